"""Linear layers whose weights are reordered once for oneDNN, so that a CPU pass over a few tokens costs little more
than a pass over one.

torch multiplies a short batch by a plain weight with a routine meant for large ones; the time then grows with every
token. With a weight in oneDNN's blocked layout it stays nearly flat up to a dozen tokens, which is what makes checking
a draft cheaper than generating its tokens one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SMALLEST_PREPACKED = 2**19
"""Weights of fewer elements stay as they are: there the call into oneDNN costs more than the layout saves
(`benchmarks/forward_cost.py` measures both)."""

NARROWEST_PREPACKED = 512
"""Hidden size below which a model is left alone unless asked for: on the shipped models, 256 wide, prepacking their
output layer made decoding 1 to 5 % slower."""


class PrepackedLinear(nn.Module):
    """An inference-only replacement of `nn.Linear` (or GPT-2's `Conv1D`), float32 or bfloat16, on CPU.

    The plain weight is not kept: `weight` rebuilds it on demand, and so does `state_dict`, so that a model can still be
    saved. A weight that another module uses too (tied embeddings) stays there, and is held here a second time.

    Args:
        weight: shape (outputs, inputs).
        bias: shape (outputs,), or None.
        saved_transposed: `state_dict` gives the weight as (inputs, outputs), as `Conv1D` keeps it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, saved_transposed: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._saved_transposed = saved_transposed
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)

    @property
    def weight(self) -> Tensor:
        """The plain weight, shape (outputs, inputs), rebuilt at every access."""
        return self._packed.to_dense()

    def forward(self, inputs: Tensor) -> Tensor:
        """Shapes (..., inputs) to (..., outputs)."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrepackedLinear:
        moved = fn(torch.empty(0, dtype=self._packed.dtype))
        if moved.device.type != "cpu" or moved.dtype != self._packed.dtype:
            raise RuntimeError(
                f"a prepacked model stays {self._packed.dtype} on CPU, not {moved.dtype} on {moved.device}; "
                "load it again with prepack=False"
            )
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.t().contiguous() if self._saved_transposed else self.weight

    def extra_repr(self) -> str:
        """Text of this layer in `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def can_prepack(model: nn.Module) -> bool:
    """True if this build and this model's device and type allow prepacking."""
    parameter = next(model.parameters(), None)
    return (
        parameter is not None
        and parameter.device.type == "cpu"
        and (parameter.dtype == torch.float32 or (parameter.dtype == torch.bfloat16 and _has_bfloat16()))
        and torch.backends.mkldnn.is_available()
    )


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepack_linears(model: nn.Module, smallest: int = SMALLEST_PREPACKED) -> int:
    """Replace the linear layers with at least `smallest` weights, in place; returns how many were replaced.

    The plain weights of a block are freed before the next block is packed, so that memory does not double.
    """
    replaced = 0
    # Nothing here may hold on to the linear layers, or their plain weights would stay alive to the end.
    for parent in [module for module in model.modules() if next(module.children(), None) is not None]:
        for name, layer in parent.named_children():
            if not isinstance(layer, nn.Linear | Conv1D) or type(layer) not in (nn.Linear, Conv1D):
                continue  # a subclass may compute something else
            if layer.weight.numel() < smallest:
                continue
            transposed = isinstance(layer, Conv1D)  # as GPT-2 keeps its weights
            weight = layer.weight.t() if transposed else layer.weight
            setattr(parent, name, PrepackedLinear(weight, layer.bias, transposed).train(layer.training))
            replaced += 1
    return replaced
