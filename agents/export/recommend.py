"""Recommended knobs of policies that move them: follow each from the defaults until it stays.

Where policies stay is what they recommend, or a setting nearby that does better on the training prompts. The state is
the knobs and the workload alone, so no text need be decoded to follow a policy.

One network moves the knobs of all workloads, and rests where its moves cancel out: near a workload's best setting, and
seldom on it. Where whole settings were recorded, those around that place are told apart by their outcomes. What holds
between them is a surface, and a place that was sought out on a surface is likely to be one where that promises too
much; so what is recommended is a setting that was recorded. Where a bound on the divergence is to be kept, the settings
between the place and the nearest that is lossless are decoded with the training prompts, and the fastest is recommended
of those whose divergence keeps the bound with a margin. A setting that is no faster than plain decoding never is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import LatencyProfile, doublings, write_sealed
from specgym.envs import Metrics, Outcomes, find_recording, reward_terms, totals, workload

from ..experiments.tune_knobs_settings import KnobSettings
from ..training.environments import recording_path
from ..training.run_folder import RunFileError, read_json
from ..training.settings_io import Number, SettingsError, decoded
from .knob_policy import ExportedPolicy, KnobRange

FORMAT = "specgym-knobs-2"
_UNSEALED = "specgym-knobs-1"  # has no checksum
SHARES = np.linspace(0, 1.25, 26)
"""Places between a lossless setting (0) and where a policy stays (1) that are compared, and a little beyond."""
LIVE_SHARES = np.array([0, 0.25, 0.5, 0.75, 1])
"""Fewer such places, where every one has to be decoded by the models."""
CONFIDENCE = 0.99
"""Probability with which the divergence of other prompts should keep the bound."""
STEPS = 200
"""Steps of the deterministic policy, far more than crossing a knob's whole range takes."""
LAST = 40
"""The recommendation is the mean over the last of them, since a policy may settle into a small swing."""
REACH = 3.0
"""Distance around the policy's resting place that is searched, in its largest moves of every knob."""
FEWEST = 12
"""Recorded settings that are compared, at least: the nearest ones, where fewer are within reach. The more knobs there
are, the fewer are."""


_KINDS: Mapping[str, Any] = {
    "pairs": Mapping[str, Mapping[str, Number]],
    "workloads": Mapping[str, Mapping[str, Number] | None],
    "reasons": Mapping[str, str],
    "rests": Mapping[str, tuple[Mapping[str, Number], ...]],
    "by_seed": Mapping[str, tuple[Mapping[str, Number] | None, ...]],
    "universal": Mapping[str, Number],
    "loss": Mapping[str, Number],
    "by_pair": Mapping[str, Mapping[str, Number]],
}
"""Types of the parts of ``knobs.json``."""


class Recommendation(NamedTuple):
    """Knobs for a workload, or None for plain decoding, and why."""

    knobs: dict[str, float] | None
    reason: str = ""


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
    policies: Sequence[ExportedPolicy],
    workloads: Sequence[str],
    improve: Callable[[str, Sequence[Mapping[str, float]]], Recommendation],
) -> dict[str, Any]:
    """Recommended knobs.

    Args:
        policies: that have learned them, one a seed.
        workloads: names.
        improve: makes the recommendation for a workload from the knobs where the policies stay.

    Returns:
        `workloads`, knobs by workload, None where plain decoding is to be preferred; `pairs`, by pair, the mean over
        the pair's workloads that have some; `reasons` for them, by workload; `rests`, where each policy stays; and
        `by_seed`, the knobs that each policy alone would have led to, by workload.
    """
    rests = {name: [settle(policy, name) for policy in policies] for name in workloads}
    improved = {name: improve(name, places) for name, places in rests.items()}
    by_workload = {name: better.knobs for name, better in improved.items()}
    return {
        "pairs": by_pair({name: knobs for name, knobs in by_workload.items() if knobs}, policies[0].knobs),
        "workloads": by_workload,
        "reasons": {name: better.reason for name, better in improved.items()},
        "rests": rests,
        "by_seed": {
            name: [improve(name, [rest]).knobs for rest in places] if len(places) > 1 else [by_workload[name]]
            for name, places in rests.items()
        },
    }


def spread_over_seeds(recommended: Mapping[str, Any]) -> str:
    """A sentence on how far apart the knobs lie that each of several policies alone would have led to; else empty."""
    by_seed = list(recommended.get("by_seed", {}).values())
    if not by_seed or len(by_seed[0]) < 2:
        return ""
    mixed = sum(None in settings and any(settings) for settings in by_seed)
    known = [settings for settings in by_seed if None not in settings]
    if not known:
        return ""
    apart = {
        knob: [max(values) - min(values) for values in ([setting[knob] for setting in settings] for settings in known)]
        for knob in known[0][0]
    }
    words = ", ".join(
        f"{knob} {np.mean(values):.2f} on average and {max(values):.2f} at most" for knob, values in apart.items()
    )
    disagree = f" On {mixed} workloads they disagree whether to speculate." if mixed else ""
    return f"The settings that each of {len(known[0])} seeds alone leads to lie apart by so much: {words}.{disagree}"


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
        "Knobs in their own units; null where plain decoding is to be preferred. `rests` has the place where each "
        "deterministic policy stays, followed from the decoder's defaults; what is recommended for a workload is such "
        "a place or a better one nearby, by the training prompts, for the reason given, and `by_seed` what each policy "
        "alone would have led to. Each pair's knobs are the mean over its workloads."
    )
    write_sealed(path, {"format": FORMAT, "about": about, **recommended})


def load_knobs(path: Path, workloads: Sequence[str] = ()) -> dict[str, Any]:
    """Read what `save_knobs` wrote.

    Args:
        path: the file.
        workloads: names of workloads that must be among its own.

    Raises:
        RunFileError: the file is missing, damaged, or of another kind.
    """
    way_out = "remove it, and write it again with: python train.py --resume <run>"
    content = read_json(path, way_out, FORMAT)
    if content.get("format") not in (FORMAT, _UNSEALED) or not {"pairs", "workloads"} <= set(content):
        raise RunFileError(f"{path} does not hold knobs ({FORMAT}); {way_out}")
    try:
        read = {name: decoded(kind, content[name], name) for name, kind in _KINDS.items() if name in content}
    except SettingsError as error:
        raise RunFileError(f"{path} is damaged ({error}); {way_out}") from error
    if lacking := [name for name in workloads if name not in read["workloads"]]:
        raise RunFileError(f"{path} has no entry for the workload {lacking[0]}; {way_out}")
    return {**content, **read}


def mean_rest(rests: Sequence[Mapping[str, float]], knobs: Sequence[KnobRange]) -> dict[str, float]:
    """The mean of the places where several policies stay; whole where it must be."""
    return {knob.name: knob.mean([rest[knob.name] for rest in rests]) for knob in knobs}


def paying(
    knobs: dict[str, float], decode: Callable[[Sequence[Mapping[str, float]]], Metrics[NDArray[np.float64]]]
) -> Recommendation:
    """Recommend knobs, unless they decode the training prompts no faster than plain decoding.

    Args:
        knobs: in their own units.
        decode: as for `fastest_within`.
    """
    sums = decode([knobs])
    speedup = float(sums.plain_seconds.sum() / sums.seconds.sum())
    reason = f"{speedup:.2f} times plain speed on the training prompts"
    return Recommendation(knobs if speedup > 1 else None, reason)


def fastest_within(
    bound: float,
    lossless_at: Mapping[str, float],
    rests: Sequence[Mapping[str, float]],
    knobs: Sequence[KnobRange],
    decode: Callable[[Sequence[Mapping[str, float]]], Metrics[NDArray[np.float64]]],
    prompts: int,
    shares: NDArray[np.float64] = SHARES,
) -> Recommendation:
    """Find the fastest setting that keeps a bound on the divergence, around the places where policies stay.

    Compared are settings on the way from the lossless one to each place, with all knobs or with all but one of them,
    and to the decoder's defaults, from which policies were followed.

    Args:
        bound: on the mean divergence.
        lossless_at: knobs at which nothing diverges; it is among the settings, so that one always keeps the bound.
        rests: knobs where each policy stays.
        knobs: that differ from the lossless ones; the others stay there.
        decode: decodes training prompts with some settings; sums of shape (settings, prompts).
        prompts: other prompts whose mean should keep the bound, too, with a probability of `CONFIDENCE`.
        shares: places on the way.
    """
    usual = dict(lossless_at) | {knob.name: min(max(knob.default, knob.low), knob.high) for knob in knobs}
    goals = [*rests, usual, *({**rest, knob.name: lossless_at[knob.name]} for rest in rests for knob in knobs[1:])]
    tried = [dict(lossless_at)]
    for goal in goals:
        for share in shares[shares > 0].tolist():
            setting = dict(lossless_at)
            for knob in knobs:
                value = lossless_at[knob.name] + share * (goal[knob.name] - lossless_at[knob.name])
                setting[knob.name] = knob.mean([min(max(value, knob.low), knob.high)])
            if setting not in tried:
                tried.append(setting)
    sums = decode(tried)
    speedup = sums.plain_seconds.sum(1) / sums.seconds.sum(1)
    highest = likely_divergence(sums.total_variation, sums.tokens, prompts)
    best = int(np.argmax(np.where(highest <= bound, speedup, -np.inf)))
    if speedup[best] <= 1:
        return Recommendation(
            None, f"the fastest setting within the bound decodes at {speedup[best]:.2f} times plain speed"
        )
    divergence = sums.total_variation[best].sum() / sums.tokens[best].sum()
    return Recommendation(
        tried[best],
        f"{speedup[best]:.2f} times plain speed at a divergence of {divergence:.3f} on the training prompts, which "
        f"lets at most {highest[best]:.3f} be expected of {prompts} others",
    )


def likely_divergence(
    total_variation: NDArray[np.float64], tokens: NDArray[np.float64], prompts: int
) -> NDArray[np.float64]:
    """Upper limit of the mean divergence on other prompts of the same kind, with a probability of `CONFIDENCE`.

    A normal prediction interval: prompts are few and differ, those that were decoded and those to come.

    Args:
        total_variation: summed over the tokens of each prompt, shape (settings, prompts decoded).
        tokens: of each prompt, likewise.
        prompts: to come.

    Returns:
        Shape (settings,); infinite where a single prompt was decoded and strayed.
    """
    decoded = tokens.shape[1]
    mean = total_variation.sum(1) / tokens.sum(1)
    if decoded < 2:
        return np.where(mean > 0, np.inf, 0.0)
    apart = (total_variation - mean[:, None] * tokens) / tokens.mean(1, keepdims=True)
    spread = np.sqrt((apart**2).sum(1) / (decoded - 1))
    quantile = NormalDist().inv_cdf(CONFIDENCE)
    limit: NDArray[np.float64] = mean + quantile * spread * np.sqrt(1 / decoded + 1 / prompts)
    return limit


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
