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
from rich.table import Table

from benchmarks.compare_decoders import (
    PLAIN,
    Comparison,
    Figures,
    Results,
    compare,
    drafted,
    rounds_of,
    table_of,
    together,
)
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
    Side,
    SpeculativeDecoder,
)


@dataclass
class Settings(Comparison):
    """Compare Lookahead decoding with others."""

    knobs: tuple[tuple[int, int, int], ...] = ((5, 3, 5), (15, 5, 15), (1, 3, 5), (1, 5, 2), (3, 4, 3))
    """Window, n-gram size and guesses of Lookahead decoding, three numbers a setting."""
    unseeded: tuple[tuple[int, int, int], ...] = ((5, 3, 5), (15, 5, 15))
    """Three such numbers for Lookahead decoding whose pool is filled by the window alone."""
    jacobi_window: int = 8
    """Window of Jacobi decoding."""
    lookup_length: int = 4
    """Most tokens drafted by prompt lookup."""


def lookahead(pair: Pair, numbers: Sequence[int], pool: PoolSettings | None = None) -> tuple[str, Side]:
    """Lookahead decoding with window, n-gram size and guesses."""
    window, ngram, guesses = numbers
    decoder = LookaheadDecoder(pair, max_window=window, max_ngram=ngram, max_guesses=max(guesses, 1), pool=pool)
    name = f"Lookahead ({window}, {ngram}, {guesses})" + (", window alone" if pool else "")
    return name, Side(decoder, {"window": window, "ngram": ngram, "guesses": guesses})


def methods(pair: Pair, settings: Settings) -> dict[str, Side]:
    """All methods, plain decoding first."""
    copied = Pair(pair.target, PromptLookupDrafter(pair.target.vocabulary_size), pair.tokenizer)
    window, copies = settings.jacobi_window, settings.lookup_length
    return {
        PLAIN: Side(AutoregressiveDecoder(pair)),
        f"Jacobi ({window})": Side(JacobiDecoder(pair, max_window=window), {"window": window}),
        **dict(lookahead(pair, numbers, PoolSettings(seeds="nothing")) for numbers in settings.unseeded),
        **dict(lookahead(pair, numbers) for numbers in settings.knobs),
        f"prompt lookup ({copies})": Side(SpeculativeDecoder(copied), {"draft_length": copies}),
        **drafted(pair, settings),
    }


def hit_rate(rounds: Sequence[Round]) -> float:
    """Share of the rounds in which there was anything to verify from the pool, or from the draft."""
    hits = [round_.available if isinstance(round_, LookaheadRound) else round_.drafted for round_ in rounds]
    return sum(hit > 0 for hit in hits) / len(hits)


def shown(side: str, rounds: Sequence[Round], _: Figures) -> dict[str, str]:
    """Column of Lookahead decoding."""
    return {"hit rate": "-" if side == PLAIN or side.startswith("Jacobi") else f"{hit_rate(rounds):.0%}"}


def step_times(target: str, results: Results, overall: Mapping[str, Figures]) -> tuple[Table, dict[str, Any]]:
    """Time of a step by its parts: a table, and numbers for the report."""
    table = table_of(
        "method", "tokens per step", "cost in plain steps", "prepare", "mask", "forward", "judge",
        title=f"{target}: cost of a step, and where its time goes (ms)",
    )  # fmt: skip
    report: dict[str, Any] = {}
    decoded = together(results)
    for side, sums in overall.items():
        rounds = rounds_of(decoded[side])
        parts = ["-"] * 4
        if all(isinstance(round_, LookaheadRound) for round_ in rounds):
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
