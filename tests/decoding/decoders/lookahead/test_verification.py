"""Verification of several guesses: what is emitted follows the target's distribution, whatever was guessed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from specgym.decoding.decoders.lookahead.window import Accepted, follow
from tests.helpers.branching_dice import Throw
from tests.helpers.known_distributions import Branches

VOCABULARY = 4
Target = Callable[[tuple[int, ...]], list[float]]
"""The distribution of the next token after some."""


@st.composite
def targets(draw: st.DrawFn) -> Target:
    """Distributions over four tokens, some of probability 0, another one after every run of tokens."""
    salt = draw(st.integers(0, 10_000))
    zeros = draw(st.integers(0, 3))

    def target(prefix: tuple[int, ...]) -> list[float]:
        rng = random.Random(f"{salt} {prefix}")
        weights = [0.0] * zeros + [rng.random() ** 3 for _ in range(VOCABULARY - zeros)]
        rng.shuffle(weights)
        return [weight / sum(weights) for weight in weights]

    return target


guesses = st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=3), min_size=1, max_size=5)


def chances(given_guesses: Sequence[Sequence[int]], target: Target) -> list[list[float]]:
    return [[target(tuple(guess[:place]))[token] for place, token in enumerate(guess)] for guess in given_guesses]


def joint(
    given_guesses: Sequence[Sequence[int]], target: Target, verify: Callable[..., Accepted]
) -> dict[tuple[int, ...], float]:
    """The distribution of the text that one round emits, and plain draws after it up to four tokens."""
    texts: dict[tuple[int, ...], float] = {}
    walk = Branches()
    for _ in walk:
        accepted = verify(given_guesses, chances(given_guesses, target), lambda: Throw(walk))
        text = tuple(given_guesses[accepted.guess][: accepted.length])
        p = [0.0 if token in accepted.rejected else chance for token, chance in enumerate(target(text))]
        text = (*text, walk.choose([chance / sum(p) for chance in p]))
        while len(text) < 4:
            text = (*text, walk.choose(target(text)))
        texts[text] = texts.get(text, 0.0) + walk.weight
    return texts


def off(texts: dict[tuple[int, ...], float], target: Target) -> float:
    """Total variation from the target's own texts of four tokens."""
    total = 0.0
    for text in itertools.product(range(VOCABULARY), repeat=4):
        p = 1.0
        for place, token in enumerate(text):
            p *= target(text[:place])[token]
        total += abs(p - texts.get(text, 0.0)) / 2
    return total


@settings(max_examples=25, deadline=None)
@given(guesses, targets())
def test_what_is_emitted_follows_the_target_exactly(given_guesses: list[list[int]], target: Target) -> None:
    assert off(joint(given_guesses, target, follow), target) < 1e-6


def keeps_rejected(*arguments: Any) -> Accepted:
    """Afterwards the token comes from the whole distribution, as if nothing had been rejected."""
    return follow(*arguments)._replace(rejected=[])


def keeps_its_share(given_guesses: Any, given_chances: Any, uniform: Any) -> Accepted:
    """A rejected token's share is not taken out of what is left for the next: u < p(x) for each."""

    class Whole:
        def __mul__(self, factor: float) -> Any:
            return uniform()

    return follow(given_guesses, given_chances, Whole)  # type: ignore[arg-type]


def divides(given_guesses: Any, given_chances: Any, uniform: Any) -> Accepted:
    """Accepts with min(1, p / q), as if the guess had been drawn with a probability of a half."""
    return follow(given_guesses, [[min(1.0, 2 * chance) for chance in row] for row in given_chances], uniform)


@pytest.mark.parametrize("wrong", [keeps_rejected, keeps_its_share, divides])
def test_wrong_verifications_are_found_out(wrong: Callable[..., Accepted]) -> None:
    def target(prefix: tuple[int, ...]) -> list[float]:
        return [0.4, 0.3, 0.2, 0.1]

    some = [[0, 1], [1, 2], [2, 2]]
    assert off(joint(some, target, follow), target) < 1e-6
    assert off(joint(some, target, wrong), target) > 0.02


@given(guesses, targets(), st.integers(0, 1000))
def test_accepted_tokens_are_possible_and_rejected_ones_are_other_continuations(
    given_guesses: list[list[int]], target: Target, seed: int
) -> None:
    of_guesses = chances(given_guesses, target)
    accepted = follow(given_guesses, of_guesses, random.Random(seed).random)
    assert 0 <= accepted.length <= len(given_guesses[accepted.guess])
    assert all(chance > 0 for chance in of_guesses[accepted.guess][: accepted.length])
    assert len(set(accepted.rejected)) == len(accepted.rejected)
    begun = given_guesses[accepted.guess][: accepted.length]
    beyond = {
        guess[accepted.length]
        for guess in given_guesses
        if guess[: accepted.length] == begun and guess[accepted.length :]
    }
    assert set(accepted.rejected) == beyond  # all that was tried there, and nothing else


def greedy(given_guesses: Sequence[Sequence[int]], text: Sequence[int]) -> Accepted:
    rows = [
        [float(list(guess[: place + 1]) == list(text[: place + 1])) for place in range(len(guess))]
        for guess in given_guesses
    ]
    return follow(given_guesses, rows, random.Random(0).random)


def test_greedy_verification_follows_the_longest_guess_that_comes_true() -> None:
    text = [5, 6, 7, 8]
    assert greedy([[5, 1, 7], [5, 6, 2], [4, 6, 7], [5, 6]], text) == (1, 2, [2])
    assert greedy([[], [9], [5, 6, 7]], text) == (2, 3, [])
    assert greedy([[], [9], [8], [9]], text) == (0, 0, [9, 8])
    assert greedy([[]], text) == (0, 0, [])
    assert greedy([], text) == (0, 0, [])
