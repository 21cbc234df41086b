"""The report on a target that was trained with its heads: quality, accuracies and speed, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .card import Facts, markdown, opening, precision, schedule, where
from .distilled_text import TextSettings, describe_text
from .early_stopping import verdict
from .head_accuracy import Accuracy
from .loop import LoopSettings, Outcome
from .measure import Quality
from .speed import Speed


@dataclass(frozen=True)
class Measured:
    """What a target and its heads are worth on text kept apart.

    Attributes:
        quality: by domain, of held-out text.
        accuracy: of the heads, on text of the original target.
        speed: by domain, of greedy decoding with the heads.
    """

    quality: Mapping[str, Quality]
    accuracy: Accuracy
    speed: Mapping[str, Speed]

    @property
    def whole(self) -> Speed:
        """The speed over all domains."""
        return sum(self.speed.values(), Speed())


@dataclass(frozen=True)
class JointReport:
    """What joint training changed.

    Attributes:
        name: of the new target.
        original: name of the one it comes from.
        before: training.
        after: training.
        loss_before: on text kept apart, before training, in nats.
        held_out_loss: the lowest there.
    """

    name: str
    original: str
    before: Measured
    after: Measured
    loss_before: float
    held_out_loss: float

    def rows(self) -> list[list[str]]:
        """A table, its heading first."""
        found = [["on text kept apart", "before", "after"]]
        for domain, quality in self.before.quality.items():
            later = self.after.quality[domain]
            found.append([f"perplexity, {domain}", f"{quality.perplexity:.2f}", f"{later.perplexity:.2f}"])
        for ranks in (1, 5):
            both = zip(self.before.accuracy.top(ranks), self.after.accuracy.top(ranks), strict=True)
            for head, (one, other) in enumerate(both, 1):
                what = f"head {head} right in its first {ranks}" if ranks > 1 else f"head {head} right at once"
                found.append([f"{what}, %", f"{100 * one:.1f}", f"{100 * other:.1f}"])
        for what, name in (("tokens a round", "tokens_per_round"), ("speedup over plain decoding", "speedup")):
            one, other = (getattr(measured.whole, name) for measured in (self.before, self.after))
            found.append([what, f"{one:.2f}", f"{other:.2f}"])
        return found

    def show(self) -> None:
        """Print the table."""
        heading, *rows = self.rows()
        shown = Table(*heading, title=f"{self.original} before, {self.name} after", box=SIMPLE_HEAD)
        for row in rows:
            shown.add_row(*row)
        Console().print(shown, verdict(self.loss_before, self.held_out_loss))

    def card(
        self, facts: Facts, text: TextSettings, settings: LoopSettings, dtype: torch.dtype, outcome: Outcome
    ) -> str:
        """The text of the card of the target and of its heads.

        Args:
            facts: what they are and come from.
            text: how the original's own text was made.
            settings: how they were trained.
            dtype: of the target while it was.
            outcome: what training did.
        """
        lines = opening(facts, None)
        lines += [
            f"- {describe_text(text, self.original)}",
            *("", "## Training", ""),
            f"- Medusa-2: the KL divergence from {self.original}, and the heads' loss by a weight that rises with a "
            f"sine; {outcome.steps:,} steps of {settings.batch} texts, {outcome.seconds / 60:.0f} minutes "
            f"on {where(settings, dtype)}",
            f"- AdamW, {schedule(settings)}",
            f"- {precision(settings)}, seed {settings.seed}",
            f"- {verdict(self.loss_before, self.held_out_loss)} The weights with the lowest are kept, so that "
            "accuracies after training, which are counted on the same texts, are a little flattered.",
            *("", "## Before and after", ""),
        ]
        heading, *rows = self.rows()
        lines += [*markdown(heading, rows), "", "The speedup depends on the machine; decoding was greedy."]
        return "\n".join(lines) + "\n"
