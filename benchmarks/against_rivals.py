"""Our decoding against what else decodes speculatively, on the same pairs, prompts, threads and machine, in one run.

    python -m benchmarks.against_rivals                                     # everything that ships: hours
    python -m benchmarks.against_rivals --pairs tiny --prompts 1 --tokens 48 --temperatures 0 --threads 1   # a minute
    python -m benchmarks.against_rivals --pairs smollm2-4l --rivals assisted lookup llama.cpp --llama-cpp q8_0

Rivals: plain `generate` of transformers, its assisted generation with the pair's draft and its defaults, its prompt
lookup, flashspec 0.3.1 with every strategy, and llama.cpp and OpenVINO GenAI if asked for. The last three are installed
from the package index into environments of their own, in specgym's cache, at their first use.

Ours: `plain` without a draft; with the pair's draft `exact` at its default length, `product`, which ends a draft where
the product of its confidences falls below --product, and `gain`, which ends it by the expected gain and the pair's
latency profile; `look-up` and `suffix` copy from the text; `mixed` has the pair's draft and the suffix draft, by the
product rule, and as `mixed, gain` by the expected gain of either; and every pair of --more, a pair of the same target,
by the product rule and by `gain`.

Every held-out prompt is decoded by all sides in turns before the next one. A figure is the median over prompts of the
tokens a second over those of plain `generate` on the same prompt, reading the prompt included. The last table compares
the best of ours with the best of each rival's ways, each the best by the median over all prompts. At temperatures above
0 transformers' assistant warps twice, which distorts its acceptance, not its output.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging as transformers_logging

from benchmarks.compare_decoders import encoded, table_of
from benchmarks.rivals import (
    GgufType,
    TransformersGenerate,
    flashspec_sides,
    llama_cpp_sides,
    openvino_sides,
    transformers_sides,
)
from specgym.decoding import (
    PRESETS,
    AutoregressiveDecoder,
    Generation,
    ModelNotFoundError,
    Pair,
    ProductBelow,
    Sampling,
    Side,
    SpeculativeDecoder,
    decode_in_turns,
    load_pair,
    resolve,
    write_json,
)

Rival = Literal["assisted", "lookup", "flashspec", "llama.cpp", "openvino"]
STOCK = "generate"
OURS = "ours, "
COPYING = {"look-up": "prompt-lookup", "suffix": "suffix"}
AIMS = {"assisted": 2.0, "flashspec": 1.3, "lookup": 1.3, STOCK: 2.0}
"""Speeds of ours over those of rivals that are aimed at."""


@dataclass
class Settings:
    """Compare with rivals."""

    pairs: tuple[str, ...] = tuple(preset.name for preset in PRESETS.values() if "+" not in preset.name and
                                   preset.draft_is_model)  # fmt: skip
    """Pairs for `load_pair`, each of a target and one draft."""
    more: tuple[str, ...] = ()
    """Further pairs of the same targets, such as tiny-10m-mixed: ours by the product rule and by `gain`."""
    rivals: tuple[Rival, ...] = ("assisted", "lookup", "flashspec")
    """Rivals besides plain `generate`."""
    temperatures: tuple[float, ...] = (0.0, 0.8)
    """Sampling temperatures; 0 is greedy."""
    threads: tuple[int, ...] = (1, 2)
    """Threads of all sides, one run for each number."""
    prompt_sets: tuple[str, ...] = ("prose", "code", "definitions", "chat")
    """Prompt sets for `load_prompts`, and `repetitive`."""
    prompts: int = 6
    """Test prompts of a set."""
    tokens: int = 128
    """Tokens generated for a prompt."""
    product: float = 0.3
    """Ours: product of a draft's confidences below which it ends."""
    lookup_tokens: tuple[int, ...] = (4, 10)
    """transformers: tokens of a draft by prompt lookup, a way of its own for each."""
    llama_cpp: GgufType = "q8_0"
    """Weights of llama.cpp, if it is among the rivals."""
    json: Path | None = None
    """File to write the figures to, those of every prompt among them."""


def target_of(pair: str) -> str:
    """The target of a pair by its one name: smollm2 is a name of its own in pairs, and a preset alone."""
    return resolve(resolve(pair).target).target


def check_more(settings: Settings) -> None:
    """Refuse pairs of --more that would be left out without a word."""
    targets = [target_of(pair) for pair in settings.pairs]
    for other in settings.more:
        if target_of(other) not in targets:
            raise SystemExit(f"--more {other} has target {target_of(other)}, of which --pairs has none: add one")


def our_sides(name: str, settings: Settings) -> tuple[Pair, dict[str, Side]]:
    """The pair, prepacked as `load_pair` does, and our ways to decode it."""
    pair, preset = load_pair(name), resolve(name)
    rule = ProductBelow(settings.product)
    sides = {"plain": Side(AutoregressiveDecoder(pair.without_draft()))}
    if pair.draft is not None:
        sides["exact"] = Side(SpeculativeDecoder(pair))
        sides["product"] = Side(SpeculativeDecoder(pair, stop=rule))
        sides["gain"] = Side(SpeculativeDecoder(pair, stop="expected-gain"))
    for way, draft in COPYING.items():
        sides[way] = Side(SpeculativeDecoder(load_pair(f"{preset.target}+{draft}")))
    if preset.draft is not None and preset.draft not in COPYING.values():
        mixed = load_pair(f"{preset.target}+{preset.draft},{COPYING['suffix']}")
        sides["mixed"] = Side(SpeculativeDecoder(mixed, stop=rule))
        sides["mixed, gain"] = Side(SpeculativeDecoder(mixed, stop="expected-gain"))
    for other in settings.more:
        if target_of(other) == target_of(name):
            further = load_pair(other)
            sides[other] = Side(SpeculativeDecoder(further, stop=rule))
            sides[f"{other}, gain"] = Side(SpeculativeDecoder(further, stop="expected-gain"))
    return pair, {OURS + way: side for way, side in sides.items()}


def all_sides(name: str, threads: int, settings: Settings) -> tuple[Pair, dict[str, Side]]:
    """A pair, and all sides of the comparison; theirs have the plain weights."""
    pair, ours = our_sides(name, settings)
    plain = load_pair(name, prepack=False)
    theirs = {STOCK: Side(TransformersGenerate(plain))}
    stock = transformers_sides(plain, settings.lookup_tokens)
    theirs |= {way: side for way, side in stock.items() if way.split()[0] in settings.rivals}
    if "flashspec" in settings.rivals:
        theirs |= flashspec_sides(plain)
    if "llama.cpp" in settings.rivals:
        theirs |= llama_cpp_sides(resolve(name).target, settings.llama_cpp, threads, settings.lookup_tokens[0])
    if "openvino" in settings.rivals:
        theirs |= openvino_sides(resolve(name).target, threads, settings.lookup_tokens[0])
    return pair, {**theirs, **ours}


Speeds = dict[str, dict[str, list[float]]]
"""Tokens a second of every prompt, by side and prompt set."""


def measured(
    pair: Pair, sides: Mapping[str, Side], temperature: float, settings: Settings
) -> tuple[Speeds, dict[str, float]]:
    """Decode all prompts in turns; returns speeds, and by side the share of texts that equal those of `generate`."""
    speeds: Speeds = {side: {} for side in sides}
    same = dict.fromkeys(sides, 0)
    count = 0
    for name in settings.prompt_sets:
        prompts = encoded(pair, name, settings.prompts, settings.tokens)
        turns = decode_in_turns(sides, prompts, max_new_tokens=settings.tokens, sampling=Sampling(temperature))
        for generations in track(turns, f"{pair.name}, {name}", total=len(prompts), transient=True):
            for side, generation in generations.items():
                speeds[side].setdefault(name, []).append(tokens_per_second(generation))
                same[side] += generation.tokens == generations[STOCK].tokens
            count += 1
    return speeds, {side: equal / count for side, equal in same.items()}


def tokens_per_second(generation: Generation) -> float:
    """Speed of a text, reading the prompt included."""
    return len(generation.tokens) / (generation.prefill_seconds + generation.seconds)


def over(speeds: Speeds, side: str, other: str, *sets: str) -> float:
    """Median over the prompts of some sets, by default all, of a side's speed over another's."""
    pairs = [
        (mine, theirs)
        for name in sets or speeds[side]
        for mine, theirs in zip(speeds[side][name], speeds[other][name], strict=True)
    ]
    return statistics.median(mine / theirs for mine, theirs in pairs)


def best_of(speeds: Speeds, sides: Sequence[str]) -> str | None:
    """The fastest of some sides by the median over all prompts; None of none."""
    return max(sides, key=lambda side: over(speeds, side, STOCK), default=None)


def ways(speeds: Speeds, rival: str) -> list[str]:
    """Sides of a rival."""
    return [side for side in speeds if side.split()[0] == rival]


def table(title: str, speeds: Speeds, same: Mapping[str, float], greedy: bool) -> Table:
    """A row for every side: its speed over plain `generate`, by prompt set."""
    sets = list(speeds[STOCK])
    shown = table_of("side", *sets, "all", "tokens/s", "same text", title=f"{title}: times plain `generate`")
    for side, by_set in speeds.items():
        everything = [speed for values in by_set.values() for speed in values]
        shown.add_row(
            side,
            *(f"{over(speeds, side, STOCK, name):.2f}" for name in sets),
            f"{over(speeds, side, STOCK):.2f}",
            f"{statistics.median(everything):.0f}",
            f"{same[side]:.0%}" if greedy else "-",
        )
    return shown


def summary(speeds: Speeds) -> dict[str, str | float]:
    """The best of ours over each rival's best way; `same draft` is that of ours with the pair's draft alone."""
    ours = [side for side in speeds if side.startswith(OURS)]
    best = best_of(speeds, ours)
    assert best is not None  # plain decoding at least
    drafted = best_of(speeds, [side for side in ours if side.removeprefix(OURS) in ("exact", "product", "gain")])
    figures: dict[str, str | float] = {
        "best of ours": best.removeprefix(OURS),
        STOCK: over(speeds, best, STOCK),
        "worst set": min(over(speeds, best, STOCK, name) for name in speeds[STOCK]),
    }
    for rival in ("assisted", "lookup", "flashspec", "llama.cpp", "openvino"):
        if their_best := best_of(speeds, ways(speeds, rival)):
            if rival == "assisted" and drafted is not None:
                figures["assisted, same draft"] = over(speeds, drafted, their_best)
            figures[rival] = over(speeds, best, their_best)
    return figures


def main() -> None:
    """Measure and print."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.against_rivals", description=__doc__)
    check_more(settings)
    transformers_logging.set_verbosity_error()
    console = Console(width=160)
    results: dict[str, Any] = {}
    for name in settings.pairs:
        for threads in settings.threads:
            torch.set_num_threads(threads)
            try:
                pair, sides = all_sides(name, threads, settings)
            except ModelNotFoundError as error:
                console.print(f"[yellow]{name} is left out: {error}")
                break
            for temperature in settings.temperatures:
                title = f"{name}, temperature {temperature:g}, {threads} thread{'s' * (threads > 1)}"
                speeds, same = measured(pair, sides, temperature, settings)
                console.print(table(title, speeds, same, greedy=temperature == 0))
                results[title] = {"tokens_per_second": speeds, "same_texts": same, "summary": summary(speeds)}
                if settings.json:
                    plain = {**asdict(settings), "json": None}
                    write_json(settings.json, {"settings": plain, "aims": AIMS, "results": results})
            del pair, sides
            gc.collect()
    figures = {title: result["summary"] for title, result in results.items()}
    headings = list(dict.fromkeys(heading for row in figures.values() for heading in row))
    shown = table_of("pair", *headings, title="the best of ours, over the best of each rival")
    for title, row in figures.items():
        cells = [row.get(heading, "-") for heading in headings]
        shown.add_row(title, *(f"{cell:.2f}" if isinstance(cell, float) else cell for cell in cells))
    console.print(shown)


if __name__ == "__main__":
    main()
