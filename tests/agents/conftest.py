"""A stand-in for the tuning environments: their spaces and their info, and a reward that is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces


class FakeTuning(gymnasium.Env[np.ndarray, np.ndarray]):
    """Thresholds without models: the reward is highest at fallback 0.6 and rollback 8.

    Args:
        broken: what to spoil at which step (1 is the first after every reset): ``{"obs": {3}, "reward": {5}}``.
    """

    def __init__(self, broken: dict[str, set[int]] | None = None, value: float = np.nan) -> None:
        self.observation_space = spaces.Box(np.array([0.05, 1], np.float32), np.array([0.95, 16], np.float32))
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.broken = broken or {}
        self.value = value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        self.knobs = self.np_random.uniform(space.low, space.high).astype(np.float32)
        return self._observation("reset"), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert np.isfinite(action).all()
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        self.steps += 1
        self.knobs = np.clip(self.knobs + action * np.array([0.1, 1.0]), space.low, space.high).astype(np.float32)
        off = np.abs(self.knobs - [0.6, 8.0]) / [0.9, 15.0]
        reward = float(1 - off.sum())
        info: dict[str, Any] = {"workload": "fake", "speedup": 1 + reward, "ms_per_token": 2.0}
        info |= {"knobs/fallback": float(self.knobs[0]), "knobs/rollback": float(self.knobs[1])}
        info |= {"reward/speed": reward}
        if self.steps in self.broken.get("reward", ()):
            reward = self.value
        return self._observation("obs"), reward, False, self.steps == 20, info

    def _observation(self, kind: str) -> np.ndarray:
        observation = self.knobs.copy()
        if self.steps in self.broken.get(kind, ()):
            observation[0] = self.value
        return observation


@pytest.fixture
def fake_tuning() -> Callable[..., FakeTuning]:
    """`FakeTuning`."""
    return FakeTuning


@pytest.fixture(scope="session")
def small_workloads(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], make_noisy: Callable[..., Any]
) -> tuple[str, str]:
    """Names of two workloads on a random pair and a prompt file, which other processes can load too."""
    from specgym.decoding.loading import load_tokenizer, shipped_models

    folder = tmp_path_factory.mktemp("pair")
    tokenizer = load_tokenizer(shipped_models()[0])
    target = make_model("llama", vocabulary=len(tokenizer))
    for name, model in (("target", target), ("draft", make_noisy(target, 0.3))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = {"train": ["one two", "three four five"], "test": ["six", "seven eight", "nine ten"]}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    name = f"{folder / 'target'}+{folder / 'draft'}/{folder / 'prompts.json'}"
    return name, f"{name}@1.0"
