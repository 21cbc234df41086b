"""Which candidates of a tree in the making are worth a place in it, and which of them the draft should go on from.

The tree is grown best first: of all candidates those with the best scores, where no score is better than its parent's.
Done level by level, so that the draft reads a level in one pass, that gives the very tree that adding one node after
another would: a candidate that is not among the best so far cannot come back, nor can what would follow it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...models.token_tree import TokenTree

EVERYTHING = -1
"""Stands among the tokens that were cut where all were, whatever they would have been."""


@dataclass(slots=True, eq=False)
class Candidate:
    """A node of a tree in the making.

    Attributes:
        parent: its place among the candidates; -1 for the root.
        token: its number.
        score: how likely it is to be accepted, path included, 0 to 1.
        depth: below the root, whose depth is 0.
        row: the draft's pass over it: its place among all nodes that the draft went on from; -1 for none.
        draws: places of its children among the candidates, in the order of their verification; a token that was drawn
            twice stands there twice.
        cut: whether pruning cut it: not verified, where children are no random choice, and otherwise without children.
    """

    parent: int
    token: int
    score: float
    depth: int
    row: int = -1
    draws: list[int] = field(default_factory=list)
    cut: bool = False


@dataclass(frozen=True, slots=True)
class DraftedTree:
    """A tree that is ready to be verified. Node 0 is the root: the last token of the text.

    Attributes:
        tokens: of all nodes.
        tree: their shape.
        children: of each node, in the order of their verification; one that was drawn twice stands there twice.
        rows: the draft's pass over each node; -1 for none.
        lost: of each node, the tokens that pruning cut below it, or `EVERYTHING`.
        cut: nodes that would have been verified without pruning, as far as they are known.
    """

    tokens: list[int]
    tree: TokenTree
    children: list[list[int]]
    rows: list[int]
    lost: list[set[int]]
    cut: int

    def __len__(self) -> int:
        """Number of candidates, without the root."""
        return len(self.tokens) - 1


class Candidates:
    """The candidates of one tree.

    Args:
        root: the last token of the text.
        width: children a node.
        depth: of the tree, below the root.
        budget: nodes below the root, at most.
        random: whether children are a random choice. Then they stay or go together: what is chosen by score is not
            which nodes there are but which of them have children.
    """

    def __init__(self, root: int, width: int, depth: int, budget: int, random: bool) -> None:
        self._width, self._depth, self._random = min(width, budget), depth, random
        self._places = max(1, budget // max(self._width, 1)) if random else budget
        self.nodes = [Candidate(-1, root, 1.0, 0, row=0)]
        self._best: list[int] = [0] if random else []
        """Places of the nodes that are in the tree or, where children are random, that have children."""

    @property
    def width(self) -> int:
        """Children to draw for each node; 0 where there is no room for any."""
        return self._width if self._depth else 0

    def add(self, parent: int, tokens: Sequence[int], scores: Sequence[float]) -> list[int]:
        """Add the children of a node.

        Args:
            parent: its place.
            tokens: of the children, in the order of their verification.
            scores: how likely each is to be accepted once the parent was.

        Returns:
            The places of those that are new, without what was drawn before.
        """
        node, known, new = self.nodes[parent], dict[int, int](), list[int]()
        for token, score in zip(tokens, scores, strict=True):
            if token not in known:
                known[token] = len(self.nodes)
                new.append(known[token])
                self.nodes.append(Candidate(parent, token, node.score * min(score, 1.0), node.depth + 1))
            node.draws.append(known[token])
        return new

    def chosen(self, level: Sequence[int]) -> list[int]:
        """Nodes of a new level that are worth a place, in the order in which they were added."""
        able = [place for place in level if self.nodes[place].depth < self._depth] if self._random else level
        contenders = [*self._best, *able]
        # The earlier of two that are as good: a parent before its child.
        self._best = heapq.nsmallest(self._places, contenders, key=lambda place: (-self.nodes[place].score, place))
        kept = set(self._best)
        return [place for place in able if place in kept]

    def goes_on(self, place: int) -> bool:
        """True if a chosen node may have children."""
        return self.nodes[place].depth < self._depth and not self.nodes[place].cut

    def finished(self) -> DraftedTree:
        """The tree of what was chosen and not cut."""
        nodes = self.nodes
        if self._random:
            able = {place for place in self._best if nodes[place].row >= 0}
            inside = [place for place in range(1, len(nodes)) if nodes[place].parent in able]
            refused = [place for place in sorted(self._best) if nodes[place].cut and nodes[place].parent in able]
            cut = len(refused) * self._width
        else:
            kept = sorted(self._best)
            inside, refused = [place for place in kept if not nodes[place].cut], [p for p in kept if nodes[p].cut]
            cut = len(refused)
        numbers = {0: 0} | {place: number for number, place in enumerate(inside, 1)}
        shown = [0, *inside]
        lost: list[set[int]] = [set() for _ in shown]
        for place in refused:
            if self._random:
                lost[numbers[place]].add(EVERYTHING)
            elif nodes[place].parent in numbers:
                lost[numbers[nodes[place].parent]].add(nodes[place].token)
        return DraftedTree(
            tokens=[nodes[place].token for place in shown],
            tree=TokenTree([-1, *(numbers[nodes[place].parent] for place in inside)]),
            children=[[numbers[child] for child in nodes[place].draws if child in numbers] for place in shown],
            rows=[nodes[place].row for place in shown],
            lost=lost,
            cut=cut,
        )
