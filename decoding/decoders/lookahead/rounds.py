"""What one round of Lookahead decoding did."""

from __future__ import annotations

from dataclasses import dataclass

from ...decoder import Round


@dataclass(frozen=True)
class LookaheadRound(Round):
    """A `Round` with what is particular to Lookahead decoding.

    `drafted` counts the tokens of all guesses and of the window's first row, which are verified in the same pass;
    `draft_seconds` is the time of choosing guesses and assembling the pass, `verify_seconds` that of the rest.
    """

    found: int = 0
    """N-grams that the pool had for the current token."""
    guesses: int = 0
    """How many of them were verified."""
    pool_size: int = 0
    """N-grams in the pool afterwards."""
    mask_seconds: float = 0.0
    """Part of `verify_seconds`: building the attention mask."""
    forward_seconds: float = 0.0
    """Part of `verify_seconds`: the target's pass, without the mask. An accelerator goes on working behind it."""
    judge_seconds: float = 0.0
    """The rest of `verify_seconds`: verification, window, pool and cache; an accelerator is waited for in it."""
