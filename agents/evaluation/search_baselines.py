"""What a sceptic would tune thresholds with: settings that need no measurement, and searches that start from nothing.

All search the same box: fallback as a real number, rollback as a whole one. All but the fixed settings recommend the
best that they have measured, the first of equals; before anything is measured, the setting that they would start from.
"""

from __future__ import annotations

import importlib
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from specgym.decoding import SpecgymError

from .measurements import Measurement
from .replayed import Problem

INTEGER = frozenset({"rollback"})
"""Knobs that are searched as whole numbers."""
NEEDS_UNIVERSAL = ("universal", "tpe from universal", "gp from universal")
METHODS = ("default", "universal", "random", "sobol", "tpe", "cma-es", "gp", "tpe from universal", "gp from universal")
TPE_RANDOM_MEASUREMENTS = 4
"""Optuna's default of 10 would make eight measurements a random search."""
GP_RANDOM_MEASUREMENTS = 3
_POINTS = 256

Knobs = dict[str, float]
SearcherFactory = Callable[[Problem, int], "Searcher"]
"""Makes a search for a problem and a seed."""


class MissingOptunaError(SpecgymError, ImportError):
    """A search needs optuna, which is not installed."""


class UnknownMethodError(SpecgymError, ValueError):
    """A search that does not exist, or one that starts from a universal setting where none is given."""


class Searcher(Protocol):
    """Tunes one workload; one searcher serves one history, which only grows."""

    name: str

    def propose(self, history: Sequence[Measurement]) -> Knobs:
        """The setting to measure next, after the measurements so far."""
        ...

    def recommend(self, history: Sequence[Measurement]) -> Knobs:
        """The setting to use, after the measurements so far; with an empty history, before any."""
        ...


@dataclass(frozen=True)
class Facts:
    """What a search may know of a workload before it measures.

    Attributes:
        ranges: (low, high) of every knob, by name.
        default: the decoder's default setting.
        seed: fixes every random choice of the search.
        universal: the best single setting over other workloads, if there is one.
    """

    ranges: Mapping[str, tuple[float, float]]
    default: Mapping[str, float]
    seed: int
    universal: Mapping[str, float] | None = None


@dataclass
class FixedSetting:
    """Recommends one setting whatever was measured.

    Attributes:
        name: of the method.
        setting: by knob.
    """

    name: str
    setting: Knobs

    def propose(self, history: Sequence[Measurement]) -> Knobs:
        """The setting."""
        return dict(self.setting)

    def recommend(self, history: Sequence[Measurement]) -> Knobs:
        """The setting."""
        return dict(self.setting)


@dataclass
class PointSearch:
    """Measures given points of the box one after another.

    Attributes:
        name: of the method.
        facts: of the workload.
        points: shares of the ranges, 0 to 1, shape (points, knobs).
    """

    name: str
    facts: Facts
    points: NDArray[np.float64]

    def propose(self, history: Sequence[Measurement]) -> Knobs:
        """The point that is next; raises ValueError when all have been measured."""
        if len(history) >= len(self.points):
            raise ValueError(f"{self.name}: all {len(self.points)} points have been measured")
        return _within(self.facts.ranges, self.points[len(history)])

    def recommend(self, history: Sequence[Measurement]) -> Knobs:
        """The best measured, or the default."""
        return best_measured(history, self.facts.default)


@dataclass
class OptunaSearch:
    """One of optuna's samplers, asked and told; it keeps its study in memory between the measurements.

    Attributes:
        name: of the method.
        facts: of the workload.
        sampler: makes the sampler from the optuna module.
        first: what to measure first, if not what the sampler says.
        start: what to recommend before anything is measured.

    Raises:
        MissingOptunaError: optuna is not installed.
    """

    name: str
    facts: Facts
    sampler: Callable[[Any, Facts], Any]
    first: Mapping[str, float] | None
    start: Mapping[str, float]
    _told: int = field(default=0, init=False)
    _asked: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._optuna = _import_optuna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=self._optuna.exceptions.ExperimentalWarning)
            sampler = self.sampler(self._optuna, self.facts)
        self._study = self._optuna.create_study(direction="maximize", sampler=sampler)
        if self.first is not None:
            self._study.enqueue_trial(_whole(self.first))
        kinds = self._optuna.distributions
        self._space = {
            name: kinds.IntDistribution(int(low), int(high)) if name in INTEGER else kinds.FloatDistribution(low, high)
            for name, (low, high) in self.facts.ranges.items()
        }

    def propose(self, history: Sequence[Measurement]) -> Knobs:
        """What the sampler asks for. Raises ValueError if the history is shorter than what it was told already."""
        if len(history) < self._told:
            raise ValueError(
                f"{self.name}: it was told {self._told} measurements and now gets {len(history)}; make a searcher for "
                "every history"
            )
        for measurement in history[self._told :]:
            self._tell(measurement)
        self._told = len(history)
        if self._asked is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", category=self._optuna.exceptions.ExperimentalWarning)
                self._asked = self._study.ask(self._space)
        return {name: float(value) for name, value in self._asked.params.items()}

    def recommend(self, history: Sequence[Measurement]) -> Knobs:
        """The best measured, or the start."""
        return best_measured(history, self.start)

    def _tell(self, measurement: Measurement) -> None:
        knobs = _whole(measurement.knobs)
        if self._asked is not None and self._asked.params == knobs:
            self._study.tell(self._asked, measurement.reward)
            self._asked = None
            return
        trial = self._optuna.trial.create_trial(params=knobs, distributions=self._space, value=measurement.reward)
        self._study.add_trial(trial)


def best_measured(history: Sequence[Measurement], otherwise: Mapping[str, float]) -> Knobs:
    """The setting with the highest measured reward, the first of equals.

    Args:
        history: measurements so far.
        otherwise: the answer where there are none.
    """
    if not history:
        return dict(otherwise)
    return dict(max(history, key=lambda measurement: measurement.reward).knobs)


def searcher(method: str, facts: Facts) -> Searcher:
    """A search for one workload.

    Args:
        method: one of `METHODS`.
        facts: of the workload.

    Raises:
        UnknownMethodError: there is no such method, or it starts from a universal setting and none is given.
        MissingOptunaError: it needs optuna, which is not installed.
    """
    if method not in METHODS:
        raise UnknownMethodError(f"no search {method!r}; there are: {', '.join(METHODS)}")
    universal = facts.universal or {}
    if method in NEEDS_UNIVERSAL and not universal:
        raise UnknownMethodError(
            f"{method!r} starts from the best single setting over other workloads, and none is given; give "
            "universal=universal_setting(problems), or leave the method out"
        )
    if method in ("default", "universal"):
        return FixedSetting(method, dict(facts.default if method == "default" else universal))
    if method == "random":
        points = np.random.default_rng(facts.seed).random((_POINTS, len(facts.ranges)))
        return PointSearch(method, facts, points)
    if method == "sobol":
        engine = torch.quasirandom.SobolEngine(len(facts.ranges), scramble=True, seed=facts.seed)
        return PointSearch(method, facts, engine.draw(_POINTS, dtype=torch.float64).numpy())
    kind, _, warm = method.partition(" from ")
    first = universal if warm else _centre(facts) if kind == "cma-es" else None
    return OptunaSearch(method, facts, _SAMPLERS[kind], first, universal if warm else facts.default)


def searchers(universal: Mapping[str, float] | None, methods: Sequence[str] = METHODS) -> dict[str, SearcherFactory]:
    """What makes a search for a problem and a seed, by method.

    Args:
        universal: the best single setting over other workloads, for the methods that need it.
        methods: of `METHODS`.
    """

    def factory(method: str) -> SearcherFactory:
        return lambda problem, seed: searcher(
            method, Facts(problem.ranges, problem.default, workload_seed(problem.name, seed), universal)
        )

    return {method: factory(method) for method in methods}


def workload_seed(workload: str, seed: int) -> int:
    """A search's seed on one workload.

    With the same dice on all workloads, the mean over many of them would be as chancy as over one.
    """
    return int(np.random.SeedSequence([seed, zlib.crc32(workload.encode())]).generate_state(1)[0])


def _tpe(optuna: Any, facts: Facts) -> Any:
    return optuna.samplers.TPESampler(n_startup_trials=TPE_RANDOM_MEASUREMENTS, multivariate=True, seed=facts.seed)


def _cma_es(optuna: Any, facts: Facts) -> Any:
    return optuna.samplers.CmaEsSampler(seed=facts.seed)  # its mean is the centre of the box


def _gp(optuna: Any, facts: Facts) -> Any:
    return optuna.samplers.GPSampler(n_startup_trials=GP_RANDOM_MEASUREMENTS, seed=facts.seed)


_SAMPLERS: dict[str, Callable[[Any, Facts], Any]] = {"tpe": _tpe, "cma-es": _cma_es, "gp": _gp}


def _import_optuna() -> Any:
    try:
        for needed in ("cmaes", "scipy"):  # optuna itself imports them late, for its CMA-ES and its Gaussian process
            importlib.import_module(needed)
        optuna: Any = importlib.import_module("optuna")
    except ImportError as error:
        raise MissingOptunaError(
            f'the searches tpe, cma-es and gp need optuna ({error}); pip install "specgym[tuning]"'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _centre(facts: Facts) -> dict[str, float | int]:
    return _whole({name: (low + high) / 2 for name, (low, high) in facts.ranges.items()})


def _within(ranges: Mapping[str, tuple[float, float]], shares: NDArray[np.float64]) -> Knobs:
    knobs = {}
    for (name, (low, high)), share in zip(ranges.items(), shares.tolist(), strict=True):
        # Every whole number has an equal part of the range.
        value = low + int(share * (high - low + 1)) if name in INTEGER else low + share * (high - low)
        knobs[name] = float(min(value, high))
    return knobs


def _whole(knobs: Mapping[str, float]) -> dict[str, float | int]:
    return {name: round(value) if name in INTEGER else float(value) for name, value in knobs.items()}
