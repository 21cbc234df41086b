"""Distil a draft: a small model that imitates a target's distribution at every position of some text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..loading.checkpoint import Link, is_checkpoint, lender, read_link, tokenizer_folder
from ..loading.find_model import load_model, shipped_models
from ..loading.pair import Pair
from ..models.output_head import output_layer
from ..models.reduced_vocabulary import reduce_output
from .card import Facts
from .data import load_data
from .distilled_text import TextSettings, check_text_settings, describe_text, distil_text, frequent_tokens
from .draft_report import ReportSettings, check_report_settings, measure_drafting, report_lines, show_report
from .errors import FitError
from .hidden_states import hidden_states, join_states, whole_states
from .lessons import Lessons, own_lessons, plain_lessons
from .loop import LoopSettings, device_of, train
from .measure import Quality, context_of
from .more_text import MoreTextSettings, check_more_text, describe_more_text, plain_texts, set_prompts
from .narrow import feed_forward_width, narrow
from .position_batches import TEXTS, require_batch
from .prompt_windows import TRAINING, cut_prompts
from .publish import Publisher, complete, move, relative
from .shrink import fresh, layers_of, spread, take_layers

_SHIPPED = Path(__file__).parent.parent / "data" / "models"
_STORED = {"float16": "in float16", "int8": "with matrices in 8 bits, a scale for each row, and all else in float16"}


@dataclass
class DraftSettings:
    """Distil a draft for any causal language model of transformers.

    The draft learns the target's distribution (the loss is the KL divergence to it) on plain text, on a corpus, or on
    text that the target writes itself after prompts cut from either. It is made of some of the target's layers, which
    keeps the target's own embeddings, or of fresh layers of any width. It numbers tokens as the target does.
    """

    target: str
    """The target: a folder, a hub id, or a model that the package ships."""
    out: Path
    """Checkpoint folder to write."""
    text: tuple[Path, ...] = ()
    """Text files and folders to learn from, each a domain of its own; without any, the corpus is used."""
    corpus: Path = Path("runs/corpus")
    """Folder written by the corpus command."""
    own_text: bool = False
    """Learn from what the target writes after prompts cut from the text, which is what a draft is to guess. The
    target's hidden states along it are computed once, so that training costs little more than the draft itself."""
    writing: tyro.conf.OmitArgPrefixes[TextSettings] = field(default_factory=TextSettings)
    """How the target's own text is made, with --own-text; what another command made with the same settings is used
    again."""
    more_text: tyro.conf.OmitArgPrefixes[MoreTextSettings] = field(default_factory=MoreTextSettings)
    """What the draft learns besides, with --own-text."""
    layers: int = 1
    """Number of layers of the draft; taken from the target, they are its first, its last and evenly between."""
    take: tuple[int, ...] = ()
    """Which layers to take from the target instead, counted from 0."""
    intermediate: int | None = None
    """Neurons to keep in the feed-forward part of each layer taken from the target, the strongest; all by default. A
    narrower draft is quicker and smaller."""
    hidden: int | None = None
    """Width of a draft of fresh layers with embeddings of its own; without it, layers are taken from the target."""
    heads: int | None = None
    """Attention heads of fresh layers; chosen by the width if not given."""
    vocabulary: int = 0
    """Let the draft propose only the so many most frequent tokens of the text (with --own-text, of what the target
    wrote and of the plain texts beside it), made up by those of the lowest numbers where it has fewer; 0 for all. Its
    output layer then costs that much less, and decoding stays lossless."""
    share: bool = True
    """Leave embeddings that are the target's own out of the folder. With --no-share the folder holds everything, so
    that transformers and other engines load it as it is. What is taken from a GGUF file is always stored."""
    store: Literal["float16", "int8"] = "float16"
    """float16, or int8: the matrices in 8 bits with a scale for each row, which halves the folder and which only
    specgym reads. All that the card says is measured on the draft as it is stored."""
    licence: str = "other"
    """Licence of the weights, for the model card."""
    report: tyro.conf.OmitArgPrefixes[ReportSettings] = field(default_factory=ReportSettings)
    """What is measured of the finished draft, besides its quality on held-out text."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(default_factory=LoopSettings)
    """How to train; with --own-text a step takes --batch texts, whatever their length."""


def place_of(target: str) -> Path | None:
    """The folder of a target; None for a hub id or a GGUF file."""
    if Path(target).expanduser().is_dir():
        return Path(target).expanduser()
    return _SHIPPED / target if target in shipped_models() else None


def make_draft(settings: DraftSettings) -> dict[str, Quality]:
    """Run the ``draft`` command.

    Returns:
        For each domain, how well the draft stands in for the target on held-out text.

    Raises:
        ModelNotFoundError: if there is no such target.
        UnsupportedModelError: if its output layer cannot be used or reduced.
        FitError: if a setting makes no sense, the target's layers cannot be taken, the windows exceed its context, or
            there is too little text.
        TrainingError: if training cannot go on.
    """
    loop, own = settings.loop, settings.own_text
    if loop.threads:
        torch.set_num_threads(loop.threads)
    target, tokenizer = load_model(settings.target, dtype=torch.float32, device=device_of(loop))
    for parameter in target.parameters():
        parameter.requires_grad_(False)
    target_name = Path(settings.target).name
    _check(settings, target)
    draft, shared, begun_from = _begin(settings, target)
    lessons, proposed, sources = _lessons(settings, draft, target, tokenizer)
    link = _links(settings, target, shared)
    facts = Facts(
        name=settings.out.name,
        summary=_summary(target_name, begun_from, proposed),
        parameters=0,
        stored=0,
        licence=settings.licence,
        sources=sources,
        target=target_name,
        compared=f"at every token that {target_name} wrote in texts kept apart" if own else "at every position",
        stored_as=_STORED[settings.store],
    )
    loop = replace(loop, length=_width(settings)) if own else loop
    publisher = Publisher(
        model=draft,
        out=settings.out,
        facts=complete(facts, draft, shared),
        settings=loop,
        measure=lessons.quality,
        tokenizer=tokenizer,
        tokenizer_at=link.tokenizer,
        target=target,
        shared_with=link.shared_with,
        shared=link.shared,
        eight_bits=settings.store == "int8",
        more=lambda trained: _decoding(settings, trained, target, tokenizer),
    )
    outcome = train(
        draft,
        lessons.loss,
        lessons.batches,
        loop,
        loop.work / f"{settings.out.name}.pt",
        on_checkpoint=publisher.checkpoint,
    )
    return publisher.finish(outcome)


def _check(settings: DraftSettings, target: PreTrainedModel) -> None:
    """Refuse what cannot work, before anything is computed."""
    check_report_settings(settings.report)
    tokens, loop = len(output_layer(target).weight), settings.loop
    if not 0 <= settings.vocabulary <= tokens:
        raise FitError(f"--vocabulary {settings.vocabulary} makes no sense: give 1 to {tokens} tokens, or 0 for all")
    if settings.vocabulary and not settings.share:
        raise FitError("other engines, for which --no-share is, draft from all tokens: leave out --vocabulary")
    if settings.store == "int8" and not settings.share:
        raise FitError("other engines, for which --no-share is, do not read --store int8: leave one of them out")
    if settings.intermediate is not None and settings.hidden is not None:
        raise FitError(
            "--intermediate narrows layers taken from the target, and --hidden makes fresh ones: leave one out"
        )
    check_more_text(settings.more_text, settings.own_text)
    if settings.own_text:
        check_text_settings(settings.writing, target, 2, "a draft to learn from")
        if loop.length != LoopSettings.length:
            raise FitError("with --own-text a step takes whole texts: leave out --length")
    elif loop.length > context_of(target):
        raise FitError(f"--length {loop.length} is more than the target's context of {context_of(target)} tokens")


def _begin(settings: DraftSettings, target: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, str], str]:
    """The draft before training, the names of what it need not store, and words for what it is made of."""
    shared: dict[str, str] = {}
    if settings.hidden is None:
        taken = list(settings.take) or spread(settings.layers, len(layers_of(target)[1]))
        draft, shared = take_layers(target, taken)
        what = f"layer{'s' * (len(taken) > 1)} {', '.join(map(str, taken))} and the embeddings of the target"
        if settings.intermediate is not None:
            present = feed_forward_width(draft)
            narrow(draft, settings.intermediate)
            what += f", with the {settings.intermediate:,} strongest of {present:,} neurons of each layer"
    else:
        draft = fresh(target, settings.layers, settings.hidden, settings.heads, settings.loop.seed)
        what = f"{settings.layers} fresh layer{'s' * (settings.layers > 1)} of width {settings.hidden}"
    move(draft, target.device)
    return draft, {} if not settings.share or settings.target.endswith(".gguf") else shared, what


def _lessons(
    settings: DraftSettings, draft: PreTrainedModel, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Lessons, tuple[int, ...], list[str]]:
    """What the draft learns from, the tokens that it proposes (none for all), and lines on the text.

    The draft's output layer is reduced to them, in place.
    """
    loop, writing = settings.loop, settings.writing
    if not settings.own_text:
        data = load_data(tokenizer, settings.corpus, settings.text, loop.seed)
        proposed = _reduce(draft, data.train, settings.vocabulary)
        return plain_lessons(draft, target, data, loop), proposed, data.sources
    work, more, name = loop.work, settings.more_text, Path(settings.target).name
    prompts = cut_prompts(tokenizer, settings.corpus, settings.text, writing.texts, writing.prompt_tokens, loop.seed)
    require_batch(int((prompts.side == TRAINING).sum()), loop.batch, TEXTS)
    # All that is read is chosen, and may be refused, before anything is computed.
    plain = plain_texts(target, prompts, more.plain_texts, _width(settings), loop.seed, work)
    asked = set_prompts(more, tokenizer, context_of(target) - writing.new_tokens, loop.seed)
    ends = Pair(target, None, tokenizer, prepack=False).eos_token_ids
    parts = [hidden_states(target, distil_text(target, ends, prompts, writing, loop.seed, work))]
    if asked.rows:
        write = replace(writing, texts=len(asked.rows), prompt_tokens=max(map(len, asked.rows)))
        parts.append(hidden_states(target, distil_text(target, ends, asked, write, loop.seed, work)))
    if len(plain.ends):
        parts.append(whole_states(target, plain, loop.bfloat16))
    states = join_states(parts)
    proposed = _reduce(draft, states.text.written(), settings.vocabulary)
    sources = [
        *(*prompts.sources, describe_text(writing, name)),
        *(*asked.sources, *describe_more_text(more, _width(settings), name)),
    ]
    return own_lessons(draft, target, states, loop), proposed, sources


def _reduce(draft: PreTrainedModel, tokens: np.ndarray, count: int) -> tuple[int, ...]:
    proposed = frequent_tokens(tokens, count, len(output_layer(draft).weight))
    if proposed:
        reduce_output(draft, torch.tensor(proposed))
    return proposed


def _links(settings: DraftSettings, target: PreTrainedModel, shared: Mapping[str, str]) -> Link:
    """Where the draft's folder finds the tokeniser and what it need not store."""
    place = place_of(settings.target)
    if place is None:
        # From the hub, or from where the same model is without a hub: `load_model` knows the ways.
        name = target.name_or_path if shared else None
        return Link(name, name, shared or None)
    tokenizer = None
    if is_checkpoint(place):
        # Beside a checkpoint of ours the tokeniser stays in one place; a folder from elsewhere lends a copy.
        tokenizer = lender(place, read_link(place).tokenizer) or relative(tokenizer_folder(place), settings.out)
    return Link(tokenizer, relative(place, settings.out) if shared else None, shared or None)


def _decoding(
    settings: DraftSettings, draft: PreTrainedModel, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """What the draft is worth in decoding, for its card; the target is prepacked, as decoders have it on a CPU."""
    if not settings.report.report_prompts:
        return []
    found = measure_drafting(Pair(target, draft, tokenizer), draft, settings.report)
    show_report(found, settings.out.name)
    return report_lines(found, settings.report)


def _width(settings: DraftSettings) -> int:
    return settings.writing.prompt_tokens + settings.writing.new_tokens


def _summary(target: str, begun_from: str, proposed: Sequence[int]) -> str:
    words = f" It proposes the {len(proposed):,} most frequent tokens alone." if proposed else ""
    return f"A draft for speculative decoding, distilled from {target}: begun from {begun_from}.{words}"
