"""Batches that depend on the seed and the step alone: windows of a text, positions, whole texts."""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ...errors import FitError
from .corpus_text import token_digest


class Batches(Protocol):
    """Training data by step; a step needs no history, so that a resumed run equals one that was never stopped."""

    def __call__(self, step: int) -> torch.Tensor:
        """The batch of one step."""
        ...

    def digest(self) -> str:
        """Hash of everything that the batches depend on besides the settings."""
        ...


class Unit(NamedTuple):
    """Contents of a batch, and the advice where there are too few.

    Attributes:
        name: the things that a batch holds, in the plural.
        way_out: the options that help.
    """

    name: str
    way_out: str


POSITIONS = Unit(
    "tokens of the target's own text", "give more --texts or --new-tokens, or a smaller --batch or --length"
)
TEXTS = Unit("texts to train on", "give more --texts or a smaller --batch")


def require_batch(count: int, size: int, unit: Unit) -> None:
    """Refuse fewer items than one batch.

    Raises:
        FitError: ``count`` is less than ``size``.
    """
    if count < size:
        raise FitError(f"{count} {unit.name} are too few for a batch of {size}: {unit.way_out}")


class PositionBatches:
    """Batches of positions, or of texts, by their numbers; every epoch has another order.

    Args:
        positions: numbers to choose from, shape (n,), int64.
        size: positions in a batch.
        seed: seed of the order.
        key: everything else that the result of training depends on.
        unit: the things that are numbered.

    Raises:
        FitError: there are fewer positions than one batch needs.
    """

    def __init__(self, positions: np.ndarray, size: int, seed: int, key: str, unit: Unit = POSITIONS) -> None:
        require_batch(len(positions), size, unit)
        self._positions, self._size, self._seed, self._key = positions, size, seed, key
        self._per_epoch = len(positions) // size
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def digest(self) -> str:
        """SHA-256 of the positions and the key, 64 hex digits."""
        numbers = np.ascontiguousarray(self._positions, dtype="<i8").tobytes()
        return hashlib.sha256(self._key.encode() + numbers).hexdigest()

    def __call__(self, step: int) -> torch.Tensor:
        """The positions of one step, shape (size,), int64."""
        epoch, place = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._positions))
            self._epoch = epoch
        chosen = self._order[place * self._size : (place + 1) * self._size]
        return torch.from_numpy(self._positions[chosen])


class Windows:
    """Batches of windows cut from a row of tokens; every epoch has another offset and another order.

    Args:
        tokens: shape (n,), integer.
        batch: windows in a batch.
        length: tokens of a window; one more follows, for the last prediction.
        seed: seed of the order.
        key: everything else that the result of training depends on.

    Raises:
        FitError: if there are not enough tokens for one batch.
    """

    def __init__(self, tokens: np.ndarray, batch: int, length: int, seed: int, key: str = "") -> None:
        self.tokens, self.batch, self.length, self.seed, self._key = tokens, batch, length, seed, key
        # One window less than fits leaves room for the offset.
        self.per_epoch = ((len(tokens) - 1) // length - 1) // batch
        if self.per_epoch < 1:
            raise FitError(f"{len(tokens)} tokens of text are too few for a batch of {batch} windows of {length}")
        self._epoch, self._order, self._offset = -1, np.empty(0, dtype=np.int64), 0

    def digest(self) -> str:
        """SHA-256 of the tokens, 64 hex digits, and the key."""
        return token_digest(self.tokens) + self._key

    def __call__(self, step: int) -> torch.Tensor:
        """The batch of one step: int64, shape (batch, length + 1)."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._offset = int(rng.integers(self.length))
            self._order = rng.permutation(self.per_epoch * self.batch)
            self._epoch = epoch
        chosen = self._order[place * self.batch : (place + 1) * self.batch]
        starts = self._offset + chosen * self.length
        return torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.length + 1)].astype(np.int64))
