"""Rules that choose, token by token, which of several drafts goes on, and the one that has no number to choose.

What they see are the features of `choice_features`. Free of torch.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from .choice_features import MOST_DRAFTS, SLOT_FEATURES
from .stop_rules import FEATURES, Rows

if TYPE_CHECKING:
    from ..latency.mixed_profile import ChoiceCharges

_COMMON = {feature.name: place for place, feature in enumerate(FEATURES)}
_OF_DRAFT = {feature.name: place for place, feature in enumerate(SLOT_FEATURES)}
_DRAFTS = np.arange(MOST_DRAFTS)

Features = NDArray[np.float32]
Floats = NDArray[np.float64]


def of_drafts(features: Features, name: str) -> Features:
    """Return a feature of every draft, by its name in `SLOT_FEATURES`, shape (environments, `MOST_DRAFTS`); a view."""
    columns = features[:, len(FEATURES) :].reshape(len(features), MOST_DRAFTS, len(SLOT_FEATURES))
    return columns[:, :, _OF_DRAFT[name]]


def places_of(features: Features) -> NDArray[np.intp]:
    """Return the tokens drafted so far in this round, shape (environments,)."""
    return features[:, _COMMON["place"]].astype(np.intp)


class ChoiceRule(ABC):
    """Says before every token of a draft who proposes it. One rule may serve many texts side by side.

    Whatever it says, the text is the target's, because a token that was drafted is verified.

    Attributes:
        looks_at_entropy: whether the rule needs that feature, or the probability of the drawn token; live decoding may
            leave them at 0 and 1 for one that does not.
        learns_chances: whether the `chance` and `product` that live decoding shows the rule follow what becomes of the
            text's own tokens, for drafts of which nobody has counted them. Recorded texts show them as counted.
    """

    looks_at_entropy: ClassVar[bool] = True
    learns_chances: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the rule in tables, with its parameters."""

    @abstractmethod
    def __call__(self, features: Features) -> NDArray[np.int64]:
        """Choose.

        Args:
            features: shape (environments, features), columns as in `CHOICE_FEATURES`; not to be changed or kept.

        Returns:
            Shape (environments,): 0 to let the target verify what there is (with nothing drafted it emits a token
            alone), or 1 to `MOST_DRAFTS` to let that draft propose the next token. A draft that cannot means 0.
        """

    def start(self, environments: int, seed: int | None) -> None:  # noqa: B027 (most rules have nothing to prepare)
        """Forget what was learned, and prepare for so many texts; called once by the rule's owner, not at each text.

        Args:
            environments: how many texts `features` will have.
            seed: fixes any random choice.
        """

    def for_text(self) -> ChoiceRule:
        """Return the rule to ask about one text: itself, or a copy if it adds things up, as texts take turns."""
        return self

    def verified(  # noqa: B027 (most rules do not learn)
        self, rows: Rows, emitted: NDArray[np.int64], seconds: Floats
    ) -> None:
        """Rounds are over, for rules that learn from what they brought.

        Args:
            rows: the texts concerned.
            emitted: tokens that each round emitted, shape (rows,).
            seconds: what each took, drafting and verification.
        """


class FurtherCosts:
    """Seconds that more tokens of each draft add to a round, over those of a plain token.

    Args:
        charges: of the pair.

    Attributes:
        longest: tokens of the longest draft.
        target: seconds of the target's pass likewise, by the tokens drafted before, shape (longest draft + 1,).
    """

    def __init__(self, charges: ChoiceCharges) -> None:
        plain = charges.autoregressive_seconds
        self._reading = np.zeros((MOST_DRAFTS, charges.drafting.shape[1]))
        self._reading[: len(charges.drafting)] = charges.drafting / plain
        self.longest = len(charges.verifying) - 1
        self.target: Floats = charges.verifying / plain
        self._more = np.append(np.diff(self.target), np.inf)
        self._decision = charges.decision_seconds / plain

    def of_token(self, draft: int, unread: int, place: int) -> float:
        """Seconds of one token.

        Args:
            draft: number of the draft that proposes it, from 0.
            unread: tokens that the draft reads for it.
            place: tokens drafted before.
        """
        reading = self._reading.item(draft, min(unread, self._reading.shape[1] - 1))
        return reading + self._more.item(min(place, self.longest)) + self._decision

    def next(self, features: Features) -> Floats:
        """Seconds of the next token of each draft, shape (environments, `MOST_DRAFTS`).

        Infinite behind the longest draft.
        """
        more = self._more[np.minimum(places_of(features), self.longest)]
        return self._first(features) + more[:, None] + self._decision

    def __call__(self, features: Features) -> Floats:
        """Seconds of 1, 2, ... further tokens of each draft, shape (environments, `MOST_DRAFTS`, longest draft).

        Infinite beyond the longest draft.
        """
        further = np.arange(self.longest)
        drafting = self._first(features)[:, :, None] + further * self._reading[:, 1, None]
        place = places_of(features)[:, None]
        after = place + 1 + further
        target = self.target[np.minimum(after, self.longest)] - self.target[np.minimum(place, self.longest)]
        target = np.where(after <= self.longest, target, np.inf)
        return drafting + target[:, None, :] + self._decision * (1 + further)

    def _first(self, features: Features) -> Floats:
        """Seconds in which each draft reads what it has not and proposes a token, shape (environments, drafts)."""
        unread = np.rint(np.exp2(of_drafts(features, "unread"))).astype(np.intp)
        return self._reading[_DRAFTS, np.minimum(unread, self._reading.shape[1] - 1)]


class ExpectedGainChoice(ChoiceRule):
    """Choose the draft whose next token is expected to bring most beyond the worth of its time, or verify if none does.

    The rule of `ExpectedGain` with several drafts. After k drafted tokens a round is expected to emit
    E = 1 + c1 + c1 c2 + ... + c1...ck tokens, where c are the chances that tokens are right. The next one brings
    c1...ck times its own chance, and costs what it adds to the round, the tokens that its draft has to read first among
    it. Time is worth what this round has made of it so far, E over its seconds, and at least what plain decoding makes
    of it.

    Chances are those of the drafts' features, which follow the text where nobody has counted them (`learns_chances`).
    Nothing is learned from the clock or from other texts, so that a text is the same again by its seed.

    Args:
        charges: of the pair.
    """

    looks_at_entropy: ClassVar[bool] = False
    learns_chances: ClassVar[bool] = True

    def __init__(self, charges: ChoiceCharges) -> None:
        self._costs = FurtherCosts(charges)
        self._drafts = len(charges.drafting)
        self.start(1, None)

    @property
    def name(self) -> str:
        """`expected gain`."""
        return "expected gain"

    def start(self, environments: int, seed: int | None) -> None:
        """Forget all rounds."""
        self._sums = [(1.0, 1.0)] * environments  # E and seconds of each text's round

    def for_text(self) -> ExpectedGainChoice:
        """Return the rule with sums of its own."""
        rule = copy.copy(self)
        rule.start(1, None)
        return rule

    def __call__(self, features: Features) -> NDArray[np.int64]:
        """Choose; asked once before every token of a round, as it adds up what it is told."""
        return np.array([self._choose(text, columns) for text, columns in enumerate(features.tolist())])

    def _choose(self, text: int, columns: list[float]) -> int:
        """Choose in one text. In plain numbers: it is asked before every token, and arrays of a few are slow."""
        product, place = columns[_COMMON["product"]], int(columns[_COMMON["place"]])
        expected, seconds = self._sums[text]
        expected, seconds = (expected + product, seconds) if place else (1.0, self._costs.target.item(0))
        worth = max(expected / seconds, 1.0)
        choice, most, cost_of_choice = 0, 0.0, 0.0
        for draft in range(self._drafts):
            begin = len(FEATURES) + draft * len(SLOT_FEATURES)
            if columns[begin + _OF_DRAFT["available"]]:
                unread = round(2.0 ** columns[begin + _OF_DRAFT["unread"]])
                cost = self._costs.of_token(draft, unread, place)
                gain = product * columns[begin + _OF_DRAFT["chance"]] - worth * cost
                if gain > most:
                    choice, most, cost_of_choice = draft + 1, gain, cost
        self._sums[text] = expected, seconds + cost_of_choice
        return choice


def best_choice(gains: Floats) -> NDArray[np.int64]:
    """Return the draft, from 1, that gains most, or 0 where none gains anything, shape (environments,).

    Args:
        gains: of each draft, shape (environments, `MOST_DRAFTS`); minus infinity where it cannot go on.
    """
    return np.where(gains.max(1) > 0, gains.argmax(1) + 1, 0)
