"""Growth of a tree of candidates with a draft model, best first, one pass of the draft a level.

Of all candidates those with the best scores are kept, where no score is better than its parent's. Done level by level,
so that the draft reads a level in one pass, that gives the very tree that adding one node after another would: a
candidate that is not among the best so far cannot come back, nor can what would follow it.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...models.kv_cache import TokenTree
from ...models.language_model import LanguageModel
from ...sampling import Sampling
from .predictor import Guidance
from .pruning import Rule, TreePruner

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


@dataclass
class GrowthSeconds:
    """Parts of the time that a tree took, by the clock; on a GPU what it takes to start them."""

    alignment: float = 0.0
    prediction: float = 0.0
    pruning: float = 0.0


@dataclass
class GrownTree:
    """A tree to verify, with what its verification needs."""

    drafted: DraftedTree
    q: list[Tensor]
    """By the draft's passes (`DraftedTree.rows`): the distribution that the children were chosen from, shape
    (vocabulary,), on the target's device."""
    steps: int = 0
    """Passes of the draft, one a level."""
    seconds: GrowthSeconds = field(default_factory=GrowthSeconds)


class TreeDraft:
    """A draft model at work on one text.

    Args:
        model: the draft.
        prompt: token ids.
        rule: how children are chosen.
        sampling: warps the draft's distribution.
        guidance: what stands beside it.
        generator: of the random numbers, on the target's device.
        device: the target's.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Sequence[int],
        rule: Rule,
        sampling: Sampling,
        guidance: Guidance,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self._model = model.fresh()
        self._rule, self._sampling, self._guidance = rule, sampling, guidance
        self._generator, self._device = generator, device
        self._in_cache = 0  # nodes of the last tree, the root not counted
        if len(prompt) > 1 and self._model.room(prompt) >= 0:
            self._model.read(prompt[:-1])

    def grow(
        self,
        context: Sequence[int],
        *,
        width: int,
        depth: int,
        budget: int,
        pruner: TreePruner | None,
        threshold: float,
    ) -> GrownTree:
        """Draft a tree of what may follow the text.

        Args:
            context: token ids of the prompt and all emitted tokens.
            width: children a node.
            depth: of the tree, at most; less where the draft's context is full.
            budget: nodes, at most.
            pruner: cuts hopeless ones; None for no pruning.
            threshold: for the pruner.
        """
        depth = min(depth, self._model.room(context) + 1) if budget else 0
        tree = Candidates(
            context[-1], min(width, self._model.vocabulary_size), max(depth, 0), budget, self._rule.random
        )
        grown, seconds = list[Tensor](), GrowthSeconds()
        self._in_cache = 0
        if not tree.width:
            return GrownTree(tree.finished(), grown)
        level, parents, steps = [0], list[int](), 0
        unread, shape = torch.tensor(context[self._model.length :]), None
        while level:
            output = self._model.forward(
                unread.to(self._model.device), shape, last=len(level), hidden=self._guidance.needs_states
            )
            steps += 1
            new = self._propose(tree, level, output.scores, output.hidden, grown, seconds)
            level = self._uncut(tree, tree.chosen(new), pruner, threshold, seconds)
            if not level:
                break
            for row, place in enumerate(level, len(grown)):
                tree.nodes[place].row = row
            parents += [tree.nodes[tree.nodes[place].parent].row - 1 for place in level]
            unread, shape = torch.tensor([tree.nodes[place].token for place in level]), TokenTree(parents)
        self._in_cache = len(parents)
        return GrownTree(tree.finished(), grown, steps, seconds)

    def keep(self, rows: Sequence[int], length: int) -> None:
        """After verification: keep the accepted nodes that the draft has read.

        Args:
            rows: of the accepted path, from the top down, as in `DraftedTree.rows`.
            length: of the text that is now certain, without its last token.
        """
        if self._in_cache:
            self._model.keep([row - 1 for row in rows if row > 0])
        self._model.truncate(min(length, self._model.length))

    def _propose(
        self,
        tree: Candidates,
        level: Sequence[int],
        scores: Tensor,
        states: Tensor | None,
        grown: list[Tensor],
        seconds: GrowthSeconds,
    ) -> list[int]:
        """Add the children of a level; returns the places of those that are new."""
        scores = scores.to(self._device)
        q = self._sampling.probabilities(scores)
        started = time.perf_counter()
        aligned = self._guidance.align(None if states is None else states.to(self._device))
        if aligned is not None and aligned.logits is not None and self._guidance.weight:
            q = torch.lerp(q, self._sampling.probabilities(aligned.logits), self._guidance.weight)
        seconds.alignment += time.perf_counter() - started
        children = self._rule.children(q, tree.width, self._generator)
        of_children = q.gather(-1, children)
        started = time.perf_counter()
        expected = self._guidance.predict(scores, aligned, children, tree.nodes[level[0]].depth + 1)
        seconds.prediction += time.perf_counter() - started
        expected = of_children if expected is None else expected
        tokens, chances, hopes = torch.stack([children.double(), of_children.double(), expected.double()]).tolist()
        grown += q.unbind()
        new: list[int] = []
        for place, drawn, possible, hope in zip(level, tokens, chances, hopes, strict=True):
            count = sum(chance > 0 for chance in possible)
            new += tree.add(place, list(map(int, drawn[:count])), hope[:count])
        return new

    def _uncut(
        self,
        tree: Candidates,
        chosen: Sequence[int],
        pruner: TreePruner | None,
        threshold: float,
        seconds: GrowthSeconds,
    ) -> list[int]:
        """Cut a level, and say which nodes the draft should go on from."""
        started = time.perf_counter()
        if pruner is not None and chosen:
            cuts = pruner.cuts([tree.nodes[place].score for place in chosen], threshold)
            for place, cut in zip(chosen, cuts, strict=True):
                tree.nodes[place].cut = cut
        seconds.pruning += time.perf_counter() - started
        return [place for place in chosen if tree.goes_on(place)]
