"""Sum tree: draws places in proportion to their priorities in logarithmic time (Schaul et al. 2016, 1511.05952).

The priorities are the leaves of a full binary tree in which every node holds the sum of its two children. A number
between 0 and the total finds its leaf from the root downwards.
"""

from __future__ import annotations

import numpy as np


class SumTree:
    """Priorities of a fixed number of places, at first all 0: a place with priority 0 is never drawn.

    Args:
        places: number of places, at least 1.

    Raises:
        ValueError: there is no place.
    """

    def __init__(self, places: int) -> None:
        if places < 1:
            raise ValueError(f"places must be at least 1, got {places}")
        self._places = places
        self._width = 1 << (places - 1).bit_length()
        self._sums = np.zeros(2 * self._width)  # the root is entry 1, the children of entry n are 2n and 2n + 1

    @property
    def priorities(self) -> np.ndarray:
        """A copy of all priorities, shape (places,)."""
        return self._sums[self._width : self._width + self._places].copy()

    @property
    def total(self) -> float:
        """The sum of all priorities."""
        return float(self._sums[1])

    def set(self, places: np.ndarray, priorities: np.ndarray) -> None:
        """Change some priorities.

        Args:
            places: places to change, shape (changes,); where a place is named twice, its last priority counts.
            priorities: finite, at least 0, shape (changes,).

        Raises:
            IndexError: a place does not exist.
            ValueError: a priority is negative or not finite.
        """
        places, priorities = np.asarray(places, np.int64), np.asarray(priorities, np.float64)
        if len(places) and not 0 <= places.min() <= places.max() < self._places:
            raise IndexError(f"places must be 0 to {self._places - 1}, got {places.min()} to {places.max()}")
        if not (np.isfinite(priorities).all() and (priorities >= 0).all()):
            raise ValueError("priorities must be finite and at least 0")
        self._sums[self._width + places] = priorities
        nodes = self._width + places
        while len(nodes) and nodes[0] > 1:
            nodes = np.unique(nodes // 2)
            # From both children rather than by the difference, so that rounding errors never add up.
            self._sums[nodes] = self._sums[2 * nodes] + self._sums[2 * nodes + 1]

    def find(self, masses: np.ndarray) -> np.ndarray:
        """Return the places at which the running sum of the priorities passes some numbers.

        Args:
            masses: between 0 and `total`, of any shape.

        Returns:
            Places of the same shape, none with priority 0.

        Raises:
            ValueError: all priorities are 0.
        """
        if not self.total:
            raise ValueError("nothing can be drawn: all priorities are 0")
        masses = np.array(masses, np.float64)
        nodes = np.ones(masses.shape, np.int64)
        for _ in range(self._width.bit_length() - 1):
            left = self._sums[2 * nodes]
            # The second condition matters only where a mass was rounded up to the end of its stretch.
            right = (masses >= left) & (self._sums[2 * nodes + 1] > 0)
            masses -= np.where(right, left, 0)
            nodes = 2 * nodes + right
        return nodes - self._width

    def draw(self, batches: int, size: int, rng: np.random.Generator) -> np.ndarray:
        """Draw places in proportion to their priorities, with replacement.

        Each batch is stratified: the total is cut into `size` equal stretches, and a number is drawn in every stretch.

        Args:
            batches: number of batches.
            size: places in a batch.
            rng: source of randomness.

        Returns:
            Places, shape (batches, size).

        Raises:
            ValueError: all priorities are 0.
        """
        stretches = np.arange(size) + rng.random((batches, size))
        return self.find(stretches * (self.total / size))
