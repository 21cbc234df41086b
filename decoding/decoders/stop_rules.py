"""Rules that end a draft, and the features of drafted tokens that they decide by.

Live and recorded decoding keep the same features, by the same code, and ask the same rules. A rule may look at the
last drafted token because that token is verified whatever the rule says, so the text stays the target's. Engines have
rules of their own (`TokenRule`), one of which leaves a token out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError, check_fields, number, whole_number
from ..sampling import likeliest_of_ten

if TYPE_CHECKING:  # replay imports this module, and no torch
    from ..drafts.drafter import DraftStep

Rows = NDArray[np.intp] | NDArray[np.bool_] | None
"""Some of many drafts: their numbers (each once), a mask over all, or None for all."""

RECENT = 0.2
"""Weight of the newest round in the averages over rounds."""


@dataclass(frozen=True)
class Feature:
    """One column of what a rule or an agent sees; values are clipped to `low` and `high`."""

    name: str
    low: float
    high: float
    doc: str


FEATURES = (
    Feature("confidence", 0, 1, "of the last drafted token (`DraftStep.confidence`); 1 before the first"),
    Feature("entropy", 0, 12, "in nats, of what that token was drawn from; 0 before the first"),
    Feature("product", 0, 1, "of the confidences of this draft so far"),
    Feature("place", 0, 32, "tokens drafted so far in this draft"),
    Feature("recent_acceptance", 0, 1, "accepted over drafted, averaged over rounds with a draft; first 0.5"),
    Feature("mean_acceptance_length", 1, 33, "emitted tokens a round, averaged over the text's rounds; first 2"),
    Feature("cost_ratio", 0, 4, "seconds that one more drafted token adds to a round, over those of a plain token"),
    Feature("batch_size", 0, 10, "sequences decoded together, as the logarithm to base 2"),
    Feature("matched", 0, 32, "tokens of context that a look-up found the last token by (`DraftStep.matched`)"),
    Feature("drawn_probability", 0, 1, "with which the draft drew that very token; 1 before the first"),
    Feature("temperature", 0, 2, "of the sampling, 0 when greedy"),
)
"""The columns, in order. The two averages give the newest round a weight of `RECENT`, older ones ever less."""

(_CONFIDENCE, _ENTROPY, _PRODUCT, _PLACE, _ACCEPTANCE, _LENGTH, _COST, _BATCH, _MATCHED, _DRAWN, _TEMPERATURE) = range(
    len(FEATURES)
)
_probability = partial(number, at_least=0, at_most=1)
_LOW, _HIGH = (tuple(np.float32(getattr(feature, end)) for feature in FEATURES) for end in ("low", "high"))
_NOTHING_DRAFTED, _NO_TOKEN, _NOTHING_VERIFIED = (np.array(row, np.float32) for row in ([1, 0, 1, 0], [0, 1], [0.5, 2]))


class DraftTracker:
    """The features of many drafts side by side, each of one text.

    Everything is computed in float32, so that a draft has the same features alone and among thousands.

    Args:
        environments: how many drafts.
        cost_ratio: see `FEATURES`; a number, or one a draft.
        batch_size: sequences decoded together, at least 1; a number, or one a draft.
        temperature: of the sampling, at least 0; a number, or one a draft.
        columns: of `features`, if there shall be more than those of `FEATURES`, for others to fill.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        environments: int,
        cost_ratio: ArrayLike,
        batch_size: ArrayLike = 1,
        temperature: ArrayLike = 0.0,
        columns: int = len(FEATURES),
    ) -> None:
        columns = whole_number("columns", columns, at_least=len(FEATURES))
        self._features = np.zeros((whole_number("environments", environments), columns), dtype=np.float32)
        self._features[:, _TEMPERATURE] = _clipped(_checked("temperature", temperature, 0), _TEMPERATURE)
        self.set_costs(cost_ratio, batch_size)
        self.forget()

    @property
    def features(self) -> NDArray[np.float32]:
        """Shape (environments, 11), columns as in `FEATURES`. Updated in place: copy what is to be kept."""
        return self._features

    def set_costs(self, cost_ratio: ArrayLike, batch_size: ArrayLike, rows: Rows = None) -> None:
        """Say on what some drafts run from now on. Arguments and errors as for the tracker."""
        ratio, batch = _checked("cost_ratio", cost_ratio, 0), _checked("batch_size", batch_size, 1)
        where = all_or(rows)
        self._features[where, _COST] = _clipped(ratio, _COST)
        self._features[where, _BATCH] = _clipped(np.log2(batch), _BATCH)

    def forget(self, rows: Rows = None) -> None:
        """Begin a text: nothing was drafted or verified yet."""
        self.begin_draft(where := all_or(rows))
        self._features[where, _ACCEPTANCE : _LENGTH + 1] = _NOTHING_VERIFIED

    def drafted(
        self, confidence: ArrayLike, entropy: ArrayLike, matched: ArrayLike = 0, drawn: ArrayLike = 1, rows: Rows = None
    ) -> None:
        """One more token was drafted.

        Args:
            confidence: of the token, 0 to 1, shape (rows,) or a number.
            entropy: of what it was drawn from, in nats, shape (rows,) or a number.
            matched: tokens of context that a look-up found it by, shape (rows,) or a number; 0 of a model.
            drawn: probability with which it was drawn, 0 to 1, shape (rows,) or a number; 1 where it is certain.
            rows: the drafts that it concerns.
        """
        features, where = self._features, all_or(rows)
        sure = _clipped(confidence, _CONFIDENCE)
        features[where, _CONFIDENCE] = sure
        features[where, _ENTROPY] = _clipped(entropy, _ENTROPY)
        features[where, _PRODUCT] *= sure
        features[where, _PLACE] = _clipped(features[where, _PLACE] + 1, _PLACE)
        features[where, _MATCHED] = _clipped(matched, _MATCHED)
        features[where, _DRAWN] = _clipped(drawn, _DRAWN)

    def verified(self, drafted: ArrayLike, accepted: ArrayLike, emitted: ArrayLike, rows: Rows = None) -> None:
        """A round is over, and a new draft begins. A round without drafted tokens says nothing about acceptance.

        Args:
            drafted: draft tokens that were verified, 0 or more, shape (rows,) or a number.
            accepted: those among them that were kept.
            emitted: tokens that the round emitted.
            rows: the drafts that it concerns.
        """
        features, where = self._features, all_or(rows)
        tried = np.asarray(drafted, dtype=np.float32)
        share = _clipped(np.asarray(accepted, dtype=np.float32) / np.maximum(tried, np.float32(1)), _ACCEPTANCE)
        before = features[where, _ACCEPTANCE]
        features[where, _ACCEPTANCE] = before + np.float32(RECENT) * (tried > 0) * (share - before)
        before = features[where, _LENGTH]
        features[where, _LENGTH] = before + np.float32(RECENT) * (_clipped(emitted, _LENGTH) - before)
        self.begin_draft(where)

    def begin_draft(self, where: NDArray[np.intp] | NDArray[np.bool_] | slice = slice(None)) -> None:
        """Begin another draft, whatever became of the one before."""
        self._features[where, : _PLACE + 1] = _NOTHING_DRAFTED
        self._features[where, _MATCHED : _DRAWN + 1] = _NO_TOKEN


def _checked(name: str, values: ArrayLike, least: float) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if not (np.isfinite(numbers) & (numbers >= least)).all():
        raise ArgumentError(f"{name} must be finite and at least {least}, got {values!r}")
    return numbers


def all_or(rows: Rows) -> NDArray[np.intp] | NDArray[np.bool_] | slice:
    """Return what indexes these rows of an array."""
    return slice(None) if rows is None else rows


def _clipped(values: ArrayLike, column: int) -> NDArray[np.float32]:
    if isinstance(values, float | int):  # of a text alone, where arrays take ten times as long
        return min(max(values, FEATURES[column].low), FEATURES[column].high)
    return np.minimum(np.maximum(np.asarray(values, dtype=np.float32), _LOW[column]), _HIGH[column])


class StopRule(ABC):
    """Says after every drafted token whether to stop and verify. One rule may serve many drafts side by side.

    Attributes:
        looks_at_entropy: whether the rule needs that feature, or the probability of the drawn token; live decoding may
            leave them at 0 and 1 for one that does not.
    """

    looks_at_entropy: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the rule in tables, with its parameters."""

    @abstractmethod
    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Decide: True to stop.

        Args:
            features: shape (environments, 11), columns as in `FEATURES`; not to be changed or kept.

        Returns:
            Shape (environments,): True to stop drafting and verify, False to draft one more token.
        """

    def start(self, environments: int, seed: int | None) -> None:  # noqa: B027 (most rules have nothing to prepare)
        """Forget what was learned, and prepare for so many drafts; called once by the rule's owner, not at each text.

        Args:
            environments: how many drafts `features` will have.
            seed: fixes any random choice.
        """

    def for_draft(self) -> StopRule:
        """Return the rule to ask about one draft: itself, or a copy if it adds things up, as texts take turns."""
        return self

    def verified(  # noqa: B027 (most rules do not learn)
        self, rows: Rows, drafted: NDArray[np.int64], emitted: NDArray[np.int64], seconds: NDArray[np.float64]
    ) -> None:
        """Rounds are over, for rules that learn from what they brought.

        Args:
            rows: the drafts concerned.
            drafted: draft tokens that each round verified, shape (rows,).
            emitted: tokens that each emitted.
            seconds: what each took, drafting and verification.
        """


@dataclass(frozen=True)
class FixedLength(StopRule):
    """Stop after so many tokens, as in speculative sampling (Leviathan et al., arXiv 2211.17192).

    Args:
        length: tokens, 1 to 32.

    Raises:
        ValueError: the length is out of range, or not whole.
    """

    looks_at_entropy: ClassVar[bool] = False
    length: int

    def __post_init__(self) -> None:
        check_fields(self, partial(whole_number, at_most=int(_HIGH[_PLACE])), "length")

    @property
    def name(self) -> str:
        return f"length {self.length}"

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        return features[:, _PLACE] >= self.length


@dataclass(frozen=True)
class ConfidenceBelow(StopRule):
    """Stop after a token of which the draft is not sure.

    The dynamic rule of assisted generation in transformers, whose default is 0.4 (Mamou et al., "Dynamic Speculation
    Lookahead Accelerates Speculative Decoding of Large Language Models", arXiv 2405.04304). It differs when sampling:
    transformers looks at the probability of the token that was drawn, and this rule at the largest one.

    Args:
        threshold: stop where the confidence is less, 0 to 1.

    Raises:
        ValueError: the threshold is out of range.
    """

    looks_at_entropy: ClassVar[bool] = False
    threshold: float

    def __post_init__(self) -> None:
        check_fields(self, _probability, "threshold")

    @property
    def name(self) -> str:
        return f"confidence < {self.threshold:g}"

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        return features[:, _CONFIDENCE] < self.threshold


@dataclass(frozen=True)
class EntropyAbove(StopRule):
    """Stop after a token that was drawn from much uncertainty.

    The rule of AdaEDL (Agrawal et al., arXiv 2410.18351) without its moving threshold, see `from_bound`, and of SVIP
    (Zhang et al., arXiv 2411.18462). An entropy is 0 for one-hot drafts, which this rule therefore never stops.

    Args:
        threshold: stop where the entropy is more, in nats, at least 0.

    Raises:
        ValueError: the threshold is negative, infinite or NaN.
    """

    threshold: float

    def __post_init__(self) -> None:
        check_fields(self, partial(number, at_least=0, hint="an entropy in nats"), "threshold")

    @classmethod
    def from_bound(cls, bound: float, scale: float = 0.2) -> EntropyAbove:
        """AdaEDL's form: stop where 1 - sqrt(scale * entropy), a lower bound on the acceptance, is less than `bound`.

        Args:
            bound: a probability, 0 to 1.
            scale: positive; the paper's experiments use 0.2.

        Raises:
            ValueError: an argument is out of range.
        """
        bound, scale = _probability("bound", bound), number("scale", scale, above=0)
        return cls((1 - bound) ** 2 / scale)

    @property
    def name(self) -> str:
        return f"entropy > {self.threshold:g}"

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        return features[:, _ENTROPY] > self.threshold


@dataclass(frozen=True)
class ProductBelow(StopRule):
    """Stop where the whole draft is no longer likely to be accepted.

    EAGLE-2 (Li et al., arXiv 2406.16858) takes the product of the draft's confidences for the chance that a path of
    its tree is accepted as far as that node, and expands the nodes where it is largest; this is the same for a chain.

    Args:
        threshold: stop where the product is less, 0 to 1.

    Raises:
        ValueError: the threshold is out of range.
    """

    looks_at_entropy: ClassVar[bool] = False
    threshold: float

    def __post_init__(self) -> None:
        check_fields(self, _probability, "threshold")

    @property
    def name(self) -> str:
        return f"product < {self.threshold:g}"

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        return features[:, _PRODUCT] < self.threshold


@dataclass(frozen=True)
class TokenRule:
    """Rule of an engine, which ends a draft at the first token that the draft is not sure of.

    The text stays the target's: whether a token is verified depends on the tokens before it and on the distributions
    that they lead to, never on the token itself. After the token, it is verified whatever it is. Before it, the rule
    looks at the distribution alone, although the token may have been drawn already.

    Args:
        threshold: sureness of the token that ends the draft is less, 0 to 1, compared in float32.
        before: whether that token is left out. Sureness is then `likeliest_of_ten`, else the probability by which the
            token was drawn, at temperature 1 when greedy; of a one-hot draft either is its confidence.
        fewest: tokens of a draft, at least. Of a shorter one nothing is verified.
    """

    threshold: float
    before: bool
    fewest: int = 0

    def draft(self, steps: Iterable[DraftStep]) -> tuple[list[DraftStep], int]:
        """Draft as far as the rule goes.

        Args:
            steps: tokens as they are drafted, up to the longest draft.

        Returns:
            Those that the draft consists of, without regard to `fewest`, and the number that were drafted.
        """
        threshold, kept, count = float(np.float32(self.threshold)), [], 0
        if threshold <= 0:  # nothing is asked for, since the host would wait for every answer
            kept = list(steps)
            return kept, len(kept)
        for step in steps:
            count += 1
            unsure = self.sureness(step) < threshold
            if not (unsure and self.before):
                kept.append(step)
            if unsure:
                break
        return kept, count

    def sureness(self, step: DraftStep) -> float:
        """Return how sure the draft is of a token, 0 to 1."""
        if step.logits is None or (step.probabilities is None and not self.before):
            return step.confidence()  # when greedy, the token is the likeliest
        if self.before:
            value = float(likeliest_of_ten(step.logits[0]))
        else:
            assert step.probabilities is not None
            value = float(step.probabilities[0, step.token])
        return value if math.isfinite(value) else 0.0  # a broken draft knows nothing
