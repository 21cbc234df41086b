"""Medusa decoding with heads and candidate trees of several sizes, against plain and speculative decoding.

    python -m benchmarks.medusa                                     # both shipped targets, 5 minutes
    python -m benchmarks.medusa --targets tiny-3m --prompts 2       # a first impression
    python -m benchmarks.medusa --temperature 0.7                   # exact sampling beside typical acceptance
    python -m benchmarks.medusa --device cuda --dtype float32

Every prompt is decoded by all methods, one after another, before the next one. Reading the prompt is not in the times.
A greedy text that is not that of plain decoding is an error in float32; in lower precisions passes of different shapes
round differently, so there it is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tyro
from rich.table import Table

from benchmarks.compare_decoders import PLAIN, Comparison, Figures, compare, drafted, table_of
from specgym.decoding import (
    DELTA,
    EPSILON,
    AutoregressiveDecoder,
    MedusaDecoder,
    Pair,
    Round,
    Side,
    TypicalMedusaDecoder,
    heads_for,
)


@dataclass
class Settings(Comparison):
    """Compare Medusa decoding with others."""

    prompt_sets: tuple[str, ...] = ("prose", "code", "definitions", "chat")
    """Prompt sets for `load_prompts`, and `repetitive`."""
    heads_from: str | None = None
    """Folder of the heads, for a single target; by default the heads that decoders load."""
    heads: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Numbers of heads used, up to those there are."""
    candidates: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of candidates verified in a step."""
    epsilon: float = EPSILON
    """Typical acceptance, which is compared when sampling: probability above which everything is accepted."""
    delta: float = DELTA
    """Typical acceptance: share of exp(-entropy) above which a candidate is accepted."""


def name_of(heads: int, candidates: int) -> str:
    """Name of Medusa decoding with some heads and candidates."""
    return f"Medusa ({heads}, {candidates})"


def methods(pair: Pair, settings: Settings) -> dict[str, Side]:
    """All methods, plain decoding first."""
    heads = heads_for(pair.target, settings.heads_from)
    exact = MedusaDecoder(pair, heads, max_tree=max(settings.candidates))
    sides = {PLAIN: Side(AutoregressiveDecoder(pair)), **drafted(pair, settings)}
    for count in settings.heads:
        if count <= heads.shape.heads:
            sides |= {name_of(count, n): Side(exact, {"heads": count, "tree_size": n}) for n in settings.candidates}
    if settings.temperature:
        typical = TypicalMedusaDecoder(pair, heads, max_tree=max(settings.candidates))
        knobs = {"heads": heads.shape.heads, "epsilon": settings.epsilon, "delta": settings.delta}
        for size in settings.candidates:
            sides[f"typical ({heads.shape.heads}, {size})"] = Side(typical, {**knobs, "tree_size": size})
    return sides


def shown(_: str, rounds: Sequence[Round], figures: Figures) -> dict[str, str]:
    """Columns of Medusa decoding."""
    tokens = sum(len(round_.tokens) for round_ in rounds)
    return {
        "cost of a step": f"{figures['step_cost']:.2f}",
        "divergence": f"{sum(round_.divergence for round_ in rounds) / tokens:.3f}",
    }


def trade(target: str, overall: Mapping[str, Figures], settings: Settings) -> Table:
    """Tokens per step against what a step costs, by heads and candidates, over all prompt sets."""
    title = f"{target}: tokens per step / cost of a step in plain steps = speedup"
    table = table_of("heads", *(f"{size} candidates" for size in settings.candidates), title=title)
    for count in settings.heads:
        cells = [overall.get(name_of(count, size)) for size in settings.candidates]
        if all(cells):
            table.add_row(
                str(count),
                *(
                    f"{cell['tokens_per_step']:.2f} / {cell['step_cost']:.2f} = {cell['speedup']:.2f}"
                    for cell in cells
                    if cell
                ),
            )
    return table


def main() -> None:
    """Decode, and print."""
    settings = tyro.cli(Settings, description=__doc__)
    compare(
        settings,
        lambda pair: methods(pair, settings),
        shown,
        lambda target, _, overall: (trade(target, overall, settings), {}),
    )


if __name__ == "__main__":
    main()
