"""Baseline searches for good settings: fixed, random, Sobol, TPE, CMA-ES, Gaussian process.

All search the same box, in whole units where a knob's range is wide. All but the fixed settings recommend the best that
they have measured, the first of equals; before anything is measured, the setting that they would start from.
"""

from __future__ import annotations

import importlib
import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from specgym.decoding import Knob, SpecgymError, doublings, from_doublings

from ..replayed import Measurement, TuningTask
from ..statistics import whole_units

NEEDS_UNIVERSAL = ("universal", "tpe from universal", "gp from universal")
METHODS = ("default", "universal", "random", "sobol", "tpe", "cma-es", "gp", "tpe from universal", "gp from universal")
TPE_RANDOM_MEASUREMENTS = 4
"""Optuna's default of 10 would make eight measurements a random search."""
GP_RANDOM_MEASUREMENTS = 3
_POINTS = 256

Knobs = dict[str, float]
SearcherFactory = Callable[[TuningTask, int], "Searcher"]
"""Makes a search for a task and a seed."""


class MissingOptunaError(SpecgymError, ImportError):
    """A search needs optuna, which is not installed."""


class UnknownMethodError(SpecgymError, ValueError):
    """A search that does not exist, or that starts from a universal setting where there is none."""


class Searcher(Protocol):
    """Tunes one workload; one searcher serves one history, which only grows."""

    name: str

    def propose(self, history: Sequence[Measurement]) -> Knobs:
        """The setting to measure next, after the measurements so far."""
        ...

    def recommend(self, history: Sequence[Measurement]) -> Knobs:
        """The setting to use, after the measurements so far; with an empty history, before any."""
        ...


class Axis:
    """A knob's range as searches see it: a share of it from 0 to 1, or a parameter of optuna.

    Args:
        knob: of the decoder.
        low: least value.
        high: greatest value.
    """

    def __init__(self, knob: Knob, low: float, high: float) -> None:
        self._low, self._high = low, high
        self._whole, self._logarithmic = whole_units(knob, low, high), knob.logarithmic

    def at(self, share: float) -> float:
        """The value at a share of the range; every whole number has an equal part of it."""
        end = self._high + 1 if self._whole else self._high
        if self._logarithmic:
            value = float(from_doublings(share * doublings(end, self._low), self._low))
        else:
            value = self._low + share * (end - self._low)
        return float(min(math.floor(value) if self._whole else value, self._high))

    @property
    def centre(self) -> float:
        """The value in the middle of the range."""
        if self._logarithmic:
            return self._rounded(float(from_doublings(doublings(self._high, self._low) / 2, self._low)))
        return self._rounded((self._low + self._high) / 2)

    def distribution(self, optuna: Any) -> Any:
        """The range as optuna takes it; of a logarithmic knob the distance from the low end, plus 1."""
        low, high = (self.parameter(end) for end in (self._low, self._high))
        kind = optuna.distributions.IntDistribution if self._whole else optuna.distributions.FloatDistribution
        return kind(low, high, log=self._logarithmic)

    def parameter(self, value: float) -> float:
        """A value as a parameter of optuna; an `int` where whole units are searched."""
        shifted = value - self._low + 1 if self._logarithmic else value
        return round(shifted) if self._whole else float(shifted)

    def value(self, parameter: float) -> float:
        """A parameter of optuna as a value."""
        return float(parameter + self._low - 1 if self._logarithmic else parameter)

    def _rounded(self, value: float) -> float:
        return float(round(value)) if self._whole else value


@dataclass(frozen=True)
class SearchSpace:
    """Facts about a workload that a search may know before it measures.

    Attributes:
        knobs: of the decoder.
        ranges: (low, high) of every knob, by name.
        default: the decoder's default setting.
        seed: fixes every random choice of the search.
        universal: the best single setting over other workloads, if there is one.
    """

    knobs: Sequence[Knob]
    ranges: Mapping[str, tuple[float, float]]
    default: Mapping[str, float]
    seed: int
    universal: Mapping[str, float] | None = None

    @property
    def axes(self) -> dict[str, Axis]:
        """The knobs' ranges, by name."""
        return {knob.name: Axis(knob, *self.ranges[knob.name]) for knob in self.knobs}


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

    recommend = propose


@dataclass
class PointSearch:
    """Measures points of the box one after another.

    Attributes:
        name: of the method.
        space: that is searched.
        points: shares of the ranges, 0 to 1, shape (points, knobs).
    """

    name: str
    space: SearchSpace
    points: NDArray[np.float64]

    def propose(self, history: Sequence[Measurement]) -> Knobs:
        """The point that is next; raises ValueError when all have been measured."""
        if len(history) >= len(self.points):
            raise ValueError(f"{self.name}: all {len(self.points)} points have been measured")
        shares = self.points[len(history)].tolist()
        return {name: axis.at(share) for (name, axis), share in zip(self.space.axes.items(), shares, strict=True)}

    def recommend(self, history: Sequence[Measurement]) -> Knobs:
        """The best measured, or the default."""
        return best_measured(history, self.space.default)


@dataclass
class OptunaSearch:
    """A sampler of optuna, which keeps its study in memory between the measurements.

    Attributes:
        name: of the method.
        space: that is searched.
        sampler: makes the sampler from the optuna module.
        first: what to measure first, if not what the sampler says.
        start: what to recommend before anything is measured.

    Raises:
        MissingOptunaError: optuna is not installed.
    """

    name: str
    space: SearchSpace
    sampler: Callable[[Any, SearchSpace], Any]
    first: Mapping[str, float] | None
    start: Mapping[str, float]
    _reported: int = field(default=0, init=False)
    _asked: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._optuna = _import_optuna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=self._optuna.exceptions.ExperimentalWarning)
            sampler = self.sampler(self._optuna, self.space)
        self._study = self._optuna.create_study(direction="maximize", sampler=sampler)
        self._axes = self.space.axes
        if self.first is not None:
            self._study.enqueue_trial(self._parameters(self.first))
        self._distributions = {name: axis.distribution(self._optuna) for name, axis in self._axes.items()}

    def propose(self, history: Sequence[Measurement]) -> Knobs:
        """Ask the sampler. Raises ValueError if the history is shorter than what was reported to it already."""
        if len(history) < self._reported:
            raise ValueError(
                f"{self.name}: it has seen {self._reported} measurements and now gets {len(history)}; make a searcher "
                "for every history"
            )
        for measurement in history[self._reported :]:
            self._report(measurement)
        self._reported = len(history)
        if self._asked is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", category=self._optuna.exceptions.ExperimentalWarning)
                self._asked = self._study.ask(self._distributions)
        return {name: self._axes[name].value(parameter) for name, parameter in self._asked.params.items()}

    def recommend(self, history: Sequence[Measurement]) -> Knobs:
        """The best measured, or the start."""
        return best_measured(history, self.start)

    def _report(self, measurement: Measurement) -> None:
        parameters = self._parameters(measurement.knobs)
        if self._asked is not None and self._asked.params == parameters:
            self._study.tell(self._asked, measurement.reward)
            self._asked = None
            return
        trial = self._optuna.trial.create_trial(
            params=parameters, distributions=self._distributions, value=measurement.reward
        )
        self._study.add_trial(trial)

    def _parameters(self, knobs: Mapping[str, float]) -> dict[str, float]:
        return {name: self._axes[name].parameter(value) for name, value in knobs.items()}


def best_measured(history: Sequence[Measurement], otherwise: Mapping[str, float]) -> Knobs:
    """The setting with the highest measured reward, the first of equals.

    Args:
        history: measurements so far.
        otherwise: the answer where there are none.
    """
    if not history:
        return dict(otherwise)
    return dict(max(history, key=lambda measurement: measurement.reward).knobs)


def searcher(method: str, space: SearchSpace) -> Searcher:
    """A search for one workload.

    Args:
        method: one of `METHODS`.
        space: that is searched.

    Raises:
        UnknownMethodError: there is no such method, or it starts from a universal setting and there is none.
        MissingOptunaError: it needs optuna, which is not installed.
    """
    if method not in METHODS:
        raise UnknownMethodError(f"no search {method!r}; there are: {', '.join(METHODS)}")
    universal = space.universal or {}
    if method in NEEDS_UNIVERSAL and not universal:
        raise UnknownMethodError(
            f"{method!r} starts from the best single setting over other workloads, and there is none; give "
            "universal=universal_setting(tasks), or leave the method out"
        )
    if method in ("default", "universal"):
        return FixedSetting(method, dict(space.default if method == "default" else universal))
    if method == "random":
        points = np.random.default_rng(space.seed).random((_POINTS, len(space.knobs)))
        return PointSearch(method, space, points)
    if method == "sobol":
        engine = torch.quasirandom.SobolEngine(len(space.knobs), scramble=True, seed=space.seed)
        return PointSearch(method, space, engine.draw(_POINTS, dtype=torch.float64).numpy())
    kind, _, warm = method.partition(" from ")
    centre = {name: axis.centre for name, axis in space.axes.items()} if kind == "cma-es" else None
    first = universal if warm else centre
    return OptunaSearch(method, space, _SAMPLERS[kind], first, universal if warm else space.default)


def searchers(universal: Mapping[str, float] | None, methods: Sequence[str] = METHODS) -> dict[str, SearcherFactory]:
    """Factories of searches, by method.

    Args:
        universal: the best single setting over other workloads, for the methods that need it.
        methods: of `METHODS`.
    """

    def factory(method: str) -> SearcherFactory:
        return lambda task, seed: searcher(
            method, SearchSpace(task.knobs, task.ranges, task.default, workload_seed(task.name, seed), universal)
        )

    return {method: factory(method) for method in methods}


def workload_seed(workload: str, seed: int) -> int:
    """A search's seed on one workload.

    With the same draws on all workloads, the mean over many of them would be as chancy as over one.
    """
    return int(np.random.SeedSequence([seed, zlib.crc32(workload.encode())]).generate_state(1)[0])


def _tpe(optuna: Any, space: SearchSpace) -> Any:
    return optuna.samplers.TPESampler(n_startup_trials=TPE_RANDOM_MEASUREMENTS, multivariate=True, seed=space.seed)


def _cma_es(optuna: Any, space: SearchSpace) -> Any:
    # Its mean is the centre of the box. A box of one dimension it leaves to a random search.
    return optuna.samplers.CmaEsSampler(seed=space.seed, warn_independent_sampling=False)


def _gp(optuna: Any, space: SearchSpace) -> Any:
    return optuna.samplers.GPSampler(n_startup_trials=GP_RANDOM_MEASUREMENTS, seed=space.seed)


_SAMPLERS: dict[str, Callable[[Any, SearchSpace], Any]] = {"tpe": _tpe, "cma-es": _cma_es, "gp": _gp}


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
