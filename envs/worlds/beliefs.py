"""Beliefs about worlds, from what a user can measure in a minute: what a tuner sees, and what its actions mean."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .acceptance import LENGTHS, LEVELS, LONGEST, THRESHOLDS, Floats, Integers, length_of, setting_of, threshold_of
from .worlds import Readings, Worlds

PROFILED: Final = (4, 16)
"""Drafted tokens of the rounds that are timed before anything is tried."""
SHOWN: Final = np.array([1, 2, 3, 4, 6, 8, 12, 16])
"""Draft lengths that predictions, and places that acceptance rates, are shown for."""
REMEMBERED: Final = 4
"""Newest measurements that are shown one by one."""
MOST_MEASUREMENTS: Final = 8
LENGTH_MOVE: Final = 2.5
"""Doublings of 1 + the draft length that an action of 1 moves it by."""
STOP: Final = 0.5
"""Third entry of an action from which on a session ends, once something was measured."""
_DOUBLINGS = 3.0  # of speed that are shown, up and down
_CHEAPEST = 8.0  # halvings of a plain token's cost down to which a drafted one's is shown
_NATS = 8.0
_LOG_TOKENS = 8.0
_PRIOR = 4.0  # tokens that the average rate weighs as much as, at a place or level of which nothing is known
_MEASURED = ("length", "threshold", "log_speedup", "acceptance_rate", "drafted_per_round", "accepted_per_round")

Flags = NDArray[np.bool_]


class Facts(NamedTuple):
    """Facts of worlds that are known before anything is tried, each of shape (n,).

    Attributes:
        fixed: whether drafts have a fixed length.
        before: whether drafts stop before the token below the threshold.
        temperature: of sampling.
        batch_size: sequences decoded together.
        short_round: seconds of a round with `PROFILED[0]` drafted tokens, over those of a plain token.
        long_round: with `PROFILED[1]`.
    """

    fixed: Flags
    before: Flags
    temperature: Floats
    batch_size: Integers
    short_round: Floats
    long_round: Floats

    @classmethod
    def of(cls, worlds: Worlds, rng: np.random.Generator) -> Facts:
        """Measure the rounds of worlds, each once."""
        every: Integers = np.arange(len(worlds))
        short, long = (worlds.costs[:, tokens] * worlds.noisy(every, rng) for tokens in PROFILED)
        return cls(worlds.fixed, worlds.before, worlds.temperature, worlds.batch_size, short, np.maximum(short, long))


class Beliefs:
    """Sums of what was measured of n worlds so far, and conclusions from them.

    Args:
        count: n.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        after, before = np.zeros((2, count), np.bool_)
        self.facts = Facts(after, before, np.zeros(count), np.ones(count, np.int64), np.ones(count), np.ones(count))
        self.done: Integers = np.zeros(count, np.int64)
        self.left: Integers = np.zeros(count, np.int64)
        self._reached = np.zeros((count, LONGEST))
        self._kept = np.zeros((count, LONGEST))
        self._judged, self._passed = np.zeros((2, count, LEVELS))
        self._entropy = np.zeros((count, 2))
        self._newest = np.zeros((count, REMEMBERED, len(_MEASURED)))
        self._best = np.zeros((count, 3))

    def begin(self, rows: Integers, facts: Facts, measurements: Integers | int) -> None:
        """Forget some worlds, and begin with others, of which so many measurements may be taken."""
        for mine, theirs in zip(self.facts, facts, strict=True):
            mine[rows] = theirs
        self.done[rows], self.left[rows] = 0, measurements
        for values in (self._reached, self._kept, self._judged, self._passed, self._entropy, self._newest, self._best):
            values[rows] = 0

    def add(self, rows: Integers, settings: Integers, readings: Readings) -> None:
        """Take what one measurement gave in each of some worlds."""
        rounds, drafts = np.maximum(readings.drafts.sum(1), 1), readings.drafts @ LENGTHS
        accepted = readings.kept.sum(1)
        self._reached[rows] += readings.reached
        self._kept[rows] += readings.kept
        self._judged[rows] += readings.judged
        self._passed[rows] += readings.passed
        tokens = readings.judged.sum(1)
        self._entropy[rows] += np.stack([readings.entropy * tokens, tokens], 1)
        speed = np.log2(np.maximum(readings.speedup, 2.0**-_DOUBLINGS)) / _DOUBLINGS
        shown = (
            np.log2(1 + length_of(settings)) / np.log2(1 + LONGEST),
            threshold_of(settings),
            speed,
            accepted / np.maximum(drafts, 1),
            drafts / rounds / LONGEST,
            accepted / rounds / LONGEST,
        )
        self._newest[rows, 1:] = self._newest[rows, :-1]
        self._newest[rows, 0] = np.stack(shown, 1)
        better = (self.done[rows] == 0) | (speed > self._best[rows, 2])
        self._best[rows[better]] = self._newest[rows[better], 0, :3]
        self.done[rows] += 1
        self.left[rows] -= 1

    def acceptance(self) -> tuple[Floats, Floats]:
        """Return the rate at which drafted tokens are kept, shape (n,), and the rate by place, shape (n, K)."""
        pooled = (self._kept.sum(1) + 1.2) / (self._reached.sum(1) + 2)
        return pooled, (self._kept + _PRIOR * pooled[:, None]) / (self._reached + _PRIOR)

    def levels(self) -> tuple[Floats, Floats]:
        """Return the share of judged tokens that have each level of probability, and the rate at which they are kept.

        Returns:
            Two of shape (n, levels).
        """
        pooled = self.acceptance()[0][:, None]
        weight = self._judged + _PRIOR / LEVELS
        return weight / weight.sum(1, keepdims=True), (self._passed + _PRIOR / 2 * pooled) / (self._judged + _PRIOR / 2)

    def predicted(self) -> Floats:
        """Return the speedups that follow from what was measured.

        Without a threshold they are tokens by the rates by place, over seconds between the timed rounds: the closed
        form of Leviathan et al. (arXiv 2211.17192) with a rate for every place instead of one for all, and with a
        verification that costs more the more it reads. A threshold changes both as if the levels of a draft's tokens
        were drawn one by one: with a share c of tokens at or above it, of which a share a is kept, a draft goes on to
        the next token with chance c, and reaches it intact with chance c a. A rule that stops before a token has
        drafted it, and throws it away.

        Returns:
            Shape (n, levels, K + 1), by the level where the threshold lies, and by length; what an engine cannot set
            is 0.
        """
        costs = self.round_costs()
        tokens = 1 + np.pad(self.acceptance()[1].cumprod(1).cumsum(1), ((0, 0), (1, 0)))
        share, rate = self.levels()
        above = share[:, ::-1].cumsum(1)[:, ::-1]
        kept = (share * rate)[:, ::-1].cumsum(1)[:, ::-1]  # at or above the level, and kept
        places = np.arange(LONGEST)
        goes_on, intact = above[..., None] ** places, kept[..., None] ** places
        stopping_before = self.facts.before[:, None]
        first = np.where(stopping_before, above, 1.0)[..., None]
        last = np.where(stopping_before, kept, kept[:, :1])[..., None]
        drafted = np.pad((first * goes_on).cumsum(2), ((0, 0), (0, 0), (1, 0)))
        emitted = 1 + np.pad((last * intact).cumsum(2), ((0, 0), (0, 0), (1, 0)))
        below = np.minimum(drafted.astype(np.int64), LONGEST - 1)
        by_length = costs[:, None]
        rest = drafted - below
        thrown = np.where(stopping_before, 1 - above, 0.0)[..., None] * goes_on.cumsum(2)  # that many ends by the rule
        cost = (1 - rest) * np.take_along_axis(by_length, below, 2) + rest * np.take_along_axis(by_length, below + 1, 2)
        cost += self._token_cost()[:, None, None] * np.pad(thrown, ((0, 0), (0, 0), (1, 0)))
        speedups: Floats = (tokens / costs)[:, None] * (emitted / emitted[:, :1]) / (cost / cost[:, :1])
        speedups[self.facts.fixed, 1:] = 0
        return speedups

    def _token_cost(self) -> Floats:
        """Seconds that a drafted token adds to a round, over those of a plain token, shape (n,)."""
        return (self.facts.long_round - self.facts.short_round) / (PROFILED[1] - PROFILED[0])

    def round_costs(self) -> Floats:
        """Seconds of rounds over those of a plain token, on lines through the timed ones, shape (n, K + 1)."""
        first, second = PROFILED
        short, long = self.facts.short_round[:, None], self.facts.long_round[:, None]
        costs = np.where(
            first >= LENGTHS,
            1 + (short - 1) * LENGTHS / first,
            short + (long - short) / (second - first) * (LENGTHS - first),
        )
        return np.maximum(costs, 1e-3)

    def observations(self) -> NDArray[np.float32]:
        """Return all beliefs as numbers between -1 and 1, shape (n, entries)."""
        facts, predicted = self.facts, self.predicted()
        speeds = predicted[:, 0]
        level, length = self._starts(predicted)
        pooled, by_place = self.acceptance()
        share, rates = self.levels()
        single = (
            ~facts.fixed & ~facts.before,
            ~facts.fixed & facts.before,
            facts.fixed,
            facts.temperature,
            np.log2(facts.batch_size) / 8,
            np.log2(facts.short_round) / _DOUBLINGS,
            np.log2(facts.long_round) / _DOUBLINGS,
            np.log2(np.maximum(self._token_cost(), 2.0**-_CHEAPEST)) / _CHEAPEST,
            self.done / MOST_MEASUREMENTS,
            np.minimum(self.left, MOST_MEASUREMENTS) / MOST_MEASUREMENTS,
            self.left <= 0,
            pooled,
            self._entropy[:, 0] / np.maximum(self._entropy[:, 1], 1) / _NATS,
            np.log2(1 + length) / np.log2(1 + LONGEST),
            level / LEVELS,
            np.log2(predicted.max((1, 2))) / _DOUBLINGS,
        )
        entries = [
            np.stack([np.asarray(values, np.float64) for values in single], 1),
            by_place[:, SHOWN - 1],
            np.log2(np.maximum(speeds[:, SHOWN], 2.0**-_DOUBLINGS)) / _DOUBLINGS,
            np.log2(np.maximum(predicted[:, 1:].max(2), 2.0**-_DOUBLINGS)) / _DOUBLINGS,
            rates,
            share,
            np.log1p(self._judged) / _LOG_TOKENS,
            self._best,
            self._newest.reshape(self.count, -1),
        ]
        return np.clip(np.concatenate(entries, 1), -1, 1).astype(np.float32)

    def over(self, actions: NDArray[np.floating]) -> Flags:
        """Return where actions end the session and recommend their settings, shape (n,); shapes as for `settings`."""
        return (self.left <= 0) | ((np.asarray(actions)[:, 2] > STOP) & (self.done > 0))

    def _starts(self, predicted: Floats) -> tuple[Integers, Integers]:
        """Level and length of the best setting predicted, each of shape (n,)."""
        level, length = np.divmod(predicted.reshape(self.count, -1).argmax(1), LONGEST + 1)
        return level, length

    def settings(self, actions: NDArray[np.floating]) -> Integers:
        """Return the settings that actions stand for.

        Args:
            actions: shape (n, 2 or more), -1 to 1: moves away from the best setting predicted, of the length in
                doublings of 1 + length, 2.5 for 1, and of the threshold, 1 for 1.

        Returns:
            Their numbers, shape (n,).
        """
        actions = np.clip(np.asarray(actions, np.float64), -1, 1)
        level, length = self._starts(self.predicted())
        lengths = 2 ** (np.log2(1 + length) + LENGTH_MOVE * actions[:, 0]) - 1
        thresholds = np.clip(level / LEVELS + actions[:, 1], 0, THRESHOLDS[-1])
        return setting_of(lengths, np.where(self.facts.fixed, 0.0, thresholds))


def observation_names() -> list[str]:
    """Return the names of the entries of `Beliefs.observations`."""
    return [
        "stops_after",
        "stops_before",
        "fixed_length",
        "temperature",
        "batch_size",
        "short_round",
        "long_round",
        "token_cost",
        "measured",
        "left",
        "last",
        "acceptance_rate",
        "entropy",
        "predicted_length",
        "predicted_threshold",
        "predicted_log_speedup",
        *(f"acceptance_at/{place}" for place in SHOWN),
        *(f"predicted_log_speedup/{length}" for length in SHOWN),
        *(f"predicted_log_speedup/above_level_{level}" for level in range(1, LEVELS)),
        *(f"level_{what}/{level}" for what in ("acceptance", "share", "tokens") for level in range(LEVELS)),
        *(f"best/{name}" for name in _MEASURED[:3]),
        *(f"before/{number}/{name}" for number in range(1, REMEMBERED + 1) for name in _MEASURED),
    ]


def observation_bounds() -> tuple[float, float]:
    """Return the bounds of every entry of an observation."""
    return -1.0, 1.0
