"""Texts whose draft length is controlled, one at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from specgym.decoding.decoders.stop_rules import FEATURES
from specgym.envs import TokenPrompts
from specgym.envs.control.env import DraftLengthEnv

GO, STOP = 0, 1
LONGEST, TOKENS = 5, 24
PROMPTS = TokenPrompts([[1, 2, 3], [4, 5], [6], [7, 8, 7, 8, 9, 7]], [[11, 12], [13]])
PRODUCT, PLACE = ([feature.name for feature in FEATURES].index(name) for name in ("product", "place"))
"""Places in an observation."""


def play(env: DraftLengthEnv, prompt: int, actions: np.random.Generator | int) -> list[tuple[Any, ...]]:
    """A whole text: (observation, reward, terminated, info) after `reset` and after every step."""
    observation, info = env.reset(seed=0, options={"prompt": prompt})
    seen: list[tuple[Any, ...]] = [(observation, 0.0, False, info)]
    while not seen[-1][2]:
        action = actions if isinstance(actions, int) else int(actions.random() < 0.3)
        observation, reward, terminated, truncated, info = env.step(action)
        assert not truncated
        seen.append((observation, reward, terminated, info))
    return seen
