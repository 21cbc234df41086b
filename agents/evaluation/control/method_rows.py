"""Rows of a table of methods on many workloads, with intervals over prompts and policies, and their means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..results import ALL, LEARNED, PLAIN, Row, interval
from .side_by_side import Decoded

Samples = NDArray[np.float64]
Derived = Mapping[tuple[str, str], Samples]
"""Further numbers by method and column."""


class MethodRows:
    """Rows of methods, workload by workload.

    Args:
        derive: computes further columns from the throughputs of all methods, each of one or several samples.
        of_means: columns among them that are computed from the means over the workloads for the mean row; others are
            averaged.
        policies: number of learned policies.
        resamples: of the bootstrap.
    """

    def __init__(
        self,
        derive: Callable[[Mapping[str, Samples]], Derived],
        of_means: Collection[str],
        policies: int,
        resamples: int,
    ) -> None:
        self._derive, self._of_means = derive, of_means
        self._rng, self._resamples = np.random.default_rng(0), resamples
        # The same policies decode every workload, so which of them a resample has is drawn once for all.
        self._policies = self._rng.integers(policies, size=(resamples, policies))
        self._rows: list[Row] = []
        self._samples: list[dict[str, Samples]] = []

    def resampled(self, prompts: int) -> NDArray[np.int64]:
        """Draw prompts for every resample, shape (resamples, prompts)."""
        return self._rng.integers(prompts, size=(self._resamples, prompts))

    def add(
        self,
        place: str,
        rules: Mapping[str, str],
        methods: Mapping[str, Sequence[Decoded]],
        prompts: NDArray[np.int64],
    ) -> None:
        """Add a workload.

        Args:
            place: its name.
            rules: name of each method's rule.
            methods: by name, what the rule, or each of the learned policies, decoded.
            prompts: as drawn by `resampled`.
        """
        samples = {
            method: self._throughputs(many, prompts, self._drawn(len(many)) if len(many) > 1 else None)
            for method, many in methods.items()
        }
        self._samples.append(samples)
        reached = {method: [decoded.throughput for decoded in many] for method, many in methods.items()}
        further = self._derive({method: np.array([np.mean(values)]) for method, values in reached.items()})
        drawn = self._derive(samples)
        self._rows.append(Row(place, PLAIN, values={"throughput": 1.0}, rule="no draft"))
        for method, many in methods.items():
            values = {
                "throughput": float(np.mean(reached[method])),
                "draft_acceptance_rate": float(np.mean([decoded.draft_acceptance_rate for decoded in many])),
                "draft_length": float(np.mean([decoded.draft_length for decoded in many])),
            }
            intervals = {"throughput": interval(samples[method])}
            for (of, column), value in further.items():
                if of == method:
                    values[column], intervals[column] = float(value[0]), interval(drawn[of, column])
            by_seed = tuple(reached[method]) if method == LEARNED or len(many) > 1 else ()
            self._rows.append(Row(place, method, {}, values, intervals, rules[method], by_seed))

    def rows(self) -> list[Row]:
        """All rows, those of the means over the workloads last."""
        same: dict[str, list[Row]] = {}
        for row in self._rows:
            same.setdefault(row.method, []).append(row)
        values = {
            method: {name: float(np.mean([row.values[name] for row in group])) for name in group[0].values}
            for method, group in same.items()
        }
        methods = list(self._samples[0])
        drawn = {method: np.mean([samples[method] for samples in self._samples], axis=0) for method in methods}
        derived = [self._derive(samples) for samples in self._samples]
        averaged = {key: np.mean([of_workload[key] for of_workload in derived], axis=0) for key in derived[0]}
        of_means = self._derive({method: np.array([values[method]["throughput"]]) for method in methods})
        for key, value in self._derive(drawn).items():
            if key[1] in self._of_means:
                averaged[key] = value
                values[key[0]][key[1]] = float(of_means[key][0])
        means = []
        for method, group in same.items():
            intervals = {
                name: interval(drawn[method] if name == "throughput" else averaged[method, name])
                for name in group[0].intervals
            }
            by_seed = tuple(np.mean([row.by_seed for row in group], axis=0).tolist()) if group[0].by_seed else ()
            means.append(Row(ALL, method, {}, values[method], intervals, by_seed=by_seed))
        return [*self._rows, *means]

    def _drawn(self, policies: int) -> NDArray[np.int64]:
        """Which of some policies every resample has, shape (resamples, policies)."""
        if policies == self._policies.shape[1]:
            return self._policies
        return self._rng.integers(policies, size=(self._resamples, policies))

    @staticmethod
    def _throughputs(
        many: Sequence[Decoded], prompts: NDArray[np.int64], policies: NDArray[np.int64] | None
    ) -> Samples:
        """Throughput in every resample, shape (resamples,): of one rule, or the mean over drawn policies."""
        rates = np.stack([rule.tokens[prompts].sum(1) / rule.seconds[prompts].sum(1) for rule in many], axis=1)
        return rates[:, 0] if policies is None else np.take_along_axis(rates, policies, axis=1).mean(1)


def gap_closed(simple: Samples, method: Samples, best: Samples) -> Samples:
    """Share of the way from a simple rule to the best that a method goes; 0 where there is none."""
    gap = best - simple
    return np.divide(method - simple, gap, out=np.zeros_like(gap), where=gap > 0)
