"""Draft trees against chains and plain decoding, and what alignment, prediction and pruning bring, one after another.

    python -m benchmarks.draft_tree                                     # both shipped pairs
    python -m benchmarks.draft_tree --targets tiny-3m --prompts 2       # a first impression
    python -m benchmarks.draft_tree --temperature 0.8                   # the three rules when sampling
    python -m benchmarks.draft_tree --device cuda --dtype float32

Every prompt is decoded by all methods, one after another, before the next one. Reading the prompt is not in the times.
A greedy text that is not that of plain decoding is an error in float32; in lower precisions passes of different shapes
round differently, so there it is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tyro
from rich import box
from rich.table import Table

from benchmarks.sides import PLAIN, Comparison, Figures, Method, Results, compare, drafted, rounds_of, together
from specgym.decoding import (
    RULES,
    AutoregressiveDecoder,
    DraftTreeDecoder,
    DraftTreeRound,
    Pair,
    Round,
    usual_acceptance,
    usual_alignment,
)

_PARTS = ("alignment", "prediction", "pruning", "forward", "judge", "cache")


@dataclass
class Settings(Comparison):
    """Compare draft trees with others."""

    prompt_sets: tuple[str, ...] = ("prose", "code", "definitions", "chat")
    """What `load_prompts` takes, and `repetitive`."""
    max_candidates: int = 5
    """Children a node."""
    max_depth: int = 4
    """Levels."""
    node_budget: int = 16
    """Candidates a round."""
    weight: float = 0.3
    """Share of the aligned states' proposals in what is drafted from, where they propose."""
    thresholds: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    """For pruning."""


def methods(pair: Pair, settings: Settings) -> list[Method]:
    """All sides, plain decoding first."""
    shape = {name: getattr(settings, name) for name in ("max_candidates", "max_depth", "node_budget")}
    found = [Method(PLAIN, AutoregressiveDecoder(pair)), *drafted(pair, settings)]
    if settings.temperature:
        return [*found, *(Method(f"tree, {rule}", DraftTreeDecoder(pair, rule, pruning=None), shape) for rule in RULES)]
    chain = shape | {"max_candidates": 1, "node_budget": settings.max_depth}
    found += [
        Method(f"chain ({settings.max_depth})", DraftTreeDecoder(pair, pruning=None), chain),
        Method("tree", DraftTreeDecoder(pair, pruning=None), shape),
    ]
    found += _pruned("tree, pruned", DraftTreeDecoder(pair), settings, shape)
    plain = DraftTreeDecoder(pair)
    alignment = usual_alignment(plain.draft, pair.target)
    if alignment is None:
        return found
    aligned = DraftTreeDecoder(pair, pruning=None, alignment=alignment, alignment_weight=settings.weight)
    found.append(Method("tree + alignment", aligned, shape))
    predictor = usual_acceptance(plain.draft, pair.target, alignment)
    if predictor is None:
        return found
    guided: dict[str, Any] = {"alignment": alignment, "predictor": predictor}
    both = DraftTreeDecoder(pair, pruning=None, alignment_weight=settings.weight, **guided)
    found += [
        Method("tree + both", both, shape),
        Method("tree + predictor", DraftTreeDecoder(pair, pruning=None, **guided), shape),
    ]
    return found + _pruned("tree + predictor, pruned", DraftTreeDecoder(pair, **guided), settings, shape)


def _pruned(name: str, decoder: DraftTreeDecoder, settings: Settings, shape: Mapping[str, float]) -> list[Method]:
    return [
        Method(f"{name} ({threshold:g})", decoder, {**shape, "min_acceptance_prob": threshold})
        for threshold in settings.thresholds
    ]


def shown(_: str, rounds: Sequence[Round], figures: Figures) -> dict[str, str]:
    """The column of what a round costs."""
    return {"cost of a step": f"{figures['step_cost']:.2f}"}


def nodes(target: str, results: Results) -> tuple[Table, dict[str, Any]]:
    """What became of the candidates, against the tree without pruning, and where the time went."""
    table = Table(
        title=f"{target}: candidates and accepted tokens a round, and where the time goes, in %", box=box.MARKDOWN
    )
    counts = ("drafted", "cut", "verified", "accepted", "lost", "fewer verified", "fewer accepted")
    for heading in ("method", *counts, "drafting", *_PARTS):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    report: dict[str, Any] = {}
    whole: dict[str, float] = {}
    for side, generations in together(results).items():
        rounds = [cycle for cycle in rounds_of(generations) if isinstance(cycle, DraftTreeRound)]
        if not rounds:
            continue
        own = {
            "cut": sum(cycle.pruned for cycle in rounds) / len(rounds),
            "verified": sum(cycle.drafted for cycle in rounds) / len(rounds),
            "accepted": sum(cycle.accepted for cycle in rounds) / len(rounds),
            "lost": sum(cycle.lost for cycle in rounds) / len(rounds),
        }
        if "pruned" not in side:  # the methods after it are the same tree, pruned
            whole = own
        fewer = {f"fewer_{name}": 1 - own[name] / whole[name] for name in ("verified", "accepted")}
        seconds = sum(cycle.draft_seconds + cycle.verify_seconds for cycle in rounds)
        shares = {part: sum(getattr(cycle, f"{part}_seconds") for cycle in rounds) / seconds for part in _PARTS}
        drafting = sum(cycle.draft_seconds for cycle in rounds) / seconds - sum(shares[part] for part in _PARTS[:3])
        report[side] = {**own, **fewer, "drafting": drafting, **shares}
        table.add_row(
            side,
            f"{own['verified'] + own['cut']:.1f}",
            *(f"{own[name]:.2f}" for name in ("cut", "verified", "accepted", "lost")),
            *(f"{100 * share:.0f} %" for share in fewer.values()),
            *(f"{100 * share:.0f}" for share in (drafting, *shares.values())),
        )
    return table, {"nodes": report}


def main() -> None:
    """Decode, and print."""
    settings = tyro.cli(Settings, description=__doc__)
    compare(
        settings,
        lambda pair: methods(pair, settings),
        shown,
        lambda target, results, _: nodes(target, results),
    )


if __name__ == "__main__":
    main()
