"""Judgement of learned policies in worlds that are kept apart, beside every method that needs no learning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import ArgumentError
from specgym.envs import AXES, PROMPTS, WorldSampler, held_out_sampler, training_sampler

from ..results import LEARNED, Row, machine
from ..statistics import FLIPS, holm, interval, resampled_means, resampled_members, sign_flip_test
from ..unseen.comparison import PairedTest
from .methods import Tuner, Universal, learned, simple_methods
from .searches import SLOW, search_methods
from .sessions import Floats, Integers, Judged, Method, Problem, judged
from .transfer import EVERY_KIND, REFERENCE, WorldsTransfer, result_table

MEASUREMENTS: Final = (0, 1, 2, 4, 8)
"""After how many measurements a recommendation is judged."""
WORLDS: Final = 120
"""Worlds of each kind and seed."""
TRAINING_WORLDS: Final = 4000
"""Worlds that the single settings are found in."""
ACCEPTANCE_WORLDS: Final = 120
RESAMPLES: Final = 1000
_PARTS = 20
FEWEST_WORKLOADS: Final = 12
"""Recorded workloads from which on tests are over them. Over fewer no test could be significant; then it is over the
deployments of each, and says nothing about other pairs."""
_WITH_INTERVALS = ("share", "within", "wrong_speculation", "session_share")


@dataclass(frozen=True)
class _Kind:
    """Results of one kind of held-out worlds, or of all kinds.

    Attributes:
        values: of every method, each of shape (seeds, worlds).
        workloads: the recorded workload that each world comes from, shape (seeds, worlds).
        deployments: of each world, likewise.
    """

    values: Judged
    workloads: NDArray[np.str_]
    deployments: Integers

    @classmethod
    def of(cls, problems: Sequence[Problem], results: Sequence[Judged]) -> _Kind:
        """Put together what methods came to in the problems of several seeds."""
        values = {
            key: {name: np.stack([columns[key][name] for columns in results]) for name in first}
            for key, first in results[0].items()
        }
        worlds = [problem.worlds for problem in problems]
        workloads = [
            np.array([source.name for source in drawn.pool.sources])[drawn.pool.source_of[drawn.acceptance]]
            for drawn in worlds
        ]
        return cls(values, np.stack(workloads), np.stack([drawn.deployment for drawn in worlds]))

    @classmethod
    def every(cls, kinds: Sequence[_Kind]) -> _Kind:
        """Put the worlds of all kinds together."""
        values = {
            key: {name: np.concatenate([kind.values[key][name] for kind in kinds], 1) for name in columns}
            for key, columns in kinds[0].values.items()
        }
        return cls(
            values,
            np.concatenate([kind.workloads for kind in kinds], 1),
            np.concatenate([kind.deployments for kind in kinds], 1),
        )

    @cached_property
    def units(self) -> list[str]:
        """Unit of a test that each world belongs to: its workload, or its deployment too where workloads are few."""
        workloads = self.workloads.ravel().tolist()
        if len(set(workloads)) >= FEWEST_WORKLOADS:
            return workloads
        return [f"{name} {place}" for name, place in zip(workloads, self.deployments.ravel().tolist(), strict=True)]

    @cached_property
    def weights(self) -> Floats:
        """Share of each world in every resample of a bootstrap over workloads and worlds, shape (resamples, worlds)."""
        workloads = self.workloads.ravel().tolist()
        rows = []
        for part in range(_PARTS):  # of all at once the places would take gigabytes
            places, there = resampled_members(workloads, draws=RESAMPLES // _PARTS, seed=part)
            rows += [
                np.bincount(drawn[counts], minlength=len(workloads)) / counts.sum()
                for drawn, counts in zip(places, there, strict=True)
            ]
        return np.stack(rows)

    def row(self, kind: str, method: str, count: int) -> Row:
        """Return a method's row, with bootstrap intervals."""
        columns = self.values[method, count]
        ends = {name: interval(self.weights @ columns[name].ravel()) for name in _WITH_INTERVALS}
        by_seed = tuple(columns["share"].mean(1).tolist())
        means = {name: float(values.mean()) for name, values in columns.items()}
        return Row(kind, method, values=means, intervals=ends, by_seed=by_seed)

    def differences(self, method: str, against: str, count: int) -> dict[str, float]:
        """Return the differences of two methods' shares by unit, so weighted that their mean is the worlds' mean."""
        difference = (self.values[method, count]["share"] - self.values[against, count]["share"]).ravel()
        by_unit = dict.fromkeys(self.units, 0.0)
        for unit, value in zip(self.units, (difference * len(by_unit) / len(difference)).tolist(), strict=True):
            by_unit[unit] += value
        return by_unit


def judge_worlds(
    policies: Mapping[int, Tuner],
    command: str,
    *,
    training: WorldSampler | None = None,
    samplers: Mapping[str, WorldSampler] | None = None,
    worlds: int = WORLDS,
    counts: Sequence[int] = MEASUREMENTS,
    methods: Sequence[str] | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> WorldsTransfer:
    """Let learned policies and everything else tune the same worlds, and judge what they recommend.

    Args:
        policies: by seed; each is judged in worlds of its own, which the other methods tune as well.
        command: that asked for it, for the record.
        training: draws the worlds in which the single settings are found; by default those to learn in.
        samplers: draw the held-out worlds, by kind; by default of every kind in `AXES`.
        worlds: of each kind and seed.
        counts: measurements after which to judge, ascending.
        methods: to compare with; by default all but `SLOW`.
        report: called with what is being done.

    Raises:
        ValueError: there is no policy, or no such method.
        MissingOptunaError: a method needs optuna, which is not installed.
    """
    if not policies:
        raise ArgumentError("worlds are judged with at least one policy; give policies by seed")
    report("Worlds to find single settings in")
    training = training or training_sampler(ACCEPTANCE_WORLDS)
    practised = Problem.drawn(training, TRAINING_WORLDS, (0, len(AXES)))
    universal = Universal.of(practised)
    every = simple_methods(universal) | search_methods(universal)
    chosen = tuple(name for name in every if name not in SLOW) if methods is None else tuple(methods)
    if unknown := [name for name in chosen if name not in every]:
        raise ArgumentError(f"no method {', '.join(unknown)}; there are: {', '.join(every)}")
    for name in chosen:
        every[name](practised.first(1), 0)  # one that is not installed should not show after all the others
    kinds = {}
    for place, kind in enumerate(AXES if samplers is None else samplers):
        report(f"Worlds of another {kind}")
        sampler = held_out_sampler(kind) if samplers is None else samplers[kind]  # type: ignore[arg-type]
        problems = [Problem.drawn(sampler, worlds, (seed, place)) for seed in policies]
        values = []
        for problem, (seed, policy) in zip(problems, policies.items(), strict=True):
            compared: dict[str, Method] = {LEARNED: learned(policy)} | {name: every[name] for name in chosen}
            values.append(judged(problem, compared, counts, partial(_report, report, kind, seed)))
        kinds[kind] = _Kind.of(problems, values)
    if len(kinds) > 1:
        kinds[EVERY_KIND] = _Kind.every(list(kinds.values()))
    report("Statistics")
    tables = {count: result_table(_rows(kinds, (LEARNED, *chosen), count), count, machine()) for count in counts}
    tests = {count: _tests(kinds, [name for name in chosen if name != REFERENCE], count) for count in counts}
    return WorldsTransfer(command, protocol(universal, policies, worlds), tables, tests)


def protocol(universal: Universal, policies: Mapping[int, Tuner], worlds: int) -> dict[str, object]:
    """Protocol of the judgement, for the record."""
    return {
        "worlds_of_each_kind_and_seed": worlds,
        "seeds": list(policies),
        "measured_on": f"{PROMPTS} training texts a measurement, the same for every method",
        "judged_on": "held-out texts, as a share of the best of all settings there",
        "universal_settings": {"fixed, stopping after, before": universal.by_kind.tolist(), "single": universal.single},
        "intervals": "95 %, bootstrap over recorded workloads and over the worlds of each",
        "tests": "sign flips over recorded workloads, or over the deployments of each where they are fewer than "
        f"{FEWEST_WORKLOADS}, each weighted by its worlds, {FLIPS} draws; Holm's correction over all tests after as "
        "many measurements",
    }


def _report(report: Callable[[str], None], kind: str, seed: int, method: str) -> None:
    report(f"Worlds of another {kind}, seed {seed}: {method}")


def _rows(kinds: Mapping[str, _Kind], methods: Sequence[str], count: int) -> list[Row]:
    return [results.row(kind, method, count) for kind, results in kinds.items() for method in methods]


def _tests(kinds: Mapping[str, _Kind], others: Sequence[str], count: int) -> dict[str, tuple[PairedTest, ...]]:
    """Tests of what was learned against every other method, corrected together."""
    cases = [(kind, other, kinds[kind].differences(LEARNED, other, count)) for kind in kinds for other in others]
    p_values = [sign_flip_test(list(differences.values())) for *_, differences in cases]
    tests: dict[str, list[PairedTest]] = {}
    for (kind, other, differences), p, adjusted in zip(cases, p_values, holm(p_values), strict=True):
        values = np.array(list(differences.values()))
        ends = interval(resampled_means(values, list(differences), draws=RESAMPLES))
        wins = float((values > 0).mean())
        test = PairedTest(count, LEARNED, other, float(values.mean()), *ends, p, adjusted, wins, len(values))
        tests.setdefault(kind, []).append(test)
    return {kind: tuple(results) for kind, results in tests.items()}
