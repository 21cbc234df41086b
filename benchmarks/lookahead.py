"""Lookahead decoding against plain decoding, Jacobi decoding, prompt lookup and speculative decoding with a draft.

    python -m benchmarks.lookahead                                   # both shipped targets, 5 minutes
    python -m benchmarks.lookahead --targets tiny-3m --prompts 2     # a first impression
    python -m benchmarks.lookahead --targets smollm2 --device cuda --dtype float32

Every prompt is decoded by all methods, one after another, before the next one. Reading the prompt is not in the times.
A greedy text that is not that of plain decoding is an error in float32; in lower precisions passes of different shapes
round differently, so there it is counted. Without seeding ("window alone") the pool holds only what the window found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tyro
from rich import box
from rich.table import Table

from benchmarks.sides import PLAIN, Comparison, Figures, Method, Results, compare, drafted, rounds_of
from specgym.decoding import (
    AutoregressiveDecoder,
    JacobiDecoder,
    LookaheadDecoder,
    LookaheadRound,
    LookaheadStatistics,
    Pair,
    PoolSettings,
    PromptLookupDrafter,
    Round,
    SpeculativeDecoder,
)


@dataclass
class Settings(Comparison):
    """Compare Lookahead decoding with others."""

    knobs: tuple[tuple[int, int, int], ...] = ((5, 3, 5), (15, 5, 15), (1, 3, 5), (1, 5, 2), (3, 4, 3))
    """Window, n-gram size and guesses of Lookahead decoding, three numbers for each setting."""
    unseeded: tuple[tuple[int, int, int], ...] = ((5, 3, 5), (15, 5, 15))
    """The same, of Lookahead decoding whose pool is filled by the window alone."""
    jacobi_window: int = 8
    """Of Jacobi decoding."""
    lookup_length: int = 4
    """Tokens drafted by prompt lookup, at most."""


def lookahead(pair: Pair, numbers: Sequence[int], pool: PoolSettings | None = None) -> Method:
    """Lookahead decoding with window, n-gram size and guesses."""
    window, ngram, guesses = numbers
    decoder = LookaheadDecoder(pair, max_window=window, max_ngram=ngram, max_guesses=max(guesses, 1), pool=pool)
    name = f"Lookahead ({window}, {ngram}, {guesses})" + (", window alone" if pool else "")
    return Method(name, decoder, {"window": window, "ngram": ngram, "guesses": guesses})


def methods(pair: Pair, settings: Settings) -> list[Method]:
    """All sides, plain decoding first."""
    copied = Pair(pair.target, PromptLookupDrafter(pair.target.vocabulary_size), pair.tokenizer)
    window, copies = settings.jacobi_window, settings.lookup_length
    return [
        Method(PLAIN, AutoregressiveDecoder(pair)),
        Method(f"Jacobi ({window})", JacobiDecoder(pair, max_window=window), {"window": window}),
        *(lookahead(pair, numbers, PoolSettings(seeds="nothing")) for numbers in settings.unseeded),
        *(lookahead(pair, numbers) for numbers in settings.knobs),
        Method(f"prompt lookup ({copies})", SpeculativeDecoder(copied), {"draft_length": copies}),
        *drafted(pair, settings),
    ]


def hit_rate(rounds: Sequence[Round]) -> float:
    """Share of the rounds in which there was anything to verify from the pool, or from the draft."""
    hits = [cycle.found if isinstance(cycle, LookaheadRound) else cycle.drafted for cycle in rounds]
    return sum(hit > 0 for hit in hits) / len(hits)


def shown(side: str, rounds: Sequence[Round], _: Figures) -> dict[str, str]:
    """The column of Lookahead decoding."""
    return {"hit rate": "-" if side == PLAIN or side.startswith("Jacobi") else f"{hit_rate(rounds):.0%}"}


def step_times(target: str, results: Results, overall: Mapping[str, Figures]) -> tuple[Table, dict[str, Any]]:
    """Where a step's time goes: a table, and the same as numbers for the report."""
    table = Table(title=f"{target}: what a step costs, and where its time goes (ms)", box=box.MARKDOWN)
    for heading in ("method", "tokens per step", "cost in plain steps", "prepare", "mask", "forward", "judge"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    report: dict[str, Any] = {}
    for side, sums in overall.items():
        rounds = rounds_of([generation for sides in results.values() for generation in sides[side]])
        parts = ["-"] * 4
        if all(isinstance(cycle, LookaheadRound) for cycle in rounds):
            means = LookaheadStatistics.of(rounds)
            report[side] = asdict(means)
            seconds = (means.prepare_seconds, means.mask_seconds, means.forward_seconds, means.judge_seconds)
            parts = [f"{1000 * part:.3f}" for part in seconds]
        table.add_row(side, f"{sums['tokens_per_step']:.2f}", f"{sums['step_cost']:.2f}", *parts)
    return table, {"steps": report}


def main() -> None:
    """Decode, and print."""
    settings = tyro.cli(Settings, description=__doc__)
    compare(settings, lambda pair: methods(pair, settings), shown, step_times)


if __name__ == "__main__":
    main()
