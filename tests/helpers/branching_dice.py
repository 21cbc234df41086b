"""Dice that walk every outcome of a random procedure."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.helpers.known_distributions import Branches


class Throw(float):
    """A number that is equally likely everywhere below `high`: comparing it with another casts the die."""

    def __new__(cls, branches: Branches, high: float = 1.0) -> Throw:
        """A float only for its type."""
        return super().__new__(cls, high)

    def __init__(self, branches: Branches, high: float = 1.0) -> None:
        self.branches = branches
        self.high = high

    def __mul__(self, factor: float) -> Throw:
        return Throw(self.branches, self.high * factor)

    def __lt__(self, other: float) -> bool:
        below = min(1.0, max(0.0, other / self.high)) if self.high > 0 else 0.0
        return bool(self.branches.choose([1 - below, below]))


class Dice(random.Random):
    """Dice whose throws walk the branches, and whose choices among tokens are the same in each."""

    def __init__(self, branches: Branches) -> None:
        super().__init__(0)
        self.branches = branches

    def random(self) -> float:
        """A throw."""
        return Throw(self.branches)

    def choice(self, options: Sequence[int]) -> int:  # type: ignore[override]
        """Without a throw."""
        return options[self.getrandbits(16) % len(options)]

    def randrange(self, count: int) -> int:  # type: ignore[override]
        """Without a throw."""
        return self.getrandbits(16) % count
