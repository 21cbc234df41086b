"""What measuring and judging settings of a workload gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Measurement:
    """What one setting did to a few training prompts.

    Attributes:
        knobs: by name, in their own units.
        values: what `envs.measuring.metrics` gives.
        reward: the objective, as `Problem.objective` has it.
    """

    knobs: dict[str, float]
    values: dict[str, float]
    reward: float


@dataclass(frozen=True)
class Worth:
    """What some settings are worth on all prompts of a split; arrays of shape (settings,).

    Attributes:
        values: what `envs.measuring.metrics` gives, as arrays by name.
        reward: the objective.
        fraction: of the best reward of the split's grid. It may be slightly above 1, as a grid has gaps; with a bound
            on the divergence it is at most 1.
        kept: whether the divergence stays within the bound; true where there is none.
    """

    values: dict[str, Floats]
    reward: Floats
    fraction: Floats
    kept: Flags


@dataclass(frozen=True)
class Grid:
    """Every setting of a dense grid on all prompts of a split.

    Attributes:
        fallback: of the rows, shape (fallbacks,).
        rollback: of the columns, in tokens, shape (rollbacks,).
        reward: the objective, shape (fallbacks, rollbacks).
        values: what `envs.measuring.metrics` gives, arrays of that shape by name.
        best: the best setting; with a bound on the divergence the fastest that keeps it, or if none does the one with
            the highest objective.
        best_reward: its reward; its speedup where no setting keeps the bound.
    """

    fallback: Floats
    rollback: Floats
    reward: Floats
    values: dict[str, Floats]
    best: dict[str, float]
    best_reward: float

    def settings(self) -> list[dict[str, float]]:
        """All settings, in the order of `reward.ravel()`."""
        return [
            {"fallback": fallback, "rollback": rollback}
            for fallback in self.fallback.tolist()
            for rollback in self.rollback.tolist()
        ]
