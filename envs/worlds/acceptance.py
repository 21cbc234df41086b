"""Acceptance worlds: how often the tokens of a draft are kept, by what was recorded of real pairs, warped.

A row of a trace is a draft at one position of a text, with the draft's probability of every token and the target's
verdict on it. To reach pairs that nobody has recorded, the verdicts are warped and the correlations kept:

1. Let a be a token's chance to pass the exact test, and g(c) the mean chance of tokens with the draft's probability c,
   which is what the probability is worth (its calibration). The verdict is drawn from a, and a latent number u
   uniformly below g(c) for a token that passes, and above it for one that does not. Over tokens of one c, u is uniform.
2. In the world the token passes where u < sigmoid(m + k (logit g(c) - m) + shift - slope j), j being its place in the
   draft and m the mean of logit g. With k = 1 and no shift or slope, these are the recorded verdicts again.
   A shift lets pass the most nearly passed first, so that what was hard stays hard and runs stay runs; k says how much
   the draft's probabilities tell (0: nothing); a slope wears long drafts out, as drafts do that see less than a model.
3. The probabilities that a stop rule looks at become sigmoid(a logit c + b): a draft surer or less sure than it ought.

The shift is solved so that first tokens pass as often as is asked. Texts are the target's own and stay as they are, so
the prompts of a world differ from one another as the recorded ones do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends.replay_table import exact_chances
from ..recordings.archive import TraceError
from ..recordings.find import record_command
from ..recordings.trace import Trace

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LONGEST: Final = 16
"""Tokens of the longest draft."""
LENGTHS: Final = np.arange(LONGEST + 1)
THRESHOLDS: Final = np.array([0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
"""Stop thresholds of the worlds' settings; the first never stops a draft."""
SETTINGS: Final = len(THRESHOLDS) * len(LENGTHS)
"""Settings are numbered by threshold, and within one by length."""
LEVELS: Final = 5
"""Levels of equal width of the probabilities that stop rules look at."""
_BINS: Final = 24
_BISECTIONS: Final = 40

Stop = Literal["after", "before"]
"""Place where a draft ends: after the token below the threshold, or before it."""


def setting_of(length: Any, threshold: Any) -> Integers:
    """Return the number of the setting that lies nearest, of lengths and thresholds of one shape."""
    level = np.abs(np.asarray(threshold)[..., None] - THRESHOLDS).argmin(-1)
    numbers: Integers = level * len(LENGTHS) + np.clip(np.rint(length), 0, LONGEST).astype(np.int64)
    return numbers


def length_of(setting: Integers) -> Integers:
    """Return the draft lengths of settings."""
    return setting % len(LENGTHS)


def threshold_of(setting: Integers) -> Floats:
    """Return the stop thresholds of settings."""
    values: Floats = THRESHOLDS[setting // len(LENGTHS)]
    return values


class Warp(NamedTuple):
    """Distance of a world from what was recorded; as it stands, none."""

    acceptance: float | None = None
    """Share of first tokens that pass, 0 to 1; None for no shift."""
    informed: float = 1.0
    """k: how much the draft's probability says about a token."""
    slope: float = 0.0
    """Logits that every further place in a draft costs."""
    sharpness: float = 1.0
    bias: float = 0.0
    """Change of the probabilities that stop rules look at, in logits."""


@dataclass(frozen=True)
class Rows:
    """Drafts of one workload at every position of the target's own texts.

    Attributes:
        chance: of each token to pass the exact test, shape (rows, K).
        drawn: the draft's probability of the drawn token, likewise.
        likeliest: the probability that a rule asks for which stops before a token, likewise.
        entropy: of the draft's distribution, in nats, likewise.
        drafted: tokens that the draft proposes, shape (rows,).
        starts: first row of each text, and the number of rows, shape (texts + 1,).
        room: tokens that a text may have; one that has fewer ended by itself.
    """

    chance: Floats
    drawn: Floats
    likeliest: Floats
    entropy: Floats
    drafted: Integers
    starts: Integers
    room: int

    @classmethod
    def of(cls, trace: Trace, texts: int) -> Rows:
        """Take the first texts of a trace.

        Raises:
            TraceError: an earlier version recorded it, without the column `top_ten`.
        """
        if trace.top_ten is None:
            raise TraceError(
                f"the trace of {trace.info.workload} ({trace.info.split}) lacks the column top_ten; record it again: "
                f"{record_command(trace.info.workload)}"
            )
        starts = trace.starts[: texts + 1]
        here = slice(0, int(starts[-1]))
        chance = exact_chances(trace.match[here], trace.p[here], trace.q[here], trace.info.sampling)
        # A draft without probabilities has q = 1 and is as sure as its confidence; for others q is the smaller.
        columns = (np.minimum(trace.q, trace.confidence), trace.top_ten, trace.entropy)
        drawn, likeliest, entropy = (_fitted(column[here]) for column in columns)
        drafted = np.minimum(trace.drafted[here].astype(np.int64), LONGEST)
        return cls(_fitted(chance), drawn, likeliest, entropy, drafted, starts, trace.info.tokens)

    @property
    def there(self) -> NDArray[np.bool_]:
        """Which tokens were drafted, shape (rows, K)."""
        return LENGTHS[:LONGEST] < self.drafted[:, None]

    @cached_property
    def calibration(self) -> Floats:
        """g: the mean chance of tokens by their probability, kept within (0, 1), shape (rows, K)."""
        reached = np.cumprod(np.concatenate([np.ones((len(self.chance), 1)), self.chance[:, :-1]], 1), 1) * self.there
        bins = np.minimum((self.drawn * _BINS).astype(np.int64), _BINS - 1)
        weight = np.bincount(bins.ravel(), reached.ravel(), _BINS)
        kept = np.bincount(bins.ravel(), (reached * self.chance).ravel(), _BINS)
        average = kept.sum() / max(weight.sum(), 1e-9)
        worth = (kept + 2 * average) / (weight + 2)  # where few were seen, they count as two that are average
        return np.clip(worth, 0.01, 0.99)[bins]


def _fitted(column: NDArray[np.floating]) -> Floats:
    """Columns as far as `LONGEST`, 0 beyond what was recorded."""
    width = min(column.shape[1], LONGEST)
    return np.pad(column[:, :width].astype(np.float64), ((0, 0), (0, LONGEST - width)))


def logit(share: Floats) -> Floats:
    """Log odds of shares, which are kept away from 0 and 1."""
    inside = np.clip(share, 1e-4, 1 - 1e-4)
    return np.log(inside / (1 - inside))


def sigmoid(odds: Floats) -> Floats:
    """Shares of log odds."""
    return 1 / (1 + np.exp(-odds))


def warped(rows: Rows, warp: Warp, stop: Stop, rng: np.random.Generator) -> tuple[Integers, Floats]:
    """Draw the verdicts of a world.

    Args:
        rows: that were recorded.
        warp: how far the world lies from them.
        stop: which probability the drafts' rule looks at.
        rng: draws the verdicts and the latent numbers.

    Returns:
        Tokens of each row's draft that pass before the first that does not, shape (rows,), and the probabilities that
        the rule looks at, shape (rows, K).
    """
    worth = rows.calibration
    first, second = rng.random((2, *worth.shape))
    latent = np.where(first < rows.chance, second * worth, worth + second * (1 - worth))
    odds = logit(worth)
    middle = odds[rows.there].mean() if rows.there.any() else 0.0
    limit = middle + warp.informed * (odds - middle) - warp.slope * np.arange(LONGEST)
    if warp.acceptance is not None:
        begun = rows.drafted > 0
        limit = limit + _shift(limit[begun, 0], logit(latent[begun, 0]), warp.acceptance)
    passes = (latent < sigmoid(limit)) & rows.there
    looked_at = rows.drawn if stop == "after" else rows.likeliest
    seen = sigmoid(warp.sharpness * logit(looked_at) + warp.bias) if warp[3:] != Warp()[3:] else looked_at
    return np.cumprod(passes, 1).sum(1), seen


def _shift(limits: Floats, latent: Floats, share: float) -> float:
    """Solve for the number to add to limits so that this share of latent numbers lies below, all in log odds."""
    low, high = -20.0, 20.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if (latent < limits + middle).mean() < share else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Counts:
    """Rounds of texts, each decoded to its end with every setting.

    Attributes:
        tokens: of each text, shape (texts,).
        drafts: rounds that drafted k tokens; tokens that were drafted and thrown away, since the rule stopped before
            them; and rounds that drafted nothing else; shape (settings, texts, K + 3).
        kept: rounds that kept more than j drafted tokens, shape (settings, texts, K).
        reached: rounds in which the target judged more than j: those kept, and the one that was not; likewise.
        judged: tokens that the target judged, by the level of their probability, shape (settings, texts, levels).
        passed: those of them that were kept, likewise.
        entropy: summed over the tokens judged, in nats, shape (settings, texts).
    """

    tokens: Integers
    drafts: NDArray[np.uint8]
    kept: NDArray[np.uint8]
    reached: NDArray[np.uint8]
    judged: NDArray[np.uint8]
    passed: NDArray[np.uint8]
    entropy: NDArray[np.float16]


def count_rounds(passing: Integers, seen: Floats, rows: Rows, stop: Stop) -> Counts:
    """Decode all texts with all settings at once.

    Args:
        passing: tokens of each row's draft that pass, shape (rows,).
        seen: probabilities that the stop rule looks at, shape (rows, K).
        rows: that the texts consist of.
        stop: whether a draft ends after the token below the threshold or before it.
    """
    texts = len(rows.starts) - 1
    count, place, row, drafted, stays, thrown = _walk(passing, seen, rows, stop)
    level = np.minimum((seen * LEVELS).astype(np.int64), LEVELS - 1)
    so_far = np.pad(np.cumsum(level[..., None] == np.arange(LEVELS), 1), ((0, 0), (1, 0), (0, 0)))
    entropy_so_far = np.pad(np.cumsum(rows.entropy, 1), ((0, 0), (1, 0)))
    reached = np.minimum(stays + 1, drafted)
    judged, passed = (
        np.stack([np.bincount(place, so_far[row, tokens, number], count) for number in range(LEVELS)], 1)
        for tokens in (reached, stays)
    )
    by_text = (count // texts, texts)
    return Counts(
        np.diff(rows.starts),
        _charged(place, drafted, thrown, count).astype(np.uint8).reshape(*by_text, -1),
        _more_than(place, stays, count).reshape(*by_text, -1),
        _more_than(place, reached, count).reshape(*by_text, -1),
        judged.astype(np.uint8).reshape(*by_text, -1),
        passed.astype(np.uint8).reshape(*by_text, -1),
        np.bincount(place, entropy_so_far[row, reached], count).astype(np.float16).reshape(by_text),
    )


def rounds_a_token(passing: Integers, seen: Floats, rows: Rows, stop: Stop) -> Floats:
    """Return `Counts.drafts` a token of all texts, shape (settings, K + 3); arguments as for `count_rounds`."""
    texts = len(rows.starts) - 1
    count, place, _, drafted, _, thrown = _walk(passing, seen, rows, stop)
    rounds: Floats = _charged(place // texts, drafted, thrown, count // texts) / rows.starts[-1]
    return rounds


def _walk(
    passing: Integers, seen: Floats, rows: Rows, stop: Stop
) -> tuple[int, Integers, Integers, Integers, Integers, Integers]:
    """Number of texts times settings; of every round which of them, its row, and tokens drafted, kept, thrown away."""
    texts = len(rows.starts) - 1
    surest = np.minimum.accumulate(seen, 1)
    # By threshold: how long drafts get before the rule ends them.
    lengths = (surest[None] >= THRESHOLDS[:, None, None]).sum(2) + (stop == "after")
    lengths[0] = LONGEST
    drafts = np.minimum(lengths, rows.drafted).ravel()
    ruled = ((lengths < rows.drafted) & (stop == "before")).ravel()
    place: Integers = np.arange(SETTINGS * texts)
    setting, text = np.divmod(place, texts)
    level, longest = setting // len(LENGTHS) * len(seen), length_of(setting)
    row, end = rows.starts[text], rows.starts[text + 1]
    last = row + rows.room - 1  # the last token that there is room for
    done = []
    while len(place):
        drafted = np.minimum(drafts.take(level + row), np.minimum(longest, last - row))
        stays = np.minimum(passing.take(row), np.minimum(drafted, end - row))
        # Where the rule, and nothing else, has ended a draft before a token, that token was drafted all the same.
        thrown = ruled.take(level + row) & (drafted < np.minimum(longest, last - row))
        done.append((place, row, drafted, stays, thrown))
        row = row + stays + 1
        going = np.flatnonzero(row < end)
        if len(going) < len(place):
            all_of_them = (place, level, longest, row, last, end)
            place, level, longest, row, last, end = (values.take(going) for values in all_of_them)
    place, row, drafted, stays, thrown = (np.concatenate(values) for values in zip(*done, strict=True))
    return SETTINGS * texts, place, row, drafted, stays, thrown


def _charged(place: Integers, drafted: Integers, thrown: Integers, places: int) -> Integers:
    """Rounds of each place by what they draft, tokens thrown away, and rounds without others, shape (places, K + 3)."""
    alone = thrown & (drafted == 0)
    wasted = [np.bincount(place, counted, places).astype(np.int64) for counted in (thrown, alone)]
    return np.column_stack([_counted(place, drafted, places), *wasted])


def _counted(place: Integers, tokens: Integers, places: int) -> Integers:
    """Number of times that each place has so many tokens, shape (places, K + 1)."""
    width = LONGEST + 1
    return np.bincount(place * width + tokens, minlength=places * width).reshape(places, width)


def _more_than(place: Integers, tokens: Integers, places: int) -> NDArray[np.uint8]:
    """Number of times that each place has more than j tokens, shape (places, K)."""
    counts: NDArray[np.uint8] = _counted(place, tokens, places)[:, :0:-1].cumsum(1)[:, ::-1].astype(np.uint8)
    return counts
