"""Growing a tree of candidates with a draft model, one pass of the draft a level."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...models.language_model import LanguageModel
from ...models.token_tree import TokenTree
from ...sampling import Sampling
from .candidates import Candidates, DraftedTree
from .draft_guidance import Guidance
from .pruning import TreePruner
from .verification_rules import Rule


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
        if 1 < len(prompt) <= model.context_limit:
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
        depth = min(depth, self._model.context_limit - len(context) + 1) if budget else 0
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
