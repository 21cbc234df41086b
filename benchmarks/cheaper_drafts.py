"""Drafts that need no training: draft models in int8, and the target's own first layers, beside the plain draft models.

    python -m benchmarks.cheaper_drafts                                             # tiny-10m
    python -m benchmarks.cheaper_drafts --target smollm2 --drafts smollm2-draft-2l smollm2-draft-2l:int8 \
        smollm2-draft-4l smollm2-draft-4l:int8
    python -m benchmarks.cheaper_drafts --drafts prompt-lookup suffix ngram tiny-10m-draft-2l \
        tiny-10m-draft-2l:drafted-by-suffix --lengths 3 8                           # tables, copies, a cascade

All drafts decode every prompt in turns with plain decoding. The speed is the sum of plain decoding's seconds over the
draft's own, on all prompts; a draft's time is that of one of its tokens, over that of a token of plain decoding, and
in microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from benchmarks.compare_decoders import PLAIN, Comparison, decode, figures, rounds_of, table_of, together
from specgym.decoding import AutoregressiveDecoder, Generation, Side, SpeculativeDecoder, load_pair, write_json


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
    rounds = rounds_of(generations)
    drafted = sum(round_.drafted for round_ in rounds)
    plainly = sum(item.seconds for item in plain) / sum(len(item.tokens) for item in plain)
    mine = sum(item.seconds for item in generations) / sum(len(item.tokens) for item in generations)
    return {
        "speed": plainly / mine,
        "accepted": sum(round_.accepted for round_ in rounds) / drafted,
        "tokens a round": figures(generations, plain)["tokens_per_step"],
        "draft time": sum(round_.draft_seconds for round_ in rounds) / drafted / plainly,
        "draft us": 1e6 * sum(round_.draft_seconds for round_ in rounds) / drafted,
        "round time": sum(item.seconds for item in generations) / len(rounds) / plainly,
    }


def main() -> None:
    """Decode and print."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.cheaper_drafts", description=__doc__)
    torch.set_num_threads(settings.threads)
    pairs = {draft: load_pair(f"{settings.target}+{draft}") for draft in settings.drafts}
    first = next(iter(pairs.values()))
    methods = {PLAIN: Side(AutoregressiveDecoder(first.without_draft()), None)}
    for length in settings.lengths:
        for draft, pair in pairs.items():
            methods[f"{draft} ({length})"] = Side(SpeculativeDecoder(pair), {"draft_length": length})
    compared = Comparison(
        prompt_sets=settings.prompt_sets,
        prompts=settings.prompts,
        tokens=settings.tokens,
        temperature=settings.temperature,
    )
    sides = together(decode(first, methods, compared))
    results = {name: measured(texts, sides[PLAIN]) for name, texts in sides.items() if name != PLAIN}
    headings = list(next(iter(results.values())))
    table = table_of("draft (tokens)", *headings, title=f"{settings.target}: times of plain decoding")
    for name, values in results.items():
        table.add_row(name, *(f"{values[heading]:.3f}" for heading in headings))
    Console(width=140).print(table)
    if settings.json:
        write_json(settings.json, {"settings": {**asdict(settings), "json": None}, "drafts": results})


if __name__ == "__main__":
    main()
