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
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ..attention import numbers, rows_behind
from ..joint.cache import cache_of
from ..joint.passes import Begun, Inputs, JoinedPasses, Source

if TYPE_CHECKING:  # which imports this module
    from ..language_model import LanguageModel
    from .encoder_decoder import EncoderDecoder


class PassesWithSources(JoinedPasses):
    """Passes of one encoder-decoder over several texts, each of which has a source.

    Args:
        model: as for `JoinedPasses`.
        texts: likewise.
        shapes: likewise.
    """

    _model: EncoderDecoder
    beginnings: Sources

    def __init__(self, model: EncoderDecoder, texts: int = 1, shapes: Sequence[Tensor] = ()) -> None:
        super().__init__(model, texts, shapes)
        self.beginnings = Sources(model)
        parts = list(model.model.get_decoder().modules())
        self._embeddings = [part for part in parts if "Position" in type(part).__name__]
        self._biases: list[Any] = [part for part in parts if getattr(part, "has_relative_attention_bias", False)]

    def trial_texts(self, count: int) -> list[tuple[LanguageModel, LanguageModel]]:
        """Begin texts after sources of several lengths, each twice: together with the others, and alone."""
        ids = self._model.source_vocabulary or self._model.vocabulary_size
        sources = [Source([token % ids for token in range(3, 6 + 4 * number)], None) for number in range(count)]
        together = zip(sources, self.beginnings.read(sources), strict=True)
        return [(self._model.after(source, begun), self._model.begin(source.prompt)[0]) for source, begun in together]

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
        stored = cache.rows(slots, longest)
        layers: list[Any] = []
        for keys, values in zip(stored[::2], stored[1::2], strict=True):
            layer: Any = DynamicLayer()
            layer.keys, layer.values, layer.is_initialized = keys[:, :, :longest], values[:, :, :longest], True
            layers.append(layer)
        ends = torch.tensor([[slot.length - 1] for slot in slots], device=inputs.tokens.device)
        return Cache(layers=layers), rows_behind(ends, longest, self._model.dtype)


class Sources:
    """Reads the sources of several texts in one pass of the encoder, and what the decoder makes of them in another.

    Args:
        model: as for `PassesWithSources`.

    Attributes:
        size: 0: what the texts go on with comes after it.
    """

    size = 0

    def __init__(self, model: EncoderDecoder) -> None:
        self._model = model

    @torch.inference_mode()
    def read(self, sources: Sequence[Source]) -> list[Begun]:
        """Read sources of any lengths."""
        lengths = [len(source.prompt) for source in sources]
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(self._model.device)
        states = self._states(sources, mask)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self._model.model(
            encoder_outputs=BaseModelOutput(states),
            attention_mask=mask,
            decoder_input_ids=mask.new_full((len(sources), 1), self._model.start_token),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        layers: list[Any] = cache.cross_attention_cache.layers
        parts = [part for layer in layers for part in (layer.keys, layer.values)]
        return [
            Begun(states[row : row + 1, :length], [part[row : row + 1, :, :length] for part in parts])
            for row, length in enumerate(lengths)
        ]

    def _states(self, sources: Sequence[Source], mask: Tensor) -> Tensor:
        """Hidden states of the sources, shape (texts, longest, hidden size), by the encoder where nobody else's do."""
        states = torch.zeros(*mask.shape, self._model.hidden_size, dtype=self._model.dtype, device=mask.device)
        tokens, unread = torch.zeros_like(mask), list[int]()
        for row, source in enumerate(sources):
            if source.states is None:
                tokens[row, : len(source.prompt)] = torch.tensor(source.prompt)
                unread.append(row)
            else:
                states[row, : len(source.prompt)] = source.states[0]
        if unread:
            encoder: Any = self._model.model.get_encoder()
            states[unread] = encoder(input_ids=tokens[unread], attention_mask=mask[unread], return_dict=True)[0]
        return states


def _biases(
    part: Any, positions: Tensor, _: int, columns: int, device: torch.device | None = None, **__: Any
) -> Tensor:
    """Biases of the attention of several texts, shape (texts, heads, tokens, columns), as `T5Attention.compute_bias`.

    What is ahead of a token, which does not see it, gets some number.
    """
    by_distance: Tensor = type(part).compute_bias(part, 1, columns, device=device, past_seen_tokens=columns - 1)
    places = numbers(columns, positions.device)[:columns] - positions[..., None] + columns - 1
    return by_distance[0, :, 0][:, places.clamp(0, columns - 1).to(by_distance.device)].transpose(0, 1)
