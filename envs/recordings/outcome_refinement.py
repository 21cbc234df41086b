"""Which settings to record next: those that would decode fastest by what was recorded so far.

A design spreads settings over all the ranges, and leaves few for the corner in which the fastest lie. There a surface
through the others may be off by more than the fastest differ from one another, so more are recorded there.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import LatencyProfile

from ..backends.outcome_replay import OutcomeReplay
from .outcome_design import design
from .outcomes import Outcomes

Floats = NDArray[np.float64]

_COMPARED = 20_000  # settings at most: all there are, or so many that are spread over the ranges


def fastest(outcomes: Outcomes, profile: LatencyProfile, count: int) -> Floats:
    """Settings that were not recorded, those first that would decode fastest.

    Args:
        outcomes: recorded so far.
        profile: what a round is charged by.
        count: how many settings, at most; fewer where all others were recorded.

    Returns:
        Shape (settings, knobs), in the knobs' own units.
    """
    knobs = outcomes.info.knobs
    number = min(_COMPARED, math.prod(knob.high - knob.low + 1 if knob.integer else math.inf for knob in knobs))
    candidates = design(knobs, int(number), [], outcomes.info.seed)
    known = set(map(tuple, outcomes.settings.tolist()))
    fresh = np.array([tuple(setting) not in known for setting in candidates.tolist()])
    candidates = candidates[fresh]
    seconds = OutcomeReplay([outcomes], [profile], outcomes.info.tokens).means(0, candidates)["seconds"]
    return candidates[np.argsort(seconds, kind="stable")[:count]]
