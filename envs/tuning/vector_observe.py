"""`ObserveContext` for many replayed environments at once."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from .observe import ContextLayout
from .vector_env import TuningVectorEnv

Array = NDArray[np.float32]
Flags = NDArray[np.bool_]


class VectorObserveContext(gymnasium.vector.VectorWrapper[Array, Array, Array, Array, NDArray[Any]]):
    """`specgym.envs.ObserveContext` for a `TuningVectorEnv`, with the same numbers.

    Args:
        env: a `TuningVectorEnv`, wrapped or not.
        history: how many settings tried in this episode are shown, at least 1.

    Attributes:
        layout: what stands where in an observation.

    Raises:
        TypeError: another environment.
        ValueError: `history` is not a whole number of at least 1.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv[Array, Array, NDArray[Any]], history: int = 4) -> None:
        super().__init__(env)
        inner = env.unwrapped
        if not isinstance(inner, TuningVectorEnv):
            raise TypeError(f"VectorObserveContext is for a TuningVectorEnv, which measures settings; {env} is none")
        self._inner = inner
        self.layout = ContextLayout(inner.ranges, history)
        self.single_observation_space = self.layout.space
        self.observation_space = batch_space(self.single_observation_space, inner.num_envs)
        self._temperature = np.array([float(each.sampling.temperature) for each in inner.workloads])
        self._cost_ratio = np.array([each.marginal_cost() for each in inner.profiles])
        self._past, self._measurements = self.layout.blank(inner.num_envs), 0
        self._belongs = inner.workload_of

    @property
    def state_names(self) -> list[str]:
        """What each entry of an observation is."""
        return list(self.layout.names)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode of every environment. Arguments and errors as for `TuningVectorEnv.reset`."""
        knobs, infos = self.env.reset(seed=seed, options=options)
        self._forget()
        return self._observations(knobs), infos

    def step(self, actions: Array) -> tuple[Array, NDArray[Any], Flags, Flags, dict[str, Any]]:
        """Try settings, and remember what they were worth. Results and errors as for `TuningVectorEnv.step`."""
        knobs, rewards, terminated, truncated, infos = self.env.step(actions)
        tried = infos.get("final_info", infos)
        self._past = self.layout.remembered(self._past, tried)
        self._measurements += 1
        if "final_obs" in infos:  # of all, since all environments end together
            last = self._observations(np.stack(infos["final_obs"]))
            final = np.empty(len(last), object)
            final[:] = list(last)
            infos["final_obs"] = final
            self._forget()
        return self._observations(knobs), rewards, terminated, truncated, infos

    def _forget(self) -> None:
        """Begin an episode, whose workloads need not be those of the last one."""
        self._past, self._measurements = self.layout.blank(self._inner.num_envs), 0
        self._belongs = self._inner.workload_of

    def _observations(self, knobs: Array) -> Array:
        return self.layout.observations(
            knobs,
            self._temperature[self._belongs],
            self._cost_ratio[self._belongs],
            self._measurements,
            self._past,
        )
