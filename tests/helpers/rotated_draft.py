"""A draft whose states are its target's in other coordinates, so that an affine map can bring them back."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from tests.helpers.counting import counting_model


def rotated_draft(vocabulary: int, noise: float = 0.6, seed: int = 5) -> PreTrainedModel:
    """The `counting_model` seen through a rotation of its states, with an output layer that errs by some noise.

    The final norm scales all states alike, so the states after it are those of the target, rotated.

    Args:
        vocabulary: tokens.
        noise: standard deviation that is added to the output layer.
        seed: of rotation and noise.
    """
    draft: Any = counting_model(vocabulary)
    generator = torch.Generator().manual_seed(seed)
    width = draft.config.hidden_size
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    with torch.no_grad():
        for layer in (draft.model.embed_tokens, draft.lm_head):
            layer.weight.copy_(layer.weight @ rotation)
        draft.lm_head.weight.add_(noise * torch.randn(draft.lm_head.weight.shape, generator=generator))
    return draft
