"""Train a small Llama from scratch, to serve as a target."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer

from specgym.decoding.fit.cards import Facts, size_of
from specgym.decoding.fit.draft.init_from_target import small_llama
from specgym.decoding.fit.draft.report import Publisher, relative
from specgym.decoding.fit.loop import train
from specgym.decoding.fit.measure import Quality, measure_domains
from specgym.decoding.fit.settings import LoopSettings
from specgym.decoding.fit.text.corpus_text import Windows, load_tokens
from specgym.decoding.loading.link import Link

from . import run


@dataclass
class TargetSettings:
    """Train a small Llama from scratch on a corpus, to serve as a target."""

    out: Path
    """Checkpoint folder to write."""
    corpus: Path = Path("runs/corpus")
    """Folder of the corpus, as written by python -m recipes.corpus."""
    tokenizer: Path = Path("runs/tokenizer")
    """Folder of the tokeniser, as written by python -m recipes.tokenizer."""
    hidden: int = 256
    """Width of the hidden state."""
    intermediate: int = 688
    """Width of the feed-forward layers."""
    layers: int = 12
    """Number of layers."""
    heads: int = 4
    """Number of attention heads."""
    context: int = 1024
    """Longest sequence the model declares, in tokens."""
    licence: str = "other"
    """Licence of the weights, for the model card."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(default_factory=LoopSettings)
    """Training."""


def make_target(settings: TargetSettings) -> dict[str, Quality]:
    """Train the target.

    Returns:
        The perplexity of held-out text, by domain.

    Raises:
        FileNotFoundError: if there is no corpus.
        TrainingError: if training cannot go on.
    """
    loop = settings.loop
    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    data = load_tokens(tokenizer, settings.corpus, (), loop.seed)
    model = small_llama(
        loop.seed,
        tokenizer,
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context,
    )
    nn.Module.to(model, loop.torch_device())

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(model.device)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    facts = Facts(
        name=settings.out.name,
        summary=(
            f"A small target for experiments with speculative decoding: a Llama of {settings.layers} layers of width "
            f"{settings.hidden}, trained from scratch. Not a model to trust or to converse with."
        ),
        licence=settings.licence,
        sources=data.sources,
        size=size_of(model),
        program="recipes.target",
    )
    publisher = Publisher(
        model=model,
        out=settings.out,
        facts=facts,
        loop=loop,
        measure=lambda trained: measure_domains(trained, data.held_out),
        tokenizer=tokenizer,
        link=Link(tokenizer=relative(settings.tokenizer, settings.out)),
    )
    outcome = train(
        model,
        loss_of,
        Windows(data.train, loop.batch, loop.length, loop.seed),
        loop,
        loop.work / f"{settings.out.name}.pt",
        on_checkpoint=publisher.checkpoint,
    )
    return publisher.finish(outcome)


if __name__ == "__main__":
    run("target", TargetSettings, make_target)
