"""Key/value storage that grows in place, and from which any set of positions can be kept."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_FIRST_CAPACITY = 256


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values in storage that is written in place and doubles when full.

    The stock `DynamicLayer` concatenates the whole store at every forward. Here `keys` and `values` are views of the
    first `length` positions, shape (1, heads, length, head size), so that cutting back costs nothing.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()
        self.length = 0
        self._stored_keys: Tensor | None = None
        self._stored_values: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append, and return everything stored. Shapes (1, heads, new, head size) to (1, heads, length, head size)."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self._stored_keys is None or self.length > self._stored_keys.shape[-2]:
            self._stored_keys = _grown(self._stored_keys, key_states, start, self.length)
            self._stored_values = _grown(self._stored_values, value_states, start, self.length)
            self.is_initialized = True
        assert self._stored_values is not None
        self._stored_keys[..., start : self.length, :] = key_states
        self._stored_values[..., start : self.length, :] = value_states
        self.keys = self._stored_keys[..., : self.length, :]
        self.values = self._stored_values[..., : self.length, :]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Number of positions stored."""
        return self.length

    def cut(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.length = min(self.length, length)

    def gather(self, start: int, rows: Tensor) -> None:
        """Keep positions `start + rows` (ascending), moved down to `start`; forget the others from `start` on."""
        if self._stored_keys is None or self._stored_values is None:
            return
        rows = rows.to(self._stored_keys.device)
        end = start + rows.shape[0]
        for stored in (self._stored_keys, self._stored_values):
            stored[..., start:end, :] = stored.index_select(-2, rows + start)
        self.length = end


def _grown(stored: Tensor | None, like: Tensor, filled: int, needed: int) -> Tensor:
    capacity = _FIRST_CAPACITY
    while capacity < needed:
        capacity *= 2
    grown = like.new_empty(*like.shape[:-2], capacity, like.shape[-1])
    if stored is not None:
        grown[..., :filled, :] = stored[..., :filled, :]
    return grown


class BranchingCache(Cache):
    """A transformers cache of `PreallocatedLayer`s that can be cut back and can keep one path of a tree."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=PreallocatedLayer)

    @property
    def _own_layers(self) -> list[PreallocatedLayer]:
        return cast("list[PreallocatedLayer]", self.layers)

    @property
    def length(self) -> int:
        """Number of positions stored."""
        return self._own_layers[0].length if self.layers else 0

    def cut(self, length: int) -> None:
        """Forget every position from `length` on."""
        for layer in self._own_layers:
            layer.cut(length)

    def gather(self, start: int, rows: list[int]) -> None:
        """Keep positions `start + rows` and forget the others from `start` on."""
        if rows == list(range(len(rows))):  # a chain lies where it belongs already
            self.cut(start + len(rows))
            return
        index = torch.tensor(rows)
        for layer in self._own_layers:
            layer.gather(start, index)
