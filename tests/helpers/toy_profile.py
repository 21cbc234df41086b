"""Latency profiles that nobody measured, and decoders that are told them, so that drafts end alike on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from specgym.decoding.decoder import Decoder
from specgym.decoding.decoders.expected_gain import KeepChances
from specgym.decoding.decoders.threshold import ThresholdDecoder
from specgym.decoding.latency.interleaved import describe_hardware
from specgym.decoding.latency.probe import Uncertainty
from specgym.decoding.latency.profile import LatencyProfile, arithmetic_of
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import GREEDY, Sampling
from specgym.decoding.traits import CHAIN

DecoderT = TypeVar("DecoderT", bound=Decoder[Any])
LONGEST = 32


def toy_profile(drafting: float = 0.1, reading: float = 0.02, chances: KeepChances | None = None) -> LatencyProfile:
    """Profile of chains by which plain decoding takes 1 second a token.

    Args:
        drafting: seconds of every drafted token.
        reading: seconds that every token more adds to a target pass.
        chances: that drafted tokens are kept.
    """
    return LatencyProfile(
        "toy",
        {0: 0.0, LONGEST: LONGEST * drafting},
        {1: 1.0, LONGEST + 1: 1.0 + LONGEST * reading},
        1.0,
        {},
        chances=chances,
    )


def nobodys_profile(pair: Pair, decoder: Decoder[Any] | None = None, *, sampling: Sampling = GREEDY) -> LatencyProfile:
    """Profile in place of `latency.measure.measure`'s, for tests of what is done with one; nothing is timed.

    A plain token takes a millisecond, a drafted one a fifth of that, and a token more in a pass a fortieth.
    """
    kind = CHAIN if decoder is None else decoder.cost_kind(sampling.greedy)
    probe = None if decoder is None or kind == CHAIN else decoder.cost_probe()
    drafts: tuple[int, ...] = (0, 16) if probe is None else tuple(sorted(probe.drafting or (0,)))
    passes: tuple[int, ...] = (1, 17) if probe is None else tuple(probe.sizes)
    return LatencyProfile(
        pair.name,
        {steps: 0.0002 * steps for steps in drafts},
        {tokens: 0.001 + 0.000025 * (tokens - 1) for tokens in passes},
        0.001,
        {**describe_hardware(pair), **(probe.detail if probe else {})},
        sampling=arithmetic_of(sampling),
        kind=kind,
        overlaps=probe is not None and probe.overlaps,
        uncertainty=Uncertainty({}, {}, 0.0, 0.0),
    )


def charged(decoder: DecoderT, profile: LatencyProfile | None = None) -> DecoderT:
    """Tell a decoder what its rounds cost; by default what `toy_profile` says."""
    decoder.charge_by(profile or toy_profile())
    return decoder


def _never(pair: Pair, longest: int) -> ThresholdDecoder:
    return ThresholdDecoder(pair, longest, stop="never")


def _by_gain(pair: Pair, longest: int) -> ThresholdDecoder:
    usual = KeepChances.assumed()
    sure = KeepChances(usual.kept**0.25, usual.average**0.25)  # toys are never confident, and would draft little
    return charged(ThresholdDecoder(pair, longest), toy_profile(chances=sure))


ENDS: dict[str, Callable[[Pair, int], ThresholdDecoder]] = {"never": _never, "expected-gain": _by_gain}
"""Threshold decoders of a pair and a longest draft, by where drafts end."""
