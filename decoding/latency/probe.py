"""The rounds by which a decoder is timed (`CostProbe`), and trust in their times. Free of torch.

A neighbour on the machine slows some rounds and not others, and the medians then contradict each other: a round that
drafts nothing, which is a step of plain decoding with a little more work, comes out cheaper than that step, or a pass
over many tokens cheaper than one over a few. Within the uncertainty that is noise, and is smoothed; beyond it the
profile says something that cannot be.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..decoder import Decoder
    from .profile import LatencyProfile

MOST_SPREAD = 0.25
"""Spread above which a machine counts as busy. Left alone, those of our trials stay below 0.1."""
TRIES = int(os.environ.get("SPECGYM_TIMING_TRIES", "3"))
"""Measurements at most, where the machine is busy or a measurement contradicts itself."""
MEASURE_AGAIN = (
    "Leave the machine alone meanwhile and measure again: --refresh-latency of train.py, or "
    "specgym.decoding.measured(pair, refresh=True)"
)
"""Way out of a profile that cannot be trusted, as a sentence without its full stop."""
_SURE = 3.0
"""Standard errors beyond which a difference is no noise."""
_ALLOWED_GAIN = 0.03
"""Share of a plain step by which a round without a draft may always be faster, as its passes are timed in others'
company."""
_ALLOWED_FALL = 0.1
"""Share by which a larger pass may always be faster: kernels for one row of a matrix are often slower than for two."""
_LUCK = 0.2
"""Least relative error that samples are believed to have, times their number: few may agree by chance."""
_LOG = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Uncertainty:
    """Standard errors and spread of a measured profile.

    Attributes:
        draft: standard errors of the medians of drafting, in seconds, by steps.
        target: likewise of target passes, by tokens.
        autoregressive: likewise of a step of plain decoding.
        spread: relative interquartile range of the times of one size, the median over the target's passes and plain
            steps; see `MOST_SPREAD`.
        doubts: what contradicted itself before it was smoothed, a clause each; none for a profile to be trusted.
    """

    draft: Mapping[int, float]
    target: Mapping[int, float]
    autoregressive: float
    spread: float
    doubts: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, draft: Mapping[int, Sequence[float]], target: Mapping[int, Sequence[float]], plain: Sequence[float]
    ) -> Uncertainty:
        """The uncertainty of samples in seconds: by steps of drafting, by tokens of a pass, and of plain decoding."""
        return cls(
            {steps: standard_error(samples) for steps, samples in sorted(draft.items())},
            {tokens: standard_error(samples) for tokens, samples in sorted(target.items())},
            standard_error(plain),
            statistics.median([relative_spread(samples) for samples in (*target.values(), plain)]),
        )

    def stored(self) -> dict[str, Any]:
        """Plain JSON values, of which `restored` makes the same again."""
        tables = {"draft": [*self.draft.items()], "target": [*self.target.items()]}
        return {**tables, "autoregressive": self.autoregressive, "spread": self.spread, "doubts": [*self.doubts]}

    @classmethod
    def restored(cls, content: Mapping[str, Any]) -> Uncertainty:
        """Read what `stored` made; raises KeyError, TypeError or ValueError if it is something else."""
        tables = {name: {int(size): float(error) for size, error in content[name]} for name in ("draft", "target")}
        plain, spread = float(content["autoregressive"]), float(content["spread"])
        return cls(tables["draft"], tables["target"], plain, spread, tuple(map(str, content["doubts"])))


def relative_spread(samples: Sequence[float]) -> float:
    """Interquartile range of some samples over their median; 0 for one alone."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def standard_error(samples: Sequence[float]) -> float:
    """Standard error of the median of some samples, as of a normal distribution with their interquartile range.

    It is at least a share of the median, which is large where the samples are few.
    """
    median, count = statistics.median(samples), len(samples)
    # The range is 1.349 standard deviations, and a median varies 1.2533 times as much as a mean.
    return median * max(1.2533 * relative_spread(samples) / (1.349 * math.sqrt(count)), _LUCK / count)


def contradictions(profile: LatencyProfile, *, ordered: bool = True) -> list[str]:
    """Statements of a profile that cannot be, beyond its uncertainty: a clause each, none for a consistent one.

    A profile without an uncertainty, such as one of an earlier version, is judged as if it were measured exactly, but
    with the same allowances.

    Args:
        profile: with its points.
        ordered: whether a pass over more tokens has to cost more. A decoder of which nothing is known may do other
            work for fewer tokens.
    """
    clauses: list[str] = []
    for point in (profile, *profile.points):
        where = "" if point is profile else f" at batch size {point.batch_size} and context {point.context}"
        clauses += [clause + where for clause in _contradictions(point, ordered)]
    return list(dict.fromkeys((*clauses, *profile.doubts)))


def smoothed(profile: LatencyProfile, *, ordered: bool = True) -> LatencyProfile:
    """A profile in which nothing falls with size and a round without a draft is no faster than plain decoding.

    Neighbours that fall get their mean (isotonic regression), and passes of the target at least what is left of a plain
    step after a draft of nothing. What contradicted itself before is kept in `Uncertainty.doubts`.

    Args:
        profile: with its points.
        ordered: as for `contradictions`.
    """
    draft, target, uncertainty = dict(profile.draft_seconds), dict(profile.target_seconds), profile.uncertainty
    if ordered:
        draft, target = _never_falling(draft), _never_falling(target)
    if min(target) == 1:
        nothing = replace(profile, draft_seconds=draft, points=()).draft(0)
        least = profile.autoregressive_seconds - (0 if profile.overlaps else nothing)
        if target[1] < least and not (profile.overlaps and nothing >= least):
            raised = {tokens: max(seconds, least) for tokens, seconds in target.items()}
            target = raised if ordered else {**target, 1: least}
    if uncertainty is not None:
        doubts = tuple(dict.fromkeys((*uncertainty.doubts, *_contradictions(profile, ordered))))
        uncertainty = replace(uncertainty, doubts=doubts)
    points = tuple(smoothed(point, ordered=ordered) for point in profile.points)
    return replace(profile, draft_seconds=draft, target_seconds=target, uncertainty=uncertainty, points=points)


def measured_with_care(
    measure: Callable[[], LatencyProfile], *, ordered: bool = True, tries: int = TRIES
) -> LatencyProfile:
    """Measure until the machine is quiet and the result consistent; return the best of a few tries, smoothed.

    A warning says if even the best was measured on a busy machine or contradicts itself, and what to do.

    Args:
        measure: measures once.
        ordered: as for `contradictions`.
        tries: measurements at most, 1 or more.
    """
    return measured_together(lambda: (measure(),), ordered=ordered, tries=tries)[0]


def measured_together(
    measure: Callable[[], Sequence[LatencyProfile]], *, ordered: bool = True, tries: int = TRIES
) -> list[LatencyProfile]:
    """Do `measured_with_care` with several profiles that come of one measurement, and are judged together."""
    best: Sequence[LatencyProfile] = ()
    judged = (0, 0.0)
    for attempt in range(tries):
        profiles = measure()
        figures = len(_clauses(profiles, ordered)), max(map(spread_of, profiles))
        if not best or figures < judged:
            best, judged = profiles, figures
        if not judged[0] and judged[1] <= MOST_SPREAD:
            break
        if attempt + 1 < tries:
            _LOG.info("the machine is busy: the latency of %s is measured again", best[0].pair)
    if judged[0]:
        text = "; ".join(_clauses(best, ordered))
        _LOG.warning("the latency profile of %s cannot be right: %s. %s", best[0].pair, text, MEASURE_AGAIN)
    elif judged[1] > MOST_SPREAD:
        warn_of_spread(max(best, key=spread_of))
    return [smoothed(profile, ordered=ordered) for profile in best]


def _clauses(profiles: Sequence[LatencyProfile], ordered: bool) -> list[str]:
    """`contradictions` of several profiles, each once: what profiles share says the same in all."""
    return list(dict.fromkeys(clause for profile in profiles for clause in contradictions(profile, ordered=ordered)))


def spread_of(profile: LatencyProfile) -> float:
    """Largest `Uncertainty.spread` of a profile and its points; 0 where none is known."""
    known = [point.uncertainty.spread for point in (profile, *profile.points) if point.uncertainty is not None]
    return max(known, default=0.0)


def warn_of_spread(profile: LatencyProfile) -> None:
    """Log that a profile was measured on a busy machine, if it was."""
    if (spread := spread_of(profile)) > MOST_SPREAD:
        _LOG.warning(
            "the latency of %s was measured on a busy machine: the middle half of the times of one size spans %.0f %% "
            "of their median (up to %.0f %% is usual). %s", profile.pair, 100 * spread, 100 * MOST_SPREAD,
            MEASURE_AGAIN,
        )  # fmt: skip


def _contradictions(point: LatencyProfile, ordered: bool) -> list[str]:
    errors = point.uncertainty or Uncertainty({}, {}, 0.0, 0.0)
    plain, clauses = point.autoregressive_seconds, []
    if min(point.target_seconds) == 1:
        nothing = point.round_of(0, 1)
        error = math.hypot(errors.draft.get(0, 0.0), errors.target.get(1, 0.0), errors.autoregressive)
        if plain - nothing > max(_SURE * error, _ALLOWED_GAIN * plain):
            clauses.append(
                f"a round that drafts nothing takes {1000 * nothing:.3g} ms, and a step of plain decoding "
                f"{1000 * plain:.3g} ms"
            )
    if ordered:
        tables = (("drafting", point.draft_seconds, errors.draft), ("a pass over", point.target_seconds, errors.target))
        for what, table, known in tables:
            clauses += _falls(what, table, known, plain)
    return clauses


def _falls(what: str, table: Mapping[int, float], errors: Mapping[int, float], plain: float) -> list[str]:
    clauses, slowest = [], min(table)
    for tokens, seconds in table.items():
        before = table[slowest]
        error = math.hypot(errors.get(slowest, 0.0), errors.get(tokens, 0.0))
        # What is small beside a plain step does not matter, such as the microseconds of a draft that is looked up.
        if before - seconds > max(_SURE * error, _ALLOWED_FALL * max(before, plain)):
            clauses.append(
                f"{what} {tokens} tokens takes {1000 * seconds:.3g} ms, and {what} {slowest} {1000 * before:.3g} ms"
            )
        if seconds >= before:
            slowest = tokens
    return clauses


def _never_falling(table: Mapping[int, float]) -> dict[int, float]:
    """The nearest table that never falls, by least squares: neighbours that fall are pooled to their mean."""
    pools: list[tuple[float, int]] = []
    for seconds in table.values():
        pools.append((seconds, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (last, count), (before, more) = pools.pop(), pools.pop()
            pools.append(((last * count + before * more) / (count + more), count + more))
    return dict(zip(table, (mean for mean, count in pools for _ in range(count)), strict=True))
