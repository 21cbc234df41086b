"""Medusa heads that nobody has trained, yet that are sometimes right: the target's own output with noise."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from specgym.decoding.medusa import MedusaHeads


def random_heads(
    model: PreTrainedModel, heads: int = 4, *, spread: float = 0.3, seed: int = 0, **more: Any
) -> MedusaHeads:
    """Untrained heads with noise on their weights; `more` as for `MedusaHeads.for_target`."""
    made = MedusaHeads.for_target(model, heads, **more)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return made.eval()
