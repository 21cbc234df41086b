"""Comparison of tuning methods on workloads they never saw: recommendations, their mean shares, paired tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from specgym.decoding import SpecgymError

from ..replayed import Measurement, TuningTask
from ..statistics import holm, interval, resampled_means, sign_flip_test
from .search_baselines import Knobs, SearcherFactory

MEASUREMENTS = (0, 1, 2, 4, 8)
"""After how many measurements a recommendation is judged."""
WITHIN = 0.97
"""A pair counts as served well from this share of its grid's best."""
LEARNED = "learned"
Kind = Literal["pair", "dataset", "family"]
_ATTRIBUTES: dict[Kind, str] = {"pair": "pair", "dataset": "prompts", "family": "family"}


class FoldError(SpecgymError, ValueError):
    """Nothing can be left out in the way asked for."""


@dataclass(frozen=True)
class Fold:
    """Some workloads to learn from, and others to be judged on.

    Attributes:
        kind: what the two have not in common: a pair, a dataset (the prompt set) or a family (the target).
        left_out: its name.
        train: names of the workloads to learn from.
        test: names of the workloads that were left out.
    """

    kind: Kind
    left_out: str
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """One recommendation, judged on held-out prompts.

    Attributes:
        workload: its name.
        pair: the pair's name.
        method: that recommends.
        seed: of the method, of the measured prompts and of the draws.
        measurements: made before.
        knobs: recommended, by name.
        reward: of the recommendation (`TuningTask.objective`).
        best: reward of the grid's best setting.
        fraction: of that best, as `Worth.fraction`.
        speedup: of the recommendation.
        divergence: of the recommendation.
        kept: whether a bound on the divergence is kept; true where there is none.
    """

    workload: str
    pair: str
    method: str
    seed: int
    measurements: int
    knobs: Knobs
    reward: float
    best: float
    fraction: float
    speedup: float
    divergence: float
    kept: bool


@dataclass(frozen=True)
class Summary:
    """One method after so many measurements.

    Attributes:
        method: its name.
        measurements: made before.
        fraction: mean over workloads and seeds.
        low: end of its 95 % interval, from a bootstrap over pairs, and over workloads within each.
        high: the other end.
        within: share of the pairs whose mean fraction is at least `WITHIN`.
    """

    method: str
    measurements: int
    fraction: float
    low: float
    high: float
    within: float


@dataclass(frozen=True)
class PairedTest:
    """One method against another, on the same workloads, prompts and seeds.

    Attributes:
        measurements: that both made before.
        method: the one.
        against: the other.
        difference: of the fractions, mean over the pairs; positive where the one is better.
        low: end of its 95 % interval, from a bootstrap over pairs.
        high: the other end.
        p: of a two-sided sign-flip test over pairs.
        p_adjusted: corrected by Holm for all tests made together.
        wins: share of the pairs on which the one is better.
        units: how many pairs there are.
    """

    measurements: int
    method: str
    against: str
    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float
    wins: float
    units: int


def kinds_to_leave_out(tasks: Sequence[TuningTask]) -> tuple[list[Kind], dict[Kind, str]]:
    """The kinds of which something can be left out, and, by each other kind, the name that all workloads share.

    Args:
        tasks: all workloads, at least one.

    Raises:
        FoldError: nothing can be left out.
    """
    names = {kind: {str(getattr(task, attribute)) for task in tasks} for kind, attribute in _ATTRIBUTES.items()}
    several = [kind for kind in _ATTRIBUTES if len(names[kind]) > 1]
    shared = {kind: next(iter(of_kind)) for kind, of_kind in names.items() if len(of_kind) == 1}
    if not several:
        raise FoldError(
            f"nothing can be left out, as all workloads are of one pair and one prompt set ({tasks[0].name}); learn on "
            "more of them with --workloads"
        )
    return several, shared


def folds(tasks: Sequence[TuningTask], kind: Kind) -> list[Fold]:
    """Every way to leave one out.

    Args:
        tasks: all workloads.
        kind: what is left out: `"pair"`, `"dataset"` (a prompt set) or `"family"` (a target).

    Raises:
        ValueError: an unknown kind.
        FoldError: all workloads have the same one, so that none is left to learn from.
    """
    if kind not in _ATTRIBUTES:
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    belongs = {task.name: str(getattr(task, _ATTRIBUTES[kind])) for task in tasks}
    names = list(dict.fromkeys(belongs.values()))
    if len(names) < 2:
        raise FoldError(
            f"leaving one {kind} out needs workloads of at least two, got {', '.join(names) or 'none'}; name the other "
            "kinds with --leave-out, or none for all that can be left out"
        )
    return [
        Fold(
            kind,
            left_out,
            tuple(name for name, value in belongs.items() if value != left_out),
            tuple(name for name, value in belongs.items() if value == left_out),
        )
        for left_out in names
    ]


def compare(
    tasks: Sequence[TuningTask],
    methods: Mapping[str, SearcherFactory],
    seeds: Sequence[int],
    measurements: Sequence[int] = MEASUREMENTS,
    report: Callable[[str], None] = lambda message: None,
) -> list[Result]:
    """Let every method tune every workload, and judge what it recommends.

    The n-th measurement of a seed decodes the same prompts with the same draws for every method.

    Args:
        tasks: workloads that no method has learned from.
        methods: by name.
        seeds: one search of each method a seed.
        measurements: after how many to judge, each at least 0.
        report: called with the name of each workload before it is tuned.
    """
    results = []
    for task in tasks:
        report(task.name)
        recommended = [
            (method, seed, count, knobs)
            for method, make in methods.items()
            for seed in seeds
            for count, knobs in recommendations(task, make, seed, measurements).items()
        ]
        results += _judged(task, recommended)
    return results


def recommendations(
    task: TuningTask, make: SearcherFactory, seed: int, measurements: Sequence[int] = MEASUREMENTS
) -> dict[int, Knobs]:
    """Recommendations of a search after each number of measurements; arguments as for `compare`."""
    search = make(task, seed)
    history: list[Measurement] = []
    recommended = {}
    for count in range(max(measurements) + 1):
        if count in measurements:
            recommended[count] = search.recommend(history)
        if count < max(measurements):
            history.append(task.measure(search.propose(history), count, seed))
    return recommended


def summary(results: Sequence[Result]) -> list[Summary]:
    """A row for each method and number of measurements, in the order of the results."""
    rows = []
    for method, count in dict.fromkeys((result.method, result.measurements) for result in results):
        means = _by_workload(results, method, count)
        pairs = [pair for pair, _ in means]
        low, high = interval(resampled_means(list(means.values()), pairs))
        served = [fraction >= WITHIN for fraction in _by_pair(means).values()]
        rows.append(Summary(method, count, float(np.mean(list(means.values()))), low, high, float(np.mean(served))))
    return rows


def paired_tests(results: Sequence[Result], method: str = LEARNED, measurements: int = 8) -> list[PairedTest]:
    """Test a method against every other one after so many measurements, and correct for the number of tests.

    Args:
        results: of all methods on the same workloads and seeds.
        method: the one.
        measurements: that all made before.

    Raises:
        ValueError: the method has no results there, or another one was judged on other workloads or seeds.
    """
    cases: dict[str, set[tuple[str, int]]] = {}
    for result in results:
        if result.measurements == measurements:
            cases.setdefault(result.method, set()).add((result.workload, result.seed))
    if method not in cases:
        raise ValueError(f"there are no results of {method!r} after {measurements} measurements to be tested")
    ours = _by_pair(_by_workload(results, method, measurements))
    others = [other for other in cases if other != method]
    differences = []
    for other in others:
        if cases[other] != cases[method]:
            raise ValueError(
                f"{method!r} and {other!r} were not judged on the same workloads and seeds; run both alike"
            )
        theirs = _by_pair(_by_workload(results, other, measurements))
        differences.append(np.array([ours[pair] - theirs[pair] for pair in ours]))
    p_values = [sign_flip_test(values) for values in differences]
    return [
        PairedTest(
            measurements,
            method,
            other,
            float(values.mean()),
            *interval(resampled_means(values, list(ours))),
            p,
            adjusted,
            float((values > 0).mean()),
            len(values),
        )
        for other, values, p, adjusted in zip(others, differences, p_values, holm(p_values), strict=True)
    ]


def _judged(task: TuningTask, recommended: Sequence[tuple[str, int, int, Knobs]]) -> list[Result]:
    """Results of one workload; a setting that comes again is judged once."""
    places: dict[tuple[tuple[str, float], ...], int] = {}
    rows = [places.setdefault(tuple(sorted(knobs.items())), len(places)) for *_, knobs in recommended]
    worth = task.worth([dict(setting) for setting in places])
    best = task.grid().best_reward
    return [
        Result(
            task.name,
            task.pair,
            method,
            seed,
            count,
            dict(knobs),
            float(worth.reward[row]),
            best,
            float(worth.fraction[row]),
            float(worth.values["speedup"][row]),
            float(worth.values["divergence"][row]),
            bool(worth.kept[row]),
        )
        for (method, seed, count, knobs), row in zip(recommended, rows, strict=True)
    ]


def _by_workload(results: Sequence[Result], method: str, measurements: int) -> dict[tuple[str, str], float]:
    """Mean fraction over the seeds, by pair and workload."""
    cases: dict[tuple[str, str], list[float]] = {}
    for result in results:
        if (result.method, result.measurements) == (method, measurements):
            cases.setdefault((result.pair, result.workload), []).append(result.fraction)
    return {case: float(np.mean(fractions)) for case, fractions in cases.items()}


def _by_pair(means: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Mean over the workloads of each pair."""
    pairs: dict[str, list[float]] = {}
    for (pair, _), fraction in means.items():
        pairs.setdefault(pair, []).append(fraction)
    return {pair: float(np.mean(fractions)) for pair, fractions in pairs.items()}
