"""Live decoding by several decoders in turns, and the rows of a table that come of it.

All get the same prompts and seeds, prompt by prompt in turn, so that a slow spell of the machine hits them alike. Time
is charged by a latency profile, which makes those columns repeatable to the last digit; the columns of the clock are
measured anew every time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specgym.decoding import (
    MEASURES,
    AutoregressiveDecoder,
    Decoder,
    Generation,
    Knob,
    LanguageModel,
    LatencyProfile,
    Sampling,
    Side,
    decode_in_turns,
)
from specgym.envs import RewardSettings, Workload, reward_terms, summarise

from .results import PLAIN, Column, Row, resampled, with_intervals
from .statistics import whole_units
from .text_quality import (
    QUALITY_COLUMNS,
    described,
    quality_columns,
    quality_view,
    require_text_quality,
    statistics_of,
    texts_of,
)

CHARGED = (
    "ms_per_token",
    "speedup",
    "draft_acceptance_rate",
    "mean_acceptance_length",
    "divergence",
    "target_tokens_per_token",
    "reward",
    "perplexity",
    "equal_texts",
    *QUALITY_COLUMNS,
)
"""Columns that are the same whenever the same settings are judged on the same machine. `perplexity` and `equal_texts`
are there where a text may not be the target's own, the latter only where no token is drawn; those of `text_quality`
where the prompts have references."""
CLOCK = ("wall_ms_per_token", "wall_speedup")
"""Columns that are measured anew."""
_SUMS = ("tokens", "rounds", "drafted", "accepted", "seconds", "wall_seconds")
_CHARGED_BY_PROFILE = (
    "ms/token and speedup are charged by the run's latency profiles; by the clock is the speedup that was measured in "
    "this very run. ± is half a 95 % interval over prompts."
)
_READS = " Tokens read are the target's, for every one emitted: plain decoding reads one."
_FIDELITY = (
    " Perplexity is that of the emitted text under the target; equal texts are those that are the target's own, token "
    "by token."
)
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Contender:
    """A way to decode that is compared with plain decoding.

    Attributes:
        method: `Row.method`.
        decoder: on the workload's pair; None for plain decoding, where that is what a method advises.
        knobs: settings; the decoder's defaults for those left out.
        rule: in words, shown instead of the knobs where there is one: for a decoder whose knobs are not those that are
            tuned.
    """

    method: str
    decoder: Decoder | None
    knobs: Mapping[str, float] = field(default_factory=dict)
    rule: str = ""


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
            warm_up=0 if number else max_new_tokens,
        )
        for place, turn in enumerate(turns):
            report(f"prompt {place + 1} of {len(prompts)}, pass {number + 1} of {len(seeds)}")
            for name, generation in turn.items():
                generations[name][place].append(generation)
    return generations


def clock_seconds(generations: Sequence[Sequence[Generation]]) -> float:
    """Seconds per token by the clock: the median over repeats of each prompt, then all prompts together."""
    medians = [statistics.median(text.seconds / len(text.tokens) for text in repeats) for repeats in generations]
    lengths = [statistics.mean(len(text.tokens) for text in repeats) for repeats in generations]
    return sum(median * length for median, length in zip(medians, lengths, strict=True)) / sum(lengths)


def judge_live(
    workload: Workload,
    contenders: Sequence[Contender],
    profile: LatencyProfile,
    reward: RewardSettings,
    *,
    prompts: int = 8,
    max_new_tokens: int = 64,
    seeds: Sequence[int] = (0, 1),
    score_texts: bool = True,
    report: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Measure plain decoding and its contenders on a workload's held-out prompts.

    Contenders that decode the same way, by the same decoder with the same knobs, share what was decoded. One pass is
    enough where another would only repeat it.

    Args:
        workload: whose prompts and sampling.
        contenders: on the workload's pair. Where one is lossy, texts are compared with the target's.
        profile: what time is charged by, and what decoders that mind costs are told of them.
        reward: what a setting is worth.
        prompts: how many, at most.
        max_new_tokens: after each prompt, at most.
        seeds: one pass over the prompts for each.
        score_texts: compare texts with the references of their prompts, where there are any.
        report: called with what is being done.

    Returns:
        A row for plain decoding and one for each contender, with 95 % bootstrap intervals over the prompts.

    Raises:
        TextQualityError: the prompts have references, and the library that compares texts with them is missing.
    """
    if score_texts:
        require_text_quality([workload])
    chosen, prompt_set = workload.prompt_ids("test")[:prompts], workload.prompt_set() if score_texts else None
    pair = workload.load()
    plain = AutoregressiveDecoder(pair)
    sides: dict[str, Side] = {}
    shared: list[tuple[Contender, Decoder, dict[str, float], str]] = []
    for contender in (Contender(PLAIN, None), *contenders):
        decoder = contender.decoder or plain
        decoder.charge_by(profile)
        knobs = whole_numbers(decoder.knobs, decoder.resolve_knobs(contender.knobs))
        side = f"{id(decoder)} {knobs}"
        sides.setdefault(side, Side(decoder, knobs))
        shared.append((contender, decoder, knobs, side))
    repeats = not any(_draws(decoder, knobs, workload.sampling) for _, decoder, knobs, _ in shared)
    generations = decode_repeatedly(
        sides,
        chosen,
        max_new_tokens=max_new_tokens,
        sampling=workload.sampling,
        seeds=[10_000 * seed for seed in seeds][: 1 if repeats else None],
        report=lambda message: report(f"{workload}: {message}"),
    )
    sums = {
        side: _sums(decoder, generations[side], profile) for side, decoder in {s: d for _, d, _, s in shared}.items()
    }
    if not all(decoder.lossless for _, decoder, _, _ in shared):
        report(f"{workload}: comparing texts with the target's")
        target_texts = generations[shared[0][-1]] if workload.sampling.greedy else None
        for side, of_side in _fidelity(pair.target, chosen, generations, target_texts).items():
            sums[side] |= of_side
    scored = ""
    if prompt_set is not None and prompt_set.test_references:
        references, measure = prompt_set.test_references[:prompts], prompt_set.measure
        for side, decoded in generations.items():
            sums[side][measure] = statistics_of([texts_of(same) for same in decoded], references, measure)
        scored = described(generations[shared[0][-1]], references, measure)
    ways = resampled(len(chosen))
    totals = {side: {name: column[ways].sum(1) for name, column in of.items()} for side, of in sums.items()}
    rows = []
    for contender, decoder, knobs, side in shared:
        columns = _columns(totals[side], totals[shared[0][-1]], profile, reward, decoder, knobs)
        shown = {} if contender.rule else knobs
        rows.append(
            Row(workload.name, contender.method, shown, *with_intervals(columns), contender.rule, scored=scored)
        )
    return rows


def log_likelihood(target: LanguageModel, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Log likelihood of a text under a model at temperature 1, summed over its tokens, by one pass.

    Args:
        target: the model; its cache is left alone.
        prompt: token ids before the text; of a model with an encoder those of the source.
        tokens: token ids of the text, at least one.
    """
    reader, first = target.fresh().begin(prompt)
    read = torch.tensor([*first, *tokens[:-1]], device=target.device)
    scores = reader.forward(read, last=len(tokens)).scores
    emitted = torch.tensor(tokens, device=target.device).unsqueeze(-1)
    return float(scores.log_softmax(-1).gather(-1, emitted).double().sum())


def live_columns(rows: Sequence[Row]) -> tuple[tuple[Column, ...], str]:
    """The columns that a table of `judge_live` shows, and the caption that explains them."""
    lossy = any("perplexity" in row.values for row in rows)
    quality, explanation = quality_view(rows)
    first: tuple[Column, ...] = (
        Column("ms_per_token", "ms/\ntoken"),
        Column("speedup", "speedup", interval=True),
        Column("wall_speedup", "by the\nclock"),
        Column("draft_acceptance_rate", "accept.\nrate", ".3f"),
        Column("mean_acceptance_length", "tokens\n/round"),
    )
    if not lossy:
        reads = Column("target_tokens_per_token", "tokens read\n/token")
        last = Column("reward", "reward", interval=True)
        return (*first, reads, last, *quality), _CHARGED_BY_PROFILE + _READS + explanation
    first += Column("divergence", "diver-\ngence", ".3f"), Column("reward", "reward")
    if quality:  # there is no room for all, and references say more of a text than its likelihood
        return (*first, *quality), _CHARGED_BY_PROFILE + explanation
    fidelity = Column("perplexity", "perple-\nxity"), Column("equal_texts", "equal\ntexts", ".0%")
    return (*first, *fidelity), _CHARGED_BY_PROFILE + _FIDELITY


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
    return float(_reward(reward, metrics, decoder, knobs))


def _reward(reward: RewardSettings, metrics: Mapping[str, Any], decoder: Decoder, knobs: Mapping[str, float]) -> Any:
    """The reward by metrics that are numbers, or arrays of one shape."""
    terms = reward_terms(
        reward,
        speedup=metrics["speedup"],
        acceptance_rate=metrics["draft_acceptance_rate"],
        divergence=metrics["divergence"],
        knobs=decoder.knobs,
        values=knobs,
    )
    return sum(terms.values())


def _draws(decoder: Decoder, knobs: Mapping[str, float], sampling: Sampling) -> bool:
    """True if decoding once more would not give the same rounds.

    A chain of drafted tokens is chosen greedily as the text is. A knob that counts something and stands between two
    whole numbers is rounded at random every round.
    """
    between = any(whole_units(knob, knob.low, knob.high) and knobs[knob.name] % 1 for knob in decoder.knobs)
    plain = isinstance(decoder, AutoregressiveDecoder)
    return not sampling.greedy or not (plain or decoder.drafts_chains()) or between


def _sums(decoder: Decoder, generations: Sequence[Sequence[Generation]], profile: LatencyProfile) -> dict[str, _Array]:
    """Sums over the passes, shape (prompts,), by name."""
    metrics = [summarise(decoder, texts, profile) for texts in generations]
    sums = {name: np.array([of_prompt[name] for of_prompt in metrics]) for name in _SUMS}
    reads = [sum(round_.target_tokens for text in texts for round_ in text.rounds) for texts in generations]
    return sums | {
        "divergence": np.array([of_prompt["divergence"] for of_prompt in metrics]) * sums["tokens"],
        "target_tokens": np.array(reads, np.float64),
    }


def _fidelity(
    target: LanguageModel,
    prompts: Sequence[Sequence[int]],
    generations: Mapping[str, Sequence[Sequence[Generation]]],
    target_texts: Sequence[Sequence[Generation]] | None,
) -> dict[str, dict[str, _Array]]:
    """Log likelihoods and numbers of texts that are the target's own, summed over the passes, by side and name.

    Args:
        target: the model.
        prompts: token ids.
        generations: by side, and for each prompt one a pass.
        target_texts: the target's own; None where texts are drawn, and equal ones mean nothing.
    """
    known: dict[tuple[int, tuple[int, ...]], float] = {}

    def likelihood(place: int, tokens: Sequence[int]) -> float:
        key = place, tuple(tokens)
        if key not in known:
            known[key] = log_likelihood(target, prompts[place], tokens)
        return known[key]

    fidelity: dict[str, dict[str, _Array]] = {}
    for side, of_side in generations.items():
        sums = [sum(likelihood(place, text.tokens) for text in texts) for place, texts in enumerate(of_side)]
        fidelity[side] = {"log_likelihood": np.array(sums)}
        if target_texts is not None:
            equal = [
                sum(text.tokens == best.tokens for text, best in zip(texts, best_texts, strict=True))
                for texts, best_texts in zip(of_side, target_texts, strict=True)
            ]
            fidelity[side] |= {
                "equal": np.array(equal, np.float64),
                "texts": np.array([len(texts) for texts in of_side], np.float64),
            }
    return fidelity


def _columns(
    total: Mapping[str, _Array],
    plain: Mapping[str, _Array],
    profile: LatencyProfile,
    reward: RewardSettings,
    decoder: Decoder,
    knobs: Mapping[str, float],
) -> dict[str, _Array]:
    """The table's columns from the sums over prompts of a method and of plain decoding, all of one shape."""
    tokens = total["tokens"]
    columns = {
        "ms_per_token": 1000 * total["seconds"] / tokens,
        "speedup": profile.autoregressive_seconds * tokens / total["seconds"],
        "draft_acceptance_rate": total["accepted"] / np.maximum(total["drafted"], 1),
        "mean_acceptance_length": tokens / total["rounds"],
        "divergence": total["divergence"] / tokens,
        "target_tokens_per_token": total["target_tokens"] / tokens,
        "wall_ms_per_token": 1000 * total["wall_seconds"] / tokens,
        "wall_speedup": (plain["wall_seconds"] / plain["tokens"]) / (total["wall_seconds"] / tokens),
    }
    columns["reward"] = _reward(reward, columns, decoder, knobs)
    if "log_likelihood" in total:
        columns["perplexity"] = np.exp(-total["log_likelihood"] / tokens)
    if "equal" in total:
        columns["equal_texts"] = total["equal"] / total["texts"]
    for measure in (name for name in MEASURES if name in total):
        columns |= quality_columns(total[measure], plain[measure], measure)
    return {name: columns[name] for name in (*CHARGED, *CLOCK) if name in columns}
