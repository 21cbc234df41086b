"""Outcomes: the rounds that a decoder did with many settings of its knobs, so that these can be tuned without models.

Where what a decoder proposes depends on its knobs, a trace of a draft (`specgym.envs.recordings.trace`) cannot say
what other knobs would have led to. So all recorded prompts are decoded with a designed set of settings, and what lies
between them is interpolated (`specgym.envs.backends.outcome_replay`). A file of outcomes is an archive
(`specgym.envs.recordings.archive`). It holds no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import CHAIN, LatencyProfile, file_name, traits_of

from .archive import Provenance, TraceError, has_form, numbers, read_archive, typed, write_archive

FORMAT = "specgym-outcomes-2"
_UNSEALED = "specgym-outcomes-1"  # has no checksum
_MOST = 2**16  # tokens of a round, far more than any pass reads
_EARLIER_HASHES = ("heads", "guidance")
COUNTS = ("emitted", "drafted", "accepted", "draft_steps", "target_tokens")
"""Whole numbers that are recorded of every round."""

QUANTITIES = ("rounds", "drafted", "accepted", "total_variation", "seconds")
"""Sums over a text's rounds, besides its tokens, by the names of `Metrics`."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class OutcomeError(TraceError):
    """Outcomes that cannot be read, or do not hold what is asked of them; the message names them and the way out."""


@dataclass(frozen=True)
class RecordedKnob:
    """Knob of a recording, with the range that was recorded, in its own units."""

    name: str
    low: float
    high: float
    integer: bool


@dataclass(frozen=True, kw_only=True)
class OutcomeInfo(Provenance):
    """Facts of a recording of outcomes."""

    decoder: str
    """Registered name of the decoder."""
    knobs: tuple[RecordedKnob, ...]
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    """Hashes of what shapes the decoder's rounds beside the pair (`Decoder.fingerprint`)."""

    def __str__(self) -> str:
        return f"the {self.decoder} outcomes of {self.workload} ({self.split})"


@dataclass(frozen=True)
class Outcomes:
    """Recorded rounds of one workload and decoder, in memory.

    The rounds of a text follow one another; the text of setting s and prompt p is number s * prompts + p.

    Attributes:
        info: what was recorded.
        settings: the knobs' values, shape (settings, knobs), each setting once.
        starts: the round at which each text begins, and the number of rounds, shape (settings * prompts + 1,).
        emitted: tokens that each round emitted, at least 1, shape (rounds,), like the rest.
        drafted: draft tokens verified.
        accepted: draft tokens among those emitted.
        draft_steps: tokens, or levels of a tree, that the draft made one after another.
        target_tokens: tokens that the target's pass read, at least 1.
        divergence: the round's sum of total variations from the target; not stored where it is 0 throughout.
    """

    info: OutcomeInfo
    settings: Floats
    starts: Integers
    emitted: Integers
    drafted: Integers
    accepted: Integers
    draft_steps: Integers
    target_tokens: Integers
    divergence: NDArray[np.float32] = field(repr=False)

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return (len(self.starts) - 1) // len(self.settings)

    def save(self, path: str | Path) -> None:
        """Write the outcomes; a reader never sees half of them."""
        arrays: dict[str, NDArray[Any]] = {"settings": self.settings, "starts": self.starts.astype(np.uint32)}
        arrays |= {name: _small(getattr(self, name)) for name in COUNTS}
        if self.divergence.any():
            arrays["divergence"] = self.divergence.astype(np.float32)
        write_archive(path, FORMAT, asdict(self.info), arrays)

    @classmethod
    def load(cls, path: str | Path) -> Outcomes:
        """Read outcomes.

        Raises:
            OutcomeError: the file is missing, truncated, damaged, of another kind or version, or contradicts itself.
        """
        return read_archive(
            path,
            (FORMAT, _UNSEALED),
            "file of outcomes",
            OutcomeError,
            _info,
            lambda info, content: _checked(_decoded(cls, info, content)),
        )


@dataclass(frozen=True)
class OutcomeTotals:
    """Sums over the rounds of every recorded text; arrays of shape (settings, prompts)."""

    tokens: Floats
    rounds: Floats
    drafted: Floats
    accepted: Floats
    total_variation: Floats
    seconds: Floats

    def per(self, unit: str, name: str) -> Floats:
        """Return one of `QUANTITIES` over all prompts together, by setting, per token or round; shape (settings,)."""
        return getattr(self, name).sum(1) / getattr(self, unit).sum(1)

    def per_token(self, name: str) -> Floats:
        """Return one of `QUANTITIES` over all prompts together, per emitted token, by setting; shape (settings,)."""
        return self.per("tokens", name)


def totals(outcomes: Outcomes, profile: LatencyProfile, tokens: int) -> OutcomeTotals:
    """Add up the rounds of every text, cut after a number of tokens.

    A decoder that drafts chains would have drafted less near the new end, so it is charged less there; a greedy exact
    one is then as if it had been asked for so many tokens. Thresholds might have decided otherwise about the shorter
    draft, Lookahead would have offered shorter n-grams, and a draft would have grown a lower tree: none of that shows
    in what was recorded, so the last rounds of a text that is cut are theirs of the longer text, without the tokens
    beyond the end. Of the divergence of a round that is cut, each token counts alike.

    Args:
        outcomes: what was recorded.
        profile: charges the rounds, at the operating point.
        tokens: kept of every text, at most; 1 to those recorded.
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
    if traits_of(outcomes.info.decoder).cost_kind(outcomes.info.sampling.greedy) == CHAIN:
        beyond = np.maximum(drafted - (room - 1), 0)
        drafted, read, steps = drafted - beyond, read - beyond, np.minimum(steps, drafted - beyond)
    accepted = np.minimum(accepted, np.minimum(drafted, emitted))

    def summed(values: NDArray[np.generic] | None = None) -> Floats:
        return np.bincount(text, values, texts).astype(np.float64).reshape(len(outcomes.settings), -1)

    return OutcomeTotals(
        tokens=summed(emitted),
        rounds=summed(),
        drafted=summed(drafted),
        accepted=summed(accepted),
        total_variation=summed(divergence),
        seconds=summed(profile.rounds_of(steps, read)),
    )


def holds_outcomes(path: str | Path) -> bool:
    """Return whether a file holds outcomes; False also where it is missing or damaged."""
    return has_form(path, FORMAT, _UNSEALED)


def outcomes_name(name: str, decoder: str, split: str) -> str:
    """Return the file name of a workload's outcomes with a decoder."""
    return f"{file_name(name)}.{decoder}.{split}.npz"


def _info(metadata: dict[str, Any]) -> OutcomeInfo:
    knobs = tuple(typed(RecordedKnob, knob) for knob in metadata.pop("knobs"))
    # Earlier files have a field of their own for every kind of hash, empty where the decoder has none.
    earlier = {name: metadata.pop(f"{name}_sha256", "") for name in _EARLIER_HASHES}
    fingerprint = metadata.pop("fingerprint", {name: digest for name, digest in earlier.items() if digest})
    if not (isinstance(fingerprint, dict) and all(isinstance(value, str) for value in fingerprint.values())):
        raise ValueError("fingerprint must be an object of hashes")
    info = typed(OutcomeInfo, {**metadata, "knobs": knobs, "fingerprint": fingerprint})
    info.check()
    names = [knob.name for knob in knobs]
    if len(set(names)) < len(names) or not all(knob.low <= knob.high for knob in knobs):
        raise ValueError(f"knobs must have a range each, and names that differ, got {', '.join(map(str, knobs))}")
    return info


def _small(values: Integers) -> NDArray[Any]:
    """Convert to the smallest unsigned integers that hold all of them."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _decoded(kind: type[Outcomes], info: OutcomeInfo, content: Mapping[str, NDArray[Any]]) -> Outcomes:
    starts, rounds = numbers(content, "starts", "iu", (-1,)), len(numbers(content, "emitted", "iu", (-1,)))
    counts = {name: numbers(content, name, "iu", (rounds,)).astype(np.int64) for name in COUNTS}
    lossless = {"divergence": np.zeros(rounds, np.float32)}
    divergence = numbers({**lossless, **content}, "divergence", "f", (rounds,)).astype(np.float32)
    settings = numbers(content, "settings", "f", (-1, len(info.knobs))).astype(np.float64)
    return kind(info, settings, starts.astype(np.int64), divergence=divergence, **counts)


def _checked(outcomes: Outcomes) -> Outcomes:
    """Return the outcomes if their arrays fit together.

    Raises:
        ValueError: they do not; the message says which.
    """
    info, settings, starts = outcomes.info, outcomes.settings, outcomes.starts
    if len(settings) == 0:
        raise ValueError("settings is empty")
    for knob, column in zip(info.knobs, settings.T, strict=True):
        if not ((knob.low <= column) & (column <= knob.high)).all():  # also where one is not a number
            raise ValueError(f"settings has values of {knob.name} outside {knob.low:g} to {knob.high:g}")
        if knob.integer and (column % 1).any():
            raise ValueError(f"settings has fractions for {knob.name}, which takes whole numbers")
    if len(np.unique(settings, axis=0)) < len(settings):
        raise ValueError("settings has one twice")
    texts, rounds = len(starts) - 1, len(outcomes.emitted)
    if texts < len(settings) or texts % len(settings):
        raise ValueError("starts does not hold as many texts for each setting")
    if starts[0] != 0 or starts[-1] != rounds or (np.diff(starts) < 1).any():
        raise ValueError("starts does not divide the rounds into texts")
    for name in (*COUNTS, "divergence"):
        values = getattr(outcomes, name)
        fewest = 1 if name in ("emitted", "target_tokens") else 0
        if not (np.isfinite(values).all() and fewest <= values.min() and values.max() <= _MOST):
            raise ValueError(f"{name} has values below {fewest}, beyond {_MOST}, or not finite")
    if (outcomes.accepted > np.minimum(outcomes.drafted, outcomes.emitted)).any():
        raise ValueError("accepted is more than was drafted or emitted")
    if np.add.reduceat(outcomes.emitted, starts[:-1]).max() > info.tokens:
        raise ValueError(f"emitted has texts of more than {info.tokens} tokens")
    return outcomes
