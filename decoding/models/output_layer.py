"""Output layers, which make scores of a model's last hidden states: finding one, and one that scores some tokens only.

A draft of few layers spends most of its time in the output layer, and a language model writes few of its tokens often:
let it propose the frequent ones alone (FR-Spec, Zhao et al., arXiv 2502.14856; EAGLE-3, Li et al., arXiv 2503.01840).
Its distribution is then 0 for all others, which exact verification takes like any other: texts stay the target's.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .linear_layers import HalfWeight, PrepackedLinear, halved, only_looking


class Logits(NamedTuple):
    """Result of a forward pass, a row a token."""

    scores: Tensor
    """Next-token logits, shape (tokens, vocabulary), float32."""
    hidden: Tensor | None
    """Last hidden states of the tokens after the final norm, from which the output layer makes scores, shape
    (tokens, hidden size); None if not asked for."""


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
    weight: Any = layer.dense() if isinstance(layer, PrepackedLinear) else getattr(layer, "weight", None)
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


@contextlib.contextmanager
def output_layer_watched(model: PreTrainedModel, watched: bool) -> Iterator[list[Tensor]]:
    """Collect what the output layer reads, if it is to be watched, shapes (1, tokens, hidden size).

    transformers' own `output_hidden_states` leaves hooks in every layer behind, which slow all later passes down (by
    a sixth, with layers as small as those of the shipped models), and with which a model cannot be pickled.

    What other threads read with the model meanwhile is theirs.
    """
    states: list[Tensor] = []
    if not watched:
        yield states
        return
    thread = threading.get_ident()

    def keep(_: nn.Module, read: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            states.append(read[0])

    handle = output_module(model).register_forward_pre_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


class ReducedOutput(nn.Module):
    """In the place of an output layer, with the same weight, of which it uses the rows of some tokens.

    The weight stays whole and stays what it is: the embeddings of the model, or the output layer of another one. The
    rows are copied when they are first needed and kept while the weight is the same; in float16 where a decoder reads
    them and they keep every number so (`halved`).

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
        self._kept: tuple[nn.Parameter, int, bool, Tensor | HalfWeight] | None = None
        self.rounded: nn.Module | None = None

    def score_by(self, layer: nn.Module) -> None:
        """Score by another linear layer, shapes (..., h) to (..., n), for instance one of int8 with the same rows."""
        self.rounded, self._kept = layer, None

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores of the tokens alone, shapes (..., h) to (..., n)."""
        if self.rounded is not None:
            return cast("Tensor", self.rounded(hidden))
        rows, bias = self._rows(), None if self.bias is None else self.bias[self.tokens]
        return functional.linear(hidden, rows, bias) if isinstance(rows, Tensor) else rows.times(hidden, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores of the whole vocabulary, shapes (..., h) to (..., vocabulary); the least number for all other tokens.

        That is no infinity, because 0 times infinity is not a number, and 0 times this is 0.
        """
        scores = self.scores(hidden)
        whole = scores.new_full((*scores.shape[:-1], self.weight.shape[0]), torch.finfo(scores.dtype).min)
        return whole.index_copy_(-1, self.tokens, scores)

    @property
    def kept_rows(self) -> Tensor | HalfWeight | None:
        """The rows as the last pass used them; None before the first."""
        return None if self._kept is None else self._kept[-1]

    def extra_repr(self) -> str:
        """Text of this layer in `print(model)`."""
        outputs, inputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}, tokens={len(self.tokens)}, bias={self.bias is not None}"

    def _rows(self) -> Tensor | HalfWeight:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return self.weight[self.tokens]
        weight, version = self.weight, 0 if self.weight.is_inference() else self.weight._version
        decoding = torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        if self._kept is not None:
            of, at, packed, rows = self._kept
            same = of is weight and at == version and packed == decoding
            if same and (rows.device, rows.dtype) == (weight.device, weight.dtype):
                return rows
        rows = weight.detach()[self.tokens]
        rows = (halved(rows) or rows) if decoding else rows
        self._kept = weight, version, decoding, rows
        return rows


def bytes_of_pass(model: nn.Module) -> int:
    """Bytes of the weights that every pass of a model reads; of embeddings it looks up a few rows."""
    total = 0
    with only_looking():
        for module in model.modules():
            if isinstance(module, PrepackedLinear):
                total += module.packed.nbytes
            elif isinstance(module, ReducedOutput):
                rows = module.kept_rows
                total += len(module.tokens) * module.weight[0].nbytes if rows is None else rows.nbytes
            elif not isinstance(module, nn.Embedding):
                total += sum(weight.nbytes for weight in module.parameters(recurse=False))
    return total


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
