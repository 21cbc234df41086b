"""The rules that a learned choice of drafts must beat, and one that knows what will be accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import (
    FEATURES,
    MOST_DRAFTS,
    ChoiceCharges,
    ChoiceRule,
    FurtherCosts,
    Rows,
    best_choice,
    of_drafts,
    places_of,
)

from .bandit import RoundBandit

Features = NDArray[np.float32]
Actions = NDArray[np.int64]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]

COMMON: Final = {feature.name: place for place, feature in enumerate(FEATURES)}


@dataclass(frozen=True)
class FixedChoice(ChoiceRule):
    """Fixed rule of engines: drafts are asked in turn, and the first that can draft drafts the round.

    With a look-up before a model it is that of llama.cpp for several ``--spec-type`` (`common_speculative_draft` in
    common/speculative.cpp takes the first draft that is not empty) and that of vLLM's issue 18633, "Combine Ngram and
    EAGLE", with its pull request 24344. Either has a shortest match and a longest draft to set. With one draft it is
    that draft alone, and with none plain decoding.

    Args:
        drafts: numbers of those that are asked, in turn, from 1.
        lengths: tokens that each drafts in a round, at most.
        matched: tokens of context by which each must know its first token, at least; 0 for a model.
        called: name of each.
    """

    looks_at_entropy: ClassVar[bool] = False
    drafts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    matched: tuple[int, ...] = ()
    called: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Drafts in turn, with their lengths and shortest matches."""
        names = self.called or tuple(f"draft {draft}" for draft in self.drafts)
        return (
            ", else ".join(
                f"{name} {length}" + (f" (match {matched})" if matched > 1 else "")
                for name, length, matched in zip(names, self.lengths, self.matched, strict=True)
                if length
            )
            or "no draft"
        )

    def __call__(self, features: Features) -> Actions:
        """Choose who begins the round; whoever did goes on."""
        return FixedChoices([self], len(features))(features)


class FixedChoices(ChoiceRule):
    """Fixed rules side by side, as fast as one.

    Args:
        rules: any number.
        texts: of each rule, which follow one another.
    """

    def __init__(self, rules: Sequence[FixedChoice], texts: int) -> None:
        self._length = np.zeros((len(rules), MOST_DRAFTS), np.int64)
        self._matched = np.zeros((len(rules), MOST_DRAFTS), np.int64)
        self._turn = np.full((len(rules), MOST_DRAFTS), MOST_DRAFTS)
        for place, rule in enumerate(rules):
            drafts = np.array(rule.drafts, np.intp) - 1
            self._length[place, drafts], self._matched[place, drafts] = rule.lengths, rule.matched
            self._turn[place, drafts] = np.arange(len(drafts))
        self._length, self._matched, self._turn = (
            values.repeat(texts, axis=0) for values in (self._length, self._matched, self._turn)
        )

    @property
    def name(self) -> str:
        """`fixed`."""
        return "fixed"

    def __call__(self, features: Features) -> Actions:
        """Choose who begins each round; whoever did goes on."""
        place = places_of(features)[:, None]
        may = (of_drafts(features, "available") > 0) & (place < self._length)
        begins = (place == 0) & (of_drafts(features, "next_matched") >= self._matched)
        turn = np.where(may & (begins | (of_drafts(features, "drafting") > 0)), self._turn, MOST_DRAFTS)
        return np.where(turn.min(1) < MOST_DRAFTS, turn.argmin(1) + 1, 0)


class DraftBandit(ChoiceRule):
    """A `RoundBandit` over fixed rules, which learns while it decodes.

    What was learned is kept from text to text, and lost with `start`.

    Args:
        rules: the arms, such as each draft alone at each length.
        exploration: in tokens, above 0.
    """

    looks_at_entropy: ClassVar[bool] = False

    def __init__(self, rules: Sequence[FixedChoice], exploration: float = 1.0) -> None:
        self.rules = tuple(rules)
        self._bandit = RoundBandit(len(self.rules), exploration)

    @property
    def name(self) -> str:
        """`bandit`, with the number of arms."""
        return f"bandit over {len(self.rules)}"

    def start(self, environments: int, seed: int | None) -> None:
        """Forget everything. The bandit itself draws nothing at random."""
        self._bandit.forget(environments)

    def __call__(self, features: Features) -> Actions:
        """Choose as the round's arm does; where a round begins, an arm is chosen for it."""
        self._bandit.attend(len(features))
        self._bandit.choose(places_of(features) == 0)
        return FixedChoices([self.rules[arm] for arm in self._bandit.arm.tolist()], 1)(features)

    def verified(self, rows: Rows, emitted: NDArray[np.int64], seconds: Floats) -> None:
        """Learn from rounds that are over."""
        self._bandit.learn(rows, emitted, seconds)

    @property
    def favourite(self) -> FixedChoice:
        """The arm tried most."""
        return self.rules[self._bandit.favourite]


class ClosedForm(ChoiceRule):
    """Expected gain of further tokens by what training texts have shown, with one worth of time for all of them.

    Where `ExpectedGainChoice` weighs the next token, this rule weighs ``m`` further tokens of each draft, for the best
    ``m``: they are expected to bring ``s * p * (1 + a + ... + a^(m-1))``, with `s` the chance that all drafted so far
    are right, `p` that of the next, and `a` that of any of its draft; they cost ``rate`` times their seconds. At the
    rate of training texts that does as well as the other rule does without.

    Args:
        charges: of the pair, with the chances of its drafts' tokens, counted on training texts.
        rate: throughput that time is priced at, relative to plain decoding, at least 0.

    Raises:
        ValueError: the rate is out of range.
    """

    looks_at_entropy: ClassVar[bool] = False

    def __init__(self, charges: ChoiceCharges, rate: float) -> None:
        self.rate = _checked_rate(rate)
        self._costs = FurtherCosts(charges)
        average = np.zeros((MOST_DRAFTS, 1))
        average[: len(charges.profile.drafts)] = charges.profile.chances[:, -1:]
        self._powers = np.cumsum(average ** np.arange(self._costs.longest), axis=1)

    @property
    def name(self) -> str:
        """`closed form`, with the rate."""
        return f"closed form at {self.rate:.2f}"

    def __call__(self, features: Features) -> Actions:
        """Choose the draft that is expected to bring most, or to verify."""
        following = features[:, COMMON["product"], None] * of_drafts(features, "chance")
        gain = following[:, :, None] * self._powers - self.rate * self._costs(features)
        return best_choice(np.where(of_drafts(features, "available") > 0, gain.max(2), -np.inf))


class ChoiceOracle(ChoiceRule):
    """Knows how many tokens of each draft will be accepted, and takes those that are worth most, if any are.

    It decides anew after every token, and so may hand over. At the rate of its own throughput no rule that keeps to one
    draft has a better round.

    Args:
        charges: of the pair.
        rate: throughput that time is priced at, relative to plain decoding, at least 0.

    Raises:
        ValueError: the rate is out of range.
    """

    def __init__(self, charges: ChoiceCharges, rate: float) -> None:
        self.rate = _checked_rate(rate)
        self._costs = FurtherCosts(charges)
        self._remaining = np.zeros((0, MOST_DRAFTS), np.int64)

    @property
    def name(self) -> str:
        """`clairvoyant`."""
        return "clairvoyant"

    def foresee(self, remaining_acceptable: NDArray[np.int64]) -> None:
        """Tell what the next call needs to know.

        Args:
            remaining_acceptable: how many more tokens of each draft would be accepted, shape (environments, drafts).
        """
        self._remaining = remaining_acceptable

    def __call__(self, features: Features) -> Actions:
        """Choose.

        Raises:
            ValueError: `foresee` was told of another number of texts.
        """
        if len(self._remaining) != len(features):
            raise ValueError(
                f"the clairvoyant was told of {len(self._remaining)} texts and is asked about {len(features)}; call "
                "foresee first. Live decoding cannot: nobody knows what the target will accept"
            )
        tokens = 1 + np.arange(self._costs.longest)
        worth = tokens - self.rate * self._costs(features)
        gain = np.where(tokens <= self._remaining[:, :, None], worth, -np.inf)
        return best_choice(np.where(of_drafts(features, "available") > 0, gain.max(2), -np.inf))


def _checked_rate(rate: float) -> float:
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"rate must be finite and at least 0, got {rate}")
    return rate
