"""The layer that makes scores of a model's last hidden states: what every way to draft from those states needs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError


class OutputLayer(NamedTuple):
    """The layer that makes scores of a model's last hidden states."""

    layer: nn.Module
    weight: Tensor
    """Shape (vocabulary, h)."""
    bias: Tensor | None
    """Shape (vocabulary,)."""


def output_layer(model: PreTrainedModel) -> OutputLayer:
    """A model's output layer, with its weights.

    Raises:
        UnsupportedModelError: it has none.
    """
    layer = output_module(model)
    weight: Any = getattr(layer, "weight", None)  # a prepacked layer makes its weight anew when asked
    bias: Any = getattr(layer, "bias", None)
    if weight is None:
        raise _without(model)
    return OutputLayer(layer, weight.detach(), None if bias is None else bias.detach())


def output_module(model: PreTrainedModel) -> nn.Module:
    """A model's output layer alone, which costs nothing to ask for.

    Raises:
        UnsupportedModelError: it has none.
    """
    layer: Any = model.get_output_embeddings()
    if not isinstance(layer, nn.Module):
        raise _without(model)
    return layer


def _without(model: PreTrainedModel) -> UnsupportedModelError:
    name = type(model).__name__
    return UnsupportedModelError(f"{name} has no output layer to draft from; choose a causal LM with an lm_head")
