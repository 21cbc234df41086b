"""The report on an alignment: how well its guesses agree with the target, beside the draft's own; also as a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..decoders.draft_tree import AffineAlignment, proposals
from ..models.output_head import OutputLayer
from .agreement import FIRST, Agreement, Guess, agreement, r_squared
from .card import Facts, markdown, opening, precision, schedule, where
from .distilled_text import TextSettings, describe_text
from .loop import LoopSettings, Outcome
from .paired_states import PairedStates

DRAFT, LEAST_SQUARES, KEPT, MIXED = "the draft itself", "least squares", "this alignment", "half draft, half aligned"


@dataclass(frozen=True)
class AlignmentReport:
    """What was measured of a finished alignment, on text that nothing was chosen by.

    Attributes:
        agreements: of several guesses with the target, by name: `DRAFT`, `LEAST_SQUARES`, `KEPT`, `MIXED`.
        r_squared: share of the variance of the target's states that is explained, by name: the two maps.
        by_domain: the agreement of the draft and of the alignment for each domain.
        positions: how many were judged.
    """

    agreements: Mapping[str, Agreement]
    r_squared: Mapping[str, float]
    by_domain: Mapping[str, tuple[Agreement, Agreement]]
    positions: int

    def rows(self) -> list[list[str]]:
        """A table of all guesses, its heading first."""
        found = [["guess", "R^2", "agreement, %", f"in the first {FIRST}, %", "KL divergence, nats"]]
        for name, one in self.agreements.items():
            explained = f"{self.r_squared[name]:.3f}" if name in self.r_squared else "-"
            found.append([name, explained, _share(one.match), _share(one.first), f"{one.divergence:.3f}"])
        return found

    def domain_rows(self) -> list[list[str]]:
        """A table by domain, its heading first."""
        found = [["domain", "agreement of the draft, %", "of the alignment, %"]]
        for domain, (own, aligned) in self.by_domain.items():
            found.append([domain, _share(own.match), _share(aligned.match)])
        return found

    def show(self, name: str) -> None:
        """Print the tables."""
        for heading, *rows in (self.rows(), self.domain_rows()):
            table = Table(*heading, title=name, box=SIMPLE_HEAD)
            for row in rows:
                table.add_row(*row)
            Console().print(table)


def judge(
    states: PairedStates,
    positions: np.ndarray,
    draft_output: OutputLayer,
    target_output: OutputLayer,
    ridge: AffineAlignment,
    kept: AffineAlignment,
) -> AlignmentReport:
    """Measure an alignment.

    Args:
        states: of draft and target.
        positions: numbers of those to judge at, shape (n,), int64.
        draft_output: the draft's output layer.
        target_output: the target's.
        ridge: the map of least squares.
        kept: the alignment.
    """

    def own(hidden: Tensor) -> Tensor:
        return proposals(hidden, draft_output)

    def mapped(alignment: AffineAlignment, hidden: Tensor) -> Tensor:
        return proposals(alignment(hidden), target_output)

    def mixed(hidden: Tensor) -> Tensor:
        return (own(hidden).softmax(-1) + mapped(kept, hidden).softmax(-1)).log()

    aligned = partial(mapped, kept)
    guesses: dict[str, Guess] = {DRAFT: own, LEAST_SQUARES: partial(mapped, ridge), KEPT: aligned, MIXED: mixed}
    domain = states.text.domain[states.row[positions]]
    by_domain = {
        name: tuple(agreement(guess, states, positions[domain == place], target_output) for guess in (own, aligned))
        for place, name in enumerate(states.text.domains)
        if (domain == place).any()
    }
    return AlignmentReport(
        agreements={name: agreement(guess, states, positions, target_output) for name, guess in guesses.items()},
        r_squared={LEAST_SQUARES: r_squared(ridge, states, positions), KEPT: r_squared(kept, states, positions)},
        by_domain={name: (one, other) for name, (one, other) in by_domain.items()},
        positions=len(positions),
    )


def alignment_card(
    facts: Facts,
    text: TextSettings,
    settings: LoopSettings,
    dtype: torch.dtype,
    outcome: Outcome | None,
    report: AlignmentReport | None,
) -> str:
    """The text of an alignment's card.

    Args:
        facts: what it is and comes from.
        text: how the target's own text was made.
        settings: how it was trained.
        dtype: of the models.
        outcome: what training did; None where least squares were all there was.
        report: what was measured; None while training goes on.
    """
    assert facts.target is not None
    lines = opening(facts, outcome if report is None else None)
    lines += [f"- {describe_text(text, facts.target)}", *("", "## Training", "")]
    if outcome is None:
        lines += [f"- least squares in closed form, on {where(settings, dtype)}"]
    else:
        lines += [
            "- least squares in closed form, then training from there or, where the states have one width and that "
            "diverged less, from no map at all",
            f"- the KL divergence from {facts.target} to its output layer on mapped states; {outcome.tokens:,} "
            f"positions in {outcome.steps:,} steps of {settings.batch * settings.length}, {outcome.seconds / 60:.0f} "
            f"minutes on {where(settings, dtype)}",
            f"- AdamW, {schedule(settings)}",
            f"- {precision(settings)}, seed {settings.seed}",
        ]
    if report is not None:
        lines += ["", "## Text kept apart", ""]
        lines += [
            f"At {report.positions:,} positions of texts that nothing was chosen by, how often the likeliest token of "
            "a guess, made of the draft's state, is the target's likeliest:"
        ]
        for heading, *rows in (report.rows(), report.domain_rows()):
            lines += ["", *markdown(heading, rows)]
        lines += [
            "",
            f"All of it is text that {facts.target} wrote at temperature {text.temperature:g}. On other text, such as "
            "prompts or what it writes at a higher temperature, the draft itself may agree more.",
        ]
    return "\n".join(lines) + "\n"


def _share(value: float) -> str:
    return f"{100 * value:.1f}"
