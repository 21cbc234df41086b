"""Key/value storage that grows in place, and from which any set of positions can be kept; saved recurrent states.

Trees of candidate tokens, checked by a target in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


class TokenTree:
    """The shape of a tree of candidate tokens that hangs from the end of the cache.

    Args:
        parents: for each node the index of its parent, which must come earlier, or -1 for a node that follows the
            last cached token directly.

    Raises:
        ValueError: a parent does not come before its child.
    """

    def __init__(self, parents: Sequence[int]) -> None:
        self.parents = tuple(int(parent) for parent in parents)
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"node {node} has parent {parent}; parents come before their children, or are -1")
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def chain(cls, length: int) -> TokenTree:
        """A tree without branches: each node follows the one before it."""
        return cls(range(-1, length - 1))

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> Tensor:
        """Distance of each node from the end of the cache, shape (nodes,), int64; 0 for a node without a parent."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return torch.tensor(depths, dtype=torch.int64)

    @cached_property
    def height(self) -> int:
        """Number of nodes on the longest path; 0 without nodes."""
        return int(self.depths.max()) + 1 if self.parents else 0

    @cached_property
    def is_chain(self) -> bool:
        """True if each node follows the one before it."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    @cached_property
    def visible(self) -> Tensor:
        """Which node (column) each node (row) sees: itself and its ancestors. Shape (nodes, nodes), bool."""
        visible = np.eye(len(self), dtype=bool)  # at these sizes a loop in numpy is faster than steps of torch
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                visible[node] |= visible[parent]
        return torch.from_numpy(visible)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`depths`, and the negation of `visible`, on a device; moved there once."""
        if device not in self._moved:
            self._moved[device] = self.depths.to(device), (~self.visible).to(device)
        return self._moved[device]

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child down to `node`, both included."""
        path = [node]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return path[::-1]


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
        start = self.length
        if self._stored_keys is None or self._stored_values is None:
            self._stored_keys = _grown(None, key_states, 0, 0)
            self._stored_values = _grown(None, value_states, 0, 0)
            self.is_initialized = True
        stored_keys, stored_values = self.extended(key_states.shape[-2])
        stored_keys[..., start : self.length, :] = key_states
        stored_values[..., start : self.length, :] = value_states
        self.keys = stored_keys[..., : self.length, :]
        self.values = stored_values[..., : self.length, :]
        return self.keys, self.values

    def extended(self, count: int) -> tuple[Tensor, Tensor]:
        """Count so many positions more as stored, and return the storage in which they are to be written."""
        start, self.length = self.length, self.length + count
        assert self._stored_keys is not None
        assert self._stored_values is not None
        if self.length > self._stored_keys.shape[-2]:
            self._stored_keys = _grown(self._stored_keys, self._stored_keys, start, self.length)
            self._stored_values = _grown(self._stored_values, self._stored_values, start, self.length)
        return self._stored_keys, self._stored_values

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


def stored_bytes(layer: object) -> int:
    """Bytes of the keys and values of the positions that a layer of a cache has stored; 0 for other states."""
    if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
        return 0
    parts: list[Tensor | None] = [layer.keys, layer.values]
    if isinstance(layer, PreallocatedLayer):
        parts = [stored[..., : layer.length, :] for stored in layer.extended(0)]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


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

    def extended(self, count: int) -> list[Tensor] | None:
        """Count so many positions more as stored, and return the keys and values of all layers, to be written there.

        Shapes (1, heads, capacity, head size); None before the first pass, which says how large they are.
        """
        if not self.layers:
            return None
        return [stored for layer in self._own_layers for stored in layer.extended(count)]

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


class RestorableCache(DynamicCache):
    """The cache that transformers gives a model, of which the text's end can be taken back.

    Keys and values of plain and sliding attention are kept for all positions, in `PreallocatedLayer`s. The other layers
    (recurrent states, states of convolutions, and keys beside them) cannot be cut: they are saved at one position and
    restored from there, and what followed is read again by whoever uses this.

    Args:
        config: of the model.

    Attributes:
        length: positions that were read, to be kept up to date after every pass.
        saved_length: position at which the states were saved last.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        self.layers: Any = [PreallocatedLayer() if type(layer) in plain else layer for layer in self.layers]
        self._stateful = [layer for layer in self.layers if not isinstance(layer, PreallocatedLayer | DummyLayer)]
        self._saved: list[dict[str, object]] = []
        self.length = 0
        self.save()

    @property
    def has_states(self) -> bool:
        """True if there are layers that cannot be cut."""
        return bool(self._stateful)

    def save(self) -> None:
        """Remember the states as they are now, in place of those remembered before."""
        self._saved = [_copied(vars(layer)) for layer in self._stateful]
        self.saved_length = self.length

    def cut(self, length: int) -> None:
        """Forget every position from `length` on, or from `saved_length` on where there are states."""
        if length >= self.length:
            return
        self.length = self.saved_length if self._stateful else length
        for layer, state in zip(self._stateful, self._saved, strict=True):
            vars(layer).update(_copied(state))
        for layer in self.layers:
            if isinstance(layer, PreallocatedLayer):
                layer.cut(self.length)


def _copied(state: Mapping[str, object]) -> dict[str, object]:
    """The attributes of a cache's layer, with copies of the states, which layers write in place.

    Keys and values need none: these layers put longer tensors into their place.
    """
    return {name: _cloned(value) if isinstance(value, dict) else value for name, value in state.items()}


def _cloned(states: dict[object, object]) -> dict[object, object]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in states.items()}
