"""Facts about a decoder that need no model: knobs, options, names, presets. Free of torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, NamedTuple

import numpy as np

from .errors import ArgumentError, KnobError, number, whole_number

CHAIN: Final = "chain"
"""Cost kind of rounds that draft tokens one after another and verify them in one pass."""
EXACT: Final = -1.0
"""`TraceRule.tolerance` of exact verification."""


@dataclass(frozen=True)
class Knob:
    """A number that a decoder reads every round.

    Attributes:
        name: of the knob, in lower case.
        low: smallest value that the decoder accepts.
        high: largest value that the decoder accepts.
        default: value in use when nothing is set.
        integer: whether only whole numbers are accepted.
        doc: one line for lists and command lines.
        logarithmic: whether ratios matter rather than differences, so that steps should be small where values are.
        search: (low, high) where a tuner looks; the whole range by default.
        step: change that a tuner's action of 1 makes, in the knob's units (in doublings for a logarithmic knob); a
            tenth of the search range by default.
        preferred: (low, high) where the range bonus of the reward is paid, as fractions of `high`; None for no bonus.
    """

    name: str
    low: float
    high: float
    default: float
    integer: bool = False
    doc: str = ""
    logarithmic: bool = False
    search: tuple[float, float] | None = None
    step: float | None = None
    preferred: tuple[float, float] | None = None

    def checked(self, value: object) -> float:
        """Return a value of this knob as a float.

        Raises:
            KnobError: it is no number, out of range, or a fraction for a whole number.
        """
        what = f"knob {self.name}"
        if self.integer:
            low, high = math.ceil(self.low), math.floor(self.high)
            return float(whole_number(what, value, at_least=low, at_most=high, error=KnobError))
        return float(number(what, value, at_least=self.low, at_most=self.high, error=KnobError))

    @property
    def sought(self) -> tuple[float, float]:
        """(low, high) where a tuner looks: `search`, or else the whole range."""
        return self.search or (self.low, self.high)

    def share(self, value: float) -> float:
        """Place of a value in that range, 0 at the low end to 1 at the high one, of a logarithmic knob in doublings."""
        low, high = self.sought
        value = min(max(value, low), high)
        if self.logarithmic:
            value, low, high = doublings(value, low), 0.0, doublings(high, low)
        return float((value - low) / (high - low)) if high > low else 0.0

    def at_share(self, share: float) -> float:
        """Value at a place in that range, 0 to 1; a fraction also of a knob that takes whole numbers."""
        low, high = self.sought
        if self.logarithmic:
            return float(from_doublings(share * doublings(high, low), low))
        return low + share * (high - low)


def doublings(value: Any, low: Any) -> Any:
    """Return how often 1, at the low end of a logarithmic knob's range, doubles until it is at a value.

    That is log2(1 + distance).

    Args:
        value: at least `low`; a number or an array, like the result.
        low: the range's low end.
    """
    return np.log2(1 + value - low)


def from_doublings(count: Any, low: Any) -> Any:
    """Return the value that is so many `doublings` above a range's low end."""
    return low - 1 + np.exp2(count)


Sureness = Literal["", "drawn", "top_ten"]
"""Measure of how sure a draft is of a token: none, the probability of the token, or `Trace.top_ten`."""


class TraceRule(NamedTuple):
    """Verification rule of one knob setting, as the replay of a trace applies it; numbers, or arrays of one shape."""

    tolerance: Any
    """Distance between draft and target up to which a token that fails the exact test is kept; `EXACT` for none."""
    taken_back: Any
    """Draft tokens that a rejection takes back, the rejected one included; fractions are rounded at random."""
    draft_length: Any
    """Tokens drafted a round, at most."""
    by_gain: bool = False
    """Drafts end earlier where `ExpectedGain` says so."""
    stop: Sureness = ""
    """Drafts end after the first token that was drawn unsurely, or before the first at which `top_ten` is low."""
    stop_below: Any = 0.0
    """Sureness of that token is less, 0 to 1; no token ends a draft at 0."""
    fewest: Any = 0
    """Tokens of a draft, at least; a shorter one is dropped, and nothing is verified."""
    pre_verify: Any = None
    """Way of a target, beside a draft that goes on meanwhile, to begin after a rejection: reading on at once (1), or
    waiting for a draft (0). None where the two take turns."""


@dataclass(frozen=True)
class NoOptions:
    """Build options of a decoder that has none."""


class DecoderTraits:
    """Description of a decoding algorithm without a model. `Decoder` adds what needs one.

    Attributes:
        name: of the decoder, in lower case with hyphens.
        lossless: whether the output follows the target's distribution exactly.
        lossless_at: knobs at which the output of a decoder that is not lossless does so, by name; None if there are
            none.
        needs_draft: whether the pair needs a draft; False where the target is enough.
        verifies_trees: whether rounds verify trees of candidates, for which targets need `LanguageModel.branches`.
        stops_by_gain: whether drafts end by `ExpectedGain`, which needs to know how often drafted tokens are kept.
        recorded_by: `trace` where one recording of a pair replays every setting, else `outcomes` of designed settings.
        env_name: environment id between `specgym/` and `-v0`; the name in CamelCase by default.
        presets: named settings that people use besides the defaults, values by knob.
        workloads: defaults; environments take the first, training takes all.
        Options: frozen dataclass of build options, as `for_pair` and `knobs_without_pair` take them.
        overlaps: whether the draft goes on while the target verifies; `cost_kind` is then one of its own.
        single_pass: whether a round costs one target pass over the tokens that it reads, so that a roofline can
            compute it.
        largest_pass: tokens that a target pass reads at most when rounds are timed; not used for chains.
        knobs: settings that may change every round.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    lossless_at: ClassVar[Mapping[str, float] | None] = None
    needs_draft: ClassVar[bool] = True
    verifies_trees: ClassVar[bool] = False
    stops_by_gain: bool = False
    recorded_by: ClassVar[Literal["trace", "outcomes"]] = "outcomes"
    env_name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    workloads: ClassVar[tuple[str, ...]] = ("tiny/prose",)
    Options: ClassVar[type] = NoOptions
    overlaps: ClassVar[bool] = False
    single_pass: ClassVar[bool] = False
    largest_pass: ClassVar[int] = 65
    knobs: tuple[Knob, ...] = ()

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" in vars(cls) and "env_name" not in vars(cls):
            cls.env_name = camel_case(cls.name)

    @classmethod
    def knobs_without_pair(cls, **options: Any) -> tuple[Knob, ...]:
        """Return the knobs of the decoder that these options build; by default the class's `knobs`.

        Raises:
            ValueError: an unknown option, or a value that is out of range.
        """
        cls.checked_options(**options)
        return cls.knobs

    @classmethod
    def recorded_knobs(cls, highest: Mapping[str, float], **options: Any) -> tuple[Knob, ...]:
        """Return the knobs for a replay of outcomes.

        Args:
            highest: upper end of every knob's recorded range, by name, for decoders whose ranges depend on the pair.
            options: as for `knobs_without_pair`.
        """
        return cls.knobs_without_pair(**options)

    @classmethod
    def cost_kind(cls, greedy: bool) -> str:
        """Return the key of the latency profiles that charge this decoder's rounds.

        Args:
            greedy: whether tokens are chosen at temperature 0, which may be cheaper to verify.
        """
        return CHAIN if cls.needs_draft else cls.name

    @classmethod
    def trace_rule(cls, values: Mapping[str, Any], options: Any) -> TraceRule:
        """Return the rule by which a trace is replayed with these knob values; for decoders recorded by traces.

        Args:
            values: of every knob, by name; numbers, or arrays of one shape.
            options: as the decoder was built, an instance of `Options`.
        """
        raise NotImplementedError(f"{cls.name} is replayed by outcomes, not by traces")

    @classmethod
    def checked_options(cls, **options: Any) -> Any:
        """Return an instance of `Options` with these values.

        Raises:
            ValueError: an unknown option; the message lists the known ones. Otherwise as for `Options`.
        """
        known = cls.option_names()
        for name in options:
            if name not in known:
                raise ArgumentError(f"decoder {cls.name} has no option {name!r}; it has: {', '.join(known) or 'none'}")
        return cls.Options(**options)

    @classmethod
    def accepted_options(cls, **options: Any) -> dict[str, Any]:
        """Return those of the options that this decoder has."""
        return {name: value for name, value in options.items() if name in cls.option_names()}

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Return the names of the build options."""
        return tuple(field.name for field in dataclasses.fields(cls.Options))

    @classmethod
    def drafts_chains(cls) -> bool:
        """Return whether drafts are chains of at most `max_draft_length` tokens, which is then a build option."""
        return "max_draft_length" in cls.option_names()


def camel_case(name: str) -> str:
    """Return a hyphenated name in CamelCase: `draft-tree` becomes `DraftTree`."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("-"))
