"""Train Medusa heads for a target, on text that the target writes (Cai et al., arXiv 2401.10774, Medusa-1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...decoders.medusa.files import load_heads, save_heads
from ...decoders.medusa.heads import MedusaHeads
from ...decoders.medusa.trees import expected_length, sparse
from ...errors import FitError
from ...files import write_text
from ...loading.pair import Pair
from ...models.output_layer import output_layer
from ..cards import Facts, Section, show, size_of, training_lines, write_card
from ..loop import Outcome, train_beside
from ..settings import (
    HeadsSettings,
    LoopSettings,
    check_own_text,
    load_frozen,
    require_least,
    small_network_loop,
)
from ..text.prompts import JUDGING
from ..text.states import IGNORED, hidden_states
from ..text.target_text import frequent_tokens, own_text
from .report import MedusaReport, accuracies, measure_speed, speed_prompts

DECAY = 0.8
"""Weight of a head's loss relative to that of the head before it."""


@dataclass(kw_only=True)
class MedusaSettings(HeadsSettings):
    """Train Medusa heads for any causal language model of transformers; the model itself stays as it is.

    The target continues prompts cut from a corpus or from plain text; its hidden states along the continuations are
    computed once, and the heads learn from them which tokens come after the next one. Text and states are kept in the
    folder of the run, so that a killed run resumes and another run on the same text reuses them.
    """

    out: Path
    """Folder to write. Decoders find it by themselves if it is called <target>-medusa, beside the target's folder."""
    heads: int = 5
    """Number of heads; the first predicts the token after the next one."""
    blocks: int = 1
    """Residual blocks of a head."""
    own_output: bool = False
    """Give every head a trainable copy of the target's output layer; larger files."""
    vocabulary: int = 0
    """Number of tokens that heads may propose, the most frequent ones of the target's text; 0 for all. A small number
    saves most of their arithmetic if the vocabulary is large, and decoding stays lossless."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(
        default_factory=lambda: small_network_loop(tokens=4_000_000, batch=4, learning_rate=1e-3)
    )
    """Training; a step takes --batch times --length positions from anywhere in the text."""


def make_medusa(settings: MedusaSettings) -> MedusaReport:
    """Run the ``medusa`` command.

    Raises:
        ModelNotFoundError: there is no such target.
        UnsupportedModelError: it has no output layer, or cannot be decoded in trees.
        FileNotFoundError: there is no text.
        FitError: a setting is out of range, or there is too little text.
        TrainingError: training cannot go on.
    """
    loop = settings.loop
    least = {"heads": 1, "blocks": 1, "vocabulary": 0, "tree_size": 1, "report_prompts": 1, "report_tokens": 1}
    check_own_text(settings, "heads", **least)
    require_least(loop, length=1)
    model, tokenizer, name = load_frozen(settings)
    tokens = len(output_layer(model).weight)
    if settings.vocabulary > tokens:
        raise FitError(f"--vocabulary {settings.vocabulary} is more than the target's {tokens} tokens: 0 takes all")
    # Weights are left as they are until the end: prepacking changes hidden states, if only a little.
    pair = Pair(model, None, tokenizer, prepack=False)
    text, prompts = own_text(settings, pair, name, settings.heads + 1)
    states = hidden_states(model, text)
    heads = MedusaHeads.for_target(
        model,
        settings.heads,
        blocks=settings.blocks,
        own_output=settings.own_output,
        vocabulary=frequent_tokens(text.written(), settings.vocabulary),
    )
    facts = Facts(
        name=settings.out.name,
        summary=_summary(settings, name, heads),
        licence=settings.licence,
        sources=prompts.sources,
        size=size_of(heads),
    )

    def card(outcome: Outcome, *sections: Section, verdict: str | None = None) -> str:
        training = [
            "Medusa-1: the target unchanged, the heads trained on its last hidden states",
            *training_lines(loop, outcome, "positions", dtype=model.dtype),
            f"sum over heads k of 0.8^k times the cross-entropy: {outcome.loss:.3f} nats on training text at the end",
        ]
        return write_card(facts, outcome, [*training, verdict] if verdict else training, sections)

    def publish(outcome: Outcome) -> None:
        save_heads(heads, settings.out, pair.target, card=card(outcome))

    def loss_at(positions: np.ndarray) -> Tensor:
        labels, hidden = states.labels(positions, settings.heads), states.hidden(positions)
        return heads_loss(heads, hidden.to(heads.weight.device), labels.to(heads.weight.device))

    key = [states.text.digest, asdict(heads.shape), DECAY]
    outcome, held_out = train_beside(heads, loss_at, states, key, settings, publish)
    heads.eval()
    accuracy, by_domain = accuracies(heads, states, states.of_side(JUDGING))
    heads.accuracies = accuracy.rows
    publish(outcome)
    tree = sparse(heads.accuracies, settings.tree_size)
    # The report measures the heads as written: loaded anew, with the target prepacked as decoders have it on a CPU.
    pair = Pair(model, None, tokenizer)
    report = MedusaReport(
        accuracy=accuracy,
        by_domain=by_domain,
        tree=tree,
        expected=expected_length(tree, heads.accuracies),
        speed=measure_speed(
            pair,
            load_heads(settings.out, pair.target),
            speed_prompts(text, settings.report_prompts),
            settings.tree_size,
            settings.report_tokens,
        ),
        new_tokens=settings.report_tokens,
        loss=held_out,
    )
    section = report.section()
    write_text(settings.out / "README.md", card(outcome, section, verdict=report.loss.verdict()))
    tables = (part for part in section.parts if not isinstance(part, str))
    show(settings.out.name, *tables, report.expectation(), report.loss.verdict())
    return report


def heads_loss(heads: MedusaHeads, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum over heads k, counted from 1, of 0.8^k times the mean cross-entropy in nats; a scalar.

    With a large vocabulary, logits fill the memory. So they are computed for a share of the positions at a time, as
    many as one head has for all, and recomputed for the gradient (Cai et al., arXiv 2401.10774, section 2.2.1).

    Args:
        heads: to be trained.
        hidden: states of the target, shape (n, h).
        labels: tokens to predict, shape (heads, n), int64; `IGNORED` where there is none.
    """
    places = torch.where(labels == IGNORED, IGNORED, heads.places_of(labels.clamp(min=0)))
    size = max(1, -(-len(hidden) // len(labels)))

    def summed(states: Tensor, expected: Tensor) -> Tensor:
        scores = heads(states).float().flatten(0, 1)
        losses = functional.cross_entropy(scores, expected.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.reshape(expected.shape).sum(1)

    parts = zip(hidden.split(size), places.split(size, dim=1), strict=True)
    # No random numbers are drawn, so their state need not be kept.
    sums = torch.stack([checkpoint(summed, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
    weights = DECAY ** torch.arange(1, len(labels) + 1, device=sums.device)
    return (weights * sums.sum(0) / (places != IGNORED).sum(1).clamp(min=1)).sum()


def _summary(settings: MedusaSettings, target: str, heads: MedusaHeads) -> str:
    output = "output layers of their own" if settings.own_output else f"the output layer of {target}"
    words = f"They propose the {heads.shape.outputs:,} most frequent tokens. " if settings.vocabulary else ""
    return (
        f"{settings.heads} Medusa head{'s' * (settings.heads > 1)} for {target}, with {settings.blocks} residual "
        f"block{'s' * (settings.blocks > 1)} each and {output}. {words}They draft tokens that {target} then checks: "
        "its greedy or sampled text stays its own."
    )
