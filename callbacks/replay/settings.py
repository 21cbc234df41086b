"""Settings of prioritised replay. Free of torch, so that a command line can offer them at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from specgym.decoding import check_fields, number, one_of, whole_number

_MOST: Final = 2**24  # segments, which are held in memory
_MOST_UPDATES: Final = 10**5


@dataclass(frozen=True)
class ReplaySettings:
    """Settings of prioritised replay: what is kept of past rollouts, and how it is learned from.

    Raises:
        ArgumentError: a setting is out of its range; the message names it.
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
        check_fields(self, partial(whole_number, at_most=_MOST), "capacity", "segments_per_update")
        check_fields(self, whole_number, "warm_up")
        check_fields(self, partial(whole_number, at_least=0, at_most=_MOST_UPDATES), "updates")
        check_fields(self, partial(whole_number, at_least=0), "max_age")
        one_of("priority", self.priority, ("advantage", "uniform"))
        check_fields(self, partial(number, at_least=0), "alpha")
        check_fields(self, partial(number, at_least=0, at_most=1), "beta_start")
        check_fields(self, partial(number, at_least=1), "max_ratio")
