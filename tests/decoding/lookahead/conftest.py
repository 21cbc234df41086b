"""A walk through every outcome of a random procedure, with its probability."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import pytest


class Branches:
    """Walks every outcome: `choose` stands for the procedure's random choices, `throw` for its dice.

    Attributes:
        weight: probability of the present outcome, when the procedure has ended.
    """

    def __init__(self) -> None:
        self._trail: list[tuple[list[int], int]] = []  # at each choice the possible options, and which one is taken
        self._depth = 0
        self.weight = 1.0

    def choose(self, probabilities: Sequence[float]) -> int:
        """One of the options that are possible."""
        if self._depth == len(self._trail):
            self._trail.append(([option for option, p in enumerate(probabilities) if p > 1e-12], 0))
        options, taken = self._trail[self._depth]
        self._depth += 1
        self.weight *= probabilities[options[taken]]
        return options[taken]

    def throw(self) -> Throw:
        """A die, not yet cast."""
        return Throw(self)

    def __iter__(self) -> Iterator[None]:
        while True:
            self._depth, self.weight = 0, 1.0
            yield
            while self._trail and self._trail[-1][1] == len(self._trail[-1][0]) - 1:
                self._trail.pop()
            if not self._trail:
                return
            options, taken = self._trail[-1]
            self._trail[-1] = (options, taken + 1)


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
        return self.branches.throw()

    def choice(self, options: Sequence[int]) -> int:  # type: ignore[override]
        """Without a throw."""
        return options[self.getrandbits(16) % len(options)]

    def randrange(self, count: int) -> int:  # type: ignore[override]
        """Without a throw."""
        return self.getrandbits(16) % count


@pytest.fixture(scope="session")
def branches() -> Callable[[], Branches]:
    """The class `Branches` itself."""
    return Branches


@pytest.fixture(scope="session")
def dice() -> Callable[[Branches], Dice]:
    """The class `Dice` itself."""
    return Dice
