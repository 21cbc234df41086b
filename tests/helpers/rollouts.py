"""Rollouts of tuning environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

STILL = np.zeros(2, np.float32)
"""The action that moves neither threshold."""


def rollout(env: gymnasium.Env, seed: int, steps: int = 5) -> list[Any]:
    """Results of `reset` and of some steps with sampled actions, arrays as lists."""
    env.action_space.seed(seed)
    seen: list[Any] = [env.reset(seed=seed)]
    seen += [env.step(env.action_space.sample()) for _ in range(steps)]
    return [[part.tolist() if isinstance(part, np.ndarray) else part for part in result] for result in seen]
