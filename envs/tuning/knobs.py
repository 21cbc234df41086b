"""How far and how fast an environment moves the knobs of a decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specgym.decoding import Knob, KnobError


def env_ranges(
    knobs: Sequence[Knob], given: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, tuple[float, float]]:
    """(low, high) of every knob, in the decoder's order: as given, else where a tuner looks by default.

    Raises:
        KnobError: an unknown knob, or a range that is upside down or goes beyond the decoder's.
    """
    given = given or {}
    _refuse_unknown("ranges", given, [knob.name for knob in knobs])
    ranges = {}
    for knob in knobs:
        low, high = given.get(knob.name) or knob.search or (knob.low, knob.high)
        if not knob.low <= low < high <= knob.high:
            raise KnobError(
                f"ranges: {knob.name} must go from low to high within {knob.low:g} and {knob.high:g}, got "
                f"({low:g}, {high:g})"
            )
        ranges[knob.name] = (float(low), float(high))
    return ranges


def default_scales(
    knobs: Sequence[Knob], ranges: Mapping[str, tuple[float, float]], given: Mapping[str, float] | None = None
) -> dict[str, float]:
    """How far an action of 1 moves every knob: as given, else the knob's own step, or a tenth of its range.

    In the knob's own units, of a logarithmic one in `doublings`.

    Args:
        knobs: of the decoder, in order.
        ranges: (low, high) of each by name.
        given: of some of them, by name.

    Raises:
        KnobError: an unknown knob, or a scale that is not positive and finite.
    """
    given = given or {}
    _refuse_unknown("scales", given, list(ranges))
    scales = {}
    for knob in knobs:
        low, high = ranges[knob.name]
        span = doublings(high, low) if knob.logarithmic else high - low
        scale = float(given.get(knob.name, span / 10 if knob.step is None else knob.step))
        if not (math.isfinite(scale) and scale > 0):
            raise KnobError(f"scales: {knob.name} must be positive and finite, got {scale}")
        scales[knob.name] = scale
    return scales


def doublings(value: Any, low: Any) -> Any:
    """How often 1, at the low end of a logarithmic knob's range, is doubled until it is at a value: log2(1 + distance).

    Args:
        value: at least `low`; a number or an array, like the result.
        low: the range's low end.
    """
    return np.log2(1 + value - low)


def from_doublings(count: Any, low: Any) -> Any:
    """The value that is so many `doublings` above a range's low end."""
    return low - 1 + np.exp2(count)


def checked_values(values: Mapping[str, float], ranges: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Values of some knobs as floats.

    Raises:
        KnobError: not a mapping, an unknown knob, or a value that is out of range or not finite.
    """
    if not isinstance(values, Mapping):
        raise KnobError(f"reset option knobs must map names to values, got {values!r}")
    _refuse_unknown("reset option knobs", values, list(ranges))
    for name, value in values.items():
        low, high = ranges[name]
        try:
            inside = low <= float(value) <= high  # False for NaN
        except (TypeError, ValueError):
            inside = False
        if not inside:
            raise KnobError(f"reset option knobs: {name} must be between {low:g} and {high:g}, got {value!r}")
    return {name: float(value) for name, value in values.items()}


def _refuse_unknown(where: str, given: Mapping[str, object], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise KnobError(f"{where}: there is no knob {name!r}; the decoder has: {', '.join(known)}")
