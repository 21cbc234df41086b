"""Learning curves from the TensorBoard event files of a run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from .data import Curve

LONGEST = 500
"""Points of a curve: a longer one is averaged over blocks of equal length."""
_OVERALL = re.compile(r"(reward|decoding|knobs|policy|eval|rollout|plateau|entropy|bound|train)/[^/]+")
_BY_WORKLOAD = re.compile(
    r"workload/.+/(reward/total|decoding/(speedup|divergence|draft_acceptance_rate))|bound/multiplier/.+"
)


def read_curves(folder: Path) -> dict[str, Curve]:
    """The scalars that say how learning went, by tag; none where the folder holds no event file.

    A value logged twice for a step (by a run that was resumed) counts as it was logged last.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in sorted(events.Tags()["scalars"]):
        if _OVERALL.fullmatch(tag) or _BY_WORKLOAD.fullmatch(tag):
            last = {event.step: event.value for event in events.Scalars(tag)}
            steps = np.array(sorted(last), np.float64)
            values = np.array([last[step] for step in sorted(last)], np.float64)
            finite = np.isfinite(values)
            if finite.any():
                found[tag] = shortened(steps[finite], values[finite])
    return found


def shortened(steps: np.ndarray, values: np.ndarray, longest: int = LONGEST) -> Curve:
    """A curve of at most `longest` points: means over blocks where there are more, placed at their last step."""
    if len(steps) <= longest:
        return steps, values
    starts = np.linspace(0, len(steps), longest, endpoint=False).astype(np.int64)
    ends = np.append(starts[1:], len(steps))
    return steps[ends - 1], np.add.reduceat(values, starts) / (ends - starts)
