"""Attention masks for chains and trees: of full attention, sliding windows and chunks, by position in the text.

Architectures whose layers see differently far take a mask for every kind of layer, keyed as `config.layer_types` names
them; transformers' models use such a dict as it stands (`create_masks_for_generate`, transformers 5.23).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .kv_cache import TokenTree

_STRIP_ROWS = 64


@dataclass(frozen=True)
class Span:
    """Reach of the layers of one kind, backwards in the text.

    Attributes:
        kind: `full`, `sliding` (the last `size` tokens, the reader's own included) or `chunked` (those of the same
            `size` tokens, counted from the beginning of the text).
        size: in tokens; 0 for `full`.
    """

    kind: Literal["full", "sliding", "chunked"] = "full"
    size: int = 0

    def limits(self, end: int) -> bool:
        """True if some token of a text of `end` tokens does not see all before it."""
        return self.kind != "full" and end > self.size

    def hides(self, readers: Tensor, places: Tensor) -> Tensor:
        """Which positions (columns) are out of sight of which readers (rows), shape (readers, places), bool."""
        if self.kind == "sliding":
            return readers.unsqueeze(1) - places.unsqueeze(0) >= self.size
        return readers.unsqueeze(1) // self.size != places.unsqueeze(0) // self.size


FULL = Span()
Spans = Mapping[str, Span]
"""Spans by kind of layer, as the model's masks are keyed; by the empty string where all layers share one mask."""
EVERYWHERE_FULL: Spans = {"": FULL}
Masks = Tensor | dict[str, Tensor]
"""One mask for all layers, or one for each kind of layer."""


class MaskMaker:
    """Makes the masks of one model's passes.

    Args:
        spans: of its layers.
        dtype: of the masks, that of the model.
        device: of the masks.
    """

    def __init__(self, spans: Spans, dtype: torch.dtype, device: torch.device) -> None:
        self._spans = spans
        self._dtype, self._device = dtype, device
        self._value = torch.finfo(dtype).min

    @property
    def full(self) -> bool:
        """True if every token sees all before it, whatever the layer."""
        return all(span.kind == "full" for span in self._spans.values())

    def masks(self, tree: TokenTree | None, start: int, count: int) -> Masks:
        """Additive masks of a pass, each of shape (1, 1, count, columns): a mask for all layers, or one for each kind.

        Args:
            tree: shape of what hangs from position `start`; None for a chain.
            start: tokens of the text before the tree or chain.
            count: tokens that are read: the last nodes of the tree, or all of the chain.
        """
        end = start + (count if tree is None else tree.height)
        if not any(span.limits(end) for span in self._spans.values()):
            return self._shared(tree, start, count)
        full = self._shared(tree, start, count)
        positions = numbers(end, self._device)
        if tree is None:
            readers, places = positions[start:end], positions[:end]
        else:
            nodes = tree.on(self._device)[0] + start
            readers, places = nodes[-count:], torch.cat([positions[:start], nodes])
        masks = {
            kind: full.masked_fill(span.hides(readers, places), self._value) if span.limits(end) else full
            for kind, span in self._spans.items()
        }
        return masks.get("", masks)

    def _shared(self, tree: TokenTree | None, start: int, count: int) -> Tensor:
        if tree is None:
            return causal_mask(start, count, self._value, self._dtype, self._device)
        mask = torch.zeros(count, start + len(tree), dtype=self._dtype, device=self._device)
        mask[:, start:].masked_fill_(tree.on(self._device)[1][-count:], self._value)
        return mask[None, None]


def numbers(count: int, device: torch.device) -> Tensor:
    """At least the numbers from 0 to `count` - 1, shape (>= count,), kept from one pass to the next."""
    return _numbers_to(max(256, 1 << (count - 1).bit_length()), device)


@lru_cache(maxsize=8)
def _numbers_to(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


@lru_cache(maxsize=16)
def _strip(capacity: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mask of which every short causal mask with up to `capacity` cached tokens is a slice."""
    ahead = torch.arange(capacity + _STRIP_ROWS, device=device) - capacity
    hidden = ahead.unsqueeze(0) > torch.arange(_STRIP_ROWS, device=device).unsqueeze(1)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, value)


def causal_mask(start: int, count: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask of a chain, shape (1, 1, count, start + count): a slice of one that is kept, if it is short.

    Args:
        start: tokens before the chain.
        count: tokens of the chain.
        value: added where a token must not look.
        dtype: of the mask.
        device: of the mask.
    """
    if count <= _STRIP_ROWS:
        capacity = max(256, 1 << (start - 1).bit_length()) if start else 256
        mask = _strip(capacity, value, dtype, device)[:count, capacity - start : capacity + count]
        if device.type != "cpu":  # fused kernels want aligned rows
            mask = mask.contiguous()
    else:
        mask = torch.full((count, start + count), value, dtype=dtype, device=device).triu_(start + 1)
    return mask[None, None]


def rows_behind(positions: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Additive mask of the chains of several texts, of which each token sees all up to its own position.

    Args:
        positions: of the tokens, shape (texts, tokens), int64.
        columns: positions in the cache.
        dtype: of the mask.

    Returns:
        Shape (texts, 1, tokens, columns).
    """
    hidden = numbers(columns, positions.device)[:columns] > positions.unsqueeze(-1)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)[
        :, None
    ]


def side_by_side(masks: Sequence[Masks], count: int, columns: int) -> Masks:
    """The masks of a pass over several texts, shape (texts, 1, count, columns), of each text's own.

    A text of fewer tokens has them last, and what is before them is of no use. It sees what its first token sees, since
    a row that sees nothing gives NaN.

    Args:
        masks: of each text, additive, shape (1, 1, tokens of the text, its positions), as `MaskMaker.masks`.
        count: tokens of a text in the pass, at least those of each.
        columns: positions in the cache, likewise.
    """
    kinds = {kind for mask in masks if isinstance(mask, dict) for kind in mask}
    if kinds:
        parts = {kind: [mask[kind] if isinstance(mask, dict) else mask for mask in masks] for kind in sorted(kinds)}
        return {kind: _side_by_side(several, count, columns) for kind, several in parts.items()}
    return _side_by_side(cast("Sequence[Tensor]", masks), count, columns)


def _side_by_side(masks: Sequence[Tensor], count: int, columns: int) -> Tensor:
    if len(masks) == 1 and masks[0].shape[2:] == (count, columns):
        return masks[0]
    joint = masks[0].new_full((len(masks), 1, count, columns), torch.finfo(masks[0].dtype).min)
    for row, mask in enumerate(masks):
        tokens, width = mask.shape[2:]
        joint[row, 0, count - tokens :, :width] = mask[0, 0]
        joint[row, 0, : count - tokens, :width] = mask[0, 0, :1]
    return joint


_LAYERS_IN_A_ROW = {
    "indexed_attention": "keep an index beside keys and values, of which no branch can be kept",
    "compressed_sparse_attention": "compress keys by blocks of the text",
    "heavily_compressed_attention": "compress keys by blocks of the text",
}


def declared_spans(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[list[Spans], str]:
    """Return the reaches of layers by a configuration, the likeliest first; or why trees cannot be verified."""
    if getattr(config, "alibi", False):
        return [], "its bias of positions (ALiBi) goes by the place in the cache"
    missing = {"attention_mask", "position_ids", "past_key_values"} - set(signature(model.forward).parameters)
    if missing:
        return [], f"its forward takes no {' and no '.join(sorted(missing))}, by which branches are told apart"
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    kinds = {"full_attention": Span()}
    if isinstance(window, int) and window > 0:
        kinds["sliding_attention"] = Span("sliding", window)
    if isinstance(chunk, int) and chunk > 0:
        kinds["chunked_attention"] = Span("chunked", chunk)
    types = getattr(config, "layer_types", None)
    if types:
        others = sorted(set(types) - set(kinds))
        if others:
            return (
                [],
                f"its layers of type {others[0]} {_LAYERS_IN_A_ROW.get(others[0], 'read tokens one after another')}",
            )
        if len(set(types)) > 1:
            return [{kind: kinds[kind] for kind in sorted(set(types))}], ""
        return [{"": kinds[types[0]]}], ""
    limited = [{"": span} for span in list(kinds.values())[1:]]
    plain: list[Spans] = [EVERYWHERE_FULL]
    return [*limited, *plain], ""
