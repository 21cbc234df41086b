"""Several workloads in one vector environment: what is given for each, and which environment belongs to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .workloads import Workload


def asked(workload: Any, recordings: Any) -> list[str | Workload | None]:
    """Which workloads are meant; None for that of a given recording."""
    if workload is None:
        if isinstance(recordings, Mapping):
            return list(recordings)
        several = isinstance(recordings, Sequence) and not isinstance(recordings, str)
        return [None] * (len(recordings) if several else 1)
    return [workload] if isinstance(workload, str | Workload) else list(workload)


def one_each(name: str, given: Any, workloads: Sequence[str], shared: bool = False) -> list[Any]:
    """What is given for each workload, None where nothing is.

    Args:
        name: of the argument, for messages.
        given: one thing, a sequence in the order of the workloads, a mapping from their names, or None.
        workloads: their names.
        shared: whether one thing may be for all.

    Raises:
        ValueError: too many or too few are given, or some for a workload that is not there.
    """
    if given is None:
        return [None] * len(workloads)
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(workloads))
        if unknown:
            raise ValueError(f"{name}: there is no workload {unknown[0]!r}; there are: {', '.join(workloads)}")
        return [given.get(workload) for workload in workloads]
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != len(workloads):
            raise ValueError(f"{name}: {len(given)} were given for {len(workloads)} workloads")
        return list(given)
    if len(workloads) > 1 and not shared:
        raise ValueError(f"{name}: one was given for {len(workloads)} workloads; give a mapping from their names")
    return [given] * len(workloads)


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


def probabilities(weights: Sequence[float] | Mapping[str, float], workloads: Sequence[str]) -> NDArray[np.float64]:
    """With what probability each workload is drawn, in proportion to the weights; shape (workloads,).

    Args:
        weights: in the order of the workloads, or a mapping from their names.
        workloads: their names.

    Raises:
        ValueError: the weights are not one finite number of at least 0 for each workload, or all are 0.
    """
    given = one_each("weights", weights if isinstance(weights, Mapping) else list(weights), workloads)
    shares = np.array([np.nan if share is None else share for share in given], np.float64)
    if not (np.isfinite(shares) & (shares >= 0)).all() or not shares.any():
        raise ValueError(
            f"weights must be {len(workloads)} finite numbers of at least 0, one for each workload and not all 0, got "
            f"{weights}"
        )
    return shares / shares.sum()
