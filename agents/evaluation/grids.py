"""Dense grids over the knobs of a decoder, and the best single setting for several workloads."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import Knob
from specgym.envs import doublings, from_doublings

if TYPE_CHECKING:
    from .replayed import TuningTask

Floats = NDArray[np.float64]

POINTS = 19
"""Values of a knob with fractions on a grid."""
MOST = 1400
"""Settings of a grid, at most; axes with many values are thinned out until it has no more."""
SPREAD = 2.0
"""A knob whose range is wider is searched in whole units, also where it takes fractions."""


@dataclass(frozen=True)
class Grid:
    """A dense grid of settings, judged on all prompts of a split.

    Attributes:
        axes: increasing values of every knob, by name.
        reward: the objective, with an axis for each knob in their order.
        values: metrics by name, of the same shape.
        best: the best setting; with a bound on the divergence the fastest that keeps it, or if none does the one with
            the highest objective.
        best_reward: its reward; its speedup where no setting keeps the bound.
    """

    axes: dict[str, Floats]
    reward: Floats
    values: dict[str, Floats]
    best: dict[str, float]
    best_reward: float


def whole_units(knob: Knob, low: float, high: float) -> bool:
    """Return whether a search takes a knob in whole units between two values."""
    return knob.integer or high - low > SPREAD


def grid_axes(knobs: Sequence[Knob], ranges: Mapping[str, tuple[float, float]], most: int = MOST) -> dict[str, Floats]:
    """Values of every knob for a dense grid: all whole ones, or `POINTS` fractions, evenly spread over its range.

    Values of a logarithmic knob are spread evenly in doublings where there are too many of them.

    Args:
        knobs: of the decoder.
        ranges: (low, high) of every knob, by name.
        most: settings of the grid; the longest axes are thinned out until it has no more.
    """
    axes = {
        knob.name: _axis(knob, *ranges[knob.name], POINTS if not whole_units(knob, *ranges[knob.name]) else None)
        for knob in knobs
    }
    counts = {name: len(axis) for name, axis in axes.items()}
    while np.prod(list(counts.values())) > most and max(counts.values()) > 2:
        longest = max(counts, key=lambda name: counts[name])
        counts[longest] -= 1
    return {
        knob.name: axes[knob.name]
        if counts[knob.name] == len(axes[knob.name])
        else _axis(knob, *ranges[knob.name], counts[knob.name])
        for knob in knobs
    }


def settings_of(axes: Mapping[str, Sequence[float] | Floats]) -> list[dict[str, float]]:
    """Every setting of a grid, the last knob changing fastest."""
    points = itertools.product(*(np.asarray(axis).tolist() for axis in axes.values()))
    return [dict(zip(axes, point, strict=True)) for point in points]


def universal_setting(tasks: Sequence[TuningTask]) -> dict[str, float]:
    """The setting of the grid with the highest mean share of each workload's best reward, on the training prompts.

    With a bound on the divergence the steep penalty makes it the one that breaks the bounds least, and among those that
    keep all of them the fastest.

    Args:
        tasks: to learn from, all with the same grid.

    Raises:
        ValueError: there is no task, or their grids differ.
        TuningTaskError: a reward is not positive.
    """
    if not tasks:
        raise ValueError("a universal setting needs at least one task to learn from")
    grids = [task.grid("train") for task in tasks]
    if any(settings_of(grid.axes) != settings_of(grids[0].axes) for grid in grids):
        raise ValueError("a universal setting needs tasks with the same grid; give all the same knobs and ranges")
    shares = np.mean([grid.reward / grid.best_reward for grid in grids], axis=0)
    return settings_of(grids[0].axes)[int(np.argmax(shares))]


def losses(tasks: Sequence[TuningTask], knobs: Mapping[str, float]) -> dict[str, float]:
    """Loss of a setting on the held-out prompts of each workload, as a share of the best reward; by workload."""
    return {task.name: 1 - float(task.worth([knobs]).fraction[0]) for task in tasks}


def _axis(knob: Knob, low: float, high: float, count: int | None) -> Floats:
    if count is None:
        return np.arange(low, high + 1)
    if knob.logarithmic:
        values = from_doublings(np.linspace(0.0, doublings(high, low), count), low)
    else:
        values = np.linspace(low, high, count)
    axis: Floats = np.unique(np.rint(values)) if whole_units(knob, low, high) else values.round(9)
    return axis
