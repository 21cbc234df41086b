"""Rules that choose a decoder's knobs anew before every round, and the features of a text that they choose by.

Live decoding, environments and learned policies keep the same features, by the same code (`RoundTracker`).

The text stays what it is with fixed knobs. A lossless decoder verifies a round exactly whatever its knobs are, as long
as they are settled before the round draws anything. A rule sees the text so far and counts of past rounds, and nothing
of the draws to come; so given the text so far, the next token has the target's distribution whatever the rule says, and
by induction the whole text has. (The clock is left out for another reason: texts would not be repeatable.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, KnobError, check_fields, mapping_of, number, whole_number
from ..rounds import Round
from ..traits import Knob
from .stop_rules import Feature

Values = dict[str, float]
FEW, MANY = 4, 16
"""Rounds that the averages over recent rounds go back."""

TEXT_FEATURES = (
    Feature("last_tokens", 0, 5, "tokens of the last round, as the logarithm to base 2; 0 before the first"),
    Feature("few_tokens", 0, 5, f"tokens a round, the mean of the last {FEW}, likewise"),
    Feature("many_tokens", 0, 5, f"tokens a round, the mean of the last {MANY}, likewise"),
    Feature("mean_tokens", 0, 5, "tokens a round, the mean of the whole text, likewise"),
    Feature("acceptance", 0, 1, f"accepted over drafted tokens of the last {MANY} rounds; 0.5 where none was drafted"),
    Feature("read", 0, 8, f"tokens that the target read for each emitted one, of the last {MANY} rounds, likewise"),
    Feature("place", 0, 16, "tokens emitted so far and one more, likewise"),
    Feature("prompt", 0, 16, "tokens before the text and one more, likewise"),
    Feature("temperature", 0, 2, "of the sampling, 0 when greedy"),
)
"""The columns that all decoders have in common, in order; one for each knob follows (`round_features`)."""


def round_features(knobs: Sequence[Knob]) -> tuple[Feature, ...]:
    """Return the columns that rules for some knobs see: `TEXT_FEATURES`, and the place of every knob in its range."""
    places = (Feature(f"knobs/{knob.name}", 0, 1, "place in its search range (`Knob.share`)") for knob in knobs)
    return (*TEXT_FEATURES, *places)


class RoundTracker:
    """Features of a text by its past rounds. Every session keeps one (`Session.progress`).

    Args:
        knobs: of the decoder.
        prompt: tokens before the text.
        temperature: of the sampling, at least 0.

    Attributes:
        knobs: as given.
        values: of the knobs in the last round, by name; at first their defaults. Those that a rule chose are kept as it
            chose them, before whole-number knobs were rounded, so that small moves add up.
        rounds: so far.
        tokens: emitted so far.
    """

    def __init__(self, knobs: Sequence[Knob], prompt: int, temperature: float = 0.0) -> None:
        self.knobs = tuple(knobs)
        self.values: Values = {knob.name: float(knob.default) for knob in knobs}
        self.rounds = 0
        self.tokens = 0
        self._prompt, self._temperature = prompt, temperature
        self._recent: deque[tuple[int, int, int, int]] = deque(maxlen=MANY)

    def saw(self, round_: Round) -> None:
        """Take in a round; an empty one, of a text that had ended, does not count."""
        if emitted := len(round_.tokens):
            self.rounds += 1
            self.tokens += emitted
            self._recent.append((emitted, round_.drafted, round_.accepted, round_.target_tokens))

    def mean_tokens(self, last: int | None = None) -> float:
        """Tokens a round, the mean of the last rounds (at most 16) or of all; 1 before the first."""
        if not self.rounds:
            return 1.0
        if last is None:
            return self.tokens / self.rounds
        counted = [emitted for emitted, *_ in self._recent][-last:]
        return sum(counted) / len(counted)

    @property
    def features(self) -> NDArray[np.float32]:
        """Features of the text so far, shape (features,), columns as in `round_features`; a new array."""
        recent = self._recent or [(1, 0, 0, 1)]
        emitted, drafted, accepted, read = (sum(column) for column in zip(*recent, strict=True))
        common = (
            math.log2(recent[-1][0]),
            math.log2(self.mean_tokens(FEW)),
            math.log2(self.mean_tokens(MANY)),
            math.log2(self.mean_tokens()),
            accepted / drafted if drafted else 0.5,
            math.log2(max(read / emitted, 1.0)),
            math.log2(1 + self.tokens),
            math.log2(1 + self._prompt),
            self._temperature,
        )
        clipped = (min(value, feature.high) for value, feature in zip(common, TEXT_FEATURES, strict=True))
        places = (knob.share(self.values[knob.name]) for knob in self.knobs)
        return np.array((*clipped, *places), np.float32)

    def settle(
        self, knobs: Mapping[str, float] | KnobRule | None, resolve: Callable[[Mapping[str, float] | None], Values]
    ) -> Values:
        """Settle the knobs of the next round.

        Args:
            knobs: values by name, or a rule to ask.
            resolve: completes and checks values (`Decoder.resolve_knobs`).

        Returns:
            Values as the decoder takes them.

        Raises:
            KnobError: a rule returned no mapping. Otherwise as `resolve`.
        """
        if not isinstance(knobs, KnobRule):
            self.values = resolve(knobs)
            return self.values
        asked = {**self.values, **mapping_of(f"what {type(knobs).__name__} returns", knobs(self), KnobError)}
        whole = {knob.name for knob in self.knobs if knob.integer}
        values = resolve({name: _nearest(value) if name in whole else value for name, value in asked.items()})
        self.values = asked
        return values


def _nearest(value: float) -> float:
    return round(value) if isinstance(value, Real) and math.isfinite(value) else value


class KnobRule(ABC):
    """Chooses a decoder's knobs before every round of a text: `generate(..., knobs=rule)`.

    All that a rule knows is in the tracker that it is called with, so that one serves any number of texts at a time.
    """

    @abstractmethod
    def __call__(self, text: RoundTracker) -> Mapping[str, float]:
        """Choose.

        Args:
            text: the features of the text so far (`text.features`), and the knobs of the last round (`text.values`). It
                is not to be changed.

        Returns:
            Values of some or all knobs, by name, within their ranges; the others stay as they are. The decoder gets the
            nearest whole number of one that takes whole numbers.
        """


@dataclass(frozen=True)
class FollowAcceptance(KnobRule):
    """Knobs between two settings, the nearer to the second, the more tokens recent rounds have brought.

    In between every knob moves evenly, a logarithmic one in doublings (`Knob.at_share`).

    Args:
        few: setting where rounds bring `low` tokens or fewer: values by name.
        many: setting where they bring `high` or more, of the same knobs.
        low: tokens a round, at least 0.
        high: tokens a round, above `low`.
        rounds: that the mean is over, the most recent, 1 to 16. A text begins with `few`.

    Raises:
        ValueError: a number is out of range, or the settings are not of the same knobs.
    """

    few: Mapping[str, float]
    many: Mapping[str, float]
    low: float = 1.0
    high: float = 3.0
    rounds: int = FEW

    def __post_init__(self) -> None:
        check_fields(self, partial(mapping_of, error=KnobError), "few", "many")
        check_fields(self, partial(number, at_least=0), "low", "high")
        check_fields(self, partial(whole_number, at_most=MANY), "rounds")
        if not self.low < self.high:
            raise ArgumentError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if set(self.few) != set(self.many):
            raise KnobError(f"few and many are settings of the same knobs, got {[*self.few]} and {[*self.many]}")

    def __call__(self, text: RoundTracker) -> dict[str, float]:
        """Choose, like any rule."""
        share = (text.mean_tokens(self.rounds) - self.low) / (self.high - self.low)
        share = min(max(share, 0.0), 1.0)
        known = {knob.name: knob for knob in text.knobs}
        chosen = {}
        for name, value in self.few.items():
            other = self.many[name]
            if share in (0, 1) or name not in known:  # the decoder refuses a name that it does not know
                chosen[name] = other if share == 1 else value
            else:
                begin, end = known[name].share(value), known[name].share(other)
                chosen[name] = known[name].at_share(begin + share * (end - begin))
        return chosen
