"""Live decoding by several decoders in turns, and the rows of a table that come of it.

All get the same prompts and seeds, prompt by prompt in turn, so that a slow spell of the machine hits them alike. Time
is charged by a latency profile, which makes those columns repeatable to the last digit; the columns of the clock are
measured anew every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import (
    AutoregressiveDecoder,
    Decoder,
    Generation,
    Knob,
    LatencyProfile,
    Sampling,
    Side,
    decode_in_turns,
)
from specgym.envs import RewardSettings, Workload, reward_terms, summarise

from .results import LEARNED, Column, Row, bootstrap

METHODS = ("autoregressive", "default", LEARNED)
CHARGED = (
    "ms_per_token",
    "speedup",
    "draft_acceptance_rate",
    "mean_acceptance_length",
    "divergence",
    "target_tokens_per_token",
    "reward",
)
"""Columns that are the same whenever the same settings are judged on the same machine."""
CLOCK = ("wall_ms_per_token", "wall_speedup")
"""Columns that are measured anew."""
_CHARGED_BY_PROFILE = (
    "ms/token and speedup are charged by the run's latency profiles; the clock's column is measured anew every time. ± "
    "is half a 95 % interval over prompts."
)
_READS = " Tokens read are the target's, for every one emitted: plain decoding reads one."


def decode_repeatedly(
    sides: Mapping[str, Side],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int] = (0,),
    report: Callable[[str], None] = lambda message: None,
) -> dict[str, list[list[Generation]]]:
    """Decode the same prompts by several decoders in turns, once for each seed.

    Args:
        sides: decoders with their settings, by name.
        prompts: token ids, at least one sequence.
        max_new_tokens: after each prompt, at most.
        sampling: how tokens are chosen.
        seeds: one pass over the prompts for each; the prompt at place n gets ``seed + n``.
        report: called with what is being done.

    Returns:
        For each side the generations of each prompt, one a pass.
    """
    generations: dict[str, list[list[Generation]]] = {name: [[] for _ in prompts] for name in sides}
    for number, seed in enumerate(seeds):
        turns = decode_in_turns(
            sides,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=range(seed, seed + len(prompts)),
            warm_up=0 if number else 8,
        )
        for place, turn in enumerate(turns):
            report(f"prompt {place + 1} of {len(prompts)}, pass {number + 1} of {len(seeds)}")
            for name, generation in turn.items():
                generations[name][place].append(generation)
    return generations


def judge_live(
    workload: Workload,
    decoder: Decoder,
    learned: Mapping[str, float],
    profile: LatencyProfile,
    reward: RewardSettings,
    *,
    prompts: int = 8,
    max_new_tokens: int = 64,
    seeds: Sequence[int] = (0, 1),
    report: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Measure plain decoding, a decoder's defaults and learned knobs on a workload's held-out prompts.

    Args:
        workload: whose prompts and sampling.
        decoder: on the workload's pair.
        learned: the learned knobs.
        profile: what time is charged by.
        reward: what a setting is worth.
        prompts: how many, at most.
        max_new_tokens: after each prompt, at most.
        seeds: one pass over the prompts for each.
        report: called with what is being done.

    Returns:
        A row for each of `METHODS`, with 95 % bootstrap intervals over the prompts.
    """
    chosen = workload.prompt_ids("test")[:prompts]
    methods: dict[str, tuple[Decoder, Mapping[str, float]]] = {
        "autoregressive": (AutoregressiveDecoder(workload.load()), {}),
        "default": (decoder, whole_numbers(decoder.knobs, decoder.resolve_knobs())),
        LEARNED: (decoder, whole_numbers(decoder.knobs, decoder.resolve_knobs(learned))),
    }
    generations = decode_repeatedly(
        {method: Side(*side) for method, side in methods.items()},
        chosen,
        max_new_tokens=max_new_tokens,
        sampling=workload.sampling,
        seeds=[10_000 * seed for seed in seeds],
        report=lambda message: report(f"{workload}: {message}"),
    )
    sums = {
        method: [_sums(side, texts, profile) for texts in generations[method]] for method, (side, _) in methods.items()
    }
    rows = []
    for method, (side, knobs) in methods.items():

        def columns(
            places: NDArray[np.int64],
            method: str = method,
            side: Decoder = side,
            knobs: Mapping[str, float] = knobs,
        ) -> dict[str, float]:
            total = {name: sum(sums[method][place][name] for place in places) for name in sums[method][0]}
            plain = {name: sum(sums["autoregressive"][place][name] for place in places) for name in total}
            return _columns(total, plain, profile, reward, side, knobs)

        values = columns(np.arange(len(chosen)))
        rows.append(Row(workload.name, method, dict(knobs), values, bootstrap(columns, len(chosen))))
    return rows


def live_columns(rows: Sequence[Row]) -> tuple[tuple[Column, ...], str]:
    """The columns that a table of `judge_live` shows, and the caption that explains them."""
    strayed = strays(row.values for row in rows)
    price = Column("divergence", "diver-\ngence", ".3f")
    if not strayed:
        price = Column("target_tokens_per_token", "tokens read\n/token")
    columns = (
        Column("ms_per_token", "ms/\ntoken"),
        Column("speedup", "speedup", interval=True),
        Column("draft_acceptance_rate", "accept.\nrate", ".3f"),
        Column("mean_acceptance_length", "tokens\n/round"),
        price,
        Column("reward", "reward", interval=True),
        Column("wall_ms_per_token", "clock ms\n/token"),
    )
    return columns, _CHARGED_BY_PROFILE + ("" if strayed else _READS)


def strays(values: Iterable[Mapping[str, float]]) -> bool:
    """True if any text is not the target's; then the divergence is the price of speed, and else what is read.

    Args:
        values: of the rows of a table, by column.
    """
    return any(of_row["divergence"] > 0 for of_row in values)


def whole_numbers(knobs: Sequence[Knob], values: Mapping[str, float]) -> dict[str, float]:
    """Values of some knobs, in their order, with an `int` for each that takes whole numbers."""
    return {knob.name: int(values[knob.name]) if knob.integer else values[knob.name] for knob in knobs}


def reward_of(
    reward: RewardSettings, metrics: Mapping[str, float], decoder: Decoder, knobs: Mapping[str, float]
) -> float:
    """The reward for some decoded texts.

    Args:
        reward: weights and ranges.
        metrics: `speedup`, `draft_acceptance_rate` and `divergence` of the texts.
        decoder: that decoded them.
        knobs: in use, by name.
    """
    terms = reward_terms(
        reward,
        speedup=metrics["speedup"],
        acceptance_rate=metrics["draft_acceptance_rate"],
        divergence=metrics["divergence"],
        knobs=decoder.knobs,
        values=knobs,
    )
    return float(sum(terms.values()))


def _sums(decoder: Decoder, texts: Sequence[Generation], profile: LatencyProfile) -> dict[str, float]:
    """Sums over prompts."""
    metrics = summarise(decoder, texts, profile)
    names = ("tokens", "rounds", "drafted", "accepted", "seconds", "wall_seconds")
    return {name: metrics[name] for name in names} | {
        "divergence": metrics["divergence"] * metrics["tokens"],
        "target_tokens": float(sum(round_.target_tokens for text in texts for round_ in text.rounds)),
    }


def _columns(
    total: Mapping[str, float],
    plain: Mapping[str, float],
    profile: LatencyProfile,
    reward: RewardSettings,
    decoder: Decoder,
    knobs: Mapping[str, float],
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
    columns["reward"] = reward_of(reward, columns, decoder, knobs)
    return {name: float(columns[name]) for name in (*CHARGED, *CLOCK)}
