"""How well a guess at a target's distribution, made of a draft's hidden state, agrees with the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..decoders.draft_tree import AffineAlignment, proposals
from ..models.output_head import OutputLayer
from .paired_states import PairedStates

_LOGITS_AT_A_TIME = 2**22
FIRST = 5


@dataclass(frozen=True)
class Agreement:
    """Means over positions.

    Attributes:
        match: share at which the likeliest token of the guess is the target's likeliest, in [0, 1].
        first: share at which that is among the first five of the guess, in [0, 1].
        divergence: KL divergence from the target's distribution to the guess, in nats.
    """

    match: float
    first: float
    divergence: float


Guess = Callable[[Tensor], Tensor]
"""From a draft's states, shape (n, draft width), to logits, shape (n, vocabulary)."""


@torch.inference_mode()
def agreement(guess: Guess, states: PairedStates, positions: np.ndarray, output: OutputLayer) -> Agreement:
    """Compare guesses with what the target says.

    Args:
        guess: what is judged.
        states: of draft and target.
        positions: numbers of those to judge at, shape (m,), int64, at least one.
        output: of the target.
    """
    device = output.weight.device
    match = first = divergence = 0.0
    step = max(1, _LOGITS_AT_A_TIME // len(output.weight))
    for start in range(0, len(positions), step):
        part = positions[start : start + step]
        wanted = proposals(states.of_target(part).to(device), output).log_softmax(-1)
        found = guess(states.of_draft(part).to(device)).log_softmax(-1)
        hits = found.topk(min(FIRST, found.shape[-1]), dim=-1).indices == wanted.argmax(-1, keepdim=True)
        match, first = match + float(hits[:, 0].sum()), first + float(hits.sum())
        divergence += float(functional.kl_div(found, wanted, log_target=True, reduction="sum"))
    count = len(positions)
    return Agreement(match / count, first / count, divergence / count)


@torch.inference_mode()
def r_squared(alignment: AffineAlignment, states: PairedStates, positions: np.ndarray) -> float:
    """Share of the variance of the target's states, over all their features together, that mapped states explain.

    Args:
        alignment: the map.
        states: of draft and target.
        positions: numbers of those to judge at, shape (m,), int64, at least one.
    """
    left, total, squares = 0.0, torch.zeros(alignment.target_size, dtype=torch.float64), 0.0
    for part in np.array_split(positions, -(-len(positions) // 4096)):
        wanted = states.of_target(part).double()
        mapped = alignment(states.of_draft(part).to(alignment.weight.device)).cpu().double()
        left += float((wanted - mapped).square().sum())
        total, squares = total + wanted.sum(0), squares + float(wanted.square().sum())
    return 1 - left / max(squares - float(total.square().sum()) / len(positions), 1e-30)
