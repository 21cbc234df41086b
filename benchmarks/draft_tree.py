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
    RULES,
    AutoregressiveDecoder,
    DraftTreeDecoder,
    DraftTreeRound,
    Pair,
    Round,
    Side,
    usual_acceptance,
    usual_alignment,
)

_PARTS = ("alignment", "prediction", "pruning", "forward", "judge", "cache")


@dataclass
class Settings(Comparison):
    """Compare draft trees with others."""

    prompt_sets: tuple[str, ...] = ("prose", "code", "definitions", "chat")
    """Prompt sets for `load_prompts`, and `repetitive`."""
    max_candidates: int = 5
    """Most children of a node."""
    max_depth: int = 4
    """Levels of a tree."""
    node_budget: int = 16
    """Candidates of a round."""
    weight: float = 0.3
    """Share of the aligned states' proposals in what is drafted from, where they propose."""
    thresholds: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    """Thresholds of pruning."""


def methods(pair: Pair, settings: Settings) -> dict[str, Side]:
    """All methods, plain decoding first."""
    shape = {name: getattr(settings, name) for name in ("max_candidates", "max_depth", "node_budget")}
    sides = {PLAIN: Side(AutoregressiveDecoder(pair)), **drafted(pair, settings)}
    if settings.temperature:
        return sides | {f"tree, {rule}": Side(DraftTreeDecoder(pair, rule, pruning=None), shape) for rule in RULES}
    chain = shape | {"max_candidates": 1, "node_budget": settings.max_depth}
    plain = DraftTreeDecoder(pair)
    sides[f"chain ({settings.max_depth})"] = Side(DraftTreeDecoder(pair, pruning=None), chain)
    sides["tree"] = Side(DraftTreeDecoder(pair, pruning=None), shape)
    sides |= _pruned("tree, pruned", plain, settings, shape)
    alignment = usual_alignment(plain.draft, pair.target)
    if alignment is None:
        return sides
    aligned = DraftTreeDecoder(pair, pruning=None, alignment=alignment, alignment_weight=settings.weight)
    sides["tree + alignment"] = Side(aligned, shape)
    predictor = usual_acceptance(plain.draft, pair.target, alignment)
    if predictor is None:
        return sides
    guided: dict[str, Any] = {"alignment": alignment, "predictor": predictor}
    both = DraftTreeDecoder(pair, pruning=None, alignment_weight=settings.weight, **guided)
    sides["tree + both"] = Side(both, shape)
    sides["tree + predictor"] = Side(DraftTreeDecoder(pair, pruning=None, **guided), shape)
    return sides | _pruned("tree + predictor, pruned", DraftTreeDecoder(pair, **guided), settings, shape)


def _pruned(name: str, decoder: DraftTreeDecoder, settings: Settings, shape: Mapping[str, float]) -> dict[str, Side]:
    return {
        f"{name} ({threshold:g})": Side(decoder, {**shape, "min_acceptance_prob": threshold})
        for threshold in settings.thresholds
    }


def shown(_: str, rounds: Sequence[Round], figures: Figures) -> dict[str, str]:
    """Column of the cost of a round."""
    return {"cost of a step": f"{figures['step_cost']:.2f}"}


def nodes(target: str, results: Results) -> tuple[Table, dict[str, Any]]:
    """Fate of the candidates, against the tree without pruning, and time by parts of a round."""
    counts = ("drafted", "cut", "verified", "accepted", "lost", "fewer verified", "fewer accepted")
    title = f"{target}: candidates and accepted tokens a round, and where the time goes, in %"
    table = table_of("method", *counts, "drafting", *_PARTS, title=title)
    report: dict[str, Any] = {}
    whole: dict[str, float] = {}
    for side, generations in together(results).items():
        rounds = [round_ for round_ in rounds_of(generations) if isinstance(round_, DraftTreeRound)]
        if not rounds:
            continue
        rates = {
            "cut": sum(round_.pruned for round_ in rounds) / len(rounds),
            "verified": sum(round_.drafted for round_ in rounds) / len(rounds),
            "accepted": sum(round_.accepted for round_ in rounds) / len(rounds),
            "lost": sum(round_.lost for round_ in rounds) / len(rounds),
        }
        if "pruned" not in side:  # the methods after it are the same tree, pruned
            whole = rates
        fewer = {f"fewer_{name}": 1 - rates[name] / whole[name] for name in ("verified", "accepted")}
        seconds = sum(round_.seconds for round_ in rounds)
        shares = {part: sum(getattr(round_, f"{part}_seconds") for round_ in rounds) / seconds for part in _PARTS}
        drafting = sum(round_.draft_seconds for round_ in rounds) / seconds - sum(shares[part] for part in _PARTS[:3])
        report[side] = {**rates, **fewer, "drafting": drafting, **shares}
        table.add_row(
            side,
            f"{rates['verified'] + rates['cut']:.1f}",
            *(f"{rates[name]:.2f}" for name in ("cut", "verified", "accepted", "lost")),
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
