"""The table: plain decoding, the decoder's defaults and the learned knobs, on prompts that training never saw.

All methods get the same prompts and seeds, prompt by prompt in turn, so that a slow spell of the machine hits them
alike. Time is charged by the latency profiles that the run has stored, which makes those columns repeatable to the last
digit; the columns of the clock are measured anew every time.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specgym.decoding import (
    AutoregressiveDecoder,
    Decoder,
    Generation,
    Knob,
    LatencyProfile,
    describe_hardware,
    write_json,
)
from specgym.envs import RewardSettings, decode_prompts, reward_terms, summarise, workload

from ..experiments.settings import TrainSettings

FORMAT = "specgym-table-1"
METHODS = ("autoregressive", "default", "learned")
CHARGED = (
    "ms_per_token",
    "speedup",
    "draft_acceptance_rate",
    "mean_acceptance_length",
    "divergence",
    "target_tokens_per_token",
    "reward",
)
"""Columns that are the same whenever the same run is evaluated on the same machine."""
CLOCK = ("wall_ms_per_token", "wall_speedup")
"""Columns that are measured anew."""
ALL = "all workloads"
_RESAMPLES = 1000


@dataclass(frozen=True)
class Row:
    """One method on one workload, or on all.

    Attributes:
        workload: its name, or `ALL` for the mean over the workloads.
        method: one of `METHODS`.
        knobs: those in use, in their own units, `int` where they are whole numbers; empty for plain decoding and for
            the means.
        values: by column: `ms_per_token` and `wall_ms_per_token` in milliseconds, `speedup` and `wall_speedup` over
            plain decoding, `draft_acceptance_rate` and `divergence` from 0 to 1, `mean_acceptance_length` in tokens
            a round, `target_tokens_per_token` in tokens that the target read for one emitted, `reward`.
        intervals: 95 % bootstrap intervals over the prompts, by column, where there are several prompts.
    """

    workload: str
    method: str
    knobs: dict[str, float]
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def evaluate(
    settings: TrainSettings,
    recommended: Mapping[str, Mapping[str, float]],
    profiles: Sequence[Path],
    tell: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Measure every method on every workload's held-out prompts.

    Args:
        settings: of the run.
        recommended: the learned knobs by workload.
        profiles: one stored latency profile a workload.
        tell: called with each workload's name before it is measured.

    Returns:
        Three rows a workload, and three with the means over the workloads where there are several.
    """
    rows: list[Row] = []
    for name, path in zip(settings.workloads, profiles, strict=True):
        tell(name)
        rows += _evaluate_workload(settings, name, recommended[name], LatencyProfile.load(path))
    if len(settings.workloads) > 1:
        for method in METHODS:
            of_method = [row for row in rows if row.method == method]
            means = {
                column: float(np.mean([row.values[column] for row in of_method])) for column in of_method[0].values
            }
            rows.append(Row(ALL, method, {}, means, {}))
    return rows


def _evaluate_workload(
    settings: TrainSettings, name: str, learned: Mapping[str, float], profile: LatencyProfile
) -> list[Row]:
    found = workload(name)
    pair = found.load()
    prompts = found.prompt_ids("test")[: settings.evaluation.prompts]
    tuned = settings.decoder(pair)
    methods: dict[str, tuple[Decoder, dict[str, float]]] = {
        "autoregressive": (AutoregressiveDecoder(pair), {}),
        "default": (tuned, whole_numbers(tuned.knobs, tuned.resolve_knobs())),
        "learned": (tuned, whole_numbers(tuned.knobs, tuned.resolve_knobs(learned))),
    }
    made: dict[str, list[list[Generation]]] = {method: [[] for _ in prompts] for method in methods}
    tokens = settings.evaluation.tokens
    for decoder, knobs in methods.values():  # the first generation pays for what is set up once
        decode_prompts(decoder, knobs, prompts[:1], min(tokens, 8), found.sampling, 0)
    for seed in settings.evaluation.seeds:
        for place, prompt in enumerate(prompts):
            for method, (decoder, knobs) in methods.items():
                made[method][place] += decode_prompts(
                    decoder, knobs, [prompt], tokens, found.sampling, seed=10_000 * seed + place
                )
    sums = {
        method: [_sums(texts, summarise(decoder, texts, profile)) for texts in made[method]]
        for method, (decoder, _) in methods.items()
    }
    draws = np.random.default_rng(0).integers(len(prompts), size=(_RESAMPLES, len(prompts)))
    every = np.arange(len(prompts))
    rows = []
    for method, (decoder, knobs) in methods.items():

        def columns(
            chosen: np.ndarray, method: str = method, decoder: Decoder = decoder, knobs: dict[str, float] = knobs
        ) -> dict[str, float]:
            total = {name: sum(sums[method][place][name] for place in chosen) for name in sums[method][0]}
            plain = {name: sum(sums["autoregressive"][place][name] for place in chosen) for name in total}
            return _columns(total, plain, profile, settings.reward, decoder, knobs)

        values = columns(every)
        intervals: dict[str, tuple[float, float]] = {}
        if len(prompts) > 1:
            resampled = [columns(drawn) for drawn in draws]
            for column in values:
                low, high = np.percentile([sample[column] for sample in resampled], [2.5, 97.5])
                intervals[column] = (float(low), float(high))
        rows.append(Row(name, method, knobs, values, intervals))
    return rows


def strays(values: Iterable[Mapping[str, float]]) -> bool:
    """Whether any text is not the target's own; then the divergence is the price of speed, and else what is read.

    Args:
        values: of the rows of a table, by column.
    """
    return any(of_row["divergence"] > 0 for of_row in values)


def whole_numbers(knobs: Sequence[Knob], values: Mapping[str, float]) -> dict[str, float]:
    """Values of some knobs, in their order, with an `int` for each that takes whole numbers."""
    return {knob.name: int(values[knob.name]) if knob.integer else values[knob.name] for knob in knobs}


def reward_of(
    reward: RewardSettings, found: Mapping[str, float], decoder: Decoder, values: Mapping[str, float]
) -> float:
    """The reward for some decoded texts.

    Args:
        reward: weights and ranges.
        found: `speedup`, `draft_acceptance_rate` and `divergence` of the texts.
        decoder: that decoded them.
        values: of its knobs.
    """
    terms = reward_terms(
        reward,
        speedup=found["speedup"],
        acceptance_rate=found["draft_acceptance_rate"],
        divergence=found["divergence"],
        knobs=decoder.knobs,
        values=values,
    )
    return float(sum(terms.values()))


def _sums(texts: Sequence[Generation], metrics: Mapping[str, float]) -> dict[str, float]:
    """What adds up over prompts."""
    names = ("tokens", "rounds", "drafted", "accepted", "seconds", "wall_seconds")
    return {name: metrics[name] for name in names} | {
        "divergence": metrics["divergence"] * metrics["tokens"],
        "target_tokens": float(sum(cycle.target_tokens for text in texts for cycle in text.rounds)),
    }


def _columns(
    total: Mapping[str, float],
    plain: Mapping[str, float],
    profile: LatencyProfile,
    reward: RewardSettings,
    decoder: Decoder,
    values: Mapping[str, float],
) -> dict[str, float]:
    """The table's columns from the sums over prompts of a method and of plain decoding."""
    tokens = total["tokens"]
    columns = {
        "ms_per_token": 1000 * total["seconds"] / tokens,
        "speedup": profile.autoregressive_seconds * tokens / total["seconds"],
        "draft_acceptance_rate": total["accepted"] / max(total["drafted"], 1),
        "mean_acceptance_length": tokens / total["rounds"],
        "divergence": total["divergence"] / tokens,
        "target_tokens_per_token": total["target_tokens"] / tokens,
        "wall_ms_per_token": 1000 * total["wall_seconds"] / tokens,
        "wall_speedup": (plain["wall_seconds"] / plain["tokens"]) / (total["wall_seconds"] / tokens),
    }
    columns["reward"] = reward_of(reward, columns, decoder, values)
    return {name: float(columns[name]) for name in (*CHARGED, *CLOCK)}


def save_rows(path: Path, rows: Sequence[Row], settings: TrainSettings, command: str) -> None:
    """Write the table as JSON, atomically, with the command and the hardware that made it."""
    first = workload(settings.workloads[0]).load()
    write_json(
        path,
        {
            "format": FORMAT,
            "command": command,
            "hardware": describe_hardware(first) | machine(),
            "protocol": {
                "prompts": settings.evaluation.prompts,
                "tokens": settings.evaluation.tokens,
                "seeds": list(settings.evaluation.seeds),
                "intervals": f"95 %, bootstrap over prompts, {_RESAMPLES} resamples",
                "charged": list(CHARGED),
                "clock": list(CLOCK),
            },
            "rows": [row_to_json(row) for row in rows],
        },
    )


def row_to_json(row: Row) -> dict[str, Any]:
    """A row as plain JSON values."""
    intervals = {name: list(ends) for name, ends in row.intervals.items()}
    return {"workload": row.workload, "method": row.method, "knobs": row.knobs, **row.values, "intervals": intervals}


def machine() -> dict[str, Any]:
    """The machine that this runs on, beside what a model says of its device."""
    return {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
