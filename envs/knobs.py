"""Which decoder, and how far and how fast an environment moves its knobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..decoding.decoder import Decoder, Knob
from ..decoding.errors import KnobError
from ..decoding.lookahead import LookaheadDecoder, lookahead_knobs
from ..decoding.lookahead.decoder import PRESETS
from ..decoding.medusa import MedusaDecoder, MedusaHeads, TypicalMedusaDecoder, medusa_knobs
from ..decoding.medusa.decoder import typical_knobs
from ..decoding.pairs import Pair
from ..decoding.round_kinds import CHAIN, LOOKAHEAD, MEDUSA, MEDUSA_TYPICAL, OF_HEADS, Rounds
from ..decoding.speculative import SpeculativeDecoder, speculative_knobs
from ..decoding.threshold import ThresholdDecoder, threshold_knobs
from .shipped_traces import DEFAULT_WORKLOAD


def _lookahead(pair: Pair, draft_length: int) -> Decoder:
    # It drafts nothing. The preset is named, since a replay does not know the device, by which it would be chosen.
    return LookaheadDecoder(pair, preset="small")


DECODERS: dict[str, Callable[[Pair, int], Decoder]] = {
    "threshold": ThresholdDecoder,
    "speculative": SpeculativeDecoder,
    "lookahead": _lookahead,
    "medusa": lambda pair, draft_length: MedusaDecoder(pair),
    "medusa-typical": lambda pair, draft_length: TypicalMedusaDecoder(pair),
}
"""Decoders by name, made from a pair and a draft length; Medusa's with the usual heads of the target."""

KNOBS: dict[str, Callable[[int], tuple[Knob, ...]]] = {
    "threshold": threshold_knobs,
    "speculative": speculative_knobs,
    "lookahead": lambda draft_length: lookahead_knobs(),
    "medusa": lambda draft_length: medusa_knobs(),
    "medusa-typical": lambda draft_length: (*medusa_knobs(), *typical_knobs()),
}
"""What can be tuned of each decoder in `DECODERS`, by draft length and without a pair; Medusa's with five heads."""

PRESET_SETTINGS: dict[str, tuple[tuple[float, ...], ...]] = {"lookahead": tuple(PRESETS.values())}
"""Settings that people use, values in the order of the knobs, of decoders that have more than their default."""

_ROUNDS: dict[str, Rounds] = {"lookahead": LOOKAHEAD, "medusa": MEDUSA, "medusa-typical": MEDUSA_TYPICAL}
_DRAFTLESS = tuple(_ROUNDS)
_WORKLOADS = dict.fromkeys(_DRAFTLESS, "tiny-10m/prose")
_RANGES = {"fallback": (0.05, 0.95)}  # at either end a threshold decides nothing, and there is nothing to learn
_SCALES = {"fallback": 0.2}


def build_decoder(decoder: str | Callable[[Pair], Decoder], pair: Pair, draft_length: int) -> Decoder:
    """The decoder of a name, or what a callable makes of the pair.

    Raises:
        ValueError: the name is unknown, the decoder has no knobs, or the pair does not suit it.
    """
    if callable(decoder):
        made = decoder(pair)
    elif decoder in DECODERS:
        made = DECODERS[decoder](pair, draft_length)
    else:
        raise ValueError(f"no decoder {decoder!r}; there are: {', '.join(DECODERS)}, or give a callable")
    if not made.knobs:
        raise ValueError(f"{type(made).__name__} has no knobs, so there is nothing to tune")
    return made


def rounds_of(decoder: str | Decoder | Callable[[Pair], Decoder]) -> Rounds:
    """What kind of rounds a decoder does, as `LatencyProfile` tells them apart.

    Args:
        decoder: a name of `DECODERS`, a decoder, its class, or a callable that makes one. Of any other callable nothing
            is known, and it counts as one that drafts chains: ask about the decoder that it makes.
    """
    if isinstance(decoder, str):
        return _ROUNDS.get(decoder, CHAIN)
    kind: Any = decoder if isinstance(decoder, type) else type(decoder)
    if issubclass(kind, MedusaDecoder):
        return MEDUSA_TYPICAL if issubclass(kind, TypicalMedusaDecoder) else MEDUSA
    return LOOKAHEAD if issubclass(kind, LookaheadDecoder) else CHAIN


def heads_of(decoder: Decoder) -> MedusaHeads | None:
    """The Medusa heads that a decoder drafts with; None for a decoder without any."""
    return decoder.heads if isinstance(decoder, MedusaDecoder) else None


def drafts_tokens(decoder: str) -> bool:
    """Whether the decoder of this name needs a draft, and so has a draft length."""
    return decoder not in _DRAFTLESS


def replayed_knobs(decoder: str, draft_length: int, highest: Mapping[str, float]) -> tuple[Knob, ...]:
    """What can be tuned of a decoder in a replay of its outcomes: with as many Medusa heads as were recorded.

    Args:
        decoder: a name of `KNOBS`.
        draft_length: K.
        highest: upper ends of the ranges that were recorded, by knob.
    """
    knobs = KNOBS[decoder](draft_length)
    if rounds_of(decoder) not in OF_HEADS:
        return knobs
    return (*medusa_knobs(int(highest["heads"])), *knobs[len(medusa_knobs()) :])


def default_workload(decoder: str | Callable[[Pair], Decoder]) -> str:
    """The workload of an environment for which none is given."""
    return _WORKLOADS.get(decoder, DEFAULT_WORKLOAD) if isinstance(decoder, str) else DEFAULT_WORKLOAD


def env_ranges(
    knobs: Sequence[Knob], given: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, tuple[float, float]]:
    """(low, high) of every knob, in the decoder's order: as given, else by default.

    Raises:
        KnobError: an unknown knob, or a range that is upside down or goes beyond the decoder's.
    """
    given = given or {}
    _refuse_unknown("ranges", given, [knob.name for knob in knobs])
    ranges = {}
    for knob in knobs:
        low, high = given.get(knob.name) or _RANGES.get(knob.name) or (knob.low, knob.high)
        if not knob.low <= low < high <= knob.high:
            raise KnobError(
                f"ranges: {knob.name} must go from low to high within {knob.low:g} and {knob.high:g}, got "
                f"({low:g}, {high:g})"
            )
        ranges[knob.name] = (float(low), float(high))
    return ranges


def default_scales(
    knobs: Sequence[Knob], ranges: Mapping[str, tuple[float, float]], given: Mapping[str, float] | None = None
) -> dict[str, float]:
    """How far an action of 1 moves every knob: as given, else by default a tenth of its range.

    In the knob's own units, of a logarithmic one in `doublings`.

    Args:
        knobs: of the decoder, in order.
        ranges: (low, high) of each by name.
        given: of some of them, by name.

    Raises:
        KnobError: an unknown knob, or a scale that is not positive and finite.
    """
    given = given or {}
    _refuse_unknown("scales", given, list(ranges))
    scales = {}
    for knob in knobs:
        low, high = ranges[knob.name]
        span = doublings(high, low) if knob.logarithmic else high - low
        scale = float(given.get(knob.name, _SCALES.get(knob.name, span / 10)))
        if not (math.isfinite(scale) and scale > 0):
            raise KnobError(f"scales: {knob.name} must be positive and finite, got {scale}")
        scales[knob.name] = scale
    return scales


def doublings(value: Any, low: Any) -> Any:
    """How often 1, at the low end of a logarithmic knob's range, is doubled until it is at a value: log2(1 + distance).

    Args:
        value: at least `low`; a number or an array, like the result.
        low: the range's low end.
    """
    return np.log2(1 + value - low)


def from_doublings(count: Any, low: Any) -> Any:
    """The value that is so many `doublings` above a range's low end."""
    return low - 1 + np.exp2(count)


def checked_values(values: Mapping[str, float], ranges: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Values of some knobs as floats.

    Raises:
        KnobError: not a mapping, an unknown knob, or a value that is out of range or not finite.
    """
    if not isinstance(values, Mapping):
        raise KnobError(f"reset option knobs must map names to values, got {values!r}")
    _refuse_unknown("reset option knobs", values, list(ranges))
    for name, value in values.items():
        low, high = ranges[name]
        try:
            inside = low <= float(value) <= high  # False for NaN
        except (TypeError, ValueError):
            inside = False
        if not inside:
            raise KnobError(f"reset option knobs: {name} must be between {low:g} and {high:g}, got {value!r}")
    return {name: float(value) for name, value in values.items()}


def _refuse_unknown(where: str, given: Mapping[str, object], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise KnobError(f"{where}: there is no knob {name!r}; the decoder has: {', '.join(known)}")
