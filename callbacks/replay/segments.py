"""Segments of past rollouts, each the steps of an environment in a rollout, with a priority.

Sum tree: draws places in proportion to their priorities in logarithmic time (Schaul et al. 2016, 1511.05952).

The priorities are the leaves of a full binary tree in which every node holds the sum of its two children. A number
between 0 and the total finds its leaf from the root downwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

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


class Segments(NamedTuple):
    """Transitions of some segments; the first two axes of every array are (segments, steps).

    Attributes:
        observations: states acted in, as the policy saw them; shape (segments, steps, ...).
        after: the state arrived in, where the next entry of `observations` is not that: after the last step, and where
            an episode was truncated. Elsewhere without meaning. Shape as `observations`.
        actions: actions before they were clipped to the environment's bounds, shape (segments, steps, entries).
        rewards: rewards in the environment's units, with nothing added for what a time limit cut off.
        log_probs: log-probabilities of the actions under the policy that chose them.
        ends: True for steps that ended an episode.
        truncated: True for those that did so by a time limit.
        usable: True for steps that may be learned from.
    """

    observations: np.ndarray
    after: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    log_probs: np.ndarray
    ends: np.ndarray
    truncated: np.ndarray
    usable: np.ndarray


class Layout(NamedTuple):
    """Sizes of a store: segments, their steps, and shape and data type of an observation and of an action."""

    capacity: int
    steps: int
    observation_shape: tuple[int, ...]
    observation_type: str
    action_shape: tuple[int, ...]
    action_type: str

    def empty(self) -> Segments:
        """Return arrays for as many segments as the capacity, all 0."""

        def zeros(kind: str, shape: tuple[int, ...] = ()) -> np.ndarray:
            return np.zeros((self.capacity, self.steps, *shape), kind)

        observation = (self.observation_type, self.observation_shape)
        return Segments(
            observations=zeros(*observation),
            after=zeros(*observation),
            actions=zeros(self.action_type, self.action_shape),
            rewards=zeros("float32"),
            log_probs=zeros("float32"),
            ends=zeros("bool"),
            truncated=zeros("bool"),
            usable=zeros("bool"),
        )


class SegmentStore:
    """A ring of segments in memory set aside once; the oldest make room for new ones.

    Args:
        layout: sizes of everything.

    Attributes:
        data: all segments, those with priority 0 without meaning.
        tree: priorities of the segments; 0 takes a segment out of the draw.
        born: rollout in which a segment was stored, counted from 1; shape (capacity,).
        rollouts: rollouts stored so far.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.data = layout.empty()
        self.tree = SumTree(layout.capacity)
        self.born = np.zeros(layout.capacity, np.int64)
        self.rollouts = 0
        self._next = 0

    def __len__(self) -> int:
        """Segments that can be drawn."""
        return int(np.count_nonzero(self.tree.priorities))

    @property
    def ages(self) -> np.ndarray:
        """Rollouts stored after that of a segment, shape (capacity,)."""
        return self.rollouts - self.born

    def add(self, segments: Segments, priorities: np.ndarray) -> None:
        """Store the segments of one rollout.

        Args:
            segments: at most as many as the capacity.
            priorities: priorities, shape (segments,).

        Raises:
            ValueError: there are more segments than places.
        """
        count = len(segments.rewards)
        if count > self.layout.capacity:
            raise ValueError(f"a rollout of {count} segments does not fit in a capacity of {self.layout.capacity}")
        places = (self._next + np.arange(count)) % self.layout.capacity
        for stored, new in zip(self.data, segments, strict=True):
            stored[places] = new
        self.rollouts += 1
        self.born[places] = self.rollouts
        self.tree.set(places, priorities)
        self._next = int((self._next + count) % self.layout.capacity)

    def take(self, places: np.ndarray) -> Segments:
        """Return copies of some segments, in the order of `places`."""
        return Segments(*(stored[places] for stored in self.data))

    def remove(self, which: np.ndarray) -> int:
        """Take segments out of the draw, a mask of shape (capacity,); return how many of them were still in it."""
        gone = np.flatnonzero(which & (self.tree.priorities > 0))
        self.tree.set(gone, np.zeros(len(gone)))
        return len(gone)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays with an entry per segment, by name, for `restore`."""
        return {**self.data._asdict(), "priorities": self.tree.priorities, "born": self.born}

    def counters(self) -> dict[str, Any]:
        """Return everything else, as plain JSON values."""
        return {"layout": list(self.layout), "rollouts": self.rollouts, "next": self._next}

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], counters: Mapping[str, Any]) -> SegmentStore:
        """Restore a store from results of `arrays` and `counters`.

        Raises:
            KeyError: something is missing.
            TypeError: a counter is of another kind.
            ValueError: an array is not of the shape or data type that the layout says, or a number is impossible.
        """
        capacity, steps, observation, observation_type, action, action_type = counters["layout"]
        layout = Layout(
            int(capacity), int(steps), tuple(observation), str(observation_type), tuple(action), str(action_type)
        )
        sizes = (layout.capacity, layout.steps, *layout.observation_shape, *layout.action_shape)
        if math.prod(sizes) < 1 or arrays["rewards"].shape != (layout.capacity, layout.steps):
            raise ValueError(f"rewards of shape {arrays['rewards'].shape} contradict the layout {tuple(layout)}")
        for name, kind, shape in (
            ("observations", layout.observation_type, layout.observation_shape),
            ("actions", layout.action_type, layout.action_shape),
        ):  # before memory is set aside for them
            stored = arrays[name]
            if stored.shape != (layout.capacity, layout.steps, *shape) or str(stored.dtype) != kind:
                raise ValueError(f"{name} is {stored.dtype}{stored.shape}, which contradicts {tuple(layout)}")
        store = cls(layout)
        targets = store.arrays()
        for name, target in targets.items():
            stored = arrays[name]
            if stored.shape != target.shape or stored.dtype != target.dtype:
                raise ValueError(f"{name} is {stored.dtype}{stored.shape} and not {target.dtype}{target.shape}")
            if not np.isfinite(stored).all():
                raise ValueError(f"{name} has NaN or infinities")
            target[...] = stored
        store.tree.set(np.arange(layout.capacity), targets["priorities"])
        store.rollouts, store._next = int(counters["rollouts"]), int(counters["next"])
        if not (0 <= store._next < layout.capacity and 0 <= store.born.min() <= store.born.max() <= store.rollouts):
            raise ValueError(f"rollouts {store.rollouts} or the next place {store._next} is impossible")
        return store
