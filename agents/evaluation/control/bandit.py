"""A bandit that learns while many texts are decoded side by side, round by round."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import Rows


class RoundBandit:
    """A choice among numbered arms for every round of many texts.

    UCB1 (Auer, Cesa-Bianchi and Fischer, "Finite-time Analysis of the Multiarmed Bandit Problem", 2002): every round
    takes the arm whose mean reward, plus ``exploration * sqrt(2 ln(all rounds) / its rounds)``, is largest. Since the
    objective is a ratio of sums, the reward of a round is ``tokens - rate * seconds`` with the throughput of all rounds
    so far as the rate. Rounds that are still under way count as tried, so that rounds side by side differ.

    Args:
        arms: how many, at least 1.
        exploration: in tokens, above 0. UCB1's own would be the range of rewards, which is as large as the longest
            draft; it would try poor arms for longer than most texts last.

    Attributes:
        arm: of the round of every text, shape (texts,); of the last one where none is under way.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, arms: int, exploration: float) -> None:
        if arms < 1:
            raise ValueError(f"a bandit has at least 1 arm, got {arms}")
        if not (math.isfinite(exploration) and exploration > 0):
            raise ValueError(f"exploration must be finite and above 0, got {exploration}")
        self.arms, self.exploration = arms, exploration
        self.forget(1)

    def forget(self, texts: int) -> None:
        """Forget everything, and prepare for so many texts."""
        self._tokens, self._seconds = np.zeros(self.arms), np.zeros(self.arms)
        self._tried = np.zeros(self.arms, np.int64)
        self.attend(texts)

    def attend(self, texts: int) -> None:
        """Prepare for so many texts, none of which has a round under way, unless there are as many already."""
        if texts != len(getattr(self, "arm", ())):
            self.arm = np.zeros(texts, np.int64)
            self._open = np.zeros(texts, np.bool_)

    def choose(self, begins: NDArray[np.bool_]) -> None:
        """Choose an arm where a round begins that has none yet, shape (texts,)."""
        for row in np.flatnonzero(begins & ~self._open).tolist():
            arm = self._best()
            self.arm[row], self._open[row] = arm, True
            self._tried[arm] += 1

    def learn(self, rows: Rows, emitted: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        """Learn from rounds that are over; those without an arm were nobody's choice. Arguments as rules have them."""
        chosen = np.zeros(len(self.arm), np.bool_)
        chosen[slice(None) if rows is None else rows] = True
        numbers = np.flatnonzero(chosen) if rows is None or np.asarray(rows).dtype == np.bool_ else np.asarray(rows)
        counts = self._open[numbers]
        arms = self.arm[numbers[counts]]
        np.add.at(self._tokens, arms, np.asarray(emitted)[counts])
        np.add.at(self._seconds, arms, np.asarray(seconds)[counts])
        self._open[numbers] = False

    @property
    def favourite(self) -> int:
        """The arm tried most."""
        return int(self._tried.argmax())

    def _best(self) -> int:
        untried = np.flatnonzero(self._tried == 0)
        if len(untried):
            return int(untried[0])
        spent = float(self._seconds.sum())
        rate = float(self._tokens.sum()) / spent if spent > 0 else 0.0
        bonus = self.exploration * np.sqrt(2 * math.log(int(self._tried.sum())) / self._tried)
        return int(((self._tokens - rate * self._seconds) / self._tried + bonus).argmax())
