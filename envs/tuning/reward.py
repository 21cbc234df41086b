"""Reward of a setting of the knobs: speed, acceptance, staying within a range, minus straying from the target.

Pure functions, the same for every decoder, for live and replayed decoding, and for one environment (floats) and many
(arrays, one entry an environment).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from specgym.decoding import Knob, SpecgymError, check_fields, mapping_of, number, sequence_of

from ..backends.backend import Number

TERMS = ("speed", "acceptance", "range", "divergence")
DIVERGENCE_BOUND = 0.05
"""Bound on the mean total variation from the target that is kept unless another is asked for."""
MULTIPLIER = 30.0
"""Price of a unit of divergence beyond the bound until one is learned for each workload."""


class RewardError(SpecgymError, ValueError):
    """Error of a reward setting that makes no sense; the message names it."""


@dataclass(frozen=True)
class RewardSettings:
    """Weights and ranges of the reward.

    Raises:
        RewardError: a number is not finite, a weight is negative, a range is upside down, `falloff` is not positive, or
            `max_divergence` is not between 0 and 1.
    """

    speed_weight: float = 1.0
    """Weight of the speedup over the target's own autoregressive decoding; 1 where the decoder is no faster."""
    acceptance_weight: float = 0.1
    """Weight of the draft acceptance rate, 0 to 1."""
    range_weight: float = 0.05
    """Weight of the range bonus, 0 to 1. So small that it decides only between settings that are nearly as fast
    (`python -m benchmarks.threshold_learning --weights`)."""
    divergence_weight: float = 0.0
    """Weight of the mean total variation from the target, 0 to 1, which is subtracted."""
    ranges: Mapping[str, tuple[float, float]] | None = None
    """Ranges where knobs earn the full bonus, by name, as fractions of the knob's upper end. Defaults to the knobs' own
    preferred ranges. A knob that is not named earns none, and a name that the decoder does not have is ignored."""
    falloff: float = 0.2
    """Distance from its range, as a fraction of the knob's upper end, at which a knob earns exp(-1) = 0.37 of it."""
    max_divergence: float | None = None
    """Bound that the mean total variation from the target should keep, 0 to 1; an excess costs a multiplier of it."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            if setting.name in ("ranges", "max_divergence"):
                continue
            check_fields(self, partial(_checked, at_least=0), setting.name)
        check_fields(self, partial(_checked, above=0, hint="take a small one for a sharp edge"), "falloff")
        if self.max_divergence is not None:
            bound = partial(_checked, at_least=0, at_most=1, hint="None for no bound")
            check_fields(self, bound, "max_divergence")
        if self.ranges is None:
            return
        checked = {}
        for name, ends in mapping_of("reward setting ranges", self.ranges, RewardError).items():
            end = partial(number, error=RewardError)
            pair = sequence_of(f"reward range {name!r}", ends, end, error=RewardError)
            if len(pair) != 2 or pair[0] > pair[1]:
                raise RewardError(f"reward range {name!r} must go from low to high, two numbers, got {pair}")
            checked[name] = pair
        object.__setattr__(self, "ranges", checked)  # lists, as JSON gives them, become tuples


def _checked(name: str, value: object, **limits: Any) -> float:
    return number(f"reward setting {name}", value, error=RewardError, **limits)


def closeness(value: Number, low: float, high: float, falloff: float) -> Number:
    """Return 1 inside [low, high]; outside it exp(-(distance / falloff)^2), smooth at the edge. In [0, 1]."""
    distance = (low - value) * (value < low) + (value - high) * (value > high)
    share = distance / falloff
    return _exponential(-share * share)


def preferred_ranges(settings: RewardSettings, knobs: Sequence[Knob]) -> dict[str, tuple[float, float]]:
    """Return the ranges where knobs earn the full bonus, as fractions of their upper ends; of those that have one."""
    if settings.ranges is None:
        return {knob.name: knob.preferred for knob in knobs if knob.preferred is not None}
    return {knob.name: settings.ranges[knob.name] for knob in knobs if knob.name in settings.ranges}


def range_bonus(settings: RewardSettings, knobs: Sequence[Knob], values: Mapping[str, Number]) -> Number:
    """Return the mean closeness of the knobs to their ranges, 0 to 1; 0 where no knob has one.

    Args:
        settings: the ranges and the falloff.
        knobs: the decoder's; their upper ends are the unit of the ranges.
        values: of the knobs, by name, in their own units.
    """
    bonuses = []
    for knob in knobs:
        ends = knob.preferred if settings.ranges is None else settings.ranges.get(knob.name)
        if ends is not None:
            bonuses.append(closeness(values[knob.name] / knob.high, *ends, settings.falloff))
    nothing: list[Any] = [0.0 * value for value in values.values()]  # arrays if the values are arrays
    total: Any = sum(bonuses or nothing)
    return total / max(len(bonuses), 1)


def reward_terms(
    settings: RewardSettings,
    *,
    speedup: Number,
    acceptance_rate: Number,
    divergence: Number,
    knobs: Sequence[Knob],
    values: Mapping[str, Number],
    multiplier: Number | float = MULTIPLIER,
) -> dict[str, Number]:
    """Return the weighted terms `speed`, `acceptance`, `range` and `divergence`, whose sum is the reward.

    Args:
        settings: the weights and ranges.
        speedup: autoregressive seconds per token over the decoder's, above 0.
        acceptance_rate: accepted draft tokens over drafted ones, 0 to 1.
        divergence: mean total variation from the target per token, 0 to 1; its term is at most 0.
        knobs: the decoder's.
        values: of the knobs, by name, in their own units.
        multiplier: of what the divergence is above `settings.max_divergence`, at least 0; a number, or an array with
            one for each entry of the arrays. Without a bound it does nothing.

    Returns:
        Floats for floats; arrays of their shape for arrays.
    """
    price: Any = settings.divergence_weight * divergence
    if settings.max_divergence is not None:
        # The plain Lagrangian, speed - multiplier * divergence, is linear in both. Where speed is a convex function of
        # divergence, its best settings are the two ends of the range, whatever the multiplier, and never one at the
        # bound. With this hinge the best one is at the bound, once the multiplier exceeds the slope of the speed there.
        price = price + multiplier * _above_zero(divergence - settings.max_divergence)
    return {
        "speed": settings.speed_weight * speedup,
        "acceptance": settings.acceptance_weight * acceptance_rate,
        "range": settings.range_weight * range_bonus(settings, knobs, values),
        "divergence": 0.0 - price,
    }


def checked_multiplier(workload: str, value: float) -> float:
    """Return a multiplier of `reward_terms` for a workload; raises ValueError unless it is finite and at least 0."""
    return float(number(f"the divergence multiplier of {workload}", value, at_least=0))


def _above_zero(value: Number) -> Number:
    return np.maximum(value, 0.0) if isinstance(value, np.ndarray) else max(value, 0.0)


def _exponential(value: Number) -> Number:
    # NumPy's takes as long for one number as for hundreds.
    return np.exp(value) if isinstance(value, np.ndarray) else math.exp(value)
