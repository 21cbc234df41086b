"""Dense grids of settings, and statistics over workloads.

Dense grids over the knobs of a decoder, and the best single setting for several workloads.

Statistics of a comparison: intervals, paired tests, and the correction for their number.

Pure functions of arrays. The resamples of a bootstrap and of a permutation test come from a fixed seed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specgym.decoding import Knob, doublings, from_doublings

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


RESAMPLES = 2000
EXACT = 12
"""Up to how many pairs a permutation test goes through all 2^n assignments of signs."""
FLIPS = 20_000
"""Assignments that it draws beyond that."""
_TOLERANCE = 1e-12  # sums of the same numbers in another order differ by rounding


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number: the chance of any false alarm is at most the level (Holm, 1979).

    Args:
        p_values: 0 to 1, in any order.

    Returns:
        In the order given, at most 1; never below the p value given.
    """
    raw = np.asarray(p_values, np.float64)
    order = np.argsort(raw, kind="stable")
    factors = len(raw) - np.arange(len(raw))
    adjusted = np.empty_like(raw)
    adjusted[order] = np.minimum(np.maximum.accumulate(raw[order] * factors), 1.0)
    return adjusted.tolist()


def sign_flip_test(differences: ArrayLike, *, draws: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p value of a mean difference: how often it is as far from 0 when every sign is drawn anew.

    Exact for up to `EXACT` differences. Otherwise signs are drawn, and the observed ones count as one of the draws, so
    that the p value is valid and never 0 (Phipson and Smyth, 2010).

    Args:
        differences: one for each independent unit, shape (units,).
        draws: of signs, where there are too many for all.
        seed: fixes them.

    Raises:
        ValueError: there is no difference.
    """
    values = np.asarray(differences, np.float64)
    if not len(values):
        raise ValueError("a sign-flip test needs at least one difference")
    observed = abs(values.sum()) - _TOLERANCE
    if len(values) <= EXACT:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
        return float((np.abs(signs @ values) >= observed).mean())
    sums = _signs(draws, len(values), seed).astype(np.float64) @ values
    return float((1 + (np.abs(sums) >= observed).sum()) / (1 + draws))


@functools.lru_cache(maxsize=1)
def _signs(draws: int, count: int, seed: int) -> NDArray[np.int8]:
    """Signs drawn for so many differences, kept for the next test of as many; shape (draws, count)."""
    return np.random.default_rng(seed).choice((-1.0, 1.0), size=(draws, count)).astype(np.int8)


def resampled_means(values: ArrayLike, clusters: Sequence[str], *, draws: int = RESAMPLES, seed: int = 0) -> Floats:
    """Means of a two-stage bootstrap: clusters are drawn with replacement, then members within each.

    Values of one cluster have much in common, so that drawing them one by one would make intervals too narrow.

    Args:
        values: shape (members,).
        clusters: which cluster each belongs to.
        draws: resamples.
        seed: fixes them.

    Returns:
        Means over all members drawn, shape (draws,).

    Raises:
        ValueError: there is no value, or not one cluster for each.
    """
    members_values = np.asarray(values, np.float64)
    if not len(members_values) or len(members_values) != len(clusters):
        raise ValueError(
            f"a bootstrap needs values and a cluster for each, got {len(members_values)} and {len(clusters)}"
        )
    places, there = resampled_members(clusters, draws=draws, seed=seed)
    means: Floats = (members_values[places] * there).sum(1) / there.sum(1)
    return means


def resampled_members(
    clusters: Sequence[str], *, draws: int = RESAMPLES, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Members that a two-stage bootstrap draws: for many values of the same members, where `resampled_means` takes one.

    Args:
        clusters: which cluster each member belongs to.
        draws: resamples.
        seed: fixes them.

    Returns:
        Places of the members drawn, and which of them count, as clusters have unlike sizes; both of shape
        (draws, most).
    """
    by_cluster: dict[str, list[int]] = {}
    for place, name in enumerate(clusters):
        by_cluster.setdefault(name, []).append(place)
    groups = list(by_cluster.values())
    sizes = np.array([len(group) for group in groups])
    members = np.zeros((len(groups), sizes.max()), np.int64)
    for row, group in enumerate(groups):
        members[row, : len(group)] = group
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(groups), size=(draws, len(groups)))
    within = (rng.random((*drawn.shape, members.shape[1])) * sizes[drawn][..., None]).astype(np.int64)
    there = np.arange(members.shape[1]) < sizes[drawn][..., None]  # as many members as the cluster has
    places = np.take_along_axis(members[drawn], within, axis=2)
    return places.reshape(draws, -1), there.reshape(draws, -1)


def interval(samples: Floats) -> tuple[float, float]:
    """The middle 95 % of some resamples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation, -1 to 1; ties share their mean rank, and 0 where either never changes.

    Args:
        first: shape (observations,).
        second: the same.
    """
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (first, second)]
    centred = [values - values.mean() for values in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float(centred[0] @ centred[1]) / scale if scale > 0 else 0.0


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks
