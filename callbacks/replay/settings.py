"""Settings of prioritised replay. Free of torch, so that a command line can offer them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ReplaySettings:
    """Settings of prioritised replay: what is kept of past rollouts, and how it is learned from.

    Raises:
        ValueError: a setting is out of its range; the message names it.
    """

    capacity: int = 512
    """Segments kept; a segment is the steps of an environment in a rollout."""
    segments_per_update: int = 16
    """Segments in a minibatch."""
    updates: int = 20
    """Gradient steps on replayed minibatches after every update of PPO; 0 for no replay."""
    priority: Literal["advantage", "uniform"] = "advantage"
    """Draw segments by their mean absolute advantage, or all alike."""
    alpha: float = 0.6
    """Exponent of the priorities: 0 draws all alike, 1 in proportion."""
    beta_start: float = 0.4
    """Exponent of the importance-sampling weights in the beginning; rises linearly to 1, which corrects in full."""
    max_age: int = 20
    """Segments are dropped when more rollouts than this have been stored after theirs."""
    max_ratio: float = 2.0
    """Segments are dropped when their actions have become more or less likely by this factor in the geometric mean."""
    warm_up: int = 2
    """Rollouts stored before replay begins."""

    def __post_init__(self) -> None:
        for name in ("capacity", "segments_per_update", "warm_up"):
            require_whole(name, getattr(self, name), 1)
        for name in ("updates", "max_age"):
            require_whole(name, getattr(self, name), 0)
        if self.priority not in ("advantage", "uniform"):
            raise ValueError(f"priority must be advantage or uniform, got {self.priority!r}")
        for name, low, high in (("alpha", 0, math.inf), ("beta_start", 0, 1), ("max_ratio", 1, math.inf)):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} must be a finite number between {low} and {high}, got {value}")


def require_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
