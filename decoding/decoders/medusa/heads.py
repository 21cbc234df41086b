"""Medusa heads: small networks on a target's last hidden state that guess the tokens after the next one.

Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (arXiv 2401.10774). From
the hidden state of a position the target's own output layer predicts the next token, and head k the token k places
after that: softmax(output(SiLU(W h + b) + h)). With W at 0, where training starts, it predicts what the target does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ...errors import SpecgymError, check_fields, whole_number
from ...models.identity import weights_digest
from ...models.output_layer import output_layer


class MedusaHeadsError(SpecgymError, ValueError):
    """Heads that cannot be used: damaged, or made for another target; the message names them and the way out."""


@dataclass(frozen=True)
class HeadsShape:
    """Sizes of heads.

    Attributes:
        heads: how many, K.
        hidden_size: width of the target's last hidden state, h.
        vocabulary_size: of the target.
        blocks: residual blocks of each head, one after another.
        own_output: whether each head has an output layer of its own; otherwise all use the target's.
        vocabulary: the tokens that heads can propose, ascending; empty for all of them. What they leave out is never
            drafted, which costs speed and never changes a text.
    """

    heads: int
    hidden_size: int
    vocabulary_size: int
    blocks: int = 1
    own_output: bool = False
    vocabulary: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("heads", 1), ("hidden_size", 1), ("vocabulary_size", 1), ("blocks", 0)):
            check_fields(self, partial(whole_number, at_least=least, error=MedusaHeadsError), name)
        tokens = self.vocabulary
        if any(low >= high for low, high in pairwise(tokens)) or (
            tokens and not 0 <= tokens[0] <= tokens[-1] < self.vocabulary_size
        ):
            raise MedusaHeadsError(
                f"vocabulary must list token ids below {self.vocabulary_size} in ascending order, each once"
            )

    @property
    def outputs(self) -> int:
        """Number of tokens that heads can propose."""
        return len(self.vocabulary) or self.vocabulary_size


class MedusaHeads(nn.Module):
    """K heads, computed together.

    Args:
        shape: what they are made of.

    Attributes:
        shape: as given.
        weight: of the blocks, shape (blocks, K, h, h), 0 at first.
        bias: of the blocks, shape (blocks, K, h), 0 at first.
        output: the heads' own output layers, shape (K, outputs, h), or None where they use the target's.
        accuracies: on held-out text, how often the token that a head ranks first, second, ... was right: rows of
            shares, shape (K, ranks); empty if that was never measured.
    """

    def __init__(self, shape: HeadsShape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.zeros(shape.blocks, shape.heads, shape.hidden_size, shape.hidden_size))
        self.bias = nn.Parameter(torch.zeros(shape.blocks, shape.heads, shape.hidden_size))
        self.output: nn.Parameter | None = None
        if shape.own_output:
            self.output = nn.Parameter(torch.zeros(shape.heads, shape.outputs, shape.hidden_size))
        self.accuracies: tuple[tuple[float, ...], ...] = ()
        self._tokens: Tensor
        self.register_buffer("_tokens", torch.tensor(shape.vocabulary, dtype=torch.int64), persistent=False)
        self._attached: tuple[nn.Module | Tensor | None, Tensor | None, torch.dtype] | None = None
        self._model: tuple[PreTrainedModel, ...] = ()  # in a tuple, so that it does not become a part of the heads

    @classmethod
    def for_target(
        cls,
        model: PreTrainedModel,
        heads: int = 5,
        *,
        blocks: int = 1,
        own_output: bool = False,
        vocabulary: Sequence[int] = (),
    ) -> MedusaHeads:
        """Untrained heads of a target, attached to it: all predict what the target predicts for the next token.

        Args:
            model: any causal LM with an output layer.
            heads: how many.
            blocks: residual blocks of each.
            own_output: give each head a copy of the target's output layer, to be trained with it.
            vocabulary: tokens that heads may propose; by default all.

        Raises:
            UnsupportedModelError: the model has no output layer.
            MedusaHeadsError: a number makes no sense.
        """
        weight = output_layer(model).weight
        outputs, hidden = weight.shape
        new = cls(HeadsShape(heads, hidden, outputs, blocks, own_output, tuple(sorted(set(map(int, vocabulary))))))
        if new.output is not None:
            with torch.no_grad():
                new.output.copy_(new._rows(weight).expand_as(new.output))
        new.attach(model)
        return new

    def attach(self, model: PreTrainedModel) -> None:
        """Move to this target's device, and use its output layer where the heads have none of their own.

        The layer's parameters do not become the heads'.

        Raises:
            MedusaHeadsError: the target has another width or vocabulary.
            UnsupportedModelError: it has no output layer.
        """
        layer, weight, bias = output_layer(model)
        outputs, hidden = weight.shape
        expected = (self.shape.vocabulary_size, self.shape.hidden_size)
        if (outputs, hidden) != expected:
            raise MedusaHeadsError(
                f"these heads are for a target of {expected[0]} tokens and width {expected[1]}, but "
                f"{model.name_or_path or type(model).__name__} has {outputs} tokens and width {hidden}; train heads "
                "for it: python -m specgym.decoding.fit medusa --target ..."
            )
        self.to(device=weight.device)
        self._model = (model,)
        bias = None if bias is None else self._rows(bias)
        if self.output is not None:
            self._attached = None, bias, self.output.dtype
        elif self.shape.vocabulary:
            self._attached = self._rows(weight), bias, weight.dtype
        else:
            self._attached = layer, bias, weight.dtype

    def serving(self, model: PreTrainedModel) -> MedusaHeads:
        """These heads, attached to a target; a copy of them if they serve another one. Errors as for `attach`."""
        new = self
        if any(other is not model for other in self._model):
            new = MedusaHeads(self.shape).to(self.weight.device, self.weight.dtype)
            new.load_state_dict(self.state_dict())
            new.accuracies = self.accuracies
        new.attach(model)
        return new

    def digest(self) -> str:
        """Return a SHA-256 over weights, tokens, and accuracies, by which trees are built; 64 hex digits."""
        return hashlib.sha256(f"{self.shape} {self.accuracies} {weights_digest(self)}".encode()).hexdigest()

    def features(self, hidden: Tensor, heads: int | None = None) -> Tensor:
        """Inputs of the output layers.

        Args:
            hidden: last hidden states of the target, after its final norm, shape (..., h).
            heads: only the first so many; by default all.

        Returns:
            Shape (heads, ..., h).
        """
        count = self.shape.heads if heads is None else heads
        flat = hidden.reshape(-1, self.shape.hidden_size).to(self.weight.dtype).expand(count, -1, -1)
        for block in range(self.shape.blocks):
            weight, bias = self.weight[block, :count], self.bias[block, :count, None]
            flat = flat + functional.silu(torch.baddbmm(bias, flat, weight.mT))
        return flat.reshape(count, *hidden.shape[:-1], self.shape.hidden_size)

    def forward(self, hidden: Tensor, heads: int | None = None) -> Tensor:
        """Scores of the tokens that heads can propose, shape (heads, ..., outputs). Arguments as for `features`.

        Raises:
            RuntimeError: the heads are not attached to a target.
        """
        if self._attached is None:
            raise RuntimeError("heads need their target's output layer; call attach(model) first")
        shared, bias, dtype = self._attached
        features = self.features(hidden, heads).to(dtype)
        if isinstance(shared, nn.Module):
            scores: Tensor = shared(features)
        elif shared is not None:
            scores = functional.linear(features, shared, bias)
        else:
            assert self.output is not None
            flat = features.reshape(len(features), -1, self.shape.hidden_size) @ self.output[: len(features)].mT
            scores = flat.reshape(*features.shape[:-1], self.shape.outputs)
            scores = scores if bias is None else scores + bias
        return scores

    def candidates(self, hidden: Tensor, heads: int, ranks: int) -> Tensor:
        """The likeliest tokens of the first heads after one position.

        Args:
            hidden: of the position, shape (h,).
            heads: how many heads.
            ranks: how many tokens of each, at most `HeadsShape.outputs`.

        Returns:
            Token ids, the likeliest first, shape (heads, ranks), int64.
        """
        places = self(hidden, heads).topk(ranks, dim=-1).indices
        return self._tokens[places] if self.shape.vocabulary else places

    def places_of(self, tokens: Tensor) -> Tensor:
        """Places of tokens among the outputs, int64, of equal shape; -100 (which losses ignore) for tokens left out."""
        if not self.shape.vocabulary:
            return tokens
        places = torch.searchsorted(self._tokens, tokens).clamp_(max=len(self._tokens) - 1)
        return torch.where(self._tokens[places] == tokens, places, -100)

    def _rows(self, values: Tensor) -> Tensor:
        """Select the rows of the tokens that heads can propose, from values of all tokens along the first dimension."""
        return values[self._tokens.to(values.device)] if self.shape.vocabulary else values
