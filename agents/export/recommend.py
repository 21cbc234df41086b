"""Recommended knobs of a policy that moves them: follow it from the defaults until it stays.

Where it stays is what it recommends, or the best recorded setting nearby. The state is the knobs and the workload
alone, so no text need be decoded for it.

One network moves the knobs of all workloads, and rests where its moves cancel out: near a workload's best setting, and
seldom on it. The outcomes that it has learned from tell the recorded settings around that place apart, on the training
prompts and at no cost. What holds between them is a surface, and a place that was sought out on a surface is likely to
be one where that promises too much; so what is recommended is a setting that was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specgym.decoding import LatencyProfile, write_json
from specgym.envs import Outcomes, doublings, find_recording, reward_terms, totals, workload

from ..experiments.tune_knobs_settings import KnobSettings
from ..training.environments import recording_path
from ..training.run_folder import RunFileError, read_json
from .knob_policy import ExportedPolicy, KnobRange

FORMAT = "specgym-knobs-1"
STEPS = 200
"""Steps of the deterministic policy, far more than crossing a knob's whole range takes."""
LAST = 40
"""The recommendation is the mean over the last of them, since a policy may settle into a small swing."""
REACH = 3.0
"""Distance around the policy's resting place that is searched, in its largest moves of every knob."""
FEWEST = 12
"""Recorded settings that are compared, at least: the nearest ones, where fewer are within reach. The more knobs there
are, the fewer are."""


def followed(policy: ExportedPolicy, name: str | None = None) -> list[dict[str, float]]:
    """Path of the deterministic policy over the knobs for a workload, from their defaults, in their own units."""
    values = {knob.name: min(max(knob.default, knob.low), knob.high) for knob in policy.knobs}
    path = []
    for _ in range(STEPS):
        values = policy.step(values, name)
        path.append(values)
    return path


def settle(policy: ExportedPolicy, name: str | None = None) -> dict[str, float]:
    """The knobs where the deterministic policy stays for a workload, in their own units; whole where they must be."""
    path = followed(policy, name)
    return {knob.name: knob.mean([point[knob.name] for point in path[-LAST:]]) for knob in policy.knobs}


def recommend(
    policy: ExportedPolicy,
    workloads: Sequence[str],
    improve: Callable[[str, Mapping[str, float]], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Recommended knobs.

    Args:
        policy: that has learned them.
        workloads: names.
        improve: makes better knobs of a workload from those where the policy stays.

    Returns:
        `workloads`, knobs by workload, and `pairs`, by pair, the mean over the pair's workloads.
    """
    by_workload = {name: settle(policy, name) for name in workloads}
    if improve is not None:
        by_workload = {name: improve(name, values) for name, values in by_workload.items()}
    return {"pairs": by_pair(by_workload, policy.knobs), "workloads": by_workload}


def by_pair(by_workload: Mapping[str, Mapping[str, float]], knobs: Sequence[KnobRange]) -> dict[str, dict[str, float]]:
    """The mean knobs over the workloads of each pair, from those by workload."""
    members: dict[str, list[Mapping[str, float]]] = {}
    for name, values in by_workload.items():
        members.setdefault(str(workload(name).pair), []).append(values)
    return {
        pair: {knob.name: knob.mean([values[knob.name] for values in group]) for knob in knobs}
        for pair, group in members.items()
    }


def save_knobs(path: Path, recommended: Mapping[str, Any]) -> None:
    """Write the result of `recommend` as JSON, atomically."""
    about = (
        "Knobs in their own units. Each workload's are where the deterministic policy stays, followed from the "
        "decoder's defaults, or, where outcomes were replayed, the best recorded setting around that place by the "
        "training prompts; each pair's are the mean over its workloads."
    )
    write_json(path, {"format": FORMAT, "about": about, **recommended})


def load_knobs(path: Path) -> dict[str, Any]:
    """Read what `save_knobs` wrote.

    Raises:
        RunFileError: the file is missing, damaged, or of another kind.
    """
    way_out = "write it again with: python train.py --resume <run>"
    content = read_json(path, way_out)
    if content.get("format") != FORMAT or not all(isinstance(content.get(key), dict) for key in ("pairs", "workloads")):
        raise RunFileError(f"{path} does not hold knobs ({FORMAT}); {way_out}")
    return content


def best_nearby(
    settings: KnobSettings,
    name: str,
    rest: Mapping[str, float],
    knobs: Sequence[KnobRange],
    profile: LatencyProfile,
) -> dict[str, float]:
    """Find the best of the recorded settings around a place, by the reward of the training prompts.

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
    resting = dict(rest)
    if not settings.replayed:
        return resting
    outcomes, _ = find_recording(settings.decoder, recording_path(settings, name, "train"), name, "train")
    if not isinstance(outcomes, Outcomes):
        return resting
    names = [knob.name for knob in outcomes.info.knobs]
    place = np.array([rest[knob] for knob in names], np.float64)
    away = _moves(outcomes.settings, place, names, knobs)
    near = away <= max(REACH, np.sort(away)[:FEWEST][-1])
    tried, sums = outcomes.settings[near], totals(outcomes, profile, settings.environment.max_new_tokens)
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
        return resting
    values = dict(zip(names, tried[best].tolist(), strict=True))
    return {knob.name: knob.mean([values[knob.name]]) for knob in knobs}


def _moves(recorded: np.ndarray, place: np.ndarray, names: Sequence[str], knobs: Sequence[KnobRange]) -> np.ndarray:
    """Number of largest moves that lead from a place to settings, shape (settings, knobs); shape (settings,)."""
    moves = np.zeros(len(recorded))
    for knob in knobs:
        column = names.index(knob.name)
        values, centre = recorded[:, column], place[column]
        if knob.logarithmic:
            values, centre = doublings(values, knob.low), doublings(centre, knob.low)
        moves = np.maximum(moves, np.abs(values - centre) / knob.step - 1e-9)
    return moves
