"""The report on Medusa heads: accuracies, the tree built from them, and what it brings; on screen and as a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..decoders.medusa import CandidateTree
from .card import Facts, markdown, opening, precision, schedule, where
from .distilled_text import TextSettings, describe_text
from .early_stopping import verdict
from .head_accuracy import Accuracy
from .loop import LoopSettings, Outcome
from .speed import COLUMNS, Speed

Rows = list[list[str]]
_SHOWN_RANKS = 8


@dataclass(frozen=True)
class MedusaReport:
    """What was measured of finished heads.

    Attributes:
        accuracy: on the target's own text, the half kept apart by whose loss the weights were chosen.
        by_domain: the same for each domain.
        tree: the sparse tree of the wanted size.
        expected: tokens per round that the accuracies promise with this tree.
        speed: by domain, from the prompts of the other half, which come from another part of the text.
        new_tokens: after each of them, at most.
        loss_before: on that half, before training, in nats.
        held_out_loss: the lowest there.
    """

    accuracy: Accuracy
    by_domain: Mapping[str, Accuracy]
    tree: CandidateTree
    expected: float
    speed: Mapping[str, Speed]
    new_tokens: int
    loss_before: float
    held_out_loss: float

    @property
    def whole(self) -> Speed:
        """Of all domains together."""
        return sum(self.speed.values(), Speed())

    def tables(self) -> dict[str, Rows]:
        """Tables by title, each with its heading first."""
        total = self.accuracy.shares.shape[1]
        ranks = range(1, min(_SHOWN_RANKS, total) + 1)
        by_rank = [["head", *(f"#{rank}" for rank in ranks), f"#1 to #{total}"]]
        for head, row in enumerate(self.accuracy.shares, 1):
            by_rank.append([str(head), *(f"{100 * share:.1f}" for share in (*row[: len(ranks)], row.sum()))])
        by_domain = [["domain, head", "#1", "#1 to #5"]]
        for domain, found in self.by_domain.items():
            for head, (one, five) in enumerate(zip(found.top(1), found.top(5), strict=True), 1):
                by_domain.append([f"{domain}, {head}", f"{100 * one:.1f}", f"{100 * five:.1f}"])
        speed = [["domain", *COLUMNS]]
        for domain, of_domain in {**self.speed, "all": self.whole}.items():
            speed.append([domain, *of_domain.cells()])
        return {
            "Accuracy of the heads by rank, in per cent": by_rank,
            "Accuracy by domain, in per cent": by_domain,
            "Decoding with them": speed,
        }

    def show(self, name: str) -> None:
        """Print the tables."""
        console = Console()
        for title, (heading, *rows) in self.tables().items():
            # Without vertical rules all of it fits into eighty columns.
            table = Table(
                *heading, title=f"{name}: {title[0].lower()}{title[1:]}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
            )
            for row in rows:
                table.add_row(*row)
            console.print(table)
        console.print(self.expectation(), verdict(self.loss_before, self.held_out_loss), sep="\n")

    def expectation(self) -> str:
        """A sentence on the tree."""
        return (
            f"The {len(self.tree)} likeliest candidates by these accuracies use {self.tree.heads} heads and promise "
            f"{self.expected:.2f} tokens a round, if heads err independently; measured: "
            f"{self.whole.tokens_per_round:.2f}."
        )


def medusa_card(
    facts: Facts,
    text: TextSettings,
    settings: LoopSettings,
    dtype: torch.dtype,
    outcome: Outcome,
    report: MedusaReport | None,
) -> str:
    """The text of the heads' card.

    Args:
        facts: what they are and come from.
        text: how the target's own text was made.
        settings: how they were trained.
        dtype: of the target.
        outcome: what training did.
        report: what was measured; None while training goes on.
    """
    lines = opening(facts, outcome if report is None else None)
    lines += [
        f"- {describe_text(text, facts.target or 'the target')}",
        *("", "## Training", ""),
        f"- Medusa-1: the target unchanged, the heads trained on its last hidden states; "
        f"{outcome.tokens:,} positions in {outcome.steps:,} steps of {settings.batch * settings.length}, "
        f"{outcome.seconds / 60:.0f} minutes on {where(settings, dtype)}",
        f"- AdamW, {schedule(settings)}",
        f"- {precision(settings)}, seed {settings.seed}",
        f"- sum over heads k of 0.8^k times the cross-entropy: {outcome.loss:.3f} nats on training text at the end",
    ]
    if report is not None:
        lines += [f"- {verdict(report.loss_before, report.held_out_loss)}"]
        titles = iter(report.tables().items())
        lines += ["", "## Text kept apart", ""]
        lines += [
            f"How often, in per cent of {report.accuracy.counts[0]:,} positions of the target's own text, the token "
            "that a head ranks first, second, ... is the right one (the first head guesses the token after the next). "
            "Training kept the weights with the lowest loss on these texts, which flatters them a little:"
        ]
        lines += ["", *_markdown(next(titles)[1]), "", *_markdown(next(titles)[1]), "", report.expectation(), ""]
        lines += [
            f"Greedy decoding, {report.new_tokens} tokens at most after each prompt from another part of the text "
            "kept apart, beside plain decoding:"
        ]
        lines += ["", *_markdown(next(titles)[1]), ""]
        lines += [
            "Overhead is the time of a round over that of a plain step; it and the speedup depend on the machine."
        ]
    return "\n".join(lines) + "\n"


def _markdown(table: Sequence[Sequence[str]]) -> list[str]:
    heading, *rows = table
    return markdown(heading, rows)
