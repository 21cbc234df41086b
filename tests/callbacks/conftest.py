"""Environments that tell of workloads and cost nothing: one at a time, and many together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

SPACE = spaces.Box(-1, 1, (2,), np.float32)
REWARDS = {"tiny/prose": 1.0, "tiny/code": 3.0}
DIVERGENCES = {"tiny/prose": 0.2, "tiny/code": 0.01}


class ToyTuning(gymnasium.Env[np.ndarray, np.ndarray]):
    """One workload; keeps the multipliers it was given."""

    observation_space = action_space = SPACE

    def __init__(self, name: str, divergences: Sequence[float] | None = None) -> None:
        self.name = name
        self.divergences = divergences or [DIVERGENCES[name]]
        self.multipliers: list[float] = []
        self.steps = 0

    def set_divergence_multiplier(self, value: float) -> None:
        self.multipliers.append(value)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {"workload": self.name}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        place = self.steps % len(self.divergences)
        self.steps += 1
        info = {"workload": self.name, "divergence": self.divergences[place], "tokens": float(10 * (1 + place))}
        return np.zeros(2, np.float32), REWARDS[self.name], False, self.steps % 4 == 0, info


class ToyVector(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Two workloads that each environment takes turns in, an episode of 3 steps each; keeps what was set on it."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    workload_names = ("tiny/prose", "tiny/code")

    def __init__(self, num_envs: int = 2) -> None:
        self.num_envs = num_envs
        self.single_observation_space = self.single_action_space = SPACE
        self.observation_space = self.action_space = batch_space(SPACE, num_envs)
        self.workload_of = np.arange(num_envs) % 2
        self.reward_of = lambda workloads: np.array([REWARDS[self.workload_names[place]] for place in workloads])
        self.weights: list[list[float]] = []
        self.multipliers: list[dict[str, float]] = []
        self.steps = 0

    def set_workload_weights(self, weights: Sequence[float]) -> None:
        self.weights.append(list(weights))

    def set_divergence_multipliers(self, multipliers: Mapping[str, float]) -> None:
        self.multipliers.append(dict(multipliers))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.steps = 0
        self.workload_of = np.arange(self.num_envs) % 2
        return self._observation(), self._named()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        rewards = self.reward_of(self.workload_of)
        every = np.ones(self.num_envs, bool)
        infos = self._named()
        divergence = np.array([DIVERGENCES[name] for name in infos["workload"]])
        infos |= {
            "divergence": divergence,
            "_divergence": every,
            "tokens": np.full(self.num_envs, 32),
            "_tokens": every,
        }
        self.steps += 1
        ended = self.steps % 3 == 0
        if ended:
            final = np.empty(self.num_envs, object)
            final[:] = list(self._observation())
            infos = {"final_obs": final, "_final_obs": every, "final_info": infos, "_final_info": every}
            self.workload_of[:] = 1 - self.workload_of  # in place: whoever keeps it without a copy is misled
            infos |= self._named()
        never = np.zeros(self.num_envs, bool)
        return self._observation(), rewards, never, np.full(self.num_envs, ended), infos

    def _observation(self) -> np.ndarray:
        marks = np.zeros((self.num_envs, 2), np.float32)
        marks[np.arange(self.num_envs), self.workload_of] = 1
        return marks

    def _named(self) -> dict[str, Any]:
        names = np.array([*self.workload_names, None], object)[self.workload_of]
        return {"workload": names, "_workload": np.ones(self.num_envs, bool)}


@pytest.fixture
def toy_tuning() -> Callable[..., ToyTuning]:
    """`ToyTuning`."""
    return ToyTuning


@pytest.fixture
def toy_vector() -> Callable[..., ToyVector]:
    """`ToyVector`."""
    return ToyVector
