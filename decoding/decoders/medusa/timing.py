"""Timing rounds of Medusa decoding: the heads by how many are asked, the target's pass by the tokens that it reads.

Neither depends on what the heads have learned: they are timed with trees that are made for it, which ask for just as
many heads as shall be timed and have just as many candidates. Heads of another shape on the same target are timed anew.
When sampling, exact and typical acceptance are timed apart, since the latter needs the entropy of the target's
distribution after each node of the tree; greedy, the two are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ...latency.interleaved import Timing
from ...latency.profile import LatencyProfile
from ...latency.round_kinds import MEDUSA_TYPICAL, MOST_TREE_TOKENS
from . import CandidateTree, MedusaDecoder, MedusaHeads, TypicalMedusaDecoder, sparse

_LOG = logging.getLogger(__name__)
_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 24, 28, 32, 40, 48, 56, MOST_TREE_TOKENS)


def heads_timed(heads: MedusaHeads) -> dict[str, object]:
    """All that the time of heads depends on, beside their target."""
    shape = heads.shape
    return {
        "heads": shape.heads,
        "blocks": shape.blocks,
        "own_output": shape.own_output,
        "outputs": shape.outputs,
        "dtype": str(heads.weight.dtype).removeprefix("torch."),
    }


def measure_medusa(timing: Timing, heads: MedusaHeads, max_target_tokens: int | None) -> LatencyProfile:
    """Time live Medusa rounds of many sizes, and plain decoding, all interleaved. See `latency_measure.measure`.

    A round that reads n tokens asks n - 1 heads, or all where there are no more.

    Args:
        timing: of what, and how.
        heads: of the target.
        max_target_tokens: the most tokens that a timed pass reads, the tree's root included, 1 or more; None for 65,
            or for as many as the heads' candidates allow.

    Raises:
        ValueError: the target's context has no room for the candidates of all heads, or the heads have no trees of so
            many candidates.
    """
    timing.require_room(heads.shape.heads + 1)
    largest = max_target_tokens or MOST_TREE_TOKENS
    wanted = sorted({*_SIZES, *range(1, heads.shape.heads + 2), largest})
    kind = _SizedTypicalTrees if timing.rounds == MEDUSA_TYPICAL else _SizedTrees
    decoder = kind(timing.pair, heads, max_tree=max(1, largest - 1))
    sizes = [size for size in wanted if size <= largest and decoder.reads(size)]
    if sizes[-1] < largest:
        told = f"{timing.pair.target.name} has heads for {heads.shape.outputs} tokens, whose trees are too small for"
        if max_target_tokens is not None:
            raise ValueError(f"{told} a pass over {largest}; give a max_target_tokens of at most {sizes[-1]}")
        _LOG.warning("%s a pass over %d tokens; rounds are timed up to %d", told, largest, sizes[-1])
    return timing.measure(decoder, sizes, decoder.knobs_of, drafting=sizes, about={"medusa": heads_timed(heads)})


class _SizedTrees(MedusaDecoder):
    """Verifies trees as tall as there are heads asked for, and as large as they should be."""

    def tree_of(self, knobs: Mapping[str, float], room: int) -> CandidateTree:
        """As `MedusaDecoder.tree_of`."""
        wanted = int(knobs["heads"]), int(knobs["tree_size"])
        if wanted not in self._trees:
            # A first choice is never wrong here, so that the path of all first choices comes before all else.
            ranks = min(self.heads.shape.outputs, max(wanted))
            self._trees[wanted] = sparse([[0.5**rank for rank in range(ranks)]] * wanted[0], wanted[1])
        return self._trees[wanted].cut(max(room, 0))

    def knobs_of(self, size: int) -> dict[str, float]:
        """Of a round that reads so many tokens."""
        return {"heads": min(self.heads.shape.heads, size - 1), "tree_size": size - 1}

    def reads(self, size: int) -> bool:
        """Whether there is a round that reads so many tokens."""
        return len(self.tree_of(self.knobs_of(size), size)) == size - 1


class _SizedTypicalTrees(_SizedTrees, TypicalMedusaDecoder):
    """The same with typical acceptance."""
