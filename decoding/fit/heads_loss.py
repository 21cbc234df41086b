"""The loss of Medusa heads (Cai et al., arXiv 2401.10774, section 2.2.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..decoders.medusa import MedusaHeads
from .labels import IGNORED

DECAY = 0.8
"""Each head's loss weighs so much of the loss of the head before it."""


def heads_loss(heads: MedusaHeads, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum over heads k, counted from 1, of 0.8^k times the mean cross-entropy in nats; a scalar.

    Where a vocabulary is large, scores are what fills the memory. So they are computed for a share of the positions at
    a time, as many as one head has for all, and once more when the gradient is wanted.

    Args:
        heads: to be trained.
        hidden: states of the target, shape (n, h).
        labels: tokens to predict, shape (heads, n), int64; `IGNORED` where there is none.
    """
    places = torch.where(labels == IGNORED, IGNORED, heads.places_of(labels.clamp(min=0)))
    size = max(1, -(-len(hidden) // len(labels)))

    def summed(states: Tensor, wanted: Tensor) -> Tensor:
        scores = heads(states).float().flatten(0, 1)
        losses = functional.cross_entropy(scores, wanted.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.reshape(wanted.shape).sum(1)

    parts = zip(hidden.split(size), places.split(size, dim=1), strict=True)
    sums = torch.stack([_recomputed(summed, *part) for part in parts]).sum(0)
    weights = DECAY ** torch.arange(1, len(labels) + 1, device=sums.device)
    return (weights * sums / (places != IGNORED).sum(1).clamp(min=1)).sum()


def _recomputed(function: Callable[[Tensor, Tensor], Tensor], states: Tensor, wanted: Tensor) -> Tensor:
    """Of a function that draws no random numbers the value; what is between is not kept for the gradient."""
    value: Tensor = checkpoint(function, states, wanted, use_reentrant=False, preserve_rng_state=False)
    return value
