"""Marks that tell a policy which of several workloads it tunes.

Without them the differences between workloads are noise to the agent, and it can only learn one setting for all.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

Array = NDArray[np.float32]
Flags = NDArray[np.bool_]


class WorkloadMark(gymnasium.ObservationWrapper[Array, Array, Array]):
    """Appends to the knobs which of several workloads they are tuned for: 1 for this one, 0 for the others.

    Args:
        env: an environment with a flat Box of observations.
        place: which workload this is, from 0.
        workloads: how many there are.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], place: int, workloads: int) -> None:
        super().__init__(env)
        self._mark = np.zeros(workloads, dtype=np.float32)
        self._mark[place] = 1
        self.observation_space = _marked(env.observation_space, workloads)

    def observation(self, observation: Array) -> Array:
        """The knobs in their own units, followed by the mark."""
        return np.concatenate([observation, self._mark])


class VectorWorkloadMark(gymnasium.vector.VectorWrapper[Array, Array, Array, Array, NDArray[Any]]):
    """`WorkloadMark` for environments that step together, each with its own workload.

    Args:
        env: a `specgym.envs.tuning.vector_env.TuningVectorEnv`, or another whose attributes `workload_names` and
            `workload_of` say which workloads there are, and which of them each environment tunes in this episode.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv[Array, Array, NDArray[Any]]) -> None:
        super().__init__(env)
        inner: Any = env.unwrapped
        self._inner = inner
        self._marks = np.eye(len(self._inner.workload_names), dtype=np.float32)
        self.single_observation_space = _marked(env.single_observation_space, len(self._marks))
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self._belongs = self._inner.workload_of

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode of every environment. Arguments and errors as for the environment within."""
        observations, infos = self.env.reset(seed=seed, options=options)
        self._belongs = self._inner.workload_of
        return self._observations(observations), infos

    def step(self, actions: Array) -> tuple[Array, NDArray[Any], Flags, Flags, dict[str, Any]]:
        """Step all environments. Results and errors as for the environment within."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:  # of all, since all environments end together
            last = self._observations(np.stack(infos["final_obs"]))
            infos["final_obs"] = np.empty(len(last), object)
            infos["final_obs"][:] = list(last)
            self._belongs = self._inner.workload_of  # a new episode may be of another workload
        return self._observations(observations), rewards, terminated, truncated, infos

    def _observations(self, observations: Array) -> Array:
        return np.concatenate([observations, self._marks[self._belongs]], axis=1)


def _marked(space: spaces.Space[Any], workloads: int) -> spaces.Space[Array]:
    assert isinstance(space, spaces.Box)
    return spaces.Box(
        np.concatenate([space.low, np.zeros(workloads, np.float32)]),
        np.concatenate([space.high, np.ones(workloads, np.float32)]),
    )
