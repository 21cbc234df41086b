"""EAGLE heads: one decoder layer on the hidden states that a target has along its text.

Li et al., "EAGLE" (arXiv 2401.15077) and "EAGLE-3" (arXiv 2503.01840). At position i the layer reads the embedding of
token i + 1 beside a feature of the target at position i, and guesses token i + 2. The feature is made by one linear
layer of the hidden states that the target has before a low, a middle and a high layer. Along its own draft, of which
the target has computed nothing, the layer reads its own last hidden state in place of the feature. It may score the
frequent tokens alone (FR-Spec, Zhao et al., arXiv 2502.14856).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ...models.identity import weights_digest
from ...models.linear_layers import can_prepack, prepack_linears, unpack_linears
from ...models.output_layer import output_layer, output_module
from .layer import EagleHeadError, EagleLayer, HeadShape, Norm

_FIRST_POSITIONS = 1024


class EagleHead(nn.Module):
    """A head, whose parameters have the names of public EAGLE-3 checkpoints.

    Args:
        shape: its sizes.

    Attributes:
        shape: as given.
        name: how reports call it.
        fc: from the target's hidden states to a feature.
        midlayer: the decoder layer.
        norm: before the output layer.
        lm_head: the head's own output layer; None where it uses the target's.
        embed_tokens: the head's own embeddings; None where it uses the target's.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape, self.name = shape, "eagle"
        self.fc = nn.Linear(len(shape.layers) * shape.target_hidden_size, shape.hidden_size, bias=False)
        self.midlayer = EagleLayer(shape)
        self.norm = Norm(shape.hidden_size, shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.outputs, bias=False) if shape.own_output else None
        self.embed_tokens = nn.Embedding(shape.vocabulary_size, shape.hidden_size) if shape.own_embeddings else None
        self._tokens: Tensor
        self.register_buffer("_tokens", torch.tensor(shape.vocabulary, dtype=torch.int64), persistent=False)
        # In tuples, so that they do not become parts of the head.
        self._attached: tuple[nn.Module, nn.Module, PreTrainedModel] | None = None
        self._rotation: tuple[Tensor, Tensor] | None = None

    @classmethod
    def for_target(
        cls,
        model: PreTrainedModel,
        *,
        layers: Sequence[int] = (),
        vocabulary: Sequence[int] = (),
        intermediate_size: int | None = None,
        own_output: bool = False,
        seed: int = 0,
    ) -> EagleHead:
        """An untrained head of a target, attached to it.

        Args:
            model: a causal LM whose config names heads and neurons as Llama's does.
            layers: layers of the target whose input is read; by default a low, a middle and the last one.
            vocabulary: tokens that the head may propose; by default all.
            intermediate_size: neurons of its feed-forward part; by default as many as in a layer of the target.
            own_output: give it a copy of the target's output layer, to be trained with it.
            seed: of its weights.

        Raises:
            EagleHeadError: the target lacks what the head is made after, or a number makes no sense.
            UnsupportedModelError: the target has no output layer.
        """
        weight = output_layer(model).weight
        tokens, hidden = weight.shape
        config: Any = model.config.get_text_config(decoder=True)
        try:
            count, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
            shape = HeadShape(
                hidden_size=hidden,
                target_hidden_size=int(config.hidden_size),
                vocabulary_size=tokens,
                layers=tuple(layers) or usual_layers(count),
                heads=heads,
                kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
                head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
                intermediate_size=intermediate_size or int(config.intermediate_size),
                vocabulary=tuple(sorted(set(map(int, vocabulary)))),
                own_output=own_output,
                norm_eps=float(config.rms_norm_eps),
                rope=dict(config.rope_parameters),
                context=int(config.max_position_embeddings),
            )
        except (AttributeError, TypeError) as error:
            raise EagleHeadError(
                f"no head can be made after {model.name_or_path or type(model).__name__}, whose configuration is not "
                f"like Llama's ({error}); choose another draft"
            ) from error
        if shape.layers[-1] >= count:
            raise EagleHeadError(
                f"the target has {count} layers, counted from 0, and layer {shape.layers[-1]} is asked for"
            )
        head = cls(shape)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in head.named_parameters():
            if parameter.ndim == 2:
                # What is added to the residual stream begins small.
                spread = parameter.shape[1] ** -0.5 * (
                    0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                )
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        if head.lm_head is not None:
            with torch.no_grad():
                head.lm_head.weight.copy_(weight[head._tokens] if shape.vocabulary else weight)
        head.attach(model)
        return head

    def attach(self, model: PreTrainedModel) -> None:
        """Move to this target's device, and use its embeddings and its output layer where the head has none.

        Raises:
            EagleHeadError: the target has another width or vocabulary, or fewer layers.
            UnsupportedModelError: it has no output layer.
        """
        weight, shape = output_layer(model).weight, self.shape
        config: Any = model.config.get_text_config(decoder=True)
        there = (len(weight), int(config.hidden_size))
        if there != (shape.vocabulary_size, shape.target_hidden_size) or config.num_hidden_layers <= shape.layers[-1]:
            raise EagleHeadError(
                f"head {self.name} is for a target of {shape.vocabulary_size} tokens, width {shape.target_hidden_size} "
                f"and more than {shape.layers[-1]} layers, but {model.name_or_path or type(model).__name__} has "
                f"{there[0]} tokens, width {there[1]} and {config.num_hidden_layers} layers; train one for it: "
                "python -m specgym.decoding.fit eagle --target ..."
            )
        self.to(device=weight.device)
        output = output_module(model) if self.lm_head is None else self.lm_head
        if self.lm_head is None and shape.vocabulary:
            output = self.rows_of(model)
        embeddings: Any = model.get_input_embeddings() if self.embed_tokens is None else self.embed_tokens
        self._attached, self._rotation = (embeddings, output, model), None

    def serving(self, model: PreTrainedModel) -> EagleHead:
        """This head, attached to a target; a copy of it if it serves another one. Errors as for `attach`."""
        if self._attached is None or self._attached[2] is model:
            self.attach(model)
            return self
        other = EagleHead(self.shape).to(self._tokens.device)
        other.load_state_dict(self.state_dict())
        other.name = self.name
        other.attach(model)
        return other.eval()

    def pack(self) -> None:
        """Keep matrices in float16 on a CPU where they are such numbers, as target and drafts have them."""
        for module in (self, self.output) if self.shape.vocabulary else (self,):
            if can_prepack(module):
                prepack_linears(module, None)

    def unpack(self) -> None:
        """Make packed matrices plain again."""
        for module in (self, self.output) if self.shape.vocabulary else (self,):
            unpack_linears(module)

    def digest(self) -> str:
        """Return a SHA-256 over sizes, tokens and weights, 64 hex digits."""
        facts = json.dumps(asdict(self.shape), sort_keys=True)
        return hashlib.sha256(f"{facts} {weights_digest(self)}".encode()).hexdigest()

    @property
    def model(self) -> PreTrainedModel:
        """The target."""
        return self._target()[2]

    @property
    def tokens(self) -> Tensor:
        """Tokens that the head can propose, ascending, shape (outputs,), int64; empty for all."""
        return self._tokens

    @property
    def embeddings(self) -> nn.Module:
        """Embeddings of tokens: the head's own or the target's."""
        return self._target()[0]

    @property
    def output(self) -> nn.Module:
        """Output layer: the head's own, or the target's with the rows of the tokens that the head proposes."""
        return self._target()[1]

    def fused(self, states: Tensor) -> Tensor:
        """Features of positions.

        Args:
            states: of the target, those of its layers one behind the other, shape (..., layers * target width).

        Returns:
            Shape (..., h).
        """
        return cast(Tensor, self.fc(self.prepared(states)))

    def prepared(self, states: Tensor) -> Tensor:
        """Hidden states of the target as `fc` reads them, of equal shape."""
        if not self.shape.norm_features:
            return states
        parts = states.unflatten(-1, (len(self.shape.layers), self.shape.target_hidden_size))
        return functional.rms_norm(parts, parts.shape[-1:], eps=self.shape.norm_eps).flatten(-2)

    def rotation(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions from ``start`` up to ``end``, each of shape (end - start, head size)."""
        if self._rotation is None or len(self._rotation[0]) < end:
            self._rotation = self._rotations(max(end, _FIRST_POSITIONS, 2 * (end - 1)))
        cosines, sines = self._rotation
        return cosines[start:end], sines[start:end]

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores of the tokens that the head proposes, shapes (..., h) to (..., outputs)."""
        return cast(Tensor, self.output(self.norm(hidden)))

    def all_scores(self, hidden: Tensor) -> Tensor:
        """Scores of the whole vocabulary, shapes (n, h) to (n, vocabulary); the least number for all other tokens."""
        scores = self.scores(hidden)
        if not self.shape.vocabulary:
            return scores
        whole = scores.new_full((*scores.shape[:-1], self.shape.vocabulary_size), torch.finfo(scores.dtype).min)
        return whole.index_copy_(-1, self._tokens, scores)

    def rows_of(self, model: PreTrainedModel) -> nn.Linear:
        """Output layer of a target with the rows of the tokens that the head proposes; a copy, which stays fixed."""
        _, weight, bias = output_layer(model)
        chosen = self._tokens if self.shape.vocabulary else slice(None)
        rows = nn.Linear(weight.shape[1], self.shape.outputs, bias is not None, device="meta")
        rows.weight = nn.Parameter(weight[chosen].to(self.norm.weight.dtype), requires_grad=False)
        if bias is not None:
            rows.bias = nn.Parameter(bias[chosen].to(self.norm.weight.dtype), requires_grad=False)
        return rows

    def _target(self) -> tuple[nn.Module, nn.Module, PreTrainedModel]:
        if self._attached is None:
            raise RuntimeError("a head needs its target's embeddings and output layer; call attach(model) first")
        return self._attached

    def _rotations(self, count: int) -> tuple[Tensor, Tensor]:
        shape, device = self.shape, self._tokens.device
        config = LlamaConfig(
            hidden_size=shape.heads * shape.head_dim,
            num_attention_heads=shape.heads,
            head_dim=shape.head_dim,
            max_position_embeddings=min(shape.context, 2**20),
            rope_parameters=shape.rope,
        )
        places = torch.arange(count, device=device)[None]
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            cosines, sines = LlamaRotaryEmbedding(config).to(device)(torch.empty(0, device=device), places)
        dtype = self.norm.weight.dtype
        return cosines[0].to(dtype), sines[0].to(dtype)


def usual_layers(count: int) -> tuple[int, ...]:
    """Layers whose input a head reads by default, of ``count``: a low, a middle and the last one."""
    return tuple(sorted({min(2, count - 1), count // 2, count - 1}))
