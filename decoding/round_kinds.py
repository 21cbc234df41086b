"""The kinds of rounds that latency profiles are made for, and how large each is by default."""

from __future__ import annotations

CHAIN = "chain"
"""Rounds that draft some tokens one after another and verify them in one pass."""
LOOKAHEAD = "lookahead"
"""Whole rounds of Lookahead decoding, by the tokens that the target's pass reads; nothing is drafted beforehand."""
ROUNDS = (CHAIN, LOOKAHEAD)

LONGEST_DRAFT = 16
"""Of chains, in tokens."""
MOST_TARGET_TOKENS = 160
"""Of Lookahead: what the decoder reads with its knobs as high as they go."""


def require_kind(rounds: str) -> None:
    """Raise ValueError if there is no such kind of rounds."""
    if rounds not in ROUNDS:
        raise ValueError(f"rounds must be one of {', '.join(ROUNDS)}, got {rounds!r}")


def largest_size(rounds: str, max_draft_length: int | None, max_target_tokens: int | None) -> int:
    """The largest round that a profile's tables shall hold: its draft for chains, what the pass reads for Lookahead.

    Args:
        rounds: the kind.
        max_draft_length: of chains, in tokens; None for 16.
        max_target_tokens: of Lookahead; None for 160.

    Raises:
        ValueError: there is no such kind, the number is not positive, or one is given that belongs to the other kind.
    """
    require_kind(rounds)
    given = {"max_draft_length": max_draft_length, "max_target_tokens": max_target_tokens}
    name, usual = (
        ("max_target_tokens", MOST_TARGET_TOKENS) if rounds == LOOKAHEAD else ("max_draft_length", LONGEST_DRAFT)
    )
    largest = given.pop(name)
    for other, value in given.items():
        if value is not None:
            raise ValueError(f"{other} is not for {rounds} rounds; how large those are timed is {name}")
    if largest is None:
        return usual
    if largest < 1 or int(largest) != largest:
        raise ValueError(f"{name} must be a whole number of at least 1, got {largest}")
    return int(largest)
