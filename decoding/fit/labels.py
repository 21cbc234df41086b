"""Which tokens heads should predict."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""The label of what losses ignore."""


def labels_of(texts: Tensor, ends: Tensor, row: Tensor, place: Tensor, heads: int) -> Tensor:
    """The tokens that heads should predict from some positions: the one after the next, and those that follow it.

    Args:
        texts: token ids, shape (texts, width), int64.
        ends: tokens of each text, shape (texts,), int64.
        row: of each position its text, shape (n,), int64.
        place: of each position its place there, shape (n,), int64.
        heads: how many.

    Returns:
        Shape (heads, n), int64; `IGNORED` behind the end of a text.
    """
    wanted = place + 2 + torch.arange(heads, device=texts.device)[:, None]
    return torch.where(wanted < ends[row], texts[row, wanted.clamp(max=texts.shape[1] - 1)], IGNORED)
