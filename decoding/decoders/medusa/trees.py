"""Trees of candidates from heads, and the candidates of a tree that are accepted.

A head's guesses do not depend on what the heads before it guessed, so a node of the tree is a path of ranks: (0, 2)
is the third choice of the second head after the first choice of the first.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ...models.kv_cache import TokenTree
from .traits import LARGEST_TREE

Ranks = tuple[int, ...]


class CandidateTree:
    """A token tree whose nodes are filled from the candidates of heads.

    Node 0 is the root: the last token of the text, which the target has yet to read. Masks, positions and paths are
    worked out once.

    Args:
        paths: of the nodes below the root, each a path of ranks; every prefix of a path must be among them. Any order.

    Attributes:
        paths: in the order of the nodes, shorter ones first; node n + 1 has path n.
        tree: the shape, the root included.
        children: of each node, the root's first.
        heads: how many heads are asked, which is the height below the root.
        ranks: how many candidates of each.

    Raises:
        ValueError: a path is empty, has a negative rank, occurs twice, or lacks a prefix.
    """

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        self.paths: tuple[Ranks, ...] = tuple(sorted((tuple(map(int, path)) for path in paths), key=_order))
        places: dict[Ranks, int] = {(): 0}
        parents = [-1]
        for node, path in enumerate(self.paths, 1):
            if not path or min(path) < 0 or path in places:
                raise ValueError(f"path {path} is empty, has a negative rank, or occurs twice")
            if path[:-1] not in places:
                raise ValueError(f"path {path} is in the tree, but {path[:-1]}, which leads to it, is not")
            places[path] = node
            parents.append(places[path[:-1]])
        self.tree = TokenTree(parents)
        self.children: list[list[int]] = [[] for _ in parents]
        for node, parent in enumerate(parents[1:], 1):
            self.children[parent].append(node)
        self.heads = max((len(path) for path in self.paths), default=0)
        self.ranks = max((max(path) + 1 for path in self.paths), default=0)
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Number of candidates, without the root."""
        return len(self.paths)

    @cached_property
    def _places(self) -> Tensor:
        """Places of the nodes' tokens among the candidates, flattened; shape (nodes below the root,), int64."""
        return torch.tensor([(len(path) - 1) * self.ranks + path[-1] for path in self.paths], dtype=torch.int64)

    def filled(self, root: Tensor, candidates: Tensor) -> Tensor:
        """The tokens of all nodes.

        Args:
            root: shape (1,), int64.
            candidates: shape (heads, ranks), int64, as `MedusaHeads.candidates` gives them.

        Returns:
            Shape (1 + nodes,), int64.
        """
        return torch.cat([root, candidates.flatten()[self._on(candidates.device)[0]]])

    def parents_on(self, device: torch.device) -> Tensor:
        """The parents of the nodes below the root, shape (nodes,), int64, on a device."""
        return self._on(device)[1]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._moved:
            parents = torch.tensor(self.tree.parents[1:], dtype=torch.int64)
            self._moved[device] = self._places.to(device), parents.to(device)
        return self._moved[device]

    def cut(self, heads: int) -> CandidateTree:
        """Cut off nodes deeper than the heads reach; return the tree itself if there are none."""
        if heads >= self.heads:
            return self
        return CandidateTree([path for path in self.paths if len(path) <= heads])


def cartesian(widths: Sequence[int]) -> CandidateTree:
    """Every combination of each head's likeliest tokens (the paper's section 2.1.1).

    Args:
        widths: how many of each head, the first head's first, each at least 1.

    Raises:
        ValueError: a width is not positive.
    """
    if any(width < 1 for width in widths):
        raise ValueError(f"widths must be at least 1, got {tuple(widths)}")
    return CandidateTree(
        [path for depth in range(1, len(widths) + 1) for path in itertools.product(*map(range, widths[:depth]))]
    )


def sparse(accuracies: Sequence[Sequence[float]], size: int) -> CandidateTree:
    """The nodes that are likeliest to be accepted, if heads err independently (the paper's section 2.3.3).

    A node's chance is the product of the accuracies along its path. The likeliest node that can be added is added,
    until there are enough; since a node is never likelier than its parent, no other tree of this size expects more.

    Args:
        accuracies: for each head the shares, in [0, 1], of positions at which its first, second, ... choice is right.
        size: nodes below the root, at least 0; fewer if there are no more with any chance.

    Raises:
        ValueError: `size` is negative, or an accuracy is out of range.
    """
    if size < 0:
        raise ValueError(f"a tree has at least 0 candidates, got {size}")
    if any(not 0 <= share <= 1 for row in accuracies for share in row):  # False for NaN
        raise ValueError("accuracies must be between 0 and 1")
    # Best first. A path's next rank at the same depth is pushed with it only where its own turn has come, so ranks are
    # sorted by accuracy first: then what has not been pushed cannot be likelier than what has.
    orders = [sorted(range(len(row)), key=row.__getitem__, reverse=True) for row in accuracies]
    chosen: list[Ranks] = []
    heap: list[tuple[float, Ranks]] = []

    def push(above: float, places: Ranks) -> None:
        depth = len(places) - 1
        if depth < len(orders) and places[-1] < len(orders[depth]):
            chance = above * accuracies[depth][orders[depth][places[-1]]]
            if chance > 0:
                heapq.heappush(heap, (-chance, places))

    push(1.0, (0,))
    while heap and len(chosen) < size:
        negative, places = heapq.heappop(heap)
        chosen.append(tuple(orders[depth][place] for depth, place in enumerate(places)))
        push(-negative, (*places, 0))
        accuracy = accuracies[len(places) - 1][orders[len(places) - 1][places[-1]]]
        push(-negative / accuracy, (*places[:-1], places[-1] + 1))
    return CandidateTree(chosen)


def expected_length(tree: CandidateTree, accuracies: Sequence[Sequence[float]]) -> float:
    """Tokens a round that a tree promises, the target's own included, if heads err independently.

    Args:
        tree: within the heads and ranks of `accuracies`.
        accuracies: as for `sparse`.
    """
    return 1 + sum(math.prod(accuracies[depth][rank] for depth, rank in enumerate(path)) for path in tree.paths)


def assumed_accuracies(heads: int, ranks: int = LARGEST_TREE) -> tuple[tuple[float, ...], ...]:
    """Accuracies to build trees by while none were measured: each head and each rank is right less often."""
    return tuple(tuple(0.6**depth / 2**rank / 2 for rank in range(ranks)) for depth in range(heads))


def _order(path: Ranks) -> tuple[int, Ranks]:
    return len(path), path


def matched(tree: CandidateTree, tokens: Sequence[float], choices: Sequence[float]) -> list[int]:
    """The path of candidates that are what the target chose at each node.

    With choices that are the target's likeliest tokens this is greedy decoding. With choices drawn from its
    distribution, one at each node, it is sampling from the target: the token after a node has that node's
    distribution, whether a candidate holds it or not. (It accepts as often as trying the children one after another
    against p, each with a one-hot q.)

    Args:
        tree: the shape.
        tokens: of the nodes, the root's first.
        choices: of the target after each node, likewise.

    Returns:
        Nodes below the root, from the top down; may be empty. The target's own token is the choice after the last.
    """
    path, node = list[int](), 0
    while True:
        following = next((child for child in tree.children[node] if tokens[child] == choices[node]), None)
        if following is None:
            return path
        path.append(following)
        node = following


def typical(p: Tensor, tokens: Tensor, parents: Tensor, epsilon: float, delta: float) -> tuple[Tensor, Tensor]:
    """Which candidates are typical of the target: p(x) > min(epsilon, delta * exp(-H(p))), H being p's entropy in nats.

    Where the target is unsure, less probable tokens pass (the paper's section 2.3.1).

    Args:
        p: the target's distributions after each node, shape (nodes, vocabulary).
        tokens: of the nodes, shape (nodes,), the root's first.
        parents: of the nodes below the root, shape (nodes - 1,).
        epsilon: no threshold is above it.
        delta: scales the threshold where the target is unsure.

    Returns:
        For the nodes below the root, shape (nodes - 1,): whether each passes, bool, and its probability.
    """
    entropy = torch.special.entr(p).sum(-1)
    threshold = (delta * (-entropy).exp()).clamp(max=epsilon)
    chances = p[parents, tokens[1:]]
    return chances > threshold[parents], chances


def longest(
    tree: CandidateTree, passes: Sequence[float], chances: Sequence[float], ended: Collection[int] = ()
) -> list[int]:
    """The longest path on which every candidate passes; of several, the most probable one.

    Args:
        tree: the shape.
        passes: for the nodes below the root, in order, 0 for what does not pass.
        chances: their probabilities, likewise.
        ended: nodes that end the text, beyond which no path counts.

    Returns:
        Nodes below the root, from the top down; may be empty.
    """
    reached: dict[int, tuple[int, float]] = {0: (0, 0.0)}  # of each node reached its depth and log-probability
    for node, (parent, passed, chance) in enumerate(zip(tree.tree.parents[1:], passes, chances, strict=True), 1):
        if passed and parent in reached and parent not in ended:
            depth, above = reached[parent]
            reached[node] = depth + 1, above + (math.log(chance) if chance > 0 else -math.inf)
    best = max(reached, key=lambda node: reached[node])
    return tree.tree.path(best)[1:]
