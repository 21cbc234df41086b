"""Throughput as a reward: what a step of drafting costs, and tokens minus the price of the time they took.

Throughput is total tokens over total seconds, a ratio of sums, and the mean of each round's own ratio is another number
with another optimum. Dinkelbach ("On nonlinear fractional programming", Management Science 13, 1967) turns the ratio
into a sum: the best throughput is the one rate at which the most that ``tokens - rate * seconds`` can reach is 0, and
what reaches it has that throughput. Alternating between learning at a rate and setting the rate to the throughput that
was reached raises both to the best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import LatencyProfile

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DraftCharges:
    """What the steps of drafting and verifying take at one operating point.

    Attributes:
        seconds: of a step, shape (2, longest draft + 1), by whether it verified (0 or 1) and the number of tokens
            drafted before it. A step that goes on is charged what one more token adds to a round; one that verifies is
            charged a round of one drafted token, or of none. Over the steps of a round that makes the seconds of the
            round. Every decision about a drafted token is charged besides.
        empty_round: seconds of a round that drafts nothing and that nobody decided on.
        autoregressive_seconds: of a token of plain decoding.
        cost_ratio: what one more drafted token costs on average (`LatencyProfile.marginal_cost`).
    """

    seconds: NDArray[np.float64]
    empty_round: float
    autoregressive_seconds: float
    cost_ratio: float

    @classmethod
    def of(
        cls,
        profile: LatencyProfile,
        longest: int,
        *,
        batch_size: int = 1,
        context: int | None = None,
        decision_seconds: float = 0.0,
    ) -> DraftCharges:
        """The charges by a latency profile.

        Args:
            profile: of the pair and the hardware.
            longest: tokens that a draft may have, at least 1.
            batch_size: sequences decoded together, all drafting as many tokens; seconds are those of the whole batch.
            context: tokens read before; by default the profile's own.
            decision_seconds: what deciding takes each time, at least 0.

        Raises:
            LatencyProfileError: the profile does not cover the batch size and the context.
            ValueError: `decision_seconds` is negative or not finite.
        """
        if not (math.isfinite(decision_seconds) and decision_seconds >= 0):
            raise ValueError(f"decision_seconds must be finite and at least 0, got {decision_seconds}")
        point = profile.at(batch_size=batch_size, context=context)
        rounds = point.round_seconds(longest)
        seconds = np.empty((2, longest + 1))
        seconds[0, :-1] = np.diff(rounds)
        seconds[0, -1] = np.inf  # nobody goes on from the longest draft; a mistake would show at once
        seconds[1] = rounds[np.minimum(np.arange(longest + 1), 1)]
        seconds[:, 1:] += decision_seconds
        return cls(seconds, float(rounds[0]), point.autoregressive_seconds, point.marginal_cost())


@overload
def linear_reward(tokens: float, seconds: float, rate: float, autoregressive_seconds: float) -> float: ...


@overload
def linear_reward(tokens: NDArray[np.int64], seconds: Array, rate: Array, autoregressive_seconds: Array) -> Array: ...


def linear_reward(tokens: Any, seconds: Any, rate: Any, autoregressive_seconds: Any) -> Any:
    """Tokens minus the price of the time they took: ``tokens - rate * seconds / autoregressive_seconds``.

    Args:
        tokens: emitted; numbers or arrays.
        seconds: charged for them.
        rate: the throughput that time is priced at, relative to plain decoding, at least 0.
        autoregressive_seconds: of a token of plain decoding.
    """
    return tokens - rate * (seconds / autoregressive_seconds)


def relative_throughput(tokens: float, seconds: float, autoregressive_seconds: float) -> float:
    """Tokens over seconds, relative to plain decoding; 0 where no time has passed."""
    return tokens * autoregressive_seconds / seconds if seconds > 0 else 0.0


def checked_rate(rate: float) -> float:
    """The rate, if it is one.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"a rate is a throughput relative to plain decoding, finite and at least 0, got {rate}")
    return float(rate)


class Totals(NamedTuple):
    """Sums over the steps of all environments of each operating point, float64, each shape (points,)."""

    tokens: Array
    """Emitted."""
    seconds: Array
    """Charged, over the autoregressive seconds per token of the point."""
    drafted: Array
    """Draft tokens verified."""
    accepted: Array
    """Those among them that were emitted."""
    rounds: Array
    """Verified."""

    @property
    def throughput(self) -> Array:
        """Tokens over seconds, relative to plain decoding, shape (points,); 0 where no time has passed."""
        return np.divide(self.tokens, self.seconds, out=np.zeros_like(self.tokens), where=self.seconds > 0)
