"""The environments of a run: one for each workload, side by side, guarded and normalised."""

from __future__ import annotations

import json
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
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor, VecNormalize

from ..envs.workload_shares import shared_out
from .numerics import FiniteGuard
from .settings import TrainSettings
from .telling import quieten

PRELOADED = "SPECGYM_PRELOADED_WORKLOADS"
"""The environment variable that tells a fork server which workloads' pairs to load, a JSON list of their names."""


class WorkloadMark(gymnasium.ObservationWrapper[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]):
    """Appends to the knobs which of several workloads they are tuned for: 1 for this one, 0 for the others.

    Without it the differences between workloads are noise to the agent, and it can only learn one setting for all.

    Args:
        env: an environment with a flat Box of observations.
        place: which workload this is, from 0.
        workloads: how many there are.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], place: int, workloads: int) -> None:
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, spaces.Box)
        self._mark = np.zeros(workloads, dtype=np.float32)
        self._mark[place] = 1
        self.observation_space = spaces.Box(
            np.concatenate([space.low, np.zeros(workloads, np.float32)]),
            np.concatenate([space.high, np.ones(workloads, np.float32)]),
        )

    def observation(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """The knobs in their own units, followed by the mark."""
        return np.concatenate([observation, self._mark])


def make_env(
    settings: TrainSettings, place: int, profile: Path, *, held_out: bool = False, threads: int | None = None
) -> gymnasium.Env[Any, Any]:
    """The environment of one workload.

    Args:
        settings: of the run.
        place: the workload's place in `settings.workloads`.
        profile: the latency profile's file.
        held_out: test prompts from the default thresholds in short episodes, instead of training.
        threads: torch's, for this process; unchanged if None.
    """
    if threads is not None:
        torch.set_num_threads(threads)
        quieten()
    environment = settings.environment
    env: gymnasium.Env[Any, Any] = gymnasium.make(
        "specgym:specgym/Thresholds-v0",
        workload=settings.workloads[place],
        draft_length=environment.draft_length,
        tokens_per_step=environment.tokens_per_step,
        backend=environment.backend,
        timing=environment.timing,
        reward=settings.reward,
        profile=str(profile),
        split="test" if held_out else "train",
        start="default" if held_out else "random",
        max_episode_steps=settings.evaluation.episode_steps if held_out else None,
        disable_env_checker=True,
    )
    if settings.identify_workloads and len(settings.workloads) > 1:
        env = WorkloadMark(env, place, len(settings.workloads))
    return env


def training_environments(settings: TrainSettings, profiles: Sequence[Path]) -> VecNormalize:
    """One environment a workload or more, on training prompts: guarded, monitored, rewards normalised.

    With `settings.subprocesses` each has its own process and one thread. (Timed by the clock they share this process,
    since neighbours would disturb it.) The processes are forked from one that has imported everything and loaded the
    models, and so share the memory of both.
    """
    practising = settings.environments or len(settings.workloads)
    apart = settings.subprocesses and settings.environment.timing == "profile" and practising > 1
    makers: list[Callable[[], gymnasium.Env[Any, Any]]] = [
        partial(make_env, settings, place, profiles[place], threads=1 if apart else None)
        for place in shared_out(practising, settings.weights or None, len(settings.workloads)).tolist()
    ]
    venv: VecEnv
    if apart:
        with _preloaded(settings.workloads if settings.environment.backend == "live" else ()):
            venv = SubprocVecEnv(makers)
    else:
        venv = DummyVecEnv(makers)
    return _wrapped(venv, settings, training=True)


def held_out_environments(settings: TrainSettings, profiles: Sequence[Path]) -> VecNormalize:
    """The same on held-out prompts, in this process; rewards are left as they are."""
    makers: list[Callable[[], gymnasium.Env[Any, Any]]] = [
        partial(make_env, settings, place, profile, held_out=True) for place, profile in enumerate(profiles)
    ]
    return _wrapped(DummyVecEnv(makers), settings, training=False)


def state_names(settings: TrainSettings, knobs: Sequence[str]) -> list[str]:
    """What each entry of an observation is."""
    marked = settings.identify_workloads and len(settings.workloads) > 1
    return [*knobs, *(f"workload/{name}" for name in settings.workloads if marked)]


@contextmanager
def _preloaded(workloads: Sequence[str]) -> Iterator[None]:
    """Let the fork server, if it is started inside, import everything and load the pairs of these workloads.

    One that runs already goes on with what it has loaded; its processes load other pairs on their own.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        yield
        return
    modules = ["specgym.agents.environments", "specgym.envs.tuning"]
    if workloads and not torch.cuda.is_available():  # a process that has touched CUDA cannot be forked
        modules.append("specgym.agents.preloading")
        # The server is another program, so what to load must be told in its environment.
        os.environ[PRELOADED] = json.dumps(list(workloads))
    multiprocessing.set_forkserver_preload(modules)
    try:
        yield
    finally:
        os.environ.pop(PRELOADED, None)


def _wrapped(venv: VecEnv, settings: TrainSettings, training: bool) -> VecNormalize:
    guarded = VecMonitor(FiniteGuard(venv))
    return VecNormalize(guarded, training=training, norm_obs=False, norm_reward=training, gamma=settings.learning.gamma)
