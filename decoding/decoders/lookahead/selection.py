"""Which of the n-grams found become guesses: the first, cheap stage before the target's exact check."""

from __future__ import annotations

from collections.abc import Sequence

from .pool import Guess, PoolSettings


def chosen(
    found: Sequence[Guess], settings: PoolSettings, count: int, longest: int
) -> list[tuple[Guess, tuple[int, ...]]]:
    """Which of the n-grams found become guesses, and how much of each.

    Args:
        found: the best first.
        settings: of the pool.
        count: guesses, at most.
        longest: tokens of a guess, at most; longer ones are cut. 0 gives none.
    """
    if count == 0 or longest == 0:
        return []
    kept = list(found)
    if settings.min_acceptance is not None:
        kept = [guess for guess in kept if guess.expected_acceptance() >= settings.min_acceptance]
    if settings.top_share is not None:
        kept = _promising(kept, settings.top_share)
    picked: dict[tuple[int, ...], Guess] = {}
    for guess in kept:
        tokens = guess.tokens[:longest]
        if tokens in picked or (
            settings.max_overlap is not None and any(_overlap(tokens, other) > settings.max_overlap for other in picked)
        ):
            continue
        picked[tokens] = guess
        if len(picked) == count:
            break
    return [(guess, tokens) for tokens, guess in picked.items()]


def _promising(found: Sequence[Guess], share: float) -> list[Guess]:
    """The best by score, as few as make up a share of all scores; in the order that they are found in if equal."""
    ordered = sorted(found, key=lambda guess: -guess.score())
    enough, total = share * sum(guess.score() for guess in ordered), 0.0
    for place, guess in enumerate(ordered):
        total += guess.score()
        if total >= enough:
            return ordered[: place + 1]
    return ordered


def _overlap(tokens: Sequence[int], other: Sequence[int]) -> float:
    """The share of the tokens that the other has at the same place."""
    return sum(mine == its for mine, its in zip(tokens, other, strict=False)) / len(tokens)
