"""Keys and values of several texts side by side, each of a length of its own; storage of which passes are graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_FIRST_CAPACITY = 256


class StoredLayer(DynamicLayer):
    """Keys and values of a layer in storage that is given, and is written in place.

    Args:
        keys: storage, shape (texts, heads, capacity, head size).
        values: likewise.
        start: positions that are there, of a single text; of several what the model shall take for it.
        end: positions that are there after the pass, at most.
        places: where each text's new tokens are written, shape (texts, tokens), int64; None for one text's, which are
            written from `start` on.
    """

    def __init__(self, keys: Tensor, values: Tensor, start: Any, end: int, places: Tensor | None = None) -> None:
        super().__init__()
        self.is_initialized = True
        self._stored, self._start, self._end, self._places = (keys, values), start, end, places

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write what is new behind what is there, and return both."""
        if self._places is not None:
            places = self._places[:, None, :, None].to(key_states.device)  # layers may be on several devices
            for stored, new in zip(self._stored, (key_states, value_states), strict=True):
                stored.scatter_(2, places.expand(new.shape), new)
        keys, values = (stored[..., : self._end, :] for stored in self._stored)
        if self._places is None:
            keys[..., self._start :, :].copy_(key_states)
            values[..., self._start :, :].copy_(value_states)
        return keys, values

    def get_seq_length(self) -> Any:
        """Number of positions that were there; the graph takes it from the mask."""
        return self._start


class Slot:
    """A text's place in a `JointCache`: what a `BranchingCache` is to a text that is read by itself.

    Attributes:
        row: of the storage.
        length: positions stored.
        source: of what an encoder has read for the text, in the same row of another cache; None where there is none.
    """

    def __init__(self, joint: JointCache, row: int) -> None:
        self._joint, self.row, self.length = joint, row, 0
        self.source: Slot | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of the positions stored."""
        parts = (stored[self.row, :, : self.length] for stored in self._joint.stored)
        return sum(part.numel() * part.element_size() for part in parts)

    def extended(self, count: int) -> list[Tensor]:
        """Count so many positions more as stored, and return the keys and values of all layers, as `BranchingCache`."""
        self.length += count
        self._joint.reserve(self.row + 1, self.length)
        return [stored[self.row : self.row + 1] for stored in self._joint.stored]

    def as_cache(self, count: int) -> Cache:
        """Return a transformers cache for a pass over so many tokens more, which then count as stored."""
        start = self.length
        return cache_of(self.extended(count), start, self.length)

    def cut(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.length = min(self.length, length)

    def gather(self, start: int, rows: list[int]) -> None:
        """Keep positions `start + rows` and forget the others from `start` on."""
        self.length = start + len(rows)
        if rows == list(range(len(rows))):
            return
        for stored in self._joint.stored:
            text = stored[self.row]
            index = torch.tensor(rows, device=text.device) + start
            text[:, start : self.length] = text.index_select(1, index)

    def release(self, broken: bool = False) -> None:
        """Give the place back; the text cannot be read on. See `JointCache.release`."""
        self._joint.release(self, broken)
        if self.source is not None:
            self.source.release(broken)


class JointCache:
    """Keys and values of several texts of one model, each of a length of its own, side by side.

    The places in use are always the first rows, so that a pass over all texts copies nothing; those of a pass over some
    of them are moved together.

    Args:
        rows: for which there is storage from the beginning.
        shapes: parts of any text, as for `admit`, if they are known; else those of the first.

    Attributes:
        stored: keys and values of every layer by turns, each of shape (rows, heads, capacity, head size).
        slots: places in use, by row.
        sources: of what encoders have read for the texts; None where there are none.
    """

    def __init__(self, rows: int = 1, shapes: Sequence[Tensor] = ()) -> None:
        self._rows = rows
        self.sources: JointCache | None = None
        self.stored = self._empty(shapes)
        self.slots: list[Slot] = []

    def admit(self, parts: Sequence[Tensor], length: int) -> Slot:
        """Copy a text that was read by itself to a place of its own.

        Args:
            parts: its keys and values of every layer by turns, shape (1, heads, at least length, head size); none if
                nothing was read.
            length: positions of the text.

        Raises:
            ValueError: nothing is known of the shapes.
        """
        if not parts and not self.stored:
            raise ValueError("the first text of a joint cache has to have been read by itself")
        slot = Slot(self, len(self.slots))
        self.slots.append(slot)
        if not self.stored:
            self.stored = self._empty(parts)
        self.reserve(len(self.slots), length)
        slot.length = length
        for stored, part in zip(self.stored if parts else (), parts, strict=True):
            stored[slot.row, :, :length] = part[0, :, :length]
        return slot

    def _empty(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part.new_zeros(self._rows, part.shape[1], 0, part.shape[3]) for part in parts]

    def admit_source(self, slot: Slot, parts: Sequence[Tensor]) -> None:
        """Copy what an encoder has read for a text that was just admitted: parts as for `admit`, of the source."""
        if self.sources is None:
            self.sources = JointCache(self._rows)
        slot.source = self.sources.admit(parts, parts[0].shape[2])

    def release(self, slot: Slot, broken: bool = False) -> None:
        """Let another text have a place; the text in the last row moves there.

        Args:
            slot: the place.
            broken: whether what is there may not be finite: a pass reads all rows as far as the longest text, and
                0 times infinity is NaN.
        """
        last = self.slots.pop()
        for stored in self.stored:
            if broken:
                stored[slot.row] = 0
            if last is not slot:
                stored[slot.row, :, : last.length] = stored[last.row, :, : last.length]
        if last is not slot:
            last.row = slot.row
            self.slots[slot.row] = last

    def reserve(self, rows: int, capacity: int) -> None:
        """Let the storage have so many rows and positions, at least."""
        known_rows, _, known_capacity, _ = self.stored[0].shape
        if rows <= known_rows and capacity <= known_capacity:
            return
        rows = known_rows if rows <= known_rows else max(rows, 2 * known_rows)
        if capacity <= known_capacity:
            capacity = known_capacity
        else:
            capacity = max(_FIRST_CAPACITY, 1 << (capacity - 1).bit_length())
        for place, stored in enumerate(self.stored):
            larger = stored.new_zeros(rows, stored.shape[1], capacity, stored.shape[3])
            larger[:known_rows, :, :known_capacity] = stored
            self.stored[place] = larger

    def bring_together(self, slots: Sequence[Slot]) -> None:
        """Move texts to rows next to each other, by exchanging as few as possible with others.

        Texts that wait while others are read mostly wait again, so that they are moved once and a pass copies nothing.
        """
        rows, count = {slot.row for slot in slots}, len(slots)
        if max(rows) - min(rows) < count:
            return
        starts = range(len(self.slots) - count + 1)
        first = max(starts, key=lambda start: len(rows.intersection(range(start, start + count))))
        places = set(range(first, first + count))
        for row, other in zip(sorted(places - rows), sorted(rows - places), strict=True):
            self._exchange(row, other)

    def _exchange(self, row: int, other: int) -> None:
        slots = self.slots
        end = max(slots[row].length, slots[other].length)
        for stored in self.stored:
            kept = stored[row, :, :end].clone()
            stored[row, :, :end] = stored[other, :, :end]
            stored[other, :, :end] = kept
        slots[row], slots[other] = slots[other], slots[row]
        slots[row].row, slots[other].row = row, other
        if self.sources is not None:
            self.sources._exchange(row, other)

    def rows(self, slots: Sequence[Slot], capacity: int) -> list[Tensor]:
        """Storage of some texts for a pass: keys and values of every layer by turns.

        Args:
            slots: of the texts, next to each other, in ascending order of their rows.
            capacity: positions that the pass sees or writes, at most.

        Returns:
            Shape (texts, heads, at least capacity, head size).
        """
        self.reserve(len(self.slots), capacity)
        return [stored[slots[0].row : slots[-1].row + 1] for stored in self.stored]


def cache_of(stored: Sequence[Tensor], start: int | Tensor, end: int, places: Tensor | None = None) -> Cache:
    """Return a transformers cache of given storage, for one pass.

    Args:
        stored: keys and values of every layer by turns.
        start: as for `StoredLayer`, as are the rest.
        end: likewise.
        places: likewise.
    """
    pairs = zip(stored[::2], stored[1::2], strict=True)
    layers: list[Any] = [StoredLayer(keys, values, start, end, places) for keys, values in pairs]
    return Cache(layers=layers)
