"""Which settings of some knobs to record: spread over their ranges, with the corners and those that people use."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .outcomes import RecordedKnob

Floats = NDArray[np.float64]
_POINTS = 64  # of the sequence, drawn at a time
_WIDE = 8  # a whole-number knob of a larger range is spread by its logarithm
_CORNERS_SHARE = 4  # corners are left out where they would be more than one in so many settings


def design(knobs: Sequence[RecordedKnob], count: int, always: Sequence[Sequence[float]], seed: int) -> Floats:
    """Settings to record: some that are given, the corners of the ranges, then a scrambled Sobol sequence over them.

    Sobol's points leave no region empty, however many are taken. Without the corners, a surface through the settings
    would have to guess there, and the best setting is often at an end. Whole-number knobs are rounded, every number
    alike; those of a wide range by their logarithm, since one column or token more matters the less the more there are.
    What occurs twice is replaced by the sequence's next points.

    Args:
        knobs: with their ranges.
        count: how many settings, at least as many as are given; all there are if those are fewer.
        always: settings that are among them, values in the order of the knobs; moved into the ranges, each taken once.
        seed: of the scrambling.

    Returns:
        Shape (settings, knobs), in the knobs' own units.
    """
    low, high = (np.array([getattr(knob, end) for knob in knobs]) for end in ("low", "high"))
    integer = np.array([knob.integer for knob in knobs])
    chosen = dict.fromkeys(tuple(np.clip(setting, low, high).tolist()) for setting in always)
    if integer.all() and count >= np.prod(high - low + 1):
        ranges = [range(int(knob.low), int(knob.high) + 1) for knob in knobs]
        chosen |= dict.fromkeys(tuple(map(float, setting)) for setting in itertools.product(*ranges))
        return np.array(list(chosen))
    if 2 ** len(knobs) * _CORNERS_SHARE <= count:
        chosen |= dict.fromkeys(itertools.product(*zip(low.tolist(), high.tolist(), strict=True)))
    wide = integer & (high - low > _WIDE)
    # The first powers of two of the sequence are the even ones, so that the given settings come on top of its start.
    sequence = torch.quasirandom.SobolEngine(len(knobs), scramble=True, seed=seed)
    while len(chosen) < count:
        points = sequence.draw(_POINTS, dtype=torch.float64).numpy()
        points = np.where(wide, ((high - low + 2) ** points - 1) / (high - low + 1), points)
        spread = np.where(integer, np.floor(low + points * (high - low + 1)), low + points * (high - low))
        for setting in np.minimum(spread, high).tolist():
            if len(chosen) < count:
                chosen.setdefault(tuple(setting))
    return np.array(list(chosen))
