"""The first tokens of a decoder's texts, over all outcomes of its dice or over many seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from known_distributions import Branches, exact_joint, p_value_of
from specgym.decoding.decoder import Decoder, Round, Session
from specgym.decoding.sampling import Sampling

LENGTH = 3
AHEAD = 3
"""Tokens that a text has beyond those that are looked at, so that what is drafted reaches there."""
Knobs = Callable[[int], Mapping[str, float]]
"""Of a round, by its number."""


class FirstTokens:
    """Adds up the first tokens of texts.

    Attributes:
        weights: of the texts, by their first tokens.
        accepted: drafted tokens that were accepted, each with the weight of its text.
        rejected: those that were not, likewise.
    """

    def __init__(self) -> None:
        self.weights: dict[tuple[int, ...], float] = {}
        self.accepted = self.rejected = 0.0

    def add(self, session: Session, knobs: Knobs, walk: Branches | None = None) -> None:
        """Decode as far as is looked at; the text weighs what the walk has come to by then, or else 1."""
        rounds: list[Round] = []
        while len(session.tokens) < LENGTH:
            rounds.append(session.step(knobs(len(rounds))))
        weight = 1.0 if walk is None else walk.weight
        text = tuple(session.tokens[:LENGTH])
        self.weights[text] = self.weights.get(text, 0.0) + weight
        self.accepted += weight * sum(cycle.accepted for cycle in rounds)
        self.rejected += weight * sum(cycle.drafted - cycle.accepted for cycle in rounds)


def sampled_p_value(
    decoder: Decoder, sampling: Sampling, prompt: Sequence[int], generations: int, knobs: Knobs
) -> tuple[float, FirstTokens]:
    """The chi-square test of seeded texts (0 where an impossible one came up), and the texts."""
    found = FirstTokens()
    for seed in range(generations):
        found.add(decoder.start(prompt, max_new_tokens=LENGTH + AHEAD, sampling=sampling, seed=seed), knobs)
    counts = {text: round(weight) for text, weight in found.weights.items()}
    return p_value_of(counts, exact_joint(decoder.pair.target, sampling, prompt, LENGTH)), found
