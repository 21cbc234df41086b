"""Batches of positions, or of texts, by their numbers."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch

from .errors import FitError


class Kind(NamedTuple):
    """What is in a batch, and what to do where there is too little of it."""

    what: str
    way_out: str


POSITIONS = Kind(
    "tokens of the target's own text", "give more --texts or --new-tokens, or a smaller --batch or --length"
)
TEXTS = Kind("texts to train on", "give more --texts or a smaller --batch")


def require_batch(count: int, size: int, kind: Kind) -> None:
    """Refuse fewer than one batch.

    Raises:
        FitError: ``count`` is less than ``size``.
    """
    if count < size:
        raise FitError(f"{count} {kind.what} are too few for a batch of {size}: {kind.way_out}")


class PositionBatches:
    """Batches in an order that depends on the seed and the step alone, as `Windows` are.

    Args:
        positions: numbers to choose from, shape (n,), int64.
        size: of a batch.
        seed: of the order, which is another in every epoch.
        key: of everything else that the result of training depends on.
        kind: of what the numbers are of.

    Raises:
        FitError: there are fewer than one batch needs.
    """

    def __init__(self, positions: np.ndarray, size: int, seed: int, key: str, kind: Kind = POSITIONS) -> None:
        require_batch(len(positions), size, kind)
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
