"""Checkpoint folder of a trained model with its card, and the measurements of a draft for it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...decoders.chain import SpeculativeDecoder
from ...files import write_text
from ...loading.checkpoint import load_checkpoint, save_checkpoint
from ...loading.link import Link
from ...loading.pair import Pair
from ...loading.prompt_tokens import encode, must_cut, prompt_limit
from ...models.encoder.encoder_decoder import start_token
from ...prompts import load_prompts
from ...rounds import Generation
from ..cards import Facts, Section, show, training_lines, write_card
from ..loop import Outcome
from ..measure import SPEED_NOTE, Quality, Speed, compare, measure_continuations, quality_rows, speed_rows
from ..settings import LoopSettings
from .objectives import FORWARD

_ALPHA = (
    "Alpha is the mean of the sum over tokens of min(target, draft) at temperature 1: the chance that a token drafted "
    "there is accepted."
)


_SETS = ("chat", "code", "definitions", "prose")
"""Shipped prompt sets of texts to be continued."""


@dataclass
class Publisher:
    """Writer of a model's folder, during training and at its end.

    Attributes:
        model: the model in training.
        out: its folder.
        facts: contents of the card.
        loop: how it is trained.
        measure: from the model as it will be loaded to its quality by domain, on held-out text.
        tokenizer: the tokeniser, written into the folder unless the link points at another place.
        link: places of the tokeniser and of shared tensors.
        target: the model it drafts for.
        compared: words for the positions at which it is compared with its target.
        eight_bits: whether matrices are stored in 8 bits instead of float16.
        more: from the model as it will be loaded to further sections of the card.
        divergence: name of the loss.
    """

    model: PreTrainedModel
    out: Path
    facts: Facts
    loop: LoopSettings
    measure: Callable[[PreTrainedModel], dict[str, Quality]]
    tokenizer: PreTrainedTokenizerBase
    link: Link
    target: PreTrainedModel | None = None
    compared: str = ""
    eight_bits: bool = False
    more: Callable[[PreTrainedModel], list[Section]] = lambda _: []
    divergence: str = FORWARD

    def checkpoint(self, outcome: Outcome) -> None:
        """Write the model, with a card that says that training goes on."""
        if self.link.tokenizer is None:
            self.tokenizer.save_pretrained(self.out)
        save_checkpoint(
            self.model,
            self.out,
            card=self._card(outcome, []),
            tokenizer=self.link.tokenizer,
            shared_with=self.link.shared_with,
            shared=self.link.shared or {},
            eight_bits=self.eight_bits,
        )

    def finish(self, outcome: Outcome) -> dict[str, Quality]:
        """Write the model, load it again, measure it by domain, complete the card and print the report."""
        self.checkpoint(outcome)
        model = load_checkpoint(self.out, shared_from=self.target if self.link.shared else None)
        nn.Module.to(model, self.model.device)
        qualities = self.measure(model)
        rows = quality_rows(qualities)
        show(self.facts.name, rows)
        notes = [f"KL, alpha and greedy match compare with {self.compared}. {_ALPHA}"] if self.compared else []
        if "covered" in rows[0]:
            notes.append(
                "The draft proposes some tokens only. Covered is the probability that the target gives to them, which "
                "alpha cannot exceed; KL compares with its distribution over them."
            )
        sections = [Section("Held-out text", [rows, *notes])]
        write_text(self.out / "README.md", self._card(outcome, sections))
        if more := self.more(model):
            write_text(self.out / "README.md", self._card(outcome, [*sections, *more]))
        return qualities

    def _card(self, outcome: Outcome, sections: list[Section]) -> str:
        lines = training_lines(self.loop, outcome, "tokens")
        unit = "" if self.divergence == "total-variation" else " nats"
        name = "" if self.divergence == FORWARD else f" ({self.divergence})"
        lines.append(f"loss{name} on training text at the end: {outcome.loss:.3f}{unit} a token")
        return write_card(self.facts, outcome, lines, sections)


def relative(path: Path, start: Path) -> str:
    """``path`` as seen from the folder ``start``, with forward slashes on every system."""
    return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()


@dataclass
class ReportSettings:
    """Measurements of a finished draft, besides its quality on held-out text."""

    report_prompts: int = 0
    """Test prompts of each shipped set to decode with the finished draft; for a target with an encoder, of each of
    --prompt-sets, and held-out sources of each --text. 0 skips this report."""
    report_tokens: int = 64
    """Tokens to generate after each prompt of the report."""
    report_draft_length: int = 4
    """Tokens to draft a round in the report."""


@dataclass(frozen=True)
class DecodingReport:
    """Results of a draft on the prompts of one set.

    Attributes:
        quality: at every token of plain greedy decoding.
        accepted: accepted drafted tokens, as a share.
        speed: speed of greedy decoding with the draft.
    """

    quality: Quality
    accepted: float
    speed: Speed


def prompts_of_sets(pair: Pair, settings: ReportSettings, sets: Sequence[str] = _SETS) -> dict[str, list[list[int]]]:
    """Test prompts of prompt sets as token ids, as many as the report takes; the pair has a tokeniser."""
    assert pair.tokenizer is not None
    room = pair.target.context_limit - settings.report_tokens
    why = f"so that --report-tokens {settings.report_tokens} fit into {pair.target.name}'s context"
    if pair.target.source_limit is not None:
        room, why = prompt_limit(pair, None)
    prompts: dict[str, list[list[int]]] = {}
    for name in sets:
        prompt_set = load_prompts(name, limit=settings.report_prompts)
        whole = encode(prompt_set, "test", pair.tokenizer)
        cut = must_cut(f"report on {name}", "test", whole, room, why)
        prompts[Path(name).stem] = encode(prompt_set, "test", pair.tokenizer, room) if cut else whole
    return prompts


def measure_decoding(
    pair: Pair, draft: nn.Module, settings: ReportSettings, prompts: Mapping[str, list[list[int]]] | None = None
) -> dict[str, DecodingReport]:
    """Decode prompts, by default of every shipped set, with and without the draft; the pair has a tokeniser."""
    prompts = prompts or prompts_of_sets(pair, settings)
    generations: dict[str, list[tuple[Generation, Generation]]] = {name: [] for name in prompts}
    decoder = SpeculativeDecoder(pair, max_draft_length=settings.report_draft_length)
    knobs = {"draft_length": settings.report_draft_length}
    for name, drafted, plain in compare(decoder, knobs, prompts, settings.report_tokens):
        generations[name].append((drafted, plain))
    reports = {}
    for name, both in generations.items():
        rounds = [round_ for drafted, _ in both for round_ in drafted.rounds]
        sources = None if pair.target.source_limit is None else prompts[name]
        begun = prompts[name] if sources is None else [[start_token(pair.target.model)]] * len(sources)
        lengths = np.array([len(prompt) for prompt in begun])
        texts = [[*prompt, *plain.tokens] for prompt, (_, plain) in zip(begun, both, strict=True)]
        ends = np.array([len(text) for text in texts])
        padded = np.array([[*text, *[0] * (ends.max() - len(text))] for text in texts])
        reports[name] = DecodingReport(
            quality=measure_continuations(draft, pair.target.model, padded, lengths, ends, batch=1, sources=sources),
            accepted=sum(round_.accepted for round_ in rounds) / max(1, sum(round_.drafted for round_ in rounds)),
            speed=sum((Speed.of(drafted, plain) for drafted, plain in both), Speed()),
        )
    return reports


def decoding_section(
    reports: Mapping[str, DecodingReport], settings: ReportSettings, prompts: str = "test prompts of each shipped set"
) -> Section:
    """A section of the card on decoding; it has the column covered for a draft that proposes some tokens only."""
    (_, *heading), *rows = speed_rows("prompts", {name: report.speed for name, report in reports.items()})
    names = ["alpha", "greedy_match"]
    if not any(math.isnan(report.quality.covered) for report in reports.values()):
        names.insert(1, "covered")
    table = [["prompts", *(name.replace("_", " ") for name in names), "accepted", *heading]]
    for (name, *cells), report in zip(rows, [*reports.values(), None], strict=True):
        shares = [] if report is None else [*(getattr(report.quality, n) for n in names), report.accepted]
        table.append([name, *(f"{share:.3f}" for share in shares), *[""] * (len(names) + 1 - len(shares)), *cells])
    intro = (
        f"Greedy decoding of {settings.report_prompts} {prompts}, at most "
        f"{settings.report_tokens} tokens after each, {settings.report_draft_length} drafted a round, compared with "
        "plain decoding; the columns from alpha to greedy match are means over the tokens of plain decoding:"
    )
    return Section("Decoding", [intro, table, SPEED_NOTE])
