"""The decoders that environments tune, by name, and what is known of each of them without a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from specgym.decoding import (
    CHAIN,
    DRAFT_TREE,
    LOOKAHEAD,
    LOOKAHEAD_PRESETS,
    MEDUSA,
    MEDUSA_TYPICAL,
    OF_HEADS,
    Decoder,
    DraftTreeDecoder,
    Knob,
    LookaheadDecoder,
    MedusaDecoder,
    MedusaHeads,
    Pair,
    Rounds,
    SpeculativeDecoder,
    ThresholdDecoder,
    TypicalMedusaDecoder,
    draft_tree_knobs,
    lookahead_knobs,
    medusa_knobs,
    speculative_knobs,
    threshold_knobs,
    typical_knobs,
)

from .recordings.shipped_traces import DEFAULT_WORKLOAD


@dataclass(frozen=True)
class TunableDecoder:
    """What is known of a decoder."""

    build: Callable[[Pair, int], Decoder]
    """Makes it from a pair and a draft length K; Medusa's with the usual heads of the target, and one that drafts trees
    with all that belongs to the pair."""
    knobs: Callable[[int], tuple[Knob, ...]]
    """What can be tuned, by draft length; Medusa's with five heads."""
    drafts: bool = True
    """Whether it needs a draft."""
    traced: bool = False
    """Whether traces replay it; others are replayed by their outcomes."""
    rounds: Rounds = CHAIN
    """The kind of its rounds, as `LatencyProfile` tells them apart."""
    workload: str = DEFAULT_WORKLOAD
    """Of an environment for which none is given."""
    presets: tuple[tuple[float, ...], ...] = ()
    """Settings that people use beside the default, values in the order of the knobs."""

    @property
    def has_draft_length(self) -> bool:
        """Whether it drafts K tokens one after another, at most. How far a tree goes its knobs say."""
        return self.drafts and self.rounds == CHAIN


def _lookahead(pair: Pair, draft_length: int) -> Decoder:
    # It drafts nothing. The preset is named, since a replay does not know the device, by which it would be chosen.
    return LookaheadDecoder(pair, preset="small")


_ALONE = "tiny-10m/prose"
DECODERS: dict[str, TunableDecoder] = {
    "threshold": TunableDecoder(ThresholdDecoder, threshold_knobs, traced=True),
    "speculative": TunableDecoder(SpeculativeDecoder, speculative_knobs, traced=True),
    "lookahead": TunableDecoder(
        _lookahead,
        lambda _: lookahead_knobs(),
        drafts=False,
        rounds=LOOKAHEAD,
        workload=_ALONE,
        presets=tuple(LOOKAHEAD_PRESETS.values()),
    ),
    "medusa": TunableDecoder(
        lambda pair, _: MedusaDecoder(pair),
        lambda _: medusa_knobs(),
        drafts=False,
        rounds=MEDUSA,
        workload=_ALONE,
    ),
    "medusa-typical": TunableDecoder(
        lambda pair, _: TypicalMedusaDecoder(pair),
        lambda _: (*medusa_knobs(), *typical_knobs()),
        drafts=False,
        rounds=MEDUSA_TYPICAL,
        workload=_ALONE,
    ),
    "draft-tree": TunableDecoder(
        lambda pair, _: DraftTreeDecoder.usual(pair),
        lambda _: draft_tree_knobs(),
        rounds=DRAFT_TREE,
    ),
}
"""By name."""
TRACED = tuple(name for name, known in DECODERS.items() if known.traced)
"""The decoders that a trace can replay."""


def build_decoder(decoder: str | Callable[[Pair], Decoder], pair: Pair, draft_length: int) -> Decoder:
    """The decoder of a name, or what a callable makes of the pair.

    Raises:
        ValueError: the name is unknown, the decoder has no knobs, or the pair does not suit it.
    """
    if callable(decoder):
        made = decoder(pair)
    elif decoder in DECODERS:
        made = DECODERS[decoder].build(pair, draft_length)
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
        return DECODERS[decoder].rounds if decoder in DECODERS else CHAIN
    kind: Any = decoder if isinstance(decoder, type) else type(decoder)
    if issubclass(kind, MedusaDecoder):
        return MEDUSA_TYPICAL if issubclass(kind, TypicalMedusaDecoder) else MEDUSA
    if issubclass(kind, DraftTreeDecoder):
        return DRAFT_TREE
    return LOOKAHEAD if issubclass(kind, LookaheadDecoder) else CHAIN


def heads_of(decoder: Decoder | None) -> MedusaHeads | None:
    """The Medusa heads that a decoder drafts with; None for a decoder without any."""
    return decoder.heads if isinstance(decoder, MedusaDecoder) else None


def tree_decoder_of(decoder: Decoder | None) -> DraftTreeDecoder | None:
    """The decoder itself, where it drafts trees; None for any other."""
    return decoder if isinstance(decoder, DraftTreeDecoder) else None


def replayed_knobs(decoder: str, draft_length: int, highest: Mapping[str, float]) -> tuple[Knob, ...]:
    """What can be tuned of a decoder in a replay of its outcomes: with as many Medusa heads as were recorded.

    Args:
        decoder: a name of `DECODERS`.
        draft_length: K.
        highest: upper ends of the ranges that were recorded, by knob.
    """
    knobs = DECODERS[decoder].knobs(draft_length)
    if rounds_of(decoder) not in OF_HEADS:
        return knobs
    return (*medusa_knobs(int(highest["heads"])), *knobs[len(medusa_knobs()) :])


def default_workload(decoder: str | Callable[[Pair], Decoder]) -> str:
    """The workload of an environment for which none is given."""
    return DECODERS[decoder].workload if decoder in DECODERS else DEFAULT_WORKLOAD
