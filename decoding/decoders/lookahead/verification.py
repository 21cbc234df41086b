"""Which guess the target follows: exact, for several guesses that may share their first tokens.

A guess is proposed with certainty, so its distribution is one-hot. At a node of the tree of guesses the distinct next
tokens are tried one after the other: token x is accepted with its share of the target's probability that is left, and
otherwise taken out of it. What is emitted follows the target's distribution whatever was guessed, as in Algorithm 4 of
Fu et al. (arXiv 2402.02057). Greedy decoding is the case in which every probability is 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Accepted(NamedTuple):
    """What verification made of some guesses."""

    guess: int
    """The guess that was followed furthest; 0 if none was followed at all."""
    length: int
    """How many of its tokens were accepted."""
    rejected: list[int]
    """Tokens that were tried where the guesses ended, and that may therefore not come next."""


def follow(
    guesses: Sequence[Sequence[int]], chances: Sequence[Sequence[float]], uniform: Callable[[], float]
) -> Accepted:
    """Walk down the tree of guesses, as far as the dice accept.

    Args:
        guesses: token ids; guesses with the same beginning share it.
        chances: of each token of each guess, its probability by the target after those before it, 0 to 1.
        uniform: throws a die, in [0, 1).
    """
    surviving = [number for number, guess in enumerate(guesses) if guess]
    followed, count = 0, 0
    while surviving:
        left = 1.0
        rejected: list[int] = []
        for number in surviving:
            token = guesses[number][count]
            if token in rejected:
                continue
            chance = chances[number][count]
            if uniform() * left < chance:
                break
            left -= chance
            rejected.append(token)
        else:
            return Accepted(followed, count, rejected)
        followed = number
        surviving = [other for other in surviving if guesses[other][count] == token]
        count += 1
        surviving = [other for other in surviving if len(guesses[other]) > count]
    return Accepted(followed, count, [])
