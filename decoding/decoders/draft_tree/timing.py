"""Timed rounds with draft trees: drafting by the draft's passes, the target's pass by the tokens that it reads.

Both are timed with trees that are made for it: a path of first choices as deep as shall be timed, and beside each of
its nodes as many others as make the size. A pass of the draft reads a level, and takes longer the more nodes that has;
drafting is timed with levels of four nodes, as many as the default knobs give. What stands beside the draft while a
tree grows, alignment and predictor, takes its time too, whatever it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...latency.probe import CostProbe
from ...latency.profile import arithmetic_of
from ...loading.pair import Pair
from .decoder import DraftTreeDecoder
from .predictor import Aligned, Guidance
from .pruning import Randomness, Rule
from .traits import DEEPEST, DraftTreeTraits

_WIDTH = 4
_EVEN = 0.5
_SIZES = (1, 2, 3, *(_WIDTH * level + 1 for level in range(1, DEEPEST + 1)), 41, 49, 57)


def probe(like: DraftTreeDecoder, max_target_tokens: int | None) -> CostProbe:
    """Return rounds with trees of all sizes up to the largest, by default 65 tokens with the tree's root.

    Raises:
        ValueError: the vocabulary has no trees as large as asked for.
    """
    target = like.pair.target
    largest, most = max_target_tokens or DraftTreeTraits.largest_pass, DEEPEST * target.vocabulary_size + 1
    if max_target_tokens is not None and largest > most:
        raise ArgumentError(
            f"{target.name} has a vocabulary of {target.vocabulary_size} tokens, too few for a pass over {largest}; "
            f"give a max_target_tokens of at most {most}"
        )
    largest = min(largest, most)
    sizes = [*(size for size in _SIZES if size < largest), largest]
    fullest = {_levels(size): size for size in sizes if size <= _WIDTH * DEEPEST + 1}
    guidance = like.guidance
    predictor = None if guidance.predictor is None else guidance.predictor.shape
    detail = {
        "rule": like.rule.name,
        "draft_sampling": arithmetic_of(like.draft_sampling),
        "alignment": guidance.alignment is not None,
        "alignment_weight": guidance.weight,
        "predictor_width": 0 if predictor is None else predictor.width,
        "aligned_scores": predictor is not None and predictor.aligned_scores,
    }
    return CostProbe(
        _SizedTrees(like.pair, like, max(map(_widest, sizes)), largest),
        sizes,
        _knobs,
        detail={"draft_tree": detail},
        drafting=set(fullest.values()),
        room_for=lambda size: _levels(largest) + 1,
    )


def _levels(size: int) -> int:
    """Levels of a tree whose verification reads this many tokens."""
    return min(DEEPEST, -(-(size - 1) // _WIDTH))


def _widest(size: int) -> int:
    """Nodes that each of its levels has, at most."""
    return -(-(size - 1) // _levels(size)) if size > 1 else 1


def _knobs(size: int) -> dict[str, float]:
    return {
        "max_candidates": _widest(size),
        "max_depth": _levels(size),
        "node_budget": size - 1,
        "min_acceptance_prob": _EVEN,
    }


class _SizedTrees(DraftTreeDecoder):
    """Grows trees as deep and as large as its knobs say, with the rule and the guidance of another decoder."""

    def __init__(self, pair: Pair, like: DraftTreeDecoder, widest: int, largest: int) -> None:
        super().__init__(pair, draft_sampling=like.draft_sampling, max_candidates=widest, max_nodes=max(largest - 1, 1))
        self.guidance = _FixedChances(**vars(like.guidance))
        self.rule = _FixedChildren(like.rule) if like.rule.random else like.rule


@dataclass(frozen=True)
class _FixedChances(Guidance):
    """Takes as long as the real one, and says that the first choice is certain and any other as likely as not."""

    def predict(self, scores: Tensor, aligned: Aligned | None, children: Tensor, depth: int) -> Tensor:
        """Return fixed chances. What follows another choice than the first is thus 0.25 at most, and cut."""
        super().predict(scores, aligned, children, depth)
        chances = torch.full(children.shape, _EVEN, device=children.device)
        chances[0, 0] = 1.0
        return chances


class _FixedChildren(Rule):
    """Draws and verifies as another rule does, but of children that are no random choice, so that sizes are certain."""

    name = "fixed"
    random = False

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def children(self, q: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return the likeliest, after the draws that the rule makes."""
        self._rule.children(q, count, generator)
        return q.topk(count, dim=-1).indices

    def verify(self, p: Tensor, q: Tensor, children: Sequence[int], chance: Randomness) -> tuple[int, int]:
        """Verify as the rule does."""
        return self._rule.verify(p, q, children, chance)
