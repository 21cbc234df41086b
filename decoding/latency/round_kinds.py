"""The kinds of rounds that latency profiles are made for, and how large each is by default."""

from __future__ import annotations

from typing import Final, Literal, get_args

from ..decoders.medusa.trees import LARGEST_TREE

Rounds = Literal["chain", "lookahead", "medusa", "medusa-typical", "draft-tree"]

CHAIN: Final = "chain"
"""Rounds that draft some tokens one after another and verify them in one pass."""
LOOKAHEAD: Final = "lookahead"
"""Whole rounds of Lookahead decoding, by the tokens that the target's pass reads; nothing is drafted beforehand."""
MEDUSA: Final = "medusa"
"""Rounds in which heads on the target propose a tree of candidates, which one pass verifies: drafting by the heads that
are asked, the pass by the tokens that it reads."""
MEDUSA_TYPICAL: Final = "medusa-typical"
"""The same with typical acceptance, for which the entropy of the target is needed after every candidate, when sampling.
Greedy, the two accept alike and are one kind; see `timed_as`."""
OF_HEADS = (MEDUSA, MEDUSA_TYPICAL)
"""The kinds that heads draft for."""
DRAFT_TREE: Final = "draft-tree"
"""Rounds in which a draft grows a tree of candidates, which one pass of the target verifies: drafting by the draft's
passes, one a level, the target's pass by the tokens that it reads."""
OF_TREES = (*OF_HEADS, DRAFT_TREE)
"""The kinds whose rounds verify a tree, so that what drafting costs does not follow from how much is verified."""
DRAFTED = (CHAIN, DRAFT_TREE)
"""The kinds that need the pair's draft; for the others the target is enough."""
ROUNDS: tuple[str, ...] = get_args(Rounds)

LONGEST_DRAFT = 16
"""Of chains, in tokens."""
MOST_TARGET_TOKENS = 160
"""Of Lookahead: what the decoder reads with its knobs as high as they go."""
MOST_TREE_TOKENS = LARGEST_TREE + 1
"""Of Medusa and of draft trees: the same, the tree's root included."""

_LARGEST = {
    CHAIN: ("max_draft_length", LONGEST_DRAFT),
    LOOKAHEAD: ("max_target_tokens", MOST_TARGET_TOKENS),
    MEDUSA: ("max_target_tokens", MOST_TREE_TOKENS),
    MEDUSA_TYPICAL: ("max_target_tokens", MOST_TREE_TOKENS),
    DRAFT_TREE: ("max_target_tokens", MOST_TREE_TOKENS),
}


def require_kind(rounds: str) -> None:
    """Raise ValueError if there is no such kind of rounds."""
    if rounds not in ROUNDS:
        raise ValueError(f"rounds must be one of {', '.join(ROUNDS)}, got {rounds!r}")


def timed_as(rounds: str, greedy: bool) -> str:
    """The kind whose times a kind of rounds takes: its own, but exact Medusa's for typical acceptance without sampling.

    Raises:
        ValueError: there is no such kind.
    """
    require_kind(rounds)
    return MEDUSA if greedy and rounds == MEDUSA_TYPICAL else rounds


def largest_size(rounds: str, max_draft_length: int | None, max_target_tokens: int | None) -> int:
    """The largest round that a profile's tables shall hold: its draft for chains, what the pass reads for others.

    Args:
        rounds: the kind.
        max_draft_length: of chains, in tokens; None for 16.
        max_target_tokens: of Lookahead, Medusa and draft trees; None for 160, 65 and 65.

    Raises:
        ValueError: there is no such kind, the number is not positive, or one is given that belongs to another kind.
    """
    require_kind(rounds)
    given = {"max_draft_length": max_draft_length, "max_target_tokens": max_target_tokens}
    name, usual = _LARGEST[rounds]
    largest = given.pop(name)
    for other, value in given.items():
        if value is not None:
            raise ValueError(f"{other} is not for {rounds} rounds; how large those are timed is {name}")
    if largest is None:
        return usual
    if largest < 1 or int(largest) != largest:
        raise ValueError(f"{name} must be a whole number of at least 1, got {largest}")
    return int(largest)
