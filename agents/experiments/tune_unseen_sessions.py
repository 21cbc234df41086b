"""Episodes as sessions of tuning, with rewards that count every workload alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from specgym.envs import TuningVectorEnv

Array = NDArray[np.float32]
Flags = NDArray[np.bool_]


class TuningSessions(gymnasium.vector.VectorWrapper[Array, Array, Array, Array, NDArray[Any]]):
    """Divides rewards by the best that is known of their workload, and lets episodes end by themselves.

    A session is over after so many measurements, and the observation says how many there were. Nothing comes after it
    that a value network should guess, as it would for an episode that was merely cut off.

    Args:
        env: a `TuningVectorEnv`, wrapped or not.
        best: rewards by the names of the workloads, each above 0.

    Raises:
        TypeError: another environment.
        ValueError: a workload is missing, or its best is not above 0.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv[Array, Array, NDArray[Any]], best: Mapping[str, float]) -> None:
        super().__init__(env)
        inner = env.unwrapped
        if not isinstance(inner, TuningVectorEnv):
            raise TypeError(f"TuningSessions is for a TuningVectorEnv; {env} is none")
        self._inner = inner
        for name in inner.workload_names:
            if not best.get(name, 0.0) > 0:
                raise ValueError(f"the best reward of {name} must be above 0, got {best.get(name)}")
        self._best = np.array([best[name] for name in inner.workload_names])

    def step(self, actions: Array) -> tuple[Array, NDArray[Any], Flags, Flags, dict[str, Any]]:
        """Step; rewards are shares of the best, and the end of a session is a termination."""
        best = self._best[self._inner.workload_of]  # the step may begin an episode on another workload
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        return observations, rewards / best, terminated | truncated, np.zeros_like(truncated), infos
