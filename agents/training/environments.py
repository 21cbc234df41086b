"""The environments of a run, whatever its decoder: one or more for each workload, guarded and normalised."""

from __future__ import annotations

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
import torch
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor, VecNormalize

from specgym.decoding import Split, models_placed, place_models, prompts_limited, warn_once
from specgym.envs import (
    Outcomes,
    TraceError,
    VectorWorkloadMark,
    WorkloadMark,
    environment_id,
    find_recording,
    outcome_command,
    outcomes_name,
    record_command,
    require_tokens,
    shared_out,
    trace_name,
)

from ..experiments.tune_knobs_settings import KnobSettings
from .run_folder import quieten
from .sb3_vec_env import FiniteGuard, VectorEnvAdaptor
from .settings_io import SettingsError

PRELOADED = "SPECGYM_PRELOADED_WORKLOADS"
"""The environment variable that tells a fork server which workloads' pairs to load, a JSON list of their names."""


def make_env(
    settings: KnobSettings, place: int, profile: Path, *, held_out: bool = False, threads: int | None = None
) -> gymnasium.Env[Any, Any]:
    """The environment of one workload.

    Args:
        settings: of the run.
        place: the workload's place in `settings.workloads`.
        profile: the latency profile's file.
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
            profile=str(profile),
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

    Those that replay step together, as one vector environment. Live ones have, with `settings.subprocesses`, each its
    own process and one thread. (Timed by the clock they share this process, since neighbours would disturb it.) The
    processes are forked from one that has imported everything and loaded the models, and so share the memory of both.
    """
    if settings.replayed:
        return _wrapped(VectorEnvAdaptor(_replays(settings, profiles)), settings, training=True)
    practising = settings.practising
    apart = settings.subprocesses and settings.environment.timing == "profile" and practising > 1
    makers: list[Callable[[], gymnasium.Env[Any, Any]]] = [
        partial(make_env, settings, place, profiles[place], threads=1 if apart else None)
        for place in shared_out(practising, settings.weights or None, len(settings.workloads)).tolist()
    ]
    venv: VecEnv
    if apart:
        with _preloaded(settings.workloads), models_placed(settings.dtype, settings.device):
            venv = SubprocVecEnv(makers)
    else:
        venv = DummyVecEnv(makers)
    return _wrapped(venv, settings, training=True)


def held_out_environments(settings: KnobSettings, profiles: Sequence[Path]) -> VecNormalize:
    """Environments on held-out prompts, in this process; rewards are left as they are."""
    makers: list[Callable[[], gymnasium.Env[Any, Any]]] = [
        partial(make_env, settings, place, profile, held_out=True) for place, profile in enumerate(profiles)
    ]
    return _wrapped(DummyVecEnv(makers), settings, training=False)


def state_names(settings: KnobSettings, knobs: Sequence[str]) -> list[str]:
    """Names of an observation's entries."""
    return [*knobs, *(f"workload/{name}" for name in settings.workloads if _marked(settings))]


def _replays(settings: KnobSettings, profiles: Sequence[Path]) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
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
