"""Which candidates of a tree are accepted: those that the target would have chosen, or those that are typical of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .trees import CandidateTree


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
