"""Distil a draft: a small model that imitates a target's distribution at every position of some text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.nn import functional

from ..checkpoint import is_checkpoint, tokenizer_folder
from ..loading import load_model, shipped_models
from .card import Facts
from .data import load_data
from .errors import FitError
from .loop import LoopSettings, device_of, train
from .measure import Quality, context_of
from .publish import Publisher, complete, move, relative
from .shrink import fresh, layers_of, spread, take_layers
from .text import Windows

_SHIPPED = Path(__file__).parent.parent / "data" / "models"


@dataclass
class DraftSettings:
    """Distil a draft for any causal language model of transformers.

    The draft learns the target's distribution (the loss is the KL divergence to it) on plain text or on a corpus. It
    is made of some of the target's layers, which keeps the target's own embeddings, or of fresh layers of any width.
    Its vocabulary is the target's by construction.
    """

    target: str
    """The target: a folder, a hub id, or a model that the package ships."""
    out: Path
    """Checkpoint folder to write."""
    text: tuple[Path, ...] = ()
    """Text files and folders to learn from, each a domain of its own; without any, the corpus is used."""
    corpus: Path = Path("runs/corpus")
    """Folder written by the corpus command."""
    layers: int = 1
    """Number of layers of the draft; taken from the target, they are its first, its last and evenly between."""
    take: tuple[int, ...] = ()
    """Which layers to take from the target instead, counted from 0."""
    hidden: int | None = None
    """Width of a draft of fresh layers with embeddings of its own; without it, layers are taken from the target."""
    heads: int | None = None
    """Attention heads of fresh layers; chosen by the width if not given."""
    share: bool = True
    """Leave embeddings that are the target's own out of the folder. With --no-share the folder holds everything, so
    that transformers and other engines load it as it is. What is taken from a GGUF file is always stored."""
    licence: str = "other"
    """Licence of the weights, for the model card."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(default_factory=LoopSettings)
    """How to train."""


def distillation_loss(draft: nn.Module, target: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence from the target's distribution to the draft's, in nats; a scalar.

    Args:
        draft: the model that learns.
        target: the model to imitate; gets no gradient.
        batch: int64, shape (b, m + 1); the last column only ends the windows.
    """
    ids = batch[:, :-1]
    with torch.no_grad():
        log_p = target(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
    log_q = draft(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
    return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


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
        FitError: if the target's layers cannot be taken, the windows exceed its context, or there is too little text.
        TrainingError: if training cannot go on.
    """
    target, tokenizer = load_model(settings.target, dtype=torch.float32, device=device_of(settings.loop))
    for parameter in target.parameters():
        parameter.requires_grad_(False)
    data = load_data(tokenizer, settings.corpus, settings.text, settings.loop.seed)
    loop = settings.loop
    if loop.length > context_of(target):
        raise FitError(f"--length {loop.length} is more than the target's context of {context_of(target)} tokens")
    shared: dict[str, str] = {}
    target_name = Path(settings.target).name
    if settings.hidden is None:
        taken = list(settings.take) or spread(settings.layers, len(layers_of(target)[1]))
        draft, shared = take_layers(target, taken)
        what = f"layer{'s' * (len(taken) > 1)} {', '.join(map(str, taken))} and the embeddings of the target"
    else:
        draft = fresh(target, settings.layers, settings.hidden, settings.heads, loop.seed)
        what = f"{settings.layers} fresh layer{'s' * (settings.layers > 1)} of width {settings.hidden}"
    move(draft, target.device)
    place = place_of(settings.target)
    if not settings.share or settings.target.endswith(".gguf"):
        shared = {}
    facts = Facts(
        name=settings.out.name,
        summary=f"A draft for speculative decoding, distilled from {target_name}: begun from {what}.",
        parameters=0,
        stored=0,
        licence=settings.licence,
        sources=data.sources,
        target=target_name,
    )
    publisher = Publisher(
        model=draft,
        out=settings.out,
        facts=complete(facts, draft, shared),
        settings=loop,
        data=data,
        tokenizer=tokenizer,
        # Beside a checkpoint of ours the tokeniser stays in one place; a target from elsewhere lends a copy.
        tokenizer_at=tokenizer_folder(place) if place is not None and is_checkpoint(place) else None,
        target=target,
        shared_with=None if not shared else settings.target if place is None else relative(place, settings.out),
        shared=shared,
    )
    outcome = train(
        draft,
        lambda batch: distillation_loss(draft, target, batch.to(target.device)),
        Windows(data.train, loop.batch, loop.length, loop.seed),
        loop,
        loop.work / f"{settings.out.name}.pt",
        on_checkpoint=publisher.checkpoint,
    )
    return publisher.finish(outcome)
