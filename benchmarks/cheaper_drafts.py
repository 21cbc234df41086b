"""Drafts of one target in turns: models, the same in int8, its own first layers, tables; and what thresholds cost.

    python -m benchmarks.cheaper_drafts                                             # tiny-10m
    python -m benchmarks.cheaper_drafts --target smollm2 --drafts smollm2-draft-2l smollm2-draft-2l:int8 \
        smollm2-draft-4l smollm2-draft-4l:int8
    python -m benchmarks.cheaper_drafts --drafts prompt-lookup suffix ngram tiny-10m-draft-2l \
        tiny-10m-draft-2l:drafted-by-suffix --lengths 3 8                           # tables, copies, a cascade
    python -m benchmarks.cheaper_drafts --target tiny-translator --drafts tiny-translator-draft-1l --lengths 3 \
        --fallbacks 0 0.2 0.4 --prompt-sets interface                               # what thresholds cost in BLEU

All drafts decode every prompt in turns with plain decoding. The speed is the sum of plain decoding's seconds over the
draft's own, on all prompts, and the median that over the prompts, which a pause of the machine leaves alone; a draft's
time is that of one of its tokens, over that of a token of plain decoding, and in microseconds. Where the prompts have
references, texts are compared with them (BLEU or ROUGE-L, 0 to 100); the change is from plain decoding's texts of the
same prompts, and its interval one of 95 %, of a bootstrap over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.compare_decoders import PLAIN, Comparison, decode, figures, prompts_of, rounds_of, table_of, together
from specgym.agents import TextQuality, require_measure, text_quality
from specgym.decoding import (
    AutoregressiveDecoder,
    Generation,
    Measure,
    Side,
    SpeculativeDecoder,
    ThresholdDecoder,
    load_pair,
    write_json,
)


@dataclass
class Settings:
    """Compare drafts of one target."""

    target: str = "tiny-10m"
    """Target for `load_pair`."""
    drafts: tuple[str, ...] = (
        "tiny-10m-draft-1l",
        "tiny-10m-draft-1l:int8",
        "tiny-10m-draft-2l",
        "tiny-10m-draft-2l:int8",
    )
    """Its drafts."""
    lengths: tuple[int, ...] = (1, 2, 3, 5)
    """Tokens drafted a round."""
    fallbacks: tuple[float, ...] = ()
    """Fallback thresholds of the threshold decoder, 0 to 1, with every draft and length; 0 keeps the target's texts."""
    prompt_sets: tuple[str, ...] = ("prose", "code", "definitions", "chat")
    """Prompt sets."""
    prompts: int = 4
    """Test prompts of a set."""
    tokens: int = 48
    """Tokens generated for a prompt."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    threads: int = 1
    """Threads of torch."""
    json: Path | None = None
    """File to write the figures to, too."""


def measured(generations: Sequence[Generation], plain: Sequence[Generation]) -> dict[str, float]:
    """Figures of a draft at a length, over all prompts."""
    rounds, shared = rounds_of(generations), figures(generations, plain)
    drafted = sum(round_.drafted for round_ in rounds)
    plainly = sum(item.seconds for item in plain) / sum(len(item.tokens) for item in plain)
    mine = sum(item.seconds for item in generations) / sum(len(item.tokens) for item in generations)
    return {
        "speed": plainly / mine,
        "median": shared["speedup"],
        "accepted": sum(round_.accepted for round_ in rounds) / drafted,
        "tokens a round": shared["tokens_per_step"],
        "draft time": sum(round_.draft_seconds for round_ in rounds) / drafted / plainly,
        "draft us": 1e6 * sum(round_.draft_seconds for round_ in rounds) / drafted,
        "round time": sum(item.seconds for item in generations) / len(rounds) / plainly,
        "same texts": shared["same_texts"],
    }


@dataclass(frozen=True)
class Scores:
    """Texts against the references of all test prompts, in the order of the prompt sets.

    Raises:
        TextQualityError: the library of the measure is missing.
    """

    references: Sequence[Sequence[str]]
    measure: Measure

    def __post_init__(self) -> None:
        require_measure(self.measure)

    @classmethod
    def of(cls, settings: Settings) -> Scores | None:
        """Scores of the prompt sets; None unless all of them have references and the same measure."""
        sets = [prompts_of(name, settings.prompts) for name in settings.prompt_sets]
        if not all(prompts.test_references for prompts in sets) or len({prompts.measure for prompts in sets}) > 1:
            return None
        return cls([texts for prompts in sets for texts in prompts.test_references], sets[0].measure)

    def __call__(self, generations: Sequence[Generation], plain: Sequence[Generation]) -> TextQuality:
        """Compare a method's texts with the references, and with those of plain decoding."""
        texts, before = ([generation.text or "" for generation in side] for side in (generations, plain))
        return text_quality(texts, self.references, self.measure, against=before)


def main() -> None:
    """Decode and print."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.cheaper_drafts", description=__doc__)
    torch.set_num_threads(settings.threads)
    scores = Scores.of(settings)
    pairs = {draft: load_pair(f"{settings.target}+{draft}") for draft in settings.drafts}
    first = next(iter(pairs.values()))
    methods = {PLAIN: Side(AutoregressiveDecoder(first.without_draft()), None)}
    for length in settings.lengths:
        for draft, pair in pairs.items():
            methods[f"{draft} ({length})"] = Side(SpeculativeDecoder(pair), {"draft_length": length})
            lossy = ThresholdDecoder(pair, length, "never") if settings.fallbacks else None
            for fallback in settings.fallbacks:
                assert lossy is not None
                methods[f"{draft} ({length}), fallback {fallback:g}"] = Side(lossy, {"fallback": fallback})
    compared = Comparison(
        prompt_sets=settings.prompt_sets,
        prompts=settings.prompts,
        tokens=settings.tokens,
        temperature=settings.temperature,
    )
    sides = together(decode(first, methods, compared))
    results = {name: measured(texts, sides[PLAIN]) for name, texts in sides.items() if name != PLAIN}
    qualities = {name: scores(texts, sides[PLAIN]) for name, texts in sides.items()} if scores else {}
    headings = list(next(iter(results.values())))
    more = ("score", "change") if qualities else ()
    table = table_of("draft (tokens)", *headings, *more, title=f"{settings.target}: times of plain decoding")
    for name, values in results.items():
        table.add_row(name, *(f"{values[heading]:.3f}" for heading in headings), *_cells(qualities.get(name)))
    console = Console(width=200)
    console.print(table)
    if qualities:
        console.print(f"{PLAIN}: {qualities[PLAIN]}", highlight=False)
    if settings.json:
        drafts = {name: values | _figures(qualities.get(name)) for name, values in results.items()}
        write_json(
            settings.json,
            {"settings": {**asdict(settings), "json": None}, "drafts": drafts, PLAIN: _figures(qualities.get(PLAIN))},
        )


def _cells(quality: TextQuality | None) -> tuple[str, ...]:
    """The score and its change from plain decoding's, with its interval; nothing without a quality."""
    if quality is None:
        return ()
    low, high = quality.change_interval
    return f"{quality.score:.1f}", f"{quality.change:+.1f} ({low:+.1f} to {high:+.1f})"


def _figures(quality: TextQuality | None) -> dict[str, Any]:
    """Everything about a quality, for JSON."""
    return {} if quality is None else {"quality": asdict(quality)}


if __name__ == "__main__":
    main()
