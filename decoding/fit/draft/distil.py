"""Distil a draft: a small model that imitates a target's distribution at every position of some text.

A draft of a target with an encoder is a smaller decoder, which reads what the target's encoder made of a source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import FitError, whole_number
from ...loading.find_model import load_model
from ...loading.link import Link, is_checkpoint, lender, read_link, tokenizer_folder
from ...loading.pair import Pair
from ...models.encoder.encoder_decoder import has_encoder
from ...models.output_layer import output_layer, reduce_output
from ..cards import Facts, Section, show, size_of
from ..measure import Quality, context_of
from ..settings import LoopSettings, TextSettings, checked_option, place_of, require_least
from ..text.chats import ChatTextSettings, chat_prompts
from ..text.corpus_text import SOURCES, TEXTS, load_tokens, require_batch
from ..text.prompts import SPEED, TRAINING, cut_prompts, line_sources, set_prompts
from ..text.states import hidden_states, join_states, states_after_sources, whole_states
from ..text.target_text import (
    check_text_settings,
    describe_text,
    describe_texts,
    frequent_tokens,
    generate_text,
    join_texts,
    plain_windows,
)
from .init_from_target import feed_forward_width, fresh, layers_of, narrow, spread, take_layers
from .objectives import DIVERGENCES, Objective, own_text_objective, plain_objective
from .on_policy import OnPolicyText, describe_rounds, round_objective, steps_of, train_in_rounds
from .report import Publisher, ReportSettings, decoding_section, measure_decoding, prompts_of_sets, relative

_MOST_BEGUN = 2
"""Tokens with which a text of a decoder beside an encoder begins, at most; the source takes no room of it."""
_STORED = {"float16": "in float16", "int8": "with matrices in 8 bits, a scale for each row, and all else in float16"}


@dataclass
class MoreTextSettings(ChatTextSettings):
    """Text to learn from besides the target's continuations of windows."""

    plain_texts: int = 0
    """Windows of the text itself to learn from as well, each as long as a prompt with its continuation. The target only
    reads them, which is cheaper than writing, and the draft learns at all their positions."""


@dataclass
class DraftSettings:
    """Distil a draft for any causal language model or encoder-decoder of transformers.

    The draft learns the target's distribution (the loss is a divergence between both) on plain text, on a corpus, or on
    text that the target writes after prompts cut from either. It consists of some of the target's layers with the
    target's embeddings, or of fresh layers of any width. It has the token numbers of the target.

    A target with an encoder (T5, BART, Marian, Pegasus, ...) always writes the text itself, after sources from --text
    or --prompt-sets. The draft consists of some layers of its decoder, with its embeddings and its encoder, which then
    runs once for both.
    """

    target: str
    """Target model: a folder, a hub id, or the name of a shipped model."""
    out: Path
    """Checkpoint folder to write."""
    text: tuple[Path, ...] = ()
    """Text files and folders to learn from, each a domain. Default: the corpus. For a target with an encoder each
    paragraph is a source, where blank lines separate any, else each line; at most --texts of them, whole. T5 wants its
    task in front of each."""
    corpus: Path = Path("runs/corpus")
    """Folder of the corpus, as written by python -m recipes.corpus."""
    own_text: bool = False
    """Learn from text that the target writes after prompts cut from the text, which is what a draft has to guess. The
    target's hidden states along it are computed once, so that training costs little more than the draft itself. A
    draft of a target with an encoder always does."""
    writing: tyro.conf.OmitArgPrefixes[TextSettings] = field(default_factory=TextSettings)
    """Generation of the text, with --own-text; text that another command generated with the same settings is reused."""
    more_text: tyro.conf.OmitArgPrefixes[MoreTextSettings] = field(default_factory=MoreTextSettings)
    """Text to learn from as well, with --own-text."""
    on_policy: int = 0
    """Rounds of on-policy distillation (GKD, arXiv 2306.13649; DistillSpec, arXiv 2310.08461), with --own-text: in each
    the draft itself first continues training prompts at temperature 1, each once and as many as the round takes, the
    target reads that, and half of each batch is of it. --tokens are divided equally between the training on the
    target's text, which comes first, and the rounds; the learning rate's one schedule is that of them all."""
    divergence: Literal["forward-kl", "reverse-kl", "jensen-shannon", "total-variation"] = "forward-kl"
    """Loss between the distributions p of the target and q of the draft: forward-kl is KL(p || q), reverse-kl KL(q ||
    p), jensen-shannon the mean KL divergence of both to their mean, and total-variation the chance that a drafted token
    is rejected, 1 - alpha, which says little of where to go while p and q have little in common."""
    layers: int = 1
    """Number of layers of the draft; layers of the target are its first, its last and evenly between."""
    take: tuple[int, ...] = ()
    """Layers to take from the target instead, counted from 0."""
    intermediate: int | None = None
    """Neurons to keep in the feed-forward part of each layer taken from the target, the strongest; all by default. A
    narrower draft is quicker and smaller."""
    hidden: int | None = None
    """Width of a draft of fresh layers with fresh embeddings. Default: take layers from the target."""
    heads: int | None = None
    """Attention heads of fresh layers. Default: chosen by the width."""
    vocabulary: int = 0
    """Number of tokens that the draft may propose: the most frequent ones of the text (with --own-text, of the text
    that the target wrote and of the plain texts), topped up with the lowest token numbers; 0 for all. A smaller output
    layer costs less, and decoding stays lossless."""
    share: bool = True
    """Leave the target's embeddings, and its encoder, out of the folder. With --no-share the folder holds everything,
    so that transformers and other engines load it as it is. Layers taken from a GGUF file are always stored."""
    store: Literal["float16", "int8"] = "float16"
    """float16, or int8: matrices in 8 bits with a scale for each row, which halves the folder and which only specgym
    reads. All measurements of the card are made on the draft as it is stored."""
    licence: str = "other"
    """Licence of the weights, for the model card."""
    report: tyro.conf.OmitArgPrefixes[ReportSettings] = field(default_factory=ReportSettings)
    """Measurements of the finished draft, besides its quality on held-out text."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(default_factory=LoopSettings)
    """Training; with --own-text a step takes --batch whole texts."""


def make_draft(settings: DraftSettings) -> dict[str, Quality]:
    """Run the ``draft`` command.

    Returns:
        For each domain, how well the draft stands in for the target on held-out text.

    Raises:
        ModelNotFoundError: there is no such target.
        UnsupportedModelError: its output layer cannot be used or reduced.
        FitError: a setting is out of range, the target's layers cannot be taken, the windows exceed its context, or
            there is too little text.
        TrainingError: training cannot go on.
    """
    loop = settings.loop
    loop.set_threads()
    target, tokenizer = load_model(settings.target, dtype=torch.float32, device=loop.torch_device())
    target.requires_grad_(False)
    name = Path(settings.target).name
    own_text = settings.own_text or has_encoder(target)
    if has_encoder(target):
        _check_with_encoder(settings)
    _check(replace(settings, own_text=own_text), target)
    draft, shared, origin = _begin(settings, target)
    make_objective = _objective_after_sources if has_encoder(target) else _objective
    objective, proposed, sources = make_objective(settings, draft, target, tokenizer)
    proposing = f" It proposes the {len(proposed):,} most frequent tokens alone." if proposed else ""
    loop = replace(loop, length=objective.length)

    def decoding(trained: PreTrainedModel) -> list[Section]:
        if not settings.report.report_prompts:
            return []
        # The target is prepacked, as decoders have it on a CPU.
        pair = Pair(target, trained, tokenizer)
        if has_encoder(target):
            prompts = {**objective.held_out, **prompts_of_sets(pair, settings.report, settings.more_text.prompt_sets)}
            chosen = {name: rows[: settings.report.report_prompts] for name, rows in prompts.items()}
            apart = "sources of each set, none of which it learned from"
            section = decoding_section(measure_decoding(pair, trained, settings.report, chosen), settings.report, apart)
        else:
            section = decoding_section(measure_decoding(pair, trained, settings.report), settings.report)
        show(f"{settings.out.name}: decoding", *(part for part in section.parts if not isinstance(part, str)))
        return [section]

    publisher = Publisher(
        model=draft,
        out=settings.out,
        facts=Facts(
            name=settings.out.name,
            summary=f"A draft for speculative decoding, distilled from {name}: begun from {origin}.{proposing}",
            licence=settings.licence,
            sources=sources,
            size=size_of(draft, shared, name),
            stored_as=_STORED[settings.store],
        ),
        loop=loop,
        measure=objective.quality,
        tokenizer=tokenizer,
        link=_link(settings, target, shared),
        target=target,
        compared=f"{name} at every " + (f"token that {name} wrote in held-out texts" if own_text else "position"),
        eight_bits=settings.store == "int8",
        more=decoding,
        divergence=settings.divergence,
    )
    state = loop.work / f"{settings.out.name}.pt"
    outcome = train_in_rounds(draft, objective, settings.on_policy, loop, state, publisher.checkpoint)
    return publisher.finish(outcome)


def _check_with_encoder(settings: DraftSettings) -> None:
    """Refuse what makes no sense for a target with an encoder."""
    writing, default = settings.writing, DraftSettings(target="", out=Path())
    reasons = {
        "--corpus": (settings.corpus != default.corpus, "its documents are no sources: give --text or --prompt-sets"),
        "--plain-texts": (settings.more_text.plain_texts > 0, "its decoder reads nothing but what it writes"),
        "--on-policy": (settings.on_policy > 0, "its drafts learn from the target's texts alone"),
        "--own-prompts": (settings.more_text.own_prompts > 0, "it does not chat"),
        "--answer-tokens": (settings.more_text.answer_tokens is not None, "--new-tokens is the length of its texts"),
        "--prompt-tokens": (writing.prompt_tokens != default.writing.prompt_tokens, "its encoder reads whole sources"),
        "--hidden": (settings.hidden is not None, "its drafts are made of layers of its decoder: give --layers"),
        "--heads": (settings.heads is not None, "its drafts are made of layers of its decoder"),
        "--length": (settings.loop.length != default.loop.length, "a step takes whole texts"),
    }
    for option, (is_set, reason) in reasons.items():
        if is_set:
            raise FitError(f"{settings.target} has an encoder: leave out {option}, since {reason}")
    if not (settings.text or settings.more_text.prompt_sets):
        raise FitError(f"{settings.target} has an encoder, which reads sources: give some by --text or --prompt-sets")


def _check(settings: DraftSettings, target: PreTrainedModel) -> None:
    """Refuse settings that cannot work, before anything is computed."""
    tokens, loop, more = len(output_layer(target).weight), settings.loop, settings.more_text
    require_least(settings.report, report_prompts=0, report_tokens=1, report_draft_length=1)
    require_least(more, plain_texts=0, continuations=1)
    require_least(settings, on_policy=0)
    if settings.divergence not in DIVERGENCES:
        raise FitError(f"--divergence must be one of {', '.join(DIVERGENCES)}, got {settings.divergence!r}")
    checked_option(whole_number, "vocabulary", settings.vocabulary, at_least=0, at_most=tokens, hint="0 takes all")
    require_least(loop, length=1)
    if settings.vocabulary and not settings.share:
        raise FitError("other engines, for which --no-share is, draft from all tokens: leave out --vocabulary")
    if settings.store == "int8" and not settings.share:
        raise FitError("other engines, for which --no-share is, do not read --store int8: leave one of them out")
    if settings.intermediate is not None and settings.hidden is not None:
        raise FitError(
            "--intermediate narrows layers taken from the target, and --hidden makes fresh ones: leave one out"
        )
    if not settings.own_text and (more.plain_texts or more.prompt_sets or more.own_prompts):
        raise FitError(
            "--plain-texts, --prompt-sets and --own-prompts add to text that the target writes: give --own-text"
        )
    if settings.on_policy:
        _check_rounds(settings)
    if settings.own_text:
        writing = replace(settings.writing, prompt_tokens=_MOST_BEGUN) if has_encoder(target) else settings.writing
        check_text_settings(writing, target, 2)
        if loop.length != LoopSettings.length:
            raise FitError("with --own-text a step takes whole texts: leave out --length")
    elif loop.length > context_of(target):
        raise FitError(f"--length {loop.length} is more than the target's context of {context_of(target)} tokens")


def _check_rounds(settings: DraftSettings) -> None:
    """Refuse rounds of on-policy distillation for which there is nothing to share out."""
    if not settings.own_text:
        raise FitError("--on-policy mixes text of the draft with text that the target writes: give --own-text")
    if settings.loop.batch < 2:
        raise FitError("half of each batch is the draft's text with --on-policy: give a --batch of at least 2")
    loop = replace(settings.loop, length=settings.writing.width)
    if steps_of(loop) <= settings.on_policy:
        raise FitError(
            f"--tokens {loop.tokens} are {steps_of(loop)} steps, and with --on-policy {settings.on_policy} at least "
            f"{settings.on_policy + 1} are needed"
        )


def _begin(settings: DraftSettings, target: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, str], str]:
    """The draft before training, the names of parameters that it need not store, and its origin in words."""
    shared: dict[str, str] = {}
    if settings.hidden is None:
        taken = list(settings.take) or spread(settings.layers, len(layers_of(target)[1]))
        draft, shared = take_layers(target, taken)
        layers = f"layer{'s' * (len(taken) > 1)} {', '.join(map(str, taken))}"
        origin = f"{layers} and the embeddings of the target"
        if has_encoder(target):
            origin = f"decoder {layers}, with the embeddings and the encoder of the target"
        if settings.intermediate is not None:
            present = feed_forward_width(draft)
            narrow(draft, settings.intermediate)
            origin += f", with the {settings.intermediate:,} strongest of {present:,} neurons of each layer"
    else:
        draft = fresh(target, settings.layers, settings.hidden, settings.heads, settings.loop.seed)
        origin = f"{settings.layers} fresh layer{'s' * (settings.layers > 1)} of width {settings.hidden}"
    nn.Module.to(draft, target.device)
    return draft, {} if not settings.share or settings.target.endswith(".gguf") else shared, origin


def _objective(
    settings: DraftSettings, draft: PreTrainedModel, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Objective, Sequence[int], list[str]]:
    """The objective, the tokens that the draft proposes (none for all), and lines on the text.

    The draft's output layer is reduced to those tokens, in place.
    """
    loop, writing, work = settings.loop, settings.writing, settings.loop.work
    if not settings.own_text:
        data = load_tokens(tokenizer, settings.corpus, settings.text, loop.seed)
        proposed = _reduce(draft, data.train, settings.vocabulary)
        return plain_objective(draft, target, data, loop, settings.divergence), proposed, data.sources
    more, name = settings.more_text, Path(settings.target).name
    prompts = cut_prompts(tokenizer, settings.corpus, settings.text, writing.texts, writing.prompt_tokens, loop.seed)
    require_batch(prompts.count(TRAINING), loop.batch, TEXTS)
    # All text to read is chosen, and may be refused, before anything is computed.
    plain = plain_windows(target, prompts, more.plain_texts, writing.width, loop.seed, work)
    pair = Pair(target, None, tokenizer, prepack=False)
    asked, lines = chat_prompts(more, writing, pair, name, loop.seed, work)
    sources = [*prompts.sources, describe_text(writing, name), *lines]
    if len(plain.ends):
        sources.append(f"{name} read {more.plain_texts:,} windows of {writing.width} tokens of the same documents")
    parts = [
        hidden_states(target, generate_text(target, pair.eos_token_ids, some, how, loop.seed, work))
        for some, how in [(prompts, writing), *((some, more.answers(writing, some)) for some in asked)]
    ]
    if len(plain.ends):
        parts.append(whole_states(target, plain, loop.bfloat16))
    states = join_states(parts)
    proposed = _reduce(draft, states.text.written(), settings.vocabulary)
    objective = own_text_objective(draft, target, states, loop, writing.width, settings.divergence)
    if settings.on_policy:
        text = OnPolicyText(draft, target, [prompts, *asked], pair.eos_token_ids, writing, loop)
        objective = replace(objective, round_of=partial(round_objective, objective, states, text, settings.divergence))
        sources.append(describe_rounds(settings.on_policy, writing))
    return objective, proposed, sources


def _objective_after_sources(
    settings: DraftSettings, draft: PreTrainedModel, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Objective, Sequence[int], list[str]]:
    """Objective, tokens that the draft proposes and lines on the text, for a target with an encoder."""
    loop, more, writing = settings.loop, settings.more_text, settings.writing
    pair = Pair(target, None, tokenizer, prepack=False)
    assert pair.target.source_limit is not None
    longest = min(pair.target.source_limit, tokenizer.model_max_length)
    of_files = line_sources(tokenizer, settings.text, writing.texts, longest, loop.seed)
    of_sets = set_prompts(more.prompt_sets, more.continuations, tokenizer, longest, loop.seed, behind="")
    asked = [prompts.by_length() for prompts in (of_files, of_sets) if prompts.rows]
    require_batch(sum(prompts.count(TRAINING) for prompts in asked), loop.batch, SOURCES)
    writes = [replace(writing, texts=len(prompts.rows), prompt_tokens=_MOST_BEGUN) for prompts in asked]
    text = join_texts(
        [
            generate_text(target, pair.eos_token_ids, prompts, write, loop.seed, loop.work)
            for prompts, write in zip(asked, writes, strict=True)
        ]
    )
    proposed = _reduce(draft, text.written(), settings.vocabulary)
    states = states_after_sources(target, text)
    length = round(len(states) / text.count(TRAINING))
    objective = own_text_objective(draft, target, states, loop, length, settings.divergence)
    sources = [line for prompts in asked for line in prompts.sources]
    sources.append(describe_texts(writing, Path(settings.target).name))
    return replace(objective, held_out=of_files.of_side(SPEED)), proposed, sources


def _reduce(draft: PreTrainedModel, tokens: np.ndarray, count: int) -> Sequence[int]:
    proposed = frequent_tokens(tokens, count, len(output_layer(draft).weight))
    if proposed:
        reduce_output(draft, torch.tensor(proposed))
    return proposed


def _link(settings: DraftSettings, target: PreTrainedModel, shared: Mapping[str, str]) -> Link:
    """Places where the draft's folder finds the tokeniser and what it need not store."""
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
