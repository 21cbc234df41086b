"""The stop rule that weighs what one more drafted token is expected to bring against what it costs.

A draft's confidences are no probabilities of being kept: a model is surer or less sure than it ought to be, and a table
that only knows how long a context it matched says nothing of the kind. `KeepChances` holds how often tokens of each
confidence were kept, by the tolerance of threshold decoding, measured on texts of the pair. With those, and with the
times of a latency profile, `ExpectedGain` needs no number to be chosen: a cheap draft goes on where a dear one stops.
Torch-free.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from .stop_rules import FEATURES, StopRule

if TYPE_CHECKING:
    from ..latency.profile import LatencyProfile

BINS = 16
"""Bins of confidence, of equal width. A power of 2, so that binning a float32 rounds nothing."""
LEVELS = 21
"""Tolerances at which chances are known: 0, 0.05, ..., 1."""
_PRIOR = 2.0
"""Tokens of each bin that the prior counts for; and of each draft, where a text's own are counted."""
_COLUMNS = [feature.name for feature in FEATURES]
_CONFIDENCE, _PLACE = _COLUMNS.index("confidence"), _COLUMNS.index("place")

Floats = NDArray[np.float64]


def bins_of(confidence: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the bin of each confidence, 0 to `BINS` - 1; any shape."""
    return np.minimum(np.maximum((confidence * BINS).astype(np.int64), 0), BINS - 1).astype(np.uint8)


def levels_of(tolerance: Any) -> Any:
    """Return the level nearest to each tolerance, 0 to `LEVELS` - 1; a number, or an array of integers."""
    if isinstance(tolerance, np.ndarray):
        return np.clip(np.floor(tolerance * (LEVELS - 1) + 0.5), 0, LEVELS - 1).astype(np.int64)
    return min(max(math.floor(tolerance * (LEVELS - 1) + 0.5), 0), LEVELS - 1)


@dataclass(frozen=True, eq=False)
class KeepChances:
    """Chances that drafted tokens are kept, all before them having been kept.

    Attributes:
        kept: by the level of the tolerance and the bin of the confidence, 0 to 1, shape (`LEVELS`, `BINS`).
        average: over the confidences as they occur, by level, shape (`LEVELS`,).

    Raises:
        ValueError: a wrong shape, or a number that is no probability.
    """

    kept: Floats
    average: Floats

    def __post_init__(self) -> None:
        for name, shape in (("kept", (LEVELS, BINS)), ("average", (LEVELS,))):
            values = np.asarray(getattr(self, name), np.float64)
            if values.shape != shape:
                raise ArgumentError(f"{name} must have shape {shape}, got {values.shape}")
            if not ((values >= 0) & (values <= 1)).all():
                raise ArgumentError(f"{name} must hold probabilities, between 0 and 1")
            object.__setattr__(self, name, values)

    @classmethod
    def assumed(cls) -> KeepChances:
        """Return chances for a draft of which nothing was measured.

        A token's confidence is taken for its chance to pass the exact test, and a tolerance to keep that share of the
        tokens that fail it.
        """
        exact = (np.arange(BINS) + 0.5) / BINS
        tolerances = np.linspace(0, 1, LEVELS)[:, None]
        kept = exact + (1 - exact) * tolerances
        return cls(kept, kept.mean(1))

    @classmethod
    def fit(
        cls, bins: NDArray[np.integer], passes: NDArray[np.floating], distance: NDArray[np.floating], drafted: Any
    ) -> KeepChances:
        """Measure the chances on recorded drafts, each at a position of a text.

        Args:
            bins: of the confidences, shape (drafts, K).
            passes: chance of each token to pass the exact test, all before it having been kept; same shape.
            distance: between draft and target there, 0 to 1; same shape.
            drafted: tokens of each draft, 0 to K, shape (drafts,).
        """
        usual = cls.assumed().kept
        there = np.arange(bins.shape[1]) < np.asarray(drafted)[:, None]
        kept, average = np.empty((LEVELS, BINS)), np.empty(LEVELS)
        for level in range(LEVELS):
            chance = np.where(distance <= np.float32(level / (LEVELS - 1)), 1.0, passes) * there
            reached = np.ones(chance.shape)
            np.cumprod(chance[:, :-1], axis=1, out=reached[:, 1:])
            reached *= there
            counts = np.bincount(bins.ravel(), reached.ravel(), BINS)
            sums = np.bincount(bins.ravel(), (reached * chance).ravel(), BINS)
            kept[level] = (sums + _PRIOR * usual[level]) / (counts + _PRIOR)
            average[level] = (sums.sum() + _PRIOR * usual[level].mean()) / (counts.sum() + _PRIOR)
        return cls(kept.astype(np.float32), average.astype(np.float32))  # as traces store them

    @property
    def exact(self) -> Floats:
        """Chances to pass the exact test: by the bin of the confidence, and last the average; shape (`BINS` + 1,)."""
        return np.append(self.kept[0], self.average[0])

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"kept": self.kept.tolist(), "average": self.average.tolist()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> KeepChances:
        """Read what `to_json` returned.

        Raises:
            ValueError: the content is something else.
        """
        try:
            return cls(np.array(content["kept"], np.float64), np.array(content["average"], np.float64))
        except (KeyError, TypeError) as error:
            raise ArgumentError(f"these are no chances of drafted tokens ({error})") from error


class TextChances:
    """Chances that tokens of several drafts are right, counted while texts are decoded, each text by itself.

    What is known of a draft beforehand counts for some tokens. So that few tokens say much, its chances at all
    confidences together are first raised or lowered, to as many right tokens as there were.

    Args:
        prior: what a text begins with, as in `KeepChances.exact`, shape (texts, drafts, `BINS` + 1).
        learns: whether those of a draft are counted, shape (texts, drafts); others stay as they are.
    """

    def __init__(self, prior: Floats, learns: NDArray[np.bool_]) -> None:
        self._prior, self._learns = prior, learns[:, :, None]
        self._tried, self._right = np.zeros((2, *prior.shape))

    def forget(self, rows: Any) -> None:
        """Begin some texts."""
        self._tried[rows] = self._right[rows] = 0.0

    def count(
        self, texts: NDArray[np.intp], drafts: NDArray[np.intp], bins: NDArray[np.intp], right: NDArray[np.bool_]
    ) -> None:
        """Count tokens before which all were right; all arguments of shape (tokens,).

        Args:
            texts: of each.
            drafts: that proposed it.
            bins: of its confidence; `BINS` where that is not known.
            right: whether it was kept.
        """
        known = bins < BINS
        for which, columns in ((known, bins[known]), (slice(None), np.full(len(bins), BINS))):
            cells = texts[which], drafts[which], columns
            np.add.at(self._tried, cells, 1.0)
            np.add.at(self._right, cells, right[which])

    def of(self, rows: Any) -> Floats:
        """Return the chances in some texts, shape (rows, drafts, `BINS` + 1)."""
        prior, tried, right = self._prior[rows], self._tried[rows], self._right[rows]
        expected = (tried * prior)[..., :-1].sum(-1, keepdims=True)
        better = (_PRIOR + right[..., :-1].sum(-1, keepdims=True)) / (_PRIOR + expected)
        likely = np.append(np.minimum(prior[..., :-1] * better, 1.0), prior[..., -1:], -1)
        chances: Floats = np.where(self._learns[rows], (_PRIOR * likely + right) / (_PRIOR + tried), prior)
        return chances


class ExpectedGain(StopRule):
    """Stop where one more token is expected to bring less than the time that it takes is worth.

    After k drafted tokens a round is expected to emit E = 1 + c1 + c1 c2 + ... + c1...ck tokens, where c are the
    chances that tokens are kept. One more token brings c1...ck times the average chance, and costs what it adds to the
    round. Time is worth what this round has made of it so far, E over its seconds, and at least what plain decoding
    makes of it. As every rule of its kind, it is asked after the first token.

    Args:
        seconds: of a round, by the number of tokens drafted, shape (longest draft + 1,).
        plain_seconds: of a token of plain decoding.
        chances: of the pair's drafted tokens.
        tolerance: of the decoder, 0 to 1; 0 for exact decoding. The nearest level is taken.

    Raises:
        ValueError: times are not positive and finite, or there is none of a draft.
    """

    looks_at_entropy: ClassVar[bool] = False

    def __init__(
        self, seconds: Sequence[float] | Floats, plain_seconds: float, chances: KeepChances, tolerance: float = 0.0
    ) -> None:
        self._seconds = np.asarray(seconds, np.float64)
        if len(self._seconds) < 2 or not (np.isfinite(self._seconds) & (self._seconds > 0)).all():
            raise ArgumentError("seconds must be positive, of a round without a draft and of at least one with one")
        if not (math.isfinite(plain_seconds) and plain_seconds > 0):
            raise ArgumentError(f"plain_seconds must be positive, got {plain_seconds}")
        self._plain_rate = 1 / plain_seconds
        self._more = np.diff(self._seconds)
        self._chances = chances
        self._level = levels_of(tolerance)
        self.start(1, None)

    @classmethod
    def of(cls, profile: LatencyProfile, max_draft_length: int, tolerance: float = 0.0) -> ExpectedGain:
        """Return the rule by a pair's profile of chains, with its chances if it has any."""
        return cls(
            profile.round_seconds(max_draft_length),
            profile.autoregressive_seconds,
            profile.chances or KeepChances.assumed(),
            tolerance,
        )

    @property
    def name(self) -> str:
        """`expected gain`."""
        return "expected gain"

    @property
    def longest(self) -> int:
        """Length of the longest draft, in tokens."""
        return len(self._more)

    def start(self, environments: int, seed: int | None) -> None:
        """Forget all drafts."""
        self._product = np.ones(environments)
        self._expected = np.ones(environments)

    def for_draft(self) -> ExpectedGain:
        """Return the rule with sums of its own."""
        rule = copy.copy(self)
        rule.start(1, None)
        return rule

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Decide; asked once for every drafted token, as it adds up what it is told."""
        place = features[:, _PLACE].astype(np.int64)
        fresh = place <= 1
        self._product[fresh] = self._expected[fresh] = 1.0
        chance = self._chances.kept[self._level].take(bins_of(features[:, _CONFIDENCE]))
        return self._add(self._product, self._expected, chance, np.maximum(place, 1), self._level)

    def lengths(self, bins: NDArray[np.uint8], levels: Sequence[int] = range(LEVELS)) -> NDArray[np.uint8]:
        """Return where drafts end by this rule, at some levels of the tolerance, whatever the rule's own.

        Args:
            bins: of the confidences of drafts, shape (drafts, tokens); the longest draft or more.
            levels: of the tolerance; by default all.

        Returns:
            Tokens drafted, at least 1, shape (levels, drafts).
        """
        drafts = len(bins)
        ends = np.full((len(levels), drafts), self.longest, np.uint8)
        for number, level in enumerate(levels):
            chances = self._chances.kept[level]
            going = np.arange(drafts)
            product, expected = np.ones(drafts), np.ones(drafts)
            for place in range(1, self.longest):
                stops = self._add(product, expected, chances.take(bins[going, place - 1]), place, level)
                ends[number, going[stops]] = place
                going, product, expected = going[~stops], product[~stops], expected[~stops]
        return ends

    def _add(
        self, product: Floats, expected: Floats, chance: Floats, place: int | NDArray[np.int64], level: int
    ) -> NDArray[np.bool_]:
        """Add a token to drafts, in place; True where a draft of so many tokens should end."""
        product *= chance
        expected += product
        last = np.minimum(place, self.longest - 1)
        worth = np.maximum(expected / self._seconds[last], self._plain_rate)
        ends: NDArray[np.bool_] = product * self._chances.average[level] <= self._more[last] * worth
        return ends | (np.asarray(place) >= self.longest)
