"""Dynamic int8: linear layers of a draft with weights of eight bits, and inputs that are rounded to eight as they come.

A draft reads a token a pass, and what a CPU then waits for is weights: with a fourth of their bytes a wide layer is the
faster, the wider it is (`benchmarks/cheaper_drafts.py`). The scale of the inputs is that of all tokens of a pass, so
that a token's scores depend a little on what it is read with: of no consequence for a draft, each of whose tokens is
verified by the distribution that it was drawn from, and ruled out for a target (`trial.settle`).

Weights have a scale an output, symmetric; biases, norms and embeddings stay as they are. The layers are torch's
(`torch.ao.quantization.quantize_dynamic`; deprecated in torch 2.13 and still there), in which rounding the inputs and
multiplying is one operation.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..models.output_layer import ReducedOutput

SMALLEST_QUANTISED = 2**17
"""Layers with fewer weights stay as they are: rounding a token's inputs takes about as long as multiplying so many."""


def quantise(model: PreTrainedModel) -> int:
    """Quantise the large linear layers of a draft to int8, in place; returns how many were.

    What the model shares with another one, such as embeddings that are its output layer as well, stays whole for that.

    Args:
        model: in float32 on a CPU.

    Raises:
        UnsupportedModelError: it is elsewhere or of another type, this build of torch has no such arithmetic, or none
            of its layers is a large linear one.
    """
    name = model.name_or_path or type(model).__name__
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise UnsupportedModelError(
            f"{name} is {model.dtype} on {model.device}, and int8 drafts are for CPUs, made of float32: leave int8 out "
            "(:int8 in a pair's name), or load the pair with dtype=torch.float32 and device='cpu'"
        )
    if torch.backends.quantized.engine == "none" or not hasattr(torch.ao.quantization, "quantize_dynamic"):
        raise UnsupportedModelError(
            f"{name} cannot be quantised: torch {torch.__version__} has no dynamic int8 layers; leave int8 out"
        )
    quantised = 0
    for parent in list(model.modules()):
        for place, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer.weight.numel() >= SMALLEST_QUANTISED:
                setattr(parent, place, _int8(layer.weight, layer.bias))
                quantised += 1
        if isinstance(parent, ReducedOutput):
            bias = None if parent.bias is None else parent.bias[parent.tokens]
            parent.score_by(_int8(parent.weight[parent.tokens], bias))
            quantised += 1
    if not quantised:
        raise UnsupportedModelError(
            f"{name} has no linear layer of {SMALLEST_QUANTISED:,} weights or more, and smaller ones are no faster in "
            "int8: leave int8 out"
        )
    return quantised


@torch.no_grad()
def _int8(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A linear layer of int8, with copies of a weight, shape (outputs, inputs), and a bias, shape (outputs,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    scales: Any = torch.ao.quantization.per_channel_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear: scales}, inplace=True)[0]
