"""Means over the steps of a rollout, for each workload and for all of them, at the cost of a few operations a step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .step_infos import Floats, StepInfos


class WorkloadMeans:
    """Adds up values by name and workload. Marked transitions and values that are not finite count in no mean."""

    def __init__(self) -> None:
        self._rows: dict[str | None, int] = {}
        self._sums: dict[str, Floats] = {}  # by name: sum of weighted values and sum of weights, for each workload

    def add(self, step: StepInfos, values: Mapping[str, Floats], weights: Floats | None = None) -> None:
        """Count a step.

        Args:
            step: says of each environment to which workload it belongs, and whether it counts.
            values: by name, each of shape (environments,).
            weights: of the environments, at least 0, shape (environments,); one that is not finite counts as 0. By
                default all weigh 1.
        """
        if not values:
            return
        rows = [self._rows.setdefault(name, len(self._rows)) for name in step.workloads.tolist()]
        weighed = step.kept if weights is None else np.where(step.kept & np.isfinite(weights), weights, 0.0)
        member = (np.array(rows)[:, None] == np.arange(len(self._rows))) * weighed[:, None].astype(np.float64)
        table = np.stack(list(values.values()))
        finite = np.isfinite(table)
        added = np.stack([np.where(finite, table, 0.0) @ member, finite @ member], axis=1)
        for name, sums in zip(values, added, strict=True):
            before = self._sums.get(name)
            if before is not None:
                sums[:, : before.shape[1]] += before
            self._sums[name] = sums

    def overall(self) -> dict[str, float]:
        """Means over all workloads, by name; those with no value are left out."""
        totals = {name: sums.sum(axis=1) for name, sums in self._sums.items()}
        return {name: float(value / weight) for name, (value, weight) in totals.items() if weight > 0}

    def by_workload(self) -> dict[str, dict[str, float]]:
        """Means by workload and name; transitions that name no workload are in none."""
        found: dict[str, dict[str, float]] = {}
        for name, sums in self._sums.items():
            for workload, row in self._rows.items():
                if workload is not None and row < sums.shape[1] and sums[1, row] > 0:
                    found.setdefault(workload, {})[name] = float(sums[0, row] / sums[1, row])
        return found
