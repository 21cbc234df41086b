"""Linear layers of a model: prepacked for oneDNN, and the output layer, whole or for some tokens.

Linear layers whose weights are reordered once for oneDNN, so that a CPU pass over a few tokens costs little more
than a pass over one.

torch multiplies a short batch by a plain weight with a routine meant for large ones; the time then grows with every
token. With a weight in oneDNN's blocked layout it stays nearly flat up to a dozen tokens, which is what makes checking
a draft cheaper than generating its tokens one after another.

Output layers, which make scores of a model's last hidden states: finding one, and one that scores some tokens only.

A draft of few layers spends most of its time in the output layer, and a language model writes few of its tokens often:
let it propose the frequent ones alone (FR-Spec, Zhao et al., arXiv 2502.14856; EAGLE-3, Li et al., arXiv 2503.01840).
Its distribution is then 0 for all others, which exact verification takes like any other: texts stay the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError

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

    @property
    def nbytes(self) -> int:
        """Bytes of the prepacked weight."""
        return int(self._packed.numel() * self._packed.element_size())

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


class ReducedOutput(nn.Module):
    """In the place of an output layer, with the same weight, of which it uses the rows of some tokens.

    The weight stays whole and stays what it is: the embeddings of the model, or the output layer of another one. The
    rows are copied when they are first needed and kept while the weight is the same.

    Args:
        layer: the output layer: its ``weight`` has shape (vocabulary, h), its ``bias``, if any, (vocabulary,).
        tokens: ids of the tokens that are scored, ascending, each once, shape (n,), int64.

    Attributes:
        weight: of the layer, the very same parameter.
        bias: likewise, or None.
        tokens: as given, on the device of the weight.

    Raises:
        ValueError: ``tokens`` are not such ids of this vocabulary.
    """

    def __init__(self, layer: nn.Module, tokens: Tensor) -> None:
        super().__init__()
        inner: Any = layer
        self.weight: nn.Parameter = inner.weight
        self.bias: nn.Parameter | None = getattr(inner, "bias", None)
        size = len(self.weight)
        if tokens.dtype != torch.int64 or tokens.ndim != 1 or not len(tokens):
            raise ValueError(
                f"the tokens of an output layer are a row of int64, not {tuple(tokens.shape)} {tokens.dtype}"
            )
        if int(tokens[0]) < 0 or int(tokens[-1]) >= size or bool((tokens.diff() <= 0).any()):
            raise ValueError(f"the tokens of an output layer must be ids below {size} in ascending order, each once")
        self.tokens: Tensor
        self.register_buffer("tokens", tokens.to(self.weight.device))
        self._kept: tuple[nn.Parameter, int, Tensor] | None = None

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores of the tokens alone, shapes (..., h) to (..., n)."""
        return functional.linear(hidden, self._rows(), None if self.bias is None else self.bias[self.tokens])

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores of the whole vocabulary, shapes (..., h) to (..., vocabulary); the least number for all other tokens.

        That is no infinity, because 0 times infinity is not a number, and 0 times this is 0.
        """
        scores = self.scores(hidden)
        whole = scores.new_full((*scores.shape[:-1], len(self.weight)), torch.finfo(scores.dtype).min)
        return whole.index_copy_(-1, self.tokens, scores)

    def extra_repr(self) -> str:
        """Text of this layer in `print(model)`."""
        outputs, inputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}, tokens={len(self.tokens)}, bias={self.bias is not None}"

    def _rows(self) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return self.weight[self.tokens]
        weight, version = self.weight, 0 if self.weight.is_inference() else self.weight._version
        if self._kept is not None:
            of, at, rows = self._kept
            if of is weight and at == version and (rows.device, rows.dtype) == (weight.device, weight.dtype):
                return rows
        rows = weight.detach()[self.tokens]
        self._kept = weight, version, rows
        return rows


def reduce_output(model: PreTrainedModel, tokens: Tensor) -> None:
    """Let a model score some tokens only, in place.

    Args:
        model: with an output layer.
        tokens: as for `ReducedOutput`.

    Raises:
        UnsupportedModelError: it has no output layer, or one that cannot be replaced.
        ValueError: the tokens are not ids of its vocabulary in ascending order.
    """
    layer = model.get_output_embeddings()
    if layer is None or getattr(layer, "weight", None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output layer to reduce; choose a causal LM with an lm_head"
        )
    reduced = ReducedOutput(layer, tokens)
    model.set_output_embeddings(reduced)
    if model.get_output_embeddings() is not reduced:
        raise UnsupportedModelError(f"the output layer of {type(model).__name__} cannot be reduced: propose all tokens")


def reduced_output(model: nn.Module) -> ReducedOutput | None:
    """The output layer of a model if it scores some tokens only."""
    layer = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return layer if isinstance(layer, ReducedOutput) else None


def tokens_name(model: PreTrainedModel) -> str | None:
    """Name in a checkpoint of the tokens that such a model scores; None if it has no output layer."""
    layer = model.get_output_embeddings()
    return next((f"{name}.tokens" for name, module in model.named_modules() if module is layer), None)
