"""Facts about decoding with draft trees that need no model. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import check_fields, whole_number
from ...traits import DecoderTraits, Knob

USUAL_CHILDREN, USUAL_DEPTH, USUAL_NODES, USUAL_CUT = 5, 4, 16, 0.1
MOST_CHILDREN, DEEPEST, LARGEST = 8, 8, 64


@dataclass(frozen=True)
class DraftTreeOptions:
    """Build options of decoding with draft trees.

    Raises:
        ValueError: a number is not positive.
    """

    rule: str = "likeliest"
    """Rule by which a node's children are chosen and verified: likeliest, independent or distinct."""
    pruning: str | None = "absolute"
    """Rule that cuts branches before verification: absolute, level, ratio or throughput; None cuts nothing."""
    max_candidates: int = MOST_CHILDREN
    """Upper end of the knob `max_candidates`, in children a node."""
    max_depth: int = DEEPEST
    """Upper end of the knob `max_depth`, in tokens a path."""
    max_nodes: int = LARGEST
    """Upper end of the knob `node_budget`, in candidates a round."""

    def __post_init__(self) -> None:
        check_fields(self, whole_number, "max_candidates", "max_depth", "max_nodes")


class DraftTreeTraits(DecoderTraits):
    """Facts about decoding with draft trees."""

    name = "draft-tree"
    lossless = True
    verifies_trees = True
    workloads = ("tiny/prose", "tiny/code", "tiny-3m-1l/prose", "tiny-3m-1l/code")
    Options = DraftTreeOptions
    largest_pass = LARGEST + 1

    @classmethod
    def cost_kind(cls, greedy: bool) -> str:
        """Return the decoder's own kind: a tree costs what its levels and its size say, not what a chain does."""
        return DraftTreeTraits.name

    @classmethod
    def knobs_without_pair(cls, **options: Any) -> tuple[Knob, ...]:
        """Return the knobs of the tree's shape, and of pruning where branches are cut."""
        limits: DraftTreeOptions = cls.checked_options(**options)
        children, depth, nodes = (
            min(USUAL_CHILDREN, limits.max_candidates),
            min(USUAL_DEPTH, limits.max_depth),
            min(USUAL_NODES, limits.max_nodes),
        )
        shape = (
            Knob("max_candidates", 1, limits.max_candidates, children, True, "children a node, at most"),
            Knob("max_depth", 0, limits.max_depth, depth, True, "tokens that a path has, at most; 0 drafts nothing"),
            Knob("node_budget", 0, limits.max_nodes, nodes, True, "candidates a round, at most", True),
        )
        if limits.pruning is None:
            return shape
        cut = Knob(
            "min_acceptance_prob",
            0.0,
            1.0,
            USUAL_CUT,
            doc="chance below which a branch is cut",
            search=(0.0, 0.3),  # a tree whose branches must be likelier has next to none
        )
        return (*shape, cut)
