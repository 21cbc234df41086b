"""Trees of candidate tokens, checked by a target in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


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
