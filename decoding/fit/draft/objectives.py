"""Training objectives of a draft: imitate the target on plain text, or on text that it or the draft wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ...models.output_layer import ReducedOutput, output_layer, reduced_output
from ..measure import Quality, measure_continuations, measure_domains
from ..settings import LoopSettings
from ..text.corpus_text import TEXTS, Batches, CorpusTokens, PositionBatches, Windows
from ..text.prompts import TRAINING
from ..text.states import HiddenStates, last_states
from ..text.target_text import TargetText

FORWARD = "forward-kl"


def forward_kl(logits: Tensor, expected: Tensor) -> Tensor:
    """Mean KL(p || q) of the target's p and the draft's q, in nats, of logits of shapes (n, tokens); a scalar."""
    log_q, log_p = _log_softmax(logits, expected)
    return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def reverse_kl(logits: Tensor, expected: Tensor) -> Tensor:
    """Mean KL(q || p), which keeps the draft from what the target does not say; arguments as of `forward_kl`."""
    return forward_kl(expected, logits)


def jensen_shannon(logits: Tensor, expected: Tensor) -> Tensor:
    """Mean of (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats; arguments as of `forward_kl`."""
    log_q, log_p = _log_softmax(logits, expected)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    to_m = [functional.kl_div(log_m, some, log_target=True, reduction="batchmean") for some in (log_p, log_q)]
    return (to_m[0] + to_m[1]) / 2


def total_variation(logits: Tensor, expected: Tensor) -> Tensor:
    """Mean of half the sum of abs(p - q): the chance that a drafted token is rejected; arguments as of `forward_kl`."""
    log_q, log_p = _log_softmax(logits, expected)
    return (log_p.exp() - log_q.exp()).abs().sum(-1).mean() / 2


def _log_softmax(logits: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    return logits.float().log_softmax(-1), expected.float().log_softmax(-1)


DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    FORWARD: forward_kl,
    "reverse-kl": reverse_kl,
    "jensen-shannon": jensen_shannon,
    "total-variation": total_variation,
}
"""Losses by name (DistillSpec, arXiv 2310.08461)."""


@dataclass(frozen=True)
class Objective:
    """Batches, loss and examination of a draft.

    Attributes:
        batches: what to train on.
        loss: from a batch to the mean divergence between the target's distribution and the draft's. For a draft that
            proposes some tokens only, the target's distribution is normalised over those.
        quality: how well a draft stands in for the target on held-out text, by domain.
        length: tokens of a window or text, for counting what was trained on.
        held_out: prompts by domain that nothing was learned from, if the text is not from the shipped sets' domains.
        round_of: from the number of a round of on-policy distillation, its first step and the number of its steps to
            its objective, for which the draft writes text at once; None without rounds.
    """

    batches: Batches
    loss: Callable[[Tensor], Tensor]
    quality: Callable[[PreTrainedModel], dict[str, Quality]]
    length: int
    held_out: Mapping[str, list[list[int]]] = field(default_factory=dict)
    round_of: Callable[[int, int, int], Objective] | None = None


def plain_objective(
    draft: PreTrainedModel, target: PreTrainedModel, data: CorpusTokens, loop: LoopSettings, divergence: str = FORWARD
) -> Objective:
    """Windows of plain text, every position of which counts.

    Raises:
        FitError: there is too little text.
    """
    return Objective(
        batches=Windows(data.train, loop.batch, loop.length, loop.seed, key=_key(draft, divergence)),
        loss=lambda batch: plain_loss(draft, target, batch.to(target.device), divergence),
        quality=lambda trained: measure_domains(trained, data.held_out, target),
        length=loop.length,
    )


def own_text_objective(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    states: HiddenStates,
    loop: LoopSettings,
    length: int,
    divergence: str = FORWARD,
) -> Objective:
    """Texts that the target wrote after prompts, of which only the continuation counts, and texts that count whole.

    A step takes ``batch`` texts, along which the target's last hidden states are known, as ``batch * length`` tokens.

    Raises:
        FitError: there are too few texts.
    """
    text = states.text
    rows = np.unique(states.row[states.of_side(TRAINING)])
    teacher, key = teacher_of(draft, target), json.dumps([text.digest, _key(draft, divergence)])
    return Objective(
        batches=PositionBatches(rows, loop.batch, loop.seed, key, TEXTS),
        loss=lambda batch: text_loss(draft, teacher, states, batch.numpy(), divergence),
        quality=lambda trained: measure_texts(trained, target, text),
        length=length,
    )


def teacher_of(draft: PreTrainedModel, target: PreTrainedModel) -> nn.Module:
    """The target's output layer, for the tokens that the draft proposes."""
    tokens, layer = _tokens(draft), output_layer(target).layer
    return layer if tokens is None else ReducedOutput(layer, tokens)


def plain_loss(draft: PreTrainedModel, target: PreTrainedModel, batch: Tensor, divergence: str = FORWARD) -> Tensor:
    """Mean divergence over all positions of windows, int64 (b, m + 1), without their last column; a scalar."""
    ids, tokens = batch[:, :-1], _tokens(draft)
    with torch.no_grad():
        expected = target(input_ids=ids, use_cache=False).logits
    logits = draft(input_ids=ids, use_cache=False).logits
    if tokens is not None:
        expected, logits = expected[..., tokens], logits[..., tokens]
    return DIVERGENCES[divergence](logits.flatten(0, 1), expected.flatten(0, 1))


def text_loss(
    draft: PreTrainedModel, teacher: nn.Module, states: HiddenStates, rows: np.ndarray, divergence: str = FORWARD
) -> Tensor:
    """Mean divergence over the positions of some texts, a scalar.

    The positions are those whose states are kept: in a text that was written, by the target or the draft, from the last
    but one of its prompt to the last but one of the text, as for heads; after a source, all from which the target wrote
    a token; in a plain text, all. What an architecture does to logits after its output layer (the soft cap of Gemma 2)
    is left out on both sides, but for the bias of BART and its kin.

    Args:
        draft: the model that learns.
        teacher: the target's output layer, for the tokens that the draft proposes.
        states: states of the target, from which its output layer computes its logits.
        rows: numbers of the texts, shape (n,).
        divergence: name of one of `DIVERGENCES`.
    """
    text, device = states.text, draft.device
    rows = np.sort(rows)
    positions = np.flatnonzero(np.isin(states.row, rows))  # row by row, as in the batch below
    width = int(text.ends[rows].max())
    ids = torch.from_numpy(text.tokens[rows, :width].astype(np.int64)).to(device)
    row = torch.from_numpy(np.searchsorted(rows, states.row[positions])).to(device)
    place = torch.from_numpy(states.place[positions]).to(device)
    with torch.no_grad():
        expected = _logits(teacher, states.hidden(positions).to(device, draft.dtype))
    # Padding stands behind a row, where a causal model does not look.
    hidden = last_states(draft, states.inputs(rows, ids, draft.dtype))[row, place]
    logits = _logits(output_layer(draft).layer, hidden)
    if (bias := getattr(draft, "final_logits_bias", None)) is not None:
        tokens = _tokens(draft)
        bias = bias[0] if tokens is None else bias[0, tokens]
        expected, logits = expected + bias, logits + bias
    return DIVERGENCES[divergence](logits, expected)


def measure_texts(draft: PreTrainedModel, target: PreTrainedModel, text: TargetText) -> dict[str, Quality]:
    """Quality of a draft, by domain, at the tokens that the target wrote in held-out texts."""
    chosen = [(text.domain == number) & (text.side != TRAINING) for number in range(len(text.domains))]
    return {
        domain: measure_continuations(
            draft,
            target,
            text.tokens[rows],
            text.prompts[rows],
            text.ends[rows],
            sources=text.sources_of(np.flatnonzero(rows)),
        )
        for domain, rows in zip(text.domains, chosen, strict=True)
    }


def _tokens(draft: PreTrainedModel) -> Tensor | None:
    """The tokens that a draft proposes, None for all."""
    layer = reduced_output(draft)
    return None if layer is None else layer.tokens


def _key(draft: PreTrainedModel, divergence: str) -> str:
    tokens = _tokens(draft)
    words = "" if tokens is None else json.dumps(tokens.tolist())
    return words if divergence == FORWARD else f"{words} {divergence}"


def _logits(layer: nn.Module, hidden: Tensor) -> Tensor:
    logits: Tensor = layer.scores(hidden) if isinstance(layer, ReducedOutput) else layer(hidden)
    return logits
