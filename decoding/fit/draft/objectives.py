"""Training objectives of a draft: imitate the target on plain text, or on text that the target wrote."""

from __future__ import annotations

import json
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


@dataclass(frozen=True)
class Objective:
    """Batches, loss and examination of a draft.

    Attributes:
        batches: what to train on.
        loss: from a batch to the mean KL divergence from the target's distribution to the draft's, in nats. For a draft
            that proposes some tokens only, the target's distribution is normalised over those.
        quality: how well a draft stands in for the target on held-out text, by domain.
        length: tokens of a window or text, for counting what was trained on.
        held_out: prompts by domain that nothing was learned from, if the text is not from the shipped sets' domains.
    """

    batches: Batches
    loss: Callable[[Tensor], Tensor]
    quality: Callable[[PreTrainedModel], dict[str, Quality]]
    length: int
    held_out: Mapping[str, list[list[int]]] = field(default_factory=dict)


def plain_objective(
    draft: PreTrainedModel, target: PreTrainedModel, data: CorpusTokens, loop: LoopSettings
) -> Objective:
    """Windows of plain text, every position of which counts.

    Raises:
        FitError: there is too little text.
    """
    return Objective(
        batches=Windows(data.train, loop.batch, loop.length, loop.seed, key=_key(_tokens(draft))),
        loss=lambda batch: plain_loss(draft, target, batch.to(target.device)),
        quality=lambda trained: measure_domains(trained, data.held_out, target),
        length=loop.length,
    )


def own_text_objective(
    draft: PreTrainedModel, target: PreTrainedModel, states: HiddenStates, loop: LoopSettings, length: int
) -> Objective:
    """Texts that the target wrote after prompts, of which only the continuation counts, and texts that count whole.

    A step takes ``batch`` texts, along which the target's last hidden states are known, as ``batch * length`` tokens.

    Raises:
        FitError: there are too few texts.
    """
    text = states.text
    rows = np.unique(states.row[states.of_side(TRAINING)])
    tokens = _tokens(draft)
    layer: nn.Module = output_layer(target).layer
    teacher = layer if tokens is None else ReducedOutput(layer, tokens)
    return Objective(
        batches=PositionBatches(rows, loop.batch, loop.seed, json.dumps([text.digest, _key(tokens)]), TEXTS),
        loss=lambda batch: own_text_loss(draft, teacher, states, batch.numpy()),
        quality=lambda trained: measure_texts(trained, target, text),
        length=length,
    )


def plain_loss(draft: PreTrainedModel, target: PreTrainedModel, batch: Tensor) -> Tensor:
    """Mean KL divergence over all positions of windows, int64 (b, m + 1), without their last column; a scalar."""
    ids, tokens = batch[:, :-1], _tokens(draft)
    with torch.no_grad():
        expected = target(input_ids=ids, use_cache=False).logits
    logits = draft(input_ids=ids, use_cache=False).logits
    if tokens is not None:
        expected, logits = expected[..., tokens], logits[..., tokens]
    return _divergence(logits.flatten(0, 1), expected.flatten(0, 1))


def own_text_loss(draft: PreTrainedModel, teacher: nn.Module, states: HiddenStates, rows: np.ndarray) -> Tensor:
    """Mean KL divergence over the positions of some texts, a scalar.

    The positions are those whose states are kept: in a text that the target wrote, from the last but one of its prompt
    to the last but one of the text, as for heads; after a source, all from which it wrote a token; in a plain text,
    all. What an architecture does to logits after its output layer (the soft cap of Gemma 2) is left out on both sides,
    but for the bias of BART and its kin.

    Args:
        draft: the model that learns.
        teacher: the target's output layer, for the tokens that the draft proposes.
        states: states of the target, from which its output layer computes its logits.
        rows: numbers of the texts, shape (n,).
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
    return _divergence(logits, expected)


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


def _key(tokens: Tensor | None) -> str:
    return "" if tokens is None else json.dumps(tokens.tolist())


def _logits(layer: nn.Module, hidden: Tensor) -> Tensor:
    logits: Tensor = layer.scores(hidden) if isinstance(layer, ReducedOutput) else layer(hidden)
    return logits


def _divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """Mean KL divergence of rows of logits, shapes (n, tokens), a scalar."""
    log_q, log_p = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
    return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
