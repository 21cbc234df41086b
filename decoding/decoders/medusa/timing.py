"""Timed rounds of Medusa decoding: the heads by how many are asked, the target's pass by the tokens that it reads.

Neither depends on what the heads have learned: they are timed with trees that are made for it, which ask for just as
many heads as shall be timed and have just as many candidates. Heads of another shape on the same target are timed anew.
When sampling, exact and typical acceptance are timed apart, since the latter needs the entropy of the target's
distribution after each node of the tree; greedy, the two are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...latency.probe import CostProbe
from .decoder import MedusaDecoder, TypicalMedusaDecoder
from .traits import MedusaTraits
from .trees import CandidateTree, sparse

_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 24, 28, 32, 40, 48, 56)


def probe(like: MedusaDecoder, max_target_tokens: int | None) -> CostProbe:
    """Return rounds of all sizes up to the largest, by default 65 tokens.

    A round that reads n tokens asks n - 1 heads, or all where there are no more.
    """
    heads, shape = like.heads, like.heads.shape
    largest = max_target_tokens or MedusaTraits.largest_pass
    sizes = sorted(size for size in {*_SIZES, *range(1, shape.heads + 2), largest} if size <= largest)
    trees = _SizedTypicalTrees if isinstance(like, TypicalMedusaDecoder) else _SizedTrees
    decoder = trees(like.pair.without_draft(), heads, max_tree=max(1, largest - 1))
    detail = {
        "heads": shape.heads,
        "blocks": shape.blocks,
        "own_output": shape.own_output,
        "outputs": shape.outputs,
        "dtype": str(heads.weight.dtype).removeprefix("torch."),
    }
    return CostProbe(
        decoder,
        sizes,
        decoder.knobs_for,
        detail={"medusa": detail},
        drafting=sizes,
        room_for=lambda size: shape.heads + 1,
        can_read=decoder.can_read,
    )


class _SizedTrees(MedusaDecoder):
    """Verifies trees as tall as there are heads asked for, and as large as they should be."""

    def tree_of(self, knobs: Mapping[str, float], room: int) -> CandidateTree:
        """Return the tree, as `MedusaDecoder.tree_of`."""
        shape = int(knobs["heads"]), int(knobs["tree_size"])
        if shape not in self._trees:
            # A first choice is never wrong here, so that the path of all first choices comes before all else.
            ranks = min(self.heads.shape.outputs, max(shape))
            self._trees[shape] = sparse([[0.5**rank for rank in range(ranks)]] * shape[0], shape[1])
        return self._trees[shape].cut(max(room, 0))

    def knobs_for(self, size: int) -> dict[str, float]:
        """Return the knobs of a round that reads this many tokens."""
        return {"heads": min(self.heads.shape.heads, size - 1), "tree_size": size - 1}

    def can_read(self, size: int) -> bool:
        """Return whether there is a round that reads this many tokens."""
        return len(self.tree_of(self.knobs_for(size), size)) == size - 1


class _SizedTypicalTrees(_SizedTrees, TypicalMedusaDecoder):
    """Verifies the same trees with typical acceptance."""
