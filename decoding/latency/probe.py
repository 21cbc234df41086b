"""The rounds by which a decoder is timed (`CostProbe`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..decoder import Decoder


def _no_knobs(size: int) -> Mapping[str, float]:
    return {}


def _itself(size: int) -> int:
    return size


def _always(size: int) -> bool:
    return True


@dataclass(frozen=True)
class CostProbe:
    """Rounds of several sizes, whose times make a latency profile.

    The profile's kind is the decoder's `cost_kind`. Decoders whose kind is `chain` share one measurement, of drafts by
    their length, and need nothing but `decoder`.

    Attributes:
        decoder: does the timed rounds: a variant that can do a round of every size, or the decoder itself.
        sizes: tokens that the target's pass reads in the timed rounds, ascending; or numbers of settings, see `fixed`.
        knobs_for: values of the decoder's knobs for a round of a size.
        detail: sections that describe the decoder in the profile's `hardware`, and tell cached profiles apart.
        overlaps: whether drafting goes on while the target verifies, so that a round takes the longer of the two times
            instead of their sum.
        drafting: sizes of the rounds whose drafting is timed apart, by `Round.draft_steps`; None where it is part of
            the pass.
        room_for: tokens that must fit behind the context for a round of a size.
        can_read: whether there is a round of a size.
        fixed: whether a round with `knobs_for(size)` reads `size` tokens. If not, `sizes` merely numbers the settings,
            and a round is filed under the tokens that it read.
    """

    decoder: Decoder[Any]
    sizes: Sequence[int] = ()
    knobs_for: Callable[[int], Mapping[str, float]] = _no_knobs
    detail: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    overlaps: bool = False
    drafting: Collection[int] | None = None
    room_for: Callable[[int], int] = _itself
    can_read: Callable[[int], bool] = _always
    fixed: bool = True


def chains(decoder: Decoder[Any]) -> CostProbe:
    """Return the probe of decoders that draft chains."""
    return CostProbe(decoder)


def whole_rounds(decoder: Decoder[Any]) -> CostProbe:
    """Return the probe of a decoder of which nothing is known: whole rounds, by the tokens that the target reads.

    The knobs are set to their defaults, then one after another, and all together, to the ends of their ranges.
    """
    knobs = decoder.knobs
    ends = [{knob.name: getattr(knob, end) for knob in knobs} for end in ("low", "high")]
    alone = [{name: value} for setting in ends for name, value in setting.items()]
    settings: list[dict[str, float]] = []
    for setting in [{}, *ends, *(alone if len(knobs) > 1 else [])]:
        if setting not in settings:
            settings.append(setting)
    ranges = {knob.name: f"{knob.low:g}_{knob.high:g}" for knob in knobs}
    return CostProbe(
        decoder,
        sizes=range(len(settings)),
        knobs_for=settings.__getitem__,
        detail={decoder.name.replace("-", "_"): ranges},
        room_for=lambda number: 1,
        fixed=False,
    )
