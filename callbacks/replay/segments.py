"""Segments of past rollouts, each the steps of an environment in a rollout, with a priority."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .sum_tree import SumTree


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
