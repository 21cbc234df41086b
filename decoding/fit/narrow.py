"""Narrower feed-forward parts for a draft: of the neurons that its layers took from the target, the strongest."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import FitError
from .shrink import layers_of

# What leads into the neurons and out of them, by the names of transformers: Llama and its kin, GPT-NeoX, OPT and Phi.
_PARTS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("fc1",), "fc2"),
)
_WIDTHS = ("intermediate_size", "ffn_dim")


def feed_forward_width(model: PreTrainedModel) -> int:
    """How many neurons the feed-forward part of every layer has.

    Raises:
        FitError: they are not made of linear layers with known names, or layers differ; the message names the
            architecture.
    """
    widths = {outward.in_features for _, outward in map(_parts, layers_of(model)[1])}
    if len(widths) != 1 or getattr(model.config, _width_name(model)) not in widths:
        raise FitError(f"the layers of {type(model).__name__} are not equally wide: leave out --intermediate")
    return int(widths.pop())


def narrow(model: PreTrainedModel, width: int) -> None:
    """Keep the strongest neurons of every layer's feed-forward part, in place.

    A neuron is as strong as the product of the norms of all that leads into it and of what leads out: what it can add
    to the hidden state is at most in proportion to that. The others are cut out, as in structured pruning (LLM-Pruner,
    Ma et al., arXiv 2305.11627), and training makes up for them.

    Args:
        model: a draft whose layers are its own.
        width: how many neurons to keep, 1 to as many as there are.

    Raises:
        FitError: as for `feed_forward_width`, or there are not so many neurons.
    """
    present = feed_forward_width(model)
    if not 1 <= width <= present:
        raise FitError(
            f"--intermediate {width} makes no sense: the target's layers have 1 to {present} neurons to keep"
        )
    for layer in layers_of(model)[1]:
        inward, outward = _parts(layer)
        strength = outward.weight.detach().norm(dim=0)
        for part in inward:
            strength = strength * part.weight.detach().norm(dim=1)
        kept = strength.topk(width).indices.sort().values
        for part in inward:
            _set(part, part.weight[kept], None if part.bias is None else part.bias[kept])
        _set(outward, outward.weight[:, kept], outward.bias)
    setattr(model.config, _width_name(model), width)


def _parts(layer: nn.Module) -> tuple[list[nn.Linear], nn.Linear]:
    """What leads into a layer's neurons, and what leads out of them."""
    for owner in (getattr(layer, "mlp", None), layer):
        for names, name in _PARTS:
            inward, outward = [getattr(owner, each, None) for each in names], getattr(owner, name, None)
            linear = [part for part in inward if isinstance(part, nn.Linear)]
            if len(linear) == len(names) and isinstance(outward, nn.Linear):
                return linear, outward
    known = ", ".join("/".join((*names, name)) for names, name in _PARTS)
    raise FitError(
        f"{type(layer).__name__} has no feed-forward part of linear layers {known}: leave out --intermediate"
    )


def _width_name(model: PreTrainedModel) -> str:
    for name in _WIDTHS:
        if isinstance(getattr(model.config, name, None), int):
            return name
    raise FitError(
        f"the configuration of {type(model).__name__} has no {' or '.join(_WIDTHS)}: leave out --intermediate"
    )


def _set(part: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    part.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        part.bias = nn.Parameter(bias.detach().clone())
    part.out_features, part.in_features = weight.shape
