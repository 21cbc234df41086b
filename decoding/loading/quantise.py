"""Dynamic int8: linear layers of a draft with weights of eight bits, and inputs that are rounded to eight as they come.

A draft reads a token a pass, and what a CPU then waits for is weights: with a fourth of their bytes a wide layer is the
faster, the wider it is (`benchmarks/cheaper_drafts.py`).

Every token's inputs have a scale of their own, and sums of whole numbers have no rounding, so that a layer makes the
same of a token whatever it is read with. A deep model does not: the last bits of its attention depend on the shape of a
pass, and where they tip an input over to the next whole number, that is no last bit any more
(`findings/int8-activations-tip-over.sh`). It is of no consequence for a draft, each of whose tokens is verified by the
distribution that it was drawn from, and rules such layers out for a target.

Weights have a scale an output, symmetric; biases, norms and embeddings stay as they are. FBGEMM multiplies, by way of
torch.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..models.output_layer import ReducedOutput

SMALLEST_QUANTISED = 2**17
"""Layers with fewer weights stay as they are: rounding a token's inputs takes about as long as multiplying so many."""

_LEAST = torch.finfo(torch.float32).tiny
_LEVELS = 127, 63
"""Largest whole number that an input is rounded to. The smaller is for processors that add products in 16 bits."""


class Int8Linear(nn.Module):
    """A linear layer in int8, for inference on a CPU: its numbers are copies, rounded to eight bits.

    Args:
        weight: float32, shape (outputs, inputs).
        bias: shape (outputs,), which the layer shares; None for none.

    Attributes:
        int8: the weight as FBGEMM has it.
        weight: None, as there is no float one.
        bias: as given.

    Raises:
        UnsupportedModelError: this build of torch does not multiply eight bits rightly.
    """

    weight: None = None
    rounds_inputs = True
    """By which targets are told that may not have such layers."""

    @torch.no_grad()
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._levels = _levels()
        self.out_features, self.in_features = weight.shape
        self.int8: Any = _packed(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shapes (..., inputs) to (..., outputs)."""
        largest = inputs.abs().amax(-1, keepdim=True).clamp(min=_LEAST)
        product = _times(inputs / largest, self.int8, self._levels) * largest
        return product if self.bias is None else product.add_(self.bias)

    def extra_repr(self) -> str:
        """Text of this layer in `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def get_extra_state(self) -> Tensor:
        """The rounded weight, for `state_dict`."""
        weight: Tensor = torch.ops.quantized.linear_unpack(self.int8)[0]
        return weight

    def set_extra_state(self, state: Tensor) -> None:
        """Take a rounded weight as `get_extra_state` returns it."""
        self.int8 = torch.ops.quantized.linear_prepack(state, None)


def _packed(weight: Tensor) -> Any:
    scale = (weight.abs().amax(1).double() / 127).clamp(min=_LEAST)
    with warnings.catch_warnings():  # of deprecation (torch 2.13); there is no other way to FBGEMM's layout
        warnings.simplefilter("ignore", UserWarning)
        rounded = torch.quantize_per_channel(weight, scale, torch.zeros_like(scale, dtype=torch.int64), 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(rounded, None)


def _times(inputs: Tensor, packed: Any, levels: int) -> Tensor:
    """Round inputs between -1 and 1 to `levels` steps on either side of 0, and multiply."""
    product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(
        inputs, 1 / levels, levels + 1, packed
    )
    return product


@lru_cache(maxsize=1)
def _levels() -> int:
    """The largest of `_LEVELS` at which products are right, extreme ones included."""
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = torch.randint(-127, 128, (40, 131), generator=generator).float()
    numbers[:, 0], numbers[:2] = 127, 127  # every row has a scale of 1; products of two rows are as large as can be
    for levels in _LEVELS:
        inputs = torch.randint(-levels, levels + 1, (7, 131), generator=generator).float()
        inputs[:2] = levels
        try:
            product = _times(inputs / levels, _packed(numbers), levels) * levels
        except (RuntimeError, AttributeError) as error:
            raise UnsupportedModelError(
                f"torch {torch.__version__} multiplies no int8 here ({str(error).splitlines()[0]}); leave int8 out"
            ) from error
        if torch.allclose(product, inputs @ numbers.T, rtol=1e-5, atol=0.01):
            return levels
    raise UnsupportedModelError(f"torch {torch.__version__} multiplies int8 wrongly on this processor; leave int8 out")


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
            f"{name} is {model.dtype} on {model.device}, and int8 is for CPUs, made of float32: leave int8 out "
            "(:int8 in a pair's name), or load the pair with dtype=torch.float32 and device='cpu'"
        )
    quantised = 0
    for parent in list(model.modules()):
        for place, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer.weight.numel() >= SMALLEST_QUANTISED:
                setattr(parent, place, Int8Linear(layer.weight, layer.bias))
                quantised += 1
        if isinstance(parent, ReducedOutput):
            bias = None if parent.bias is None else parent.bias[parent.tokens]
            parent.score_by(Int8Linear(parent.weight[parent.tokens], bias))
            quantised += 1
    if not quantised:
        raise UnsupportedModelError(
            f"{name} has no linear layer of {SMALLEST_QUANTISED:,} weights or more, and smaller ones are no faster in "
            "int8: leave int8 out"
        )
    return quantised
