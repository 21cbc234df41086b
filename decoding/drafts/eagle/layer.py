"""The decoder layer of an EAGLE head, and the sizes of heads.

Li et al., "EAGLE-3" (arXiv 2503.01840): a layer like Llama's, whose attention reads the embedding of a token beside a
feature, one behind the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import SpecgymError, check_fields, whole_number

_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotations whose frequencies do not depend on the length of the text."""


class EagleHeadError(SpecgymError, ValueError):
    """A head that cannot be used: damaged, or made for another target; the message names it and the way out."""


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a head.

    Attributes:
        hidden_size: width of its layer, h.
        target_hidden_size: width of the target's hidden states.
        vocabulary_size: tokens of the target.
        layers: layers of the target, counted from 0, whose input is read.
        heads: attention heads.
        kv_heads: heads of keys and values; divides `heads`.
        head_dim: width of each.
        intermediate_size: neurons of its feed-forward part.
        vocabulary: tokens that it can propose, ascending; empty for all of them.
        own_output: whether it has an output layer of its own; otherwise it uses that of the target.
        own_embeddings: likewise for embeddings.
        norm_features: whether each hidden state of the target is divided by its root mean square first. Hidden states
            of some layers are hundreds of times larger at some tokens than at others.
        norm_before_residual: whether the residual stream goes on from the normed feature instead of the feature.
        norm_eps: added to mean squares.
        rope: parameters of the rotation of positions, as in transformers' `rope_parameters`.
        context: positions of the longest text.
    """

    hidden_size: int
    target_hidden_size: int
    vocabulary_size: int
    layers: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocabulary: tuple[int, ...] = ()
    own_output: bool = False
    own_embeddings: bool = False
    norm_features: bool = True
    norm_before_residual: bool = False
    norm_eps: float = 1e-5
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    context: int = 2**31

    def __post_init__(self) -> None:
        positive = partial(whole_number, error=EagleHeadError)
        check_fields(self, positive, "hidden_size", "target_hidden_size", "vocabulary_size", "heads", "kv_heads")
        check_fields(self, positive, "head_dim", "intermediate_size", "context")
        if not self.layers or any(low >= high for low, high in pairwise(self.layers)) or self.layers[0] < 0:
            raise EagleHeadError(f"layers must be numbers of the target's layers, ascending, each once: {self.layers}")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise EagleHeadError(f"{self.heads} heads cannot share {self.kv_heads} of keys, of width {self.head_dim}")
        words = self.vocabulary
        if any(low >= high for low, high in pairwise(words)) or (words and not 0 <= words[0] <= words[-1]):
            raise EagleHeadError("vocabulary must list token ids in ascending order, each once")
        if words and words[-1] >= self.vocabulary_size:
            raise EagleHeadError(f"vocabulary lists token {words[-1]}, and the target has {self.vocabulary_size}")
        if self.rope.get("rope_type", "default") not in _FIXED_ROPE:
            raise EagleHeadError(
                f"the rotation {self.rope['rope_type']!r} depends on the length of the text, which no head is made "
                f"for; there are: {', '.join(_FIXED_ROPE)}"
            )
        if not self.own_embeddings and self.hidden_size != self.target_hidden_size:
            raise EagleHeadError(
                f"a head of width {self.hidden_size} cannot read embeddings of a target of width "
                f"{self.target_hidden_size}: it needs embeddings of its own"
            )

    @property
    def outputs(self) -> int:
        """Number of tokens that the head can propose."""
        return len(self.vocabulary) or self.vocabulary_size


class Norm(nn.RMSNorm):
    """Root mean square norm in the type of its weight."""

    def forward(self, states: Tensor) -> Tensor:
        """Norm the last dimension."""
        return super().forward(states.to(self.weight.dtype))  # under autocast, too: mixed types are slow


class _Attention(nn.Module):
    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        linear, both = partial(nn.Linear, bias=False), 2 * shape.hidden_size
        self.q_proj = linear(both, shape.heads * shape.head_dim)
        self.k_proj = linear(both, shape.kv_heads * shape.head_dim)
        self.v_proj = linear(both, shape.kv_heads * shape.head_dim)
        self.o_proj = linear(shape.heads * shape.head_dim, shape.hidden_size)


class _FeedForward(nn.Module):
    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)))


class EagleLayer(nn.Module):
    """Decoder layer whose attention reads a token's embedding beside a feature, each normed.

    Args:
        shape: of the head.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.input_layernorm = Norm(shape.hidden_size, shape.norm_eps)
        self.hidden_norm = Norm(shape.hidden_size, shape.norm_eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.norm_eps)
        self.mlp = _FeedForward(shape)

    def enter(
        self, embedding: Tensor, feature: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values of some positions, and where their residual stream begins.

        Args:
            embedding: of the tokens, shape (..., n, h).
            feature: likewise.
            rotation: cosines and sines of the positions, each of shape (n, head size).

        Returns:
            Queries, shape (..., heads, n, head size), keys and values, shape (..., kv heads, n, head size), all rotated
            but the values, and the residual, shape (..., n, h).
        """
        normed, shape, inner = self.hidden_norm(feature), self.shape, self.self_attn
        both = torch.cat([self.input_layernorm(embedding), normed], -1)
        queries = inner.q_proj(both).unflatten(-1, (shape.heads, shape.head_dim)).transpose(-2, -3)
        keys = inner.k_proj(both).unflatten(-1, (shape.kv_heads, shape.head_dim)).transpose(-2, -3)
        values = inner.v_proj(both).unflatten(-1, (shape.kv_heads, shape.head_dim)).transpose(-2, -3)
        residual = normed if shape.norm_before_residual else feature
        return _rotated(queries, *rotation), _rotated(keys, *rotation), values, residual

    def leave(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Hidden states behind the layer, shape (..., n, h).

        Args:
            residual: as `enter` returned it.
            attended: what the attention gave, shape (..., heads, n, head size).
        """
        hidden: Tensor = residual + self.self_attn.o_proj(attended.transpose(-2, -3).flatten(-2))
        return hidden + cast(Tensor, self.mlp(self.post_attention_layernorm(hidden)))

    def forward(
        self,
        embedding: Tensor,
        feature: Tensor,
        rotation: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Read the last positions of a text, and write their keys and values.

        Args:
            embedding: of the n tokens, shape (n, h).
            feature: likewise.
            rotation: as for `enter`.
            keys: of all positions, those of the n last, which are written here, included; shape (1, kv heads,
                positions, head size).
            values: likewise.
            mask: added to the scores of attention, shape (n, positions); none if the n see everything.

        Returns:
            Hidden states, shape (n, h).
        """
        shape, count = self.shape, embedding.shape[0]
        queries, new_keys, new_values, residual = self.enter(embedding, feature, rotation)
        keys[0, :, -count:] = new_keys
        values[0, :, -count:] = new_values
        queries = (queries * shape.head_dim**-0.5).reshape(shape.kv_heads, -1, shape.head_dim)
        scores = queries @ keys[0].transpose(-1, -2)
        if mask is not None:
            scores = (scores.unflatten(1, (-1, count)) + mask).flatten(1, 2)
        attended = scores.softmax(-1) @ values[0]
        return self.leave(residual, attended.reshape(shape.heads, count, shape.head_dim))


def _rotated(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return states * cosines + torch.cat([-second, first], -1) * sines
