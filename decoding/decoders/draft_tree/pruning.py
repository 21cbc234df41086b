"""Which branches of a draft tree are hopeless: cut before the draft goes on from them and the target reads them.

A pruner knows of each candidate only how likely it is to be accepted, its ancestors included, by the draft's own
probability or by an `AcceptancePredictor`. What is cut depends on nothing that the target says about the tree, so that
the output stays the target's own; see `rules.Rule.random` for what may be cut where children are drawn.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

LOWEST, HIGHEST = 1e-4, 0.9
"""Between these a threshold adapts."""


class TreePruner(ABC):
    """Cuts a level of the tree at a time. One object serves one text.

    Attributes:
        name: as `DraftTreeDecoder` takes it.
    """

    name: ClassVar[str]

    @abstractmethod
    def cuts(self, scores: Sequence[float], threshold: float) -> list[bool]:
        """Which candidates of a level to cut.

        Args:
            scores: how likely each is to be accepted, its ancestors included, 0 to 1.
            threshold: the knob `min_acceptance_prob`, 0 to 1; with 0 nothing is cut.
        """

    def observe(self, drafted: int, cut: int, tokens: int, seconds: float) -> None:  # noqa: B027 (most learn nothing)
        """Hear what became of a round.

        Args:
            drafted: candidates, those that were cut included.
            cut: how many were.
            tokens: emitted.
            seconds: that the round took by the clock.
        """


class AbsolutePruner(TreePruner):
    """Cuts what is less likely than the threshold."""

    name = "absolute"

    def cuts(self, scores: Sequence[float], threshold: float) -> list[bool]:
        """Cut by an equal threshold on every level."""
        return [score < threshold for score in scores]


class LevelPruner(TreePruner):
    """Cuts what is less likely than the threshold times the best of its level, of which something always stays."""

    name = "level"

    def cuts(self, scores: Sequence[float], threshold: float) -> list[bool]:
        """A threshold for this level."""
        least = threshold * max(scores, default=0.0)
        return [score < least for score in scores]


class RatioPruner(TreePruner):
    """Adapts the threshold from round to round, until so large a share of the candidates is cut.

    Args:
        goal: share of the candidates to cut, 0 to 1.
        gain: by how much the threshold's logarithm moves when the share was off by 1.
    """

    name = "ratio"

    def __init__(self, goal: float = 0.5, gain: float = 1.0) -> None:
        if not 0 <= goal <= 1:
            raise ValueError(f"the goal is a share of the candidates, 0 to 1, got {goal}")
        self.goal, self._gain, self._shift = goal, gain, 0.0

    def cuts(self, scores: Sequence[float], threshold: float) -> list[bool]:
        """By the knob to begin with, and then as rounds have moved it."""
        if threshold <= 0:
            return [False] * len(scores)
        start = math.log(threshold)
        self._shift = min(max(self._shift, math.log(LOWEST) - start), math.log(HIGHEST) - start)
        moved = math.exp(start + self._shift)
        return [score < moved for score in scores]

    def observe(self, drafted: int, cut: int, tokens: int, seconds: float) -> None:
        """Too few were cut: a higher threshold."""
        if drafted:
            self._shift += self._gain * (self.goal - cut / drafted)


class ThroughputPruner(TreePruner):
    """Sets the threshold where one more candidate costs what it brings, by what rounds have taken so far.

    A candidate that is accepted with probability a saves a times the seconds that a token takes, and costs what the
    round grows by. The latter is the slope of a line through the recent rounds: seconds over candidates verified. Until
    it is known, and where it is not positive, the knob's threshold holds. Decoding is as exact as ever, but what is
    drafted depends on the clock, so that a seed does not give the same rounds twice.

    Args:
        memory: rounds after which a round counts half as much.
    """

    name = "throughput"
    _FEWEST = 8

    def __init__(self, memory: float = 32.0) -> None:
        self._decay = 0.5 ** (1 / memory)
        self._rounds = 0
        self._sums = np.zeros(6)  # decayed: rounds, verified, seconds, verified^2, verified * seconds, tokens

    def observe(self, drafted: int, cut: int, tokens: int, seconds: float) -> None:
        """Add a round."""
        verified = drafted - cut
        self._sums *= self._decay
        self._sums += (1, verified, seconds, verified**2, verified * seconds, tokens)
        self._rounds += 1

    def cuts(self, scores: Sequence[float], threshold: float) -> list[bool]:
        """Seconds of one more candidate over seconds of a token."""
        if threshold <= 0:
            return [False] * len(scores)
        least = self._worth() or threshold
        return [score < least for score in scores]

    def _worth(self) -> float | None:
        rounds, verified, seconds, squares, products, tokens = self._sums
        spread = rounds * squares - verified**2
        if self._rounds < self._FEWEST or spread <= 1e-9 * rounds * squares or seconds <= 0:
            return None
        slope = (rounds * products - verified * seconds) / spread
        return float(np.clip(slope * tokens / seconds, LOWEST, HIGHEST)) if slope > 0 else None


PRUNERS: dict[str, Callable[[], TreePruner]] = {
    kind.name: kind for kind in (AbsolutePruner, LevelPruner, RatioPruner, ThroughputPruner)
}
"""By name."""
