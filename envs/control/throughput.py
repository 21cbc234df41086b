"""Throughput as a reward: tokens minus the price of the time they took, at one or several operating points.

Throughput is total tokens over total seconds, a ratio of sums, and the mean of each round's own ratio is another number
with another optimum. Dinkelbach ("On nonlinear fractional programming", Management Science 13, 1967) turns the ratio
into a sum: the best throughput is the one rate at which the most that ``tokens - rate * seconds`` can reach is 0, and
what reaches it has that throughput. Alternating between learning at a rate and setting the rate to the throughput that
was reached raises both to the best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import ArgumentError, Split, number, sequence_of, whole_number

from ..backends.replay import Workloads, asked
from ..workloads import Workload, per_workload

Array = NDArray[np.float64]
Recorded = TypeVar("Recorded")
"""A recording of a workload."""
Charges = TypeVar("Charges")
"""Charges of time at an operating point."""


@overload
def linear_reward(tokens: float, seconds: float, rate: float, autoregressive_seconds: float) -> float: ...


@overload
def linear_reward(tokens: NDArray[np.int64], seconds: Array, rate: Array, autoregressive_seconds: Array) -> Array: ...


def linear_reward(tokens: Any, seconds: Any, rate: Any, autoregressive_seconds: Any) -> Any:
    """Return tokens minus the price of the time they took: ``tokens - rate * seconds / autoregressive_seconds``.

    Args:
        tokens: emitted; numbers or arrays.
        seconds: charged for them.
        rate: the throughput that time is priced at, relative to plain decoding, at least 0.
        autoregressive_seconds: of a token of plain decoding.
    """
    return tokens - rate * (seconds / autoregressive_seconds)


def relative_throughput(tokens: float, seconds: float, autoregressive_seconds: float) -> float:
    """Return tokens over seconds, relative to plain decoding; 0 where no time has passed."""
    return tokens * autoregressive_seconds / seconds if seconds > 0 else 0.0


def checked_rate(rate: float) -> float:
    """Return the rate, if it is finite and at least 0.

    Raises:
        ValueError: it is negative or not finite.
    """
    return float(number("rate", rate, at_least=0, hint="a throughput relative to plain decoding"))


class ControlTotals(NamedTuple):
    """Sums over the steps of all environments of each operating point, float64, each shape (points,)."""

    tokens: Array
    """Tokens emitted."""
    seconds: Array
    """Seconds charged, over the autoregressive seconds per token of the point."""
    drafted: Array
    """Draft tokens verified."""
    accepted: Array
    """Draft tokens among those emitted."""
    rounds: Array
    """Verifications."""

    @property
    def throughput(self) -> Array:
        """Tokens over seconds, relative to plain decoding, shape (points,); 0 where no time has passed."""
        return np.divide(self.tokens, self.seconds, out=np.zeros_like(self.tokens), where=self.seconds > 0)


class OperatingPoint(NamedTuple):
    """Workload and batch size of a group of environments; its best throughput, and so its rate, is its own."""

    workload: str
    batch_size: int


@dataclass(frozen=True)
class OperatingPoints(Generic[Recorded, Charges]):
    """Operating points of some environments: every workload with every batch size.

    Attributes:
        workloads: in order, each with its split.
        recordings: of each workload; None where it is decoded live.
        points: all batch sizes of the first workload, then those of the next.
        charges: of time at each point.
    """

    workloads: tuple[Workload, ...]
    recordings: tuple[Recorded, ...]
    points: tuple[OperatingPoint, ...]
    charges: tuple[Charges, ...]

    @classmethod
    def find(
        cls,
        workload: Workloads,
        split: Split | None,
        recording: Any,
        profile: Any,
        batch_size: int | Sequence[int],
        *,
        find: Callable[[Any, Any, Split | None], tuple[Recorded, Workload]],
        charge: Callable[[Recorded, Workload, Any, int], Charges],
    ) -> OperatingPoints[Recorded, Charges]:
        """Find workloads, recordings and profiles.

        Args:
            workload: and what follows, up to `batch_size`: as for `DraftLengthVectorEnv`.
            find: returns a recording, or None for live decoding, and its workload, by what was given of each and the
                split.
            charge: returns the charges of a recording and workload, by the profile that was given and a batch size.

        Raises:
            ValueError: as for `DraftLengthVectorEnv`.
        """
        names = asked(workload, recording)
        recordings = per_workload("recording", recording, list(map(str, names)))
        kept, workloads = zip(
            *(find(value, name, split) for value, name in zip(recordings, names, strict=True)), strict=True
        )
        known = tuple(named.name for named in workloads)
        if len(set(known)) < len(known):
            raise ArgumentError(f"workload must name one or more different workloads, got {workload!r}")
        several = isinstance(batch_size, Sequence) and not isinstance(batch_size, str)
        sizes = sequence_of("batch_size", batch_size if several else [batch_size], whole_number, distinct=True)
        profiles = per_workload("profile", profile, known, shared=True)
        return cls(
            workloads=workloads,
            recordings=kept,
            points=tuple(OperatingPoint(name, size) for name in known for size in sizes),
            charges=tuple(
                charge(trace, named, value, size)
                for trace, named, value in zip(kept, workloads, profiles, strict=True)
                for size in sizes
            ),
        )
