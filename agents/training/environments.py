"""The environments of a run, whatever its decoder: one or more for each workload, guarded and normalised."""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from specgym.decoding import LatencyProfile, Split, models_placed, place_models, prompts_limited, warn_once
from specgym.envs import (
    MOST_LOST,
    Outcomes,
    TraceError,
    VectorWorkloadMark,
    WorkloadMark,
    cluster,
    environment_id,
    find_recording,
    named_node,
    outcome_command,
    outcomes_name,
    ray_errors,
    record_command,
    require_tokens,
    share_of,
    shared_out,
    trace_name,
)

from ..experiments.experiment import RunSettings
from ..experiments.tune_knobs_settings import KnobSettings
from .run_folder import quieten
from .sb3_vec_env import FiniteGuard, VectorEnvAdaptor
from .settings_io import SettingsError

PRELOADED = "SPECGYM_PRELOADED_WORKLOADS"
"""The environment variable that tells a fork server which workloads' pairs to load, a JSON list of their names."""


def make_env(
    settings: KnobSettings,
    place: int,
    profile: Path | LatencyProfile,
    *,
    held_out: bool = False,
    threads: int | None = None,
) -> gymnasium.Env[Any, Any]:
    """The environment of one workload.

    Args:
        settings: of the run.
        place: the workload's place in `settings.workloads`.
        profile: the latency profile, or its file.
        held_out: test prompts from the decoder's defaults in short episodes, instead of training.
        threads: torch's, for this process; unchanged if None.
    """
    if threads is not None:
        torch.set_num_threads(threads)
        place_models(settings.dtype, settings.device)
        quieten()
        logging.getLogger(warn_once.__module__).setLevel(logging.ERROR)  # the process that started this one has said it
    split: Split = "test" if held_out else "train"
    with models_placed(settings.dtype, settings.device), prompts_limited(settings.max_prompt_tokens):
        env: gymnasium.Env[Any, Any] = gymnasium.make(
            f"specgym:{environment_id(settings.decoder)}",
            workload=settings.workloads[place],
            timing=settings.environment.timing,
            profile=str(profile) if isinstance(profile, Path) else profile,
            recording=recording_path(settings, settings.workloads[place], split),
            split=split,
            start="default" if held_out else "random",
            max_episode_steps=settings.evaluation.episode_steps if held_out else None,
            disable_env_checker=True,
            **_shared_options(settings),
        )
    if _marked(settings):
        env = WorkloadMark(env, place, len(settings.workloads))
    return env


def require_recordings(settings: KnobSettings) -> None:
    """Raise SettingsError unless all that is to be replayed is there."""
    for name in settings.workloads if settings.replayed else ():
        splits: tuple[Split, ...] = ("train", "test") if settings.evaluation.during_training else ("train",)
        for split in splits:
            path = recording_path(settings, name, split)
            if path is not None and not path.is_file():
                traced = settings.traits.recorded_by == "trace"
                command = record_command(name) if traced else outcome_command(name, settings.decoder)
                raise SettingsError(
                    f"{path.parent} has no {path.name}; make it: {command}, or give another --environment.recordings"
                )
            try:
                recording, _ = find_recording(settings.decoder, path, name, split)
                if isinstance(recording, Outcomes):
                    require_tokens(recording, settings.environment.max_new_tokens)
            except TraceError as error:
                raise SettingsError(
                    f"{error}. Their folder goes to --environment.recordings; --environment.backend live needs none"
                ) from error


def training_environments(settings: KnobSettings, profiles: Sequence[Path]) -> VecNormalize:
    """One environment a workload or more, on training prompts: guarded, monitored, rewards normalised.

    They step together, as one vector environment, live ones decoding their texts in one batch. With
    `settings.subprocesses` live ones have each its own process and one thread. (Timed by the clock they share this
    process and decode one after another, since neighbours would disturb it.) The processes are forked from one that has
    imported everything and loaded the models, and so share the memory of both; within `on_ray` they are workers of the
    cluster.
    """
    apart = _apart(settings)
    if settings.replayed or (not apart and settings.environment.timing == "profile"):
        return _wrapped(VectorEnvAdaptor(_together(settings, profiles)), settings, training=True)
    places = shared_out(settings.practising, settings.weights or None, len(settings.workloads))
    makers: list[Callable[[], gymnasium.Env[Any, Any]]] = [
        partial(make_env, settings, place, profiles[place], threads=1 if apart else None) for place in places.tolist()
    ]
    venv: VecEnv
    if apart and cluster() is not None:
        loaded = [LatencyProfile.load(path) for path in profiles]  # whose files are on this machine alone
        remote = [partial(make_env, settings, place, loaded[place], threads=1) for place in places.tolist()]
        venv = RayVecEnv(remote, models=settings.device != "cpu")
    elif apart:
        with _preloaded(settings.workloads), models_placed(settings.dtype, settings.device):
            venv = SubprocVecEnv(makers)
    else:
        venv = DummyVecEnv(makers)
    return _wrapped(venv, settings, training=True)


def require_apart(settings: RunSettings) -> None:
    """Raise SettingsError unless the environments are live, and each has a process of its own, which Ray can place."""
    if not isinstance(settings, KnobSettings) or settings.replayed:
        raise SettingsError(
            "--ray is for --environment.backend live: replayed environments step together, in one process, faster than "
            "they could be sent anywhere"
        )
    if not _can_be_apart(settings):
        raise SettingsError(
            "--ray steps live environments in processes of their own: leave out --environment.timing wall, and let at "
            "least two --environments practise"
        )
    if settings.device not in (None, "cpu", "cuda"):
        raise SettingsError(f"--ray gives every environment its GPU: leave out --device {settings.device}")


def _apart(settings: KnobSettings) -> bool:
    """True if every environment has a process of its own."""
    return (settings.subprocesses or cluster() is not None) and _can_be_apart(settings)


def _can_be_apart(settings: KnobSettings) -> bool:
    return settings.environment.timing == "profile" and settings.practising > 1


def held_out_environments(settings: KnobSettings, profiles: Sequence[Path]) -> VecNormalize:
    """Environments on held-out prompts, in this process; rewards are left as they are."""
    makers: list[Callable[[], gymnasium.Env[Any, Any]]] = [
        partial(make_env, settings, place, profile, held_out=True) for place, profile in enumerate(profiles)
    ]
    return _wrapped(DummyVecEnv(makers), settings, training=False)


def state_names(settings: KnobSettings, knobs: Sequence[str]) -> list[str]:
    """Names of an observation's entries."""
    return [*knobs, *(f"workload/{name}" for name in settings.workloads if _marked(settings))]


def _together(settings: KnobSettings, profiles: Sequence[Path]) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    with models_placed(settings.dtype, settings.device), prompts_limited(settings.max_prompt_tokens):
        env = gymnasium.make_vec(
            f"specgym:{environment_id(settings.decoder)}",
            num_envs=settings.practising,
            workload=settings.workloads,
            weights=settings.weights or None,
            profile=list(profiles),
            recording=_training_recordings(settings) or None,
            split="train",
            **_shared_options(settings),
        )
    return VectorWorkloadMark(env) if _marked(settings) else env


def _training_recordings(settings: KnobSettings) -> dict[str, Path]:
    paths = ((name, recording_path(settings, name, "train")) for name in settings.workloads)
    return {name: path for name, path in paths if path is not None}


def recording_path(settings: KnobSettings, name: str, split: Split) -> Path | None:
    """The file that a workload is replayed from; None for that which ships, or where nothing is replayed."""
    folder = settings.environment.recordings
    if folder is None:
        return None
    traced = settings.traits.recorded_by == "trace"
    return folder / (trace_name(name, split) if traced else outcomes_name(name, settings.decoder, split))


def _shared_options(settings: KnobSettings) -> dict[str, Any]:
    """Arguments that single environments and those that step together have in common."""
    further = dict(settings.decoder_options)
    longest = further.pop("max_draft_length", None)  # an argument of its own, since traces depend on it
    return {
        "decoder": settings.decoder,
        "max_new_tokens": settings.environment.max_new_tokens,
        "prompts_per_step": settings.environment.prompts_per_step,
        "backend": settings.environment.backend,
        "reward": settings.reward,
        "decoder_options": further,
        **({} if longest is None else {"max_draft_length": longest}),
    }


def _marked(settings: KnobSettings) -> bool:
    """True if the policy is shown which workload it tunes."""
    return settings.identify_workloads and len(settings.workloads) > 1


@contextmanager
def _preloaded(workloads: Sequence[str]) -> Iterator[None]:
    """Let the fork server, if it is started inside, import everything and load the pairs of these workloads.

    One that runs already goes on with what it has loaded; its processes load other pairs on their own.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        yield
        return
    modules = ["specgym.agents.training.environments", "specgym.envs.tuning.env"]
    if workloads and not torch.cuda.is_available():  # a process that has touched CUDA cannot be forked
        modules.append("specgym.agents.training.preloading")
        # The server is another program, so what to load must be told in its environment.
        os.environ[PRELOADED] = json.dumps(list(workloads))
    multiprocessing.set_forkserver_preload(modules)
    try:
        yield
    finally:
        os.environ.pop(PRELOADED, None)


def _wrapped(venv: VecEnv, settings: KnobSettings, training: bool) -> VecNormalize:
    guarded = VecMonitor(FiniteGuard(venv))
    return VecNormalize(guarded, training=training, norm_obs=False, norm_reward=training, gamma=settings.learning.gamma)


class RayVecEnv(VecEnv):
    """Environments on the nodes of a Ray cluster, each in a process of its own.

    One whose process ends is started again, up to three times, and brought to where it was: it repeats all calls
    without decoding (`TuningEnv.rehearsing`), so that what is learned is what would have been.

    Args:
        makers: make an environment each, there.
        models: whether they run models, and so share the GPUs of the cluster evenly, if it has any.
    """

    def __init__(self, makers: Sequence[Callable[[], gymnasium.Env[Any, Any]]], models: bool) -> None:
        self._ray: Any = cluster()
        kind: Any = self._ray.remote(
            num_cpus=share_of("CPU", len(makers)),
            num_gpus=share_of("GPU", len(makers)) if models else 0,
            max_restarts=MOST_LOST,
            max_task_retries=-1,
            scheduling_strategy="SPREAD",
        )(_RemoteEnv)
        self._makers = makers
        self._actors = [kind.remote() for _ in makers]
        self._calls: list[list[tuple[str, tuple[Any, ...], dict[str, Any]]]] = [[] for _ in makers]
        self._asked: list[Any] = []
        begun = [actor.begin.remote(make, []) for actor, make in zip(self._actors, makers, strict=True)]
        spaces = [self._get(reference, place) for place, reference in enumerate(begun)]
        super().__init__(len(makers), *copy.deepcopy(spaces[0]))  # Ray's arrays cannot be written, of which torch warns

    def step_async(self, actions: NDArray[Any]) -> None:
        """Let all environments step."""
        self._asked = [self._ask(place, "step", action[None]) for place, action in enumerate(actions)]

    def step_wait(self) -> VecEnvStepReturn:
        """Return observations, rewards, ends of episodes and infos of the step."""
        answers = [self._answer(place, reference) for place, reference in enumerate(self._asked)]
        steps, self.reset_infos = [step for step, _ in answers], [infos[0] for _, infos in answers]
        observations, rewards, dones, infos = zip(*steps, strict=True)
        return np.concatenate(observations), np.concatenate(rewards), np.concatenate(dones), [info[0] for info in infos]

    def reset(self) -> VecEnvObs:
        """Reset all environments, with the seeds and options given before; they count once."""
        asked = []
        for place, (seed, options) in enumerate(zip(self._seeds, self._options, strict=True)):
            if seed is not None:
                self._ask(place, "seed", seed)
            if options:
                self._ask(place, "set_options", options)
            asked.append(self._ask(place, "reset"))
        self._reset_seeds()
        self._reset_options()
        answers = [self._answer(place, reference) for place, reference in enumerate(asked)]
        self.reset_infos = [infos[0] for _, infos in answers]
        return np.concatenate([observation for observation, _ in answers])

    def close(self) -> None:
        """End the processes."""
        for actor in self._actors:
            self._ray.kill(actor)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of some environments."""
        return self._of_each(indices, "get_attr", attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of some environments."""
        for place in self._get_indices(indices):
            self._answer(place, self._ask(place, "set_attr", attr_name, value))

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of some environments."""
        return self._of_each(indices, "env_method", method_name, *method_args, **method_kwargs)

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Return whether some environments are in such a wrapper."""
        return self._of_each(indices, "env_is_wrapped", wrapper_class)

    def _of_each(self, indices: VecEnvIndices, name: str, *arguments: Any, **options: Any) -> list[Any]:
        asked = [(place, self._ask(place, name, *arguments, **options)) for place in self._get_indices(indices)]
        return [self._answer(place, reference)[0][0] for place, reference in asked]

    def _ask(self, place: int, name: str, *arguments: Any, **options: Any) -> Any:
        calls = self._calls[place]
        calls.append((name, arguments, options))
        return self._actors[place].call.remote(len(calls) - 1, *calls[-1])

    def _answer(self, place: int, reference: Any) -> Any:
        there, answer = self._get(reference, place)
        while not there:  # another process has taken its place
            calls, actor = self._calls[place], self._actors[place]
            self._get(actor.begin.remote(self._makers[place], calls[:-1]), place)
            there, answer = self._get(actor.call.remote(len(calls) - 1, *calls[-1]), place)
        return answer

    def _get(self, reference: Any, place: int) -> Any:
        with ray_errors(self._ray, f"environment {place}", "fewer --environments need less memory"):
            return self._ray.get(reference)


class _RemoteEnv:
    """Environment in a process of a Ray cluster, which counts its calls: one that was started again has had none."""

    def __init__(self) -> None:
        self._venv: DummyVecEnv | None = None
        self._calls = -1
        self._last: Any = None

    def begin(
        self,
        make: Callable[[], gymnasium.Env[Any, Any]],
        calls: Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]],
    ) -> tuple[Any, Any]:
        """Make the environment, and repeat the calls that it has had; returns its spaces."""
        with named_node():
            self._venv = DummyVecEnv([make])
        with self._venv.envs[0].unwrapped.rehearsing():  # type: ignore[attr-defined]
            for name, arguments, options in calls:
                getattr(self._venv, name)(*arguments, **options)
        self._calls = len(calls)
        return self._venv.observation_space, self._venv.action_space

    def call(self, earlier: int, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[bool, Any]:
        """Call a method after a number of earlier calls; False where this process has not had those."""
        if self._calls == earlier:
            result = getattr(self._venv, name)(*arguments, **options)
            assert self._venv is not None
            self._last, self._calls = (result, self._venv.reset_infos), earlier + 1
        # Ray asks again if the answer was lost on its way.
        return self._calls == earlier + 1, self._last
