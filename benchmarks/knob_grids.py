"""Grids over the knobs of a decoder."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from specgym.agents import KnobRange

Setting = dict[str, float]
MOST = 250
"""Settings of a grid for which nothing is said, at most."""


def thinned(
    knobs: Sequence[KnobRange], values_of: Mapping[str, Sequence[float]], most: int = MOST
) -> dict[str, list[float]]:
    """The values to try of every knob: those given, else evenly spread over its range.

    Args:
        knobs: of the decoder.
        values_of: values of some of them, by name.
        most: settings of the whole grid, at most, as far as the values given allow.
    """
    counts = {
        knob.name: len(set(values_of[knob.name]))
        if knob.name in values_of
        else (int(knob.high - knob.low) + 1 if knob.integer else most)
        for knob in knobs
    }
    while np.prod(list(counts.values())) > most:
        largest = max((name for name in counts if name not in values_of), key=lambda name: counts[name], default=None)
        if largest is None or counts[largest] <= 2:
            break
        counts[largest] -= 1
    values = {}
    for knob in knobs:
        spread = np.linspace(knob.low, knob.high, counts[knob.name])
        even = sorted(set(np.rint(spread).tolist())) if knob.integer else spread.tolist()
        values[knob.name] = sorted({float(value) for value in values_of.get(knob.name, even)})
    return values


def settings_of(values: Mapping[str, Sequence[float]]) -> list[Setting]:
    """Every combination of the values, in order."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def best_apart(earned: Sequence[float], count: int) -> list[int]:
    """Places of the best rewards, and of equal ones the first alone: settings that do the same earn the very same.

    With one level of a draft tree, for instance, no budget beyond the children of a node changes anything, and all
    finalists would be one.
    """
    first: dict[float, int] = {}
    for place, reward in enumerate(earned):
        first.setdefault(round(reward, 9), place)
    return [first[reward] for reward in sorted(first, reverse=True)[:count]]
