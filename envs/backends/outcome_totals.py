"""What recorded rounds add up to, for texts of at most so many tokens and by some latency profile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import LatencyProfile, traits_of

from ..recordings.outcomes import Outcomes

Floats = NDArray[np.float64]

QUANTITIES = ("rounds", "drafted", "accepted", "divergence", "seconds")
"""What is summed over a text, beside its tokens; as `measuring.metrics` takes them."""


@dataclass(frozen=True)
class Totals:
    """Sums over the rounds of every recorded text; arrays of shape (settings, prompts)."""

    tokens: Floats
    rounds: Floats
    drafted: Floats
    accepted: Floats
    divergence: Floats
    seconds: Floats

    def per(self, unit: str, name: str) -> Floats:
        """One of `QUANTITIES` over all prompts together, by setting, per unit, which is `tokens` or `rounds`; shape
        (settings,)."""
        return getattr(self, name).sum(1) / getattr(self, unit).sum(1)

    def per_token(self, name: str) -> Floats:
        """One of `QUANTITIES` over all prompts together, per emitted token, by setting; shape (settings,)."""
        return self.per("tokens", name)


def totals(outcomes: Outcomes, profile: LatencyProfile, tokens: int) -> Totals:
    """Add up the rounds of every text, cut after so many tokens.

    A decoder that drafts chains would have drafted less near the new end, so it is charged less there; a greedy exact
    one is then as if it had been asked for so many tokens. Thresholds might have decided otherwise about the shorter
    draft, Lookahead would have offered shorter n-grams, and a draft would have grown a lower tree: none of that shows
    in what was recorded, so the last rounds of a text that is cut are theirs of the longer text, without the tokens
    beyond the end. Of the divergence of a round that is cut, each token counts alike.

    Args:
        outcomes: what was recorded.
        profile: what a round is charged by, at the operating point.
        tokens: at most, 1 to those recorded.
    """
    texts = len(outcomes.starts) - 1
    text = np.repeat(np.arange(texts), np.diff(outcomes.starts))
    before = np.cumsum(outcomes.emitted) - outcomes.emitted
    before -= before[outcomes.starts[:-1]][text]  # tokens of the text before each round
    reached = before < tokens
    text, room = text[reached], (tokens - before)[reached]
    emitted, drafted, accepted, steps, read = (
        getattr(outcomes, name)[reached] for name in ("emitted", "drafted", "accepted", "draft_steps", "target_tokens")
    )
    divergence = outcomes.divergence[reached] * (np.minimum(emitted, room) / emitted)
    emitted = np.minimum(emitted, room)
    if traits_of(outcomes.info.decoder).drafts_chains():
        beyond = np.maximum(drafted - (room - 1), 0)
        drafted, read, steps = drafted - beyond, read - beyond, np.minimum(steps, drafted - beyond)
    accepted = np.minimum(accepted, np.minimum(drafted, emitted))

    def summed(values: NDArray[np.generic] | None = None) -> Floats:
        return np.bincount(text, values, texts).astype(np.float64).reshape(len(outcomes.settings), -1)

    return Totals(
        tokens=summed(emitted),
        rounds=summed(),
        drafted=summed(drafted),
        accepted=summed(accepted),
        divergence=summed(divergence),
        seconds=summed(profile.rounds_of(steps, read)),
    )
