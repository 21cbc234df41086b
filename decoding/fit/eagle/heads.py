"""Train an EAGLE head for a target, on text that the target writes, unrolled along its own states (EAGLE-3)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from transformers import PreTrainedModel

from ...drafts.eagle.files import load_head, save_head
from ...drafts.eagle.head import EagleHead
from ...errors import FitError, whole_number
from ...files import write_text
from ...loading.pair import Pair
from ...models.output_layer import output_layer
from ..cards import Facts, Section, show, size_of, training_lines, write_card
from ..loop import EarlyStopping, Outcome, mean_loss, spread_over, train
from ..settings import LoopSettings, OwnTextSettings, checked_option, load_frozen, require_least
from ..text.chats import ChatTextSettings, text_of
from ..text.corpus_text import TEXTS, PositionBatches
from ..text.prompts import JUDGING, TRAINING
from ..text.target_text import frequent_tokens
from .features import features_of
from .report import EagleReport, EagleReportSettings, measure_head, speed_section
from .unroll import DECAY, unrolled_loss

_MOST_JUDGED = 96
"""Held-out texts by whose loss training is stopped, at most."""


@dataclass(kw_only=True)
class EagleSettings(OwnTextSettings):
    """Train an EAGLE head for any causal language model that is a plain stack of layers; the model stays as it is.

    The target continues prompts cut from a corpus or from plain text, answers prompts of prompt sets, and writes chats
    of its own; its hidden states along all that are computed once. The head learns its distribution, several tokens
    ahead. Text and states are kept in the folder of the run, so that a killed run resumes.
    """

    out: Path
    """Folder to write. The pair <target>+<folder> decodes with it."""
    layers: tuple[int, ...] = ()
    """Layers of the target, counted from 0, whose input the head reads. Default: a low, a middle and the last one."""
    intermediate: int | None = None
    """Neurons of the head's feed-forward part. Default: as many as in a layer of the target."""
    own_output: bool = False
    """Give the head a trainable copy of the target's output layer; larger files."""
    vocabulary: int = 0
    """Number of tokens that the head may propose, the most frequent ones of the target's text, topped up with the
    lowest token numbers; 0 for all. Decoding stays lossless."""
    unroll: int = 3
    """Tokens of the head's own draft along which it is trained, 1 for the next token alone."""
    chats: tyro.conf.OmitArgPrefixes[ChatTextSettings] = field(default_factory=ChatTextSettings)
    """Chats to learn from as well."""
    store: Literal["float16", "int8"] = "float16"
    """float16, or int8: matrices in 8 bits with a scale for each row, which halves the folder. All measurements of the
    card are made on the head as it is stored."""
    report: tyro.conf.OmitArgPrefixes[EagleReportSettings] = field(default_factory=EagleReportSettings)
    """Measurements of the finished head."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(
        default_factory=lambda: LoopSettings(tokens=2_000_000, batch=8, learning_rate=5e-3, weight_decay=0.01)
    )
    """Training; a step takes --batch whole texts."""


def make_eagle(settings: EagleSettings) -> EagleReport:
    """Run the ``eagle`` command.

    Raises:
        ModelNotFoundError: there is no such target.
        UnsupportedModelError: it is no plain stack of layers.
        FileNotFoundError: there is no text.
        FitError: a setting is out of range, or there is too little text.
        TrainingError: training cannot go on.
    """
    loop = settings.loop
    model, tokenizer, name = load_frozen(settings)
    _check(settings, model)
    pair = Pair(model, None, tokenizer, prepack=False)
    text, sources = text_of(settings, settings.chats, pair, name)
    tokens = len(output_layer(model).weight)
    head = EagleHead.for_target(
        model,
        layers=settings.layers,
        vocabulary=frequent_tokens(text.written(), settings.vocabulary, tokens),
        intermediate_size=settings.intermediate,
        own_output=settings.own_output,
        seed=loop.seed,
    ).float()
    head.attach(model)
    # Weights are left as they are until the end: prepacking changes hidden states, if only a little.
    features = features_of(model, head, text, loop.bfloat16 and model.dtype == torch.float32)
    teacher = head.rows_of(model)
    facts = Facts(
        name=settings.out.name,
        summary=_summary(name, head),
        licence=settings.licence,
        sources=sources,
        size=size_of(head),
        stored_as="with matrices in 8 bits, a scale for each row, and all else in float16"
        if settings.store == "int8"
        else "in float16",
    )

    def card(outcome: Outcome, *sections: Section, verdict: str | None = None) -> str:
        training = [
            f"EAGLE-3: the target unchanged, the head unrolled along {settings.unroll} tokens of its own draft",
            *training_lines(replace(loop, length=text.tokens.shape[1]), outcome, "tokens", dtype=model.dtype),
            f"sum over the tokens k of a draft, from 0, of {DECAY:g}^k times the KL divergence: {outcome.loss:.3f} "
            "nats on training text at the end",
        ]
        return write_card(facts, outcome, [*training, verdict] if verdict else training, sections)

    def publish(outcome: Outcome) -> None:
        save_head(head, settings.out, pair.target, card=card(outcome), eight_bits=settings.store == "int8")

    def loss_at(rows: np.ndarray) -> torch.Tensor:
        return unrolled_loss(head, teacher, features.of(np.sort(rows), head.norm.weight.device), settings.unroll)

    rows = np.flatnonzero(text.side == TRAINING)
    key = json.dumps([text.digest, asdict(head.shape), settings.unroll, DECAY, settings.check_steps, settings.patience])
    judged = spread_over(np.flatnonzero(text.side == JUDGING), _MOST_JUDGED)
    stopping = EarlyStopping(lambda: mean_loss(loss_at, judged, loop.batch), settings.check_steps, settings.patience)
    outcome = train(
        head,
        lambda batch: loss_at(batch.numpy()),
        PositionBatches(rows, loop.batch, loop.seed, key, TEXTS),
        replace(loop, length=text.tokens.shape[1]),
        loop.work / f"{settings.out.name}.pt",
        on_checkpoint=publish,
        stopping=stopping,
    )
    publish(outcome)
    # The report measures the head as written: loaded anew, and for the speed with a target as decoders have it.
    trained = load_head(settings.out, pair.target).float()
    trained.attach(model)
    report = EagleReport(measure_head(trained, features, settings.unroll), stopping.loss)
    sections = [report.section()]
    write_text(settings.out / "README.md", card(outcome, *sections, verdict=report.loss.verdict()))
    if settings.report.report_prompts:
        sections.append(speed_section(settings.report, settings.target, settings.out))
        write_text(settings.out / "README.md", card(outcome, *sections, verdict=report.loss.verdict()))
    for section in sections:
        show(settings.out.name, *(part for part in section.parts if not isinstance(part, str)))
    return report


def _check(settings: EagleSettings, model: PreTrainedModel) -> None:
    """Refuse settings that cannot work, before anything is computed."""
    tokens = len(output_layer(model).weight)
    require_least(settings.report, report_prompts=0, report_tokens=1, report_draft_length=1)
    require_least(settings, check_steps=1, patience=0, unroll=1)
    checked_option(whole_number, "vocabulary", settings.vocabulary, at_least=0, at_most=tokens, hint="0 takes all")
    if settings.loop.length != LoopSettings.length:
        raise FitError("a step takes whole texts: leave out --length")


def _summary(target: str, head: EagleHead) -> str:
    shape = head.shape
    output = "an output layer of its own" if shape.own_output else f"the output layer of {target}"
    words = f"It proposes the {shape.outputs:,} most frequent tokens alone. " if shape.vocabulary else ""
    return (
        f"An EAGLE head for {target}: one decoder layer of {shape.intermediate_size:,} neurons on the input of the "
        f"target's layers {', '.join(map(str, shape.layers))}, with {output}. {words}It drafts tokens that {target} "
        "then checks: its greedy or sampled text stays its own."
    )
