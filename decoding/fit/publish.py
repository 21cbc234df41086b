"""From a model in training to a checkpoint folder with its card, measured as it will be loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import write_text
from ..loading.checkpoint import load_checkpoint, save_checkpoint
from .card import Facts, write_card
from .loop import LoopSettings, Outcome
from .measure import Quality, table


@dataclass
class Publisher:
    """Writes one model's folder, during training and at its end.

    Attributes:
        model: the model in training.
        out: its folder.
        facts: for the card.
        settings: for the card.
        measure: from the model as it will be loaded to its quality by domain, on held-out text.
        tokenizer: the tokeniser, written into the folder if ``tokenizer_at`` is None.
        tokenizer_at: tokeniser to point at instead, a folder relative to ``out`` or a hub id.
        target: the model it drafts for.
        shared_with: folder or hub id that holds the shared tensors.
        shared: their names here and there.
        eight_bits: whether matrices are stored in 8 bits instead of float16.
        more: from the model as it will be loaded to further lines of the card.
    """

    model: PreTrainedModel
    out: Path
    facts: Facts
    settings: LoopSettings
    measure: Callable[[PreTrainedModel], dict[str, Quality]]
    tokenizer: PreTrainedTokenizerBase
    tokenizer_at: str | None = None
    target: PreTrainedModel | None = None
    shared_with: str | None = None
    shared: Mapping[str, str] | None = None
    eight_bits: bool = False
    more: Callable[[PreTrainedModel], list[str]] = lambda _: []

    def checkpoint(self, outcome: Outcome) -> None:
        """Write what there is, with a card that says that training goes on."""
        self._save(outcome)

    def finish(self, outcome: Outcome) -> dict[str, Quality]:
        """Write the model, load it again, measure it by domain, complete the card and print the report."""
        self._save(outcome)
        model = load_checkpoint(self.out, shared_from=self.target if self.shared else None)
        move(model, self.model.device)
        qualities = self.measure(model)
        card = write_card(self.facts, self.settings, outcome, qualities)
        write_text(self.out / "README.md", card)
        heading, *rows = table(qualities)
        report = Table(*heading, title=self.facts.name)
        for row in rows:
            report.add_row(*row)
        Console().print(report)
        if lines := self.more(model):
            write_text(self.out / "README.md", card + "\n".join(lines) + "\n")
        return qualities

    def _save(self, outcome: Outcome) -> None:
        if self.tokenizer_at is None:
            self.tokenizer.save_pretrained(self.out)
        save_checkpoint(
            self.model,
            self.out,
            card=write_card(self.facts, self.settings, outcome, None),
            tokenizer=self.tokenizer_at,
            shared_with=self.shared_with,
            shared=self.shared or {},
            eight_bits=self.eight_bits,
        )


def move(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device, in place (the stub of ``PreTrainedModel.to`` refuses devices)."""
    model.to(device)


def relative(path: Path, start: Path) -> str:
    """``path`` as seen from the folder ``start``, with forward slashes on every system."""
    return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()


def count(model: PreTrainedModel, shared: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Parameters of a model, and those that are not shared; tied ones count once."""
    own = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in own.values())
    return total, total - sum(own[name].numel() for name in shared or {} if name in own)


def complete(facts: Facts, model: PreTrainedModel, shared: Mapping[str, str] | None = None) -> Facts:
    """``facts`` with the numbers of parameters filled in."""
    parameters, stored = count(model, shared)
    return replace(facts, parameters=parameters, stored=stored)
