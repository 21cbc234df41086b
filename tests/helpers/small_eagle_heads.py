"""EAGLE heads for random models, which guess some tokens right."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from specgym.decoding import EagleHead


def small_head(model: PreTrainedModel, *, seed: int = 0, spread: float = 1.0, **options: Any) -> EagleHead:
    """An untrained head of a model, its weights `spread` times as far from 0 as those that training begins with.

    Args:
        model: like Llama.
        seed: of the weights.
        spread: of the decoder layer's.
        options: of `EagleHead.for_target`.
    """
    head = EagleHead.for_target(model, seed=seed, **options)
    with torch.no_grad():
        for parameter in head.midlayer.parameters():
            if parameter.ndim == 2:
                parameter.mul_(spread)
    return head.eval().requires_grad_(False)
