"""Passes of one encoder-decoder over the texts of several sources, whose decoder numbers positions by its cache.

The sources' keys and values lie side by side like the texts' own, and a mask hides where a source has ended. Positions
these decoders do not take: they count from the length of the cache, one number for all texts. Those that add a vector
for each position go by a length that differs from text to text, and those whose attention adds a bias for each distance
(T5 and its kin) are given the biases of every text's own distances. A trial tells whether a model reads rightly so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ..attention import numbers, rows_behind
from ..joint.cache import cache_of
from ..joint.passes import Inputs, JoinedPasses

if TYPE_CHECKING:  # which imports this module
    from ..language_model import LanguageModel


class PassesWithSources(JoinedPasses):
    """Passes of one encoder-decoder over several texts, each of which has a source.

    Args:
        model: as for `JoinedPasses`.
        texts: likewise.
        shapes: likewise.
    """

    def __init__(self, model: LanguageModel, texts: int = 1, shapes: Sequence[Tensor] = ()) -> None:
        super().__init__(model, texts, shapes)
        parts = list(model.model.get_decoder().modules())
        self._embeddings = [part for part in parts if "Position" in type(part).__name__]
        self._biases: list[Any] = [part for part in parts if getattr(part, "has_relative_attention_bias", False)]

    def trial_text(self, number: int) -> LanguageModel:
        """Begin a text after a source whose length goes by the number."""
        ids = self._model.source_vocabulary or self._model.vocabulary_size
        return self._model.begin([token % ids for token in range(3, 6 + 4 * number)])[0]

    def _scores(self, inputs: Inputs, last: int) -> Tensor:
        texts, count = inputs.tokens.shape
        crossed, mask = self._sources(inputs)
        # As long as each text's cache would be before each of its tokens, were they read in a row.
        lengths = inputs.positions - numbers(count, inputs.positions.device)[:count]
        cache = cache_of(inputs.stored, lengths, inputs.end, inputs.places)
        states = inputs.positions.new_zeros(1, dtype=self._model.dtype)  # nothing is computed from them any more
        arguments: dict[str, Any] = {
            "encoder_outputs": BaseModelOutput(states.expand(texts, mask.shape[-1], self._model.hidden_size)),
            "attention_mask": mask,
            "decoder_input_ids": inputs.tokens,
            "decoder_attention_mask": inputs.mask,
            "past_key_values": EncoderDecoderCache(cache, crossed),
        }

        def in_rows(_: object, __: object, embedded: Tensor) -> Tensor:
            return embedded.reshape(texts, count, -1)  # some have a dimension more

        handles = [part.register_forward_hook(in_rows) for part in self._embeddings]
        for part in self._biases:
            part.compute_bias = partial(_biases, part, inputs.positions)
        try:
            scores: Tensor = self._model.model(**arguments, use_cache=True, return_dict=True).logits
        finally:
            for handle in handles:
                handle.remove()
            for part in self._biases:
                del part.compute_bias
        return scores

    def _sources(self, inputs: Inputs) -> tuple[Cache, Tensor]:
        """Keys and values of the texts' sources, and which of them each text has, shape (texts, 1, 1, source)."""
        slots = [slot.source for slot in inputs.slots if slot.source is not None]
        cache, longest = self.cache.sources, max(slot.length for slot in slots)
        assert cache is not None
        stored, _ = cache.rows(slots, longest)
        layers: list[Any] = []
        for keys, values in zip(stored[::2], stored[1::2], strict=True):
            layer: Any = DynamicLayer()
            layer.keys, layer.values, layer.is_initialized = keys[:, :, :longest], values[:, :, :longest], True
            layers.append(layer)
        ends = torch.tensor([[slot.length - 1] for slot in slots], device=inputs.tokens.device)
        return Cache(layers=layers), rows_behind(ends, longest, self._model.dtype)


def _biases(
    part: Any, positions: Tensor, _: int, columns: int, device: torch.device | None = None, **__: Any
) -> Tensor:
    """Biases of the attention of several texts, shape (texts, heads, tokens, columns), as `T5Attention.compute_bias`.

    What is ahead of a token, which does not see it, gets some number.
    """
    by_distance: Tensor = type(part).compute_bias(part, 1, columns, device=device, past_seen_tokens=columns - 1)
    places = numbers(columns, positions.device)[:columns] - positions[..., None] + columns - 1
    return by_distance[0, :, 0][:, places.clamp(0, columns - 1).to(by_distance.device)].transpose(0, 1)
