"""Facts about Medusa decoding that need no model. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import check_fields, whole_number
from ...traits import DecoderTraits, Knob

LARGEST_TREE = 64
"""Candidates of the largest tree, by default: the paper's."""
USUAL_TREE = 16
USUAL_HEADS = 5
EPSILON, DELTA = 0.09, 0.3
"""Thresholds of typical acceptance in the paper; delta is the square root of epsilon."""


@dataclass(frozen=True)
class MedusaOptions:
    """Build options of Medusa decoding.

    Raises:
        ValueError: `max_tree` is not positive.
    """

    heads: str | None = None
    """Medusa heads: their folder, or the name of heads that ship; by default those beside the target, or that ship for
    it."""
    max_tree: int = LARGEST_TREE
    """Upper end of the `tree_size` knob, in candidates."""

    def __post_init__(self) -> None:
        check_fields(self, whole_number, "max_tree")


class MedusaTraits(DecoderTraits):
    """Facts about Medusa decoding with exact verification.

    Attributes:
        acceptance_knobs: knobs of what is accepted; last among the knobs.
    """

    name = "medusa"
    lossless = True
    verifies_trees = True
    needs_draft = False
    workloads = ("tiny-10m/prose", "tiny-10m/code", "tiny-3m/prose", "tiny-3m/code")
    Options = MedusaOptions
    largest_pass = LARGEST_TREE + 1
    acceptance_knobs: ClassVar[tuple[Knob, ...]] = ()

    @classmethod
    def knobs_without_pair(cls, **options: Any) -> tuple[Knob, ...]:
        """Return the knobs for a target with five heads."""
        return cls.knobs_of_heads(USUAL_HEADS, cls.checked_options(**options).max_tree)

    @classmethod
    def recorded_knobs(cls, highest: Mapping[str, float], **options: Any) -> tuple[Knob, ...]:
        """Return the knobs for as many heads as were recorded."""
        return cls.knobs_of_heads(int(highest["heads"]), cls.checked_options(**options).max_tree)

    @classmethod
    def knobs_of_heads(cls, heads: int, max_tree: int = LARGEST_TREE) -> tuple[Knob, ...]:
        """Return the knobs for a target with this many heads."""
        usual = min(USUAL_TREE, max_tree)
        return (
            Knob("heads", 0, heads, heads, True, "heads that propose candidates"),
            Knob("tree_size", 0, max_tree, usual, True, "candidates verified a round, at most", True),
            *cls.acceptance_knobs,
        )


class TypicalMedusaTraits(MedusaTraits):
    """Facts about Medusa decoding with typical acceptance."""

    name = "medusa-typical"
    lossless = False
    acceptance_knobs = (
        Knob("epsilon", 0.0, 1.0, EPSILON, doc="probability above which every candidate is accepted"),
        Knob("delta", 0.0, 2.0, DELTA, doc="share of exp(-entropy) above which a candidate is accepted"),
    )

    @classmethod
    def cost_kind(cls, greedy: bool) -> str:
        """Return the kind of exact acceptance for greedy decoding, where the two do the same."""
        return MedusaTraits.name if greedy else cls.name
