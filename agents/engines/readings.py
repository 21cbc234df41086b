"""Readings and facts, as tuners of simulated worlds take them, from the counts that an engine tells.

An engine tells sums: tokens drafted, tokens accepted, rounds. What a tuner knows of places in a draft follows from them
as if every token were right with the same chance, and the draft went on after it with another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from specgym.decoding import Engine
from specgym.envs import LENGTHS, LEVELS, PROFILED, ComparedText, Facts, Readings

_LONGEST: Final = int(LENGTHS[-1])
_BISECTIONS: Final = 40
_APART: Final = 1.5
"""Tokens by which two mean drafts differ at least for the line through their costs to mean anything."""
_LEAST_ROUND: Final = 0.5  # no round takes less than half a plain token


class Counts(NamedTuple):
    """Sums over texts that were decoded with one setting."""

    tokens: int
    rounds: int
    drafted: int
    accepted: int
    seconds: float
    plain_token: float
    """Seconds of a plain token of the same texts."""

    @classmethod
    def of(cls, texts: Sequence[ComparedText]) -> Counts | None:
        """Sum some texts up; None where the engine does not tell its counts."""
        drafted = [text.drafted for text in texts]
        if any(None in (text.drafted, text.accepted, text.rounds) for text in drafted):
            return None
        plain = sum(text.plain.seconds for text in texts) / sum(text.plain.timed_tokens for text in texts)
        rounds, guessed, kept = (
            sum(getattr(text, name) for text in drafted) for name in ("rounds", "drafted", "accepted")
        )
        tokens, seconds = sum(text.timed_tokens for text in drafted), sum(text.seconds for text in drafted)
        return cls(tokens, rounds, guessed, kept, seconds, plain)

    @property
    def speedup(self) -> float:
        """Speed over that of plain decoding of the same texts."""
        return self.plain_token * self.tokens / self.seconds


class RoundCost(NamedTuple):
    """Mean of the rounds that drafted anything, with one setting."""

    drafted: float
    """Tokens drafted."""
    cost: float
    """Seconds over those of a plain token."""

    @classmethod
    def of(cls, counts: Counts, drafting: float) -> RoundCost:
        """Take the cost of the rounds that drafted from that of all; the others cost what a plain token does."""
        idle = counts.rounds - drafting
        cost = (counts.seconds / counts.plain_token - idle) / drafting
        return cls(counts.drafted / drafting, max(cost, _LEAST_ROUND))


def rounds_with_draft(engine: Engine, knobs: Mapping[str, float], counts: Counts) -> float:
    """Return the number of rounds that drafted anything: of look-ups those that had a match, of a model all."""
    if engine.fixed_length(engine.setting(1)):
        return counts.rounds if counts.drafted else 0
    return min(counts.drafted / knobs[engine.length_knob], counts.rounds)


def facts_of(engine: Engine, temperature: float, rounds: Sequence[RoundCost]) -> Facts:
    """Return what a tuner knows of an engine and its draft before it proposes anything.

    Args:
        engine: that was measured.
        temperature: of sampling.
        rounds: of one setting or two. A second one of other drafts gives the cost of a drafted token; otherwise that
            comes from the difference to a plain token.
    """
    rounds = sorted(rounds)
    first, last = rounds[0], rounds[-1]
    if last.drafted - first.drafted < _APART:
        first, last = RoundCost(0.0, 1.0), rounds[0]
    slope = max((last.cost - first.cost) / max(last.drafted - first.drafted, 1e-9), 0.0)
    short, long = (max(last.cost + slope * (tokens - last.drafted), _LEAST_ROUND) for tokens in PROFILED)
    return Facts(
        np.array([engine.threshold_knob is None]),
        np.array([engine.stop == "llama.cpp" and engine.threshold_knob is not None]),
        np.array([temperature]),
        np.array([1]),
        np.array([short]),
        np.array([max(short, long)]),
    )


def readings_of(counts: Counts, drafting: float, draft_length: int) -> Readings:
    """Return the readings of one measurement, arrays with one row.

    Args:
        counts: of the texts.
        drafting: rounds that drafted anything.
        draft_length: tokens drafted a round at most, by the setting.

    Returns:
        Without the draft's probabilities, which engines do not tell.
    """
    longest, places = min(draft_length, _LONGEST), np.arange(_LONGEST)
    drafts, kept, reached = np.zeros((3, _LONGEST + 1))
    if drafting and longest:
        mean = min(counts.drafted / drafting, longest)
        # A draft goes on with chance c, all its first tokens are right and there is one more with chance c a.
        goes_on = _solved(lambda chance: float((chance ** np.arange(longest)).sum()), mean)
        right = _solved(
            lambda chance: float((chance * (chance * goes_on) ** np.arange(longest)).sum()), counts.accepted / drafting
        )
        inside = places < longest
        reached[:_LONGEST] = drafting * (right * goes_on) ** places * inside
        kept[:_LONGEST] = right * reached[:_LONGEST]
        below = int(mean)
        drafts[below] += drafting * (1 - mean + below)
        drafts[min(below + 1, _LONGEST)] += drafting * (mean - below)
    drafts[0] += counts.rounds - drafting
    nothing = np.zeros((1, LEVELS), np.int64)
    return Readings(
        np.array([counts.speedup]),
        np.rint(drafts)[None].astype(np.int64),
        np.rint(kept[None, :_LONGEST]).astype(np.int64),
        np.rint(reached[None, :_LONGEST]).astype(np.int64),
        nothing,
        nothing,
        np.zeros(1),
    )


def _solved(rising: Callable[[float], float], value: float) -> float:
    """The argument in [0, 1] at which a rising function has a value, or the nearer end."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return high
