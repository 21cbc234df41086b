"""The first tokens of a decoder's texts, over all outcomes of its dice or over many seeds, against the target's own.

*Exactly*, a `Walker` goes through every outcome (to rounding error); *sampled*, seeded texts pass a chi-square test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import pytest
from transformers import LogitsProcessor

from specgym.decoding.decoder import Decoder, Session
from specgym.decoding.rounds import Round
from specgym.decoding.sampling import Sampling
from tests.helpers.known_distributions import Branches, Joint, distance, exact_joint, p_value_of

PROMPT = (0, 1, 2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 1)
LENGTH = 3
AHEAD = 3
"""Tokens that a text has beyond those that are looked at, so that what is drafted reaches there."""
SIGNIFICANCE = 1e-3
"""Level of every chi-square test: with n of them, a run in 1000/n would fail by chance, were the seeds not fixed."""
ROUNDING = 1e-5
"""Total variation from the target of what is exact."""
Knobs = Callable[[int], Mapping[str, float]]
"""Knobs of a round by its number."""


def usual(number: int) -> Mapping[str, float]:
    """The decoder's own knobs in every round."""
    return {}


class FirstTokens:
    """Adds up the first tokens of texts.

    Attributes:
        weights: weights of the texts, by their first tokens.
        accepted: drafted tokens that were accepted, weighted by their texts.
        rejected: those that were not, likewise.
    """

    def __init__(self) -> None:
        self.weights: Joint = {}
        self.accepted = self.rejected = 0.0

    def add(self, session: Session, knobs: Knobs, walk: Branches | None = None) -> None:
        """Decode as far as is looked at; the text weighs what the walk has come to by then, or else 1."""
        rounds: list[Round] = []
        while len(session.tokens) < LENGTH:
            rounds.append(session.step(knobs(len(rounds))))
        weight = 1.0 if walk is None else walk.weight
        text = tuple(session.tokens[:LENGTH])
        self.weights[text] = self.weights.get(text, 0.0) + weight
        self.accepted += weight * sum(round_.accepted for round_ in rounds)
        self.rejected += weight * sum(round_.drafted - round_.accepted for round_ in rounds)


class Walker(ABC):
    """Walks every outcome of a decoder's first tokens. What is random in a decoder is said by a subclass.

    Attributes:
        prompt: what is continued.
        accepted: drafted tokens that were accepted, expected a text, summed over all walks.
        rejected: those that were not, likewise.
    """

    prompt: tuple[int, ...] = PROMPT

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.accepted = self.rejected = 0.0

    @abstractmethod
    def branch(self, patch: pytest.MonkeyPatch, walk: Branches) -> None:
        """Replace the random choices of the decoder's module by branches of the walk."""

    def begin(self, session: Session, walk: Branches) -> None:  # noqa: B027  # not every decoder needs it
        """Replace those that a session has of its own; by default it has none."""

    def strays(self, decoder: Decoder, sampling: Sampling, knobs: Knobs = usual) -> float:
        """Total variation of the decoder's first tokens from the target's own."""
        walk, result = Branches(), FirstTokens()
        with self._monkeypatch.context() as patch:
            self.branch(patch, walk)
            for _ in walk:
                session = decoder.start(self.prompt, max_new_tokens=LENGTH + AHEAD, sampling=sampling, seed=0)
                self.begin(session, walk)
                result.add(session, knobs, walk)
        assert sum(result.weights.values()) == pytest.approx(1)
        self.accepted += result.accepted
        self.rejected += result.rejected
        return distance(result.weights, exact_joint(decoder.pair.target, sampling, self.prompt, LENGTH))


def sampled(
    decoder: Decoder, sampling: Sampling, texts: int, knobs: Knobs, processors: Sequence[LogitsProcessor] = ()
) -> tuple[float, FirstTokens]:
    """The p-value of so many seeded texts (0 where an impossible one came up), and the texts."""
    result = FirstTokens()
    for seed in range(texts):
        session = decoder.start(
            PROMPT, max_new_tokens=LENGTH + AHEAD, sampling=sampling, seed=seed, logits_processor=processors
        )
        result.add(session, knobs)
    counts = {text: round(weight) for text, weight in result.weights.items()}
    return p_value_of(counts, exact_joint(decoder.pair.target, sampling, PROMPT, LENGTH, processors)), result


def assert_texts_follow_the_target(
    decoder: Decoder, sampling: Sampling, texts: int, knobs: Knobs, processors: Sequence[LogitsProcessor] = ()
) -> None:
    """So many seeded texts may be the target's own; and enough was accepted and rejected for that to say something."""
    p_value, result = sampled(decoder, sampling, texts, knobs, processors)
    assert p_value > SIGNIFICANCE
    assert min(result.accepted, result.rejected) > texts / 10


def assert_found_out(walker: Walker, small: Decoder, large: Decoder, texts: int, knobs: Knobs = usual) -> None:
    """A wrong decoder strays from its target when walked, of few tokens, and by so many texts, of more tokens."""
    assert walker.strays(small, Sampling(), knobs) > 0.01
    assert sampled(large, Sampling(), texts, knobs)[0] < SIGNIFICANCE / 1000
