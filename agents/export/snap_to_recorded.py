"""From where a policy rests to the best recorded setting around it.

One network moves the knobs of all workloads, and rests where its moves cancel out: near a workload's best setting, and
seldom on it. The outcomes that it has learned from tell the recorded settings around that place apart, on the training
prompts and at no cost. What holds between them is a surface, and a place that was sought out on a surface is likely to
be one where that promises too much; so what is recommended is a setting that was recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from specgym.decoding import LatencyProfile
from specgym.envs import Outcomes, doublings, find_recording, reward_terms, totals, workload

from ..experiments.tune_knobs_settings import KnobSettings
from ..training.environments import recording_path
from .knob_policy import KnobRange

REACH = 3.0
"""How far around the policy's resting place is looked, in its own largest moves of every knob."""
FEWEST = 12
"""Recorded settings that are looked at, at least: the nearest ones, where fewer are within reach. The more knobs there
are, the fewer are."""


def best_nearby(
    settings: KnobSettings,
    name: str,
    rest: Mapping[str, float],
    knobs: Sequence[KnobRange],
    profile: LatencyProfile,
) -> dict[str, float]:
    """The best of the recorded settings around a place, by the reward of the training prompts.

    Args:
        settings: of the run.
        name: of the workload.
        rest: where the policy rests.
        knobs: that it moves.
        profile: what the workload's time is charged by.

    Returns:
        Knobs, in their own units; those of `rest` where the run was not replayed by outcomes, or where its bound on the
        divergence is kept by none.
    """
    own = dict(rest)
    if not settings.replayed:
        return own
    found, _ = find_recording(settings.decoder, recording_path(settings, name, "train"), name, "train")
    if not isinstance(found, Outcomes):
        return own
    names = [knob.name for knob in found.info.knobs]
    place = np.array([rest[knob] for knob in names], np.float64)
    away = _moves(found.settings, place, names, knobs)
    near = away <= max(REACH, np.sort(away)[:FEWEST][-1])
    tried, sums = found.settings[near], totals(found, profile, settings.environment.max_new_tokens)
    seconds, accepted, drafted, divergence = (
        sums.per_token(name)[near] for name in ("seconds", "accepted", "drafted", "total_variation")
    )
    reward = settings.reward
    terms = reward_terms(
        reward,
        speedup=profile.autoregressive_seconds / seconds,
        acceptance_rate=accepted / np.maximum(drafted, 1e-9),
        divergence=divergence,
        knobs=settings.build(workload(name).load()).knobs,
        values=dict(zip(names, tried.T, strict=True)),
    )
    earned = np.asarray(sum(terms.values()))
    if reward.max_divergence is not None:
        earned = np.where(divergence <= reward.max_divergence, earned, -np.inf)
    best = int(np.argmax(earned))
    if not np.isfinite(earned[best]):
        return own
    values = dict(zip(names, tried[best].tolist(), strict=True))
    return {knob.name: knob.mean([values[knob.name]]) for knob in knobs}


def _moves(recorded: np.ndarray, place: np.ndarray, names: Sequence[str], knobs: Sequence[KnobRange]) -> np.ndarray:
    """How many of the largest moves lead from a place to settings, shape (settings, knobs); shape (settings,)."""
    moves = np.zeros(len(recorded))
    for knob in knobs:
        column = names.index(knob.name)
        values, centre = recorded[:, column], place[column]
        if knob.logarithmic:
            values, centre = doublings(values, knob.low), doublings(centre, knob.low)
        moves = np.maximum(moves, np.abs(values - centre) / knob.step - 1e-9)
    return moves
