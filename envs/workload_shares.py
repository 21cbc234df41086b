"""Several workloads in one vector environment: what is given for each, and which environment belongs to which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def paired(traces: Any, workloads: Any) -> list[tuple[Any, Any]]:
    """Each trace with its workload, either of which may be one, several or None for all.

    Raises:
        ValueError: there are several of both, but not as many.
    """
    count = max(len(given) if _is_sequence(given) else 1 for given in (traces, workloads))
    return list(zip(one_each("traces", traces, count), one_each("workloads", workloads, count), strict=True))


def one_each(what: str, given: Any, count: int) -> list[Any]:
    """A list with one entry for each of so many workloads: those given, or the one given for all.

    Raises:
        ValueError: several are given, but not as many; the message calls them `what`.
    """
    if not _is_sequence(given):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"there are {len(given)} {what} for {count} workloads; give one for each, in order")
    return list(given)


def _is_sequence(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)


def shared_out(environments: int, weights: Sequence[float] | None, workloads: int) -> NDArray[np.int64]:
    """The workload of each environment, in proportion to the weights and well mixed; shape (environments,), int64.

    Raises:
        ValueError: the weights are not one positive number a workload, or there are fewer environments than workloads.
    """
    shares = np.ones(workloads) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (workloads,) or not (np.isfinite(shares) & (shares > 0)).all():
        raise ValueError(f"weights must be {workloads} positive numbers, one for each workload, got {weights}")
    if environments < workloads:
        raise ValueError(f"num_envs must be at least {workloads}, one for each workload, got {environments}")
    chosen = np.empty(environments, np.int64)
    given = np.zeros(workloads)
    for place in range(environments):
        # Always the workload that has waited longest for its next environment.
        chosen[place] = np.argmin((given + 0.5) / shares)
        given[chosen[place]] += 1
    return chosen
