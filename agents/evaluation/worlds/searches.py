"""Searches that know no other world: bandit, Sobol points, Gaussian process, and TPE, also from a universal setting.

All know plain decoding, whose speedup is 1, without measuring it, and recommend it where nothing measured is faster.
Before anything is measured they recommend the setting that they start from: the engine's default, or the
universal one of those that speculate.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from specgym.decoding import Knob
from specgym.envs import LENGTHS, THRESHOLDS, length_of, setting_of, threshold_of

from ..replayed import Measurement
from ..unseen.search_baselines import Searcher, SearchSpace, searcher
from .methods import Universal
from .sessions import Floats, Integers, Method, Readings, Searchable, Session

ARM_LENGTHS: Final = (1, 2, 4, 8, 16)
ARM_THRESHOLDS: Final = (0.0, 0.3, 0.6)
EXPLORATION: Final = 0.1
"""Scale of UCB1's bonus, in speedups."""
KNOBS: Final = (
    Knob("draft_length", 0, float(LENGTHS[-1]), 5, integer=True, logarithmic=True),
    Knob("stop_threshold", 0.0, float(THRESHOLDS[-1]), 0.0),
)
_SCALES: Final = tuple((length, threshold) for length in (0.2, 0.4, 0.8) for threshold in (0.4, 1.0, 2.5))
"""Length scales of the process, in the whole range of doublings of 1 + length and in thresholds."""
_NOISE: Final = 0.02
"""Variance of a measured log speedup over that of the process."""
_COLD_POINTS: Final = 2


class Search(Session):
    """A search that recommends the best it has measured.

    Args:
        problem, budget: as for every session.
        universal: with the settings to start from; None for each engine's default.
    """

    def __init__(self, problem: Searchable, budget: int, universal: Universal | None = None) -> None:
        super().__init__(problem, budget)
        self.rows = np.arange(len(problem))
        self.warm = universal is not None
        self.start = problem.defaults if universal is None else universal.speculating[problem.kinds]
        self._rng = np.random.default_rng([*problem.seed, 2])

    def propose(self) -> Integers:
        """Return the universal setting first, if there is one, then what the search says."""
        return self.start if self.warm and not self.tried else self.searched()

    @abstractmethod
    def searched(self) -> Integers:
        """Return what the search measures next."""

    def recommend(self) -> Integers:
        """Return the best measured setting, or plain decoding if that is faster."""
        if not self.tried:
            return self.start
        speeds, tried = np.stack(self.speeds, 1), np.stack(self.tried, 1)
        best = speeds.argmax(1)
        return np.where(speeds[self.rows, best] > 1, tried[self.rows, best], 0)


class Sobol(Search):
    """Points of a Sobol sequence, shifted at random in every world."""

    def __init__(self, problem: Searchable, budget: int, universal: Universal | None = None) -> None:
        super().__init__(problem, budget, universal)
        points = torch.quasirandom.SobolEngine(2).draw(max(budget, 1), dtype=torch.float64).numpy()
        self._shares = (points + self._rng.random((len(problem), 1, 2))) % 1

    def searched(self) -> Integers:
        """Return the next point's setting."""
        length, threshold = self._shares[:, len(self.tried)].T
        # Every length has a part of the range as wide as it has in doublings of 1 + length.
        lengths = np.floor(2 ** (length * np.log2(len(LENGTHS) + 1)) - 1)
        return setting_of(lengths, np.where(self.facts.fixed, 0.0, threshold * THRESHOLDS[-1]))


class UCB(Search):
    """UCB1 (Auer, Cesa-Bianchi and Fischer, 2002) over a few lengths and thresholds, untried ones first.

    The arms are `ARM_LENGTHS` by `ARM_THRESHOLDS`, the universal setting if it starts from that, and for engines with
    fixed lengths those without a threshold.
    """

    def __init__(self, problem: Searchable, budget: int, universal: Universal | None = None) -> None:
        super().__init__(problem, budget, universal)
        grid = [int(setting_of(length, threshold)) for threshold in ARM_THRESHOLDS for length in ARM_LENGTHS]
        self._arms = np.broadcast_to(np.array(grid), (len(problem), len(grid)))
        if self.warm:
            self._arms = np.concatenate([self._arms, self.start[:, None]], 1)
        usable = ~self.facts.fixed[:, None] | (threshold_of(self._arms) == 0)
        # An untried arm comes before all others, in an order drawn for each world.
        self._first = np.where(usable, 1e6 + self._rng.random(self._arms.shape), -np.inf)

    def searched(self) -> Integers:
        """Return the arm with the highest bound."""
        if not self.tried:
            return self._arms[self.rows, self._first.argmax(1)]
        tried, speeds = np.stack(self.tried, 1), np.stack(self.speeds, 1)
        here = self._arms[:, :, None] == tried[:, None]
        count = here.sum(2)
        mean = (here * speeds[:, None]).sum(2) / np.maximum(count, 1)
        bound = mean + EXPLORATION * np.sqrt(2 * np.log(tried.shape[1]) / np.maximum(count, 1))
        return self._arms[self.rows, np.where(count > 0, bound, self._first).argmax(1)]


@cache
def _kernels() -> Floats:
    """Correlations of all settings by length scales (Matern 5/2), shape (scales, settings, settings)."""
    settings = np.arange(len(LENGTHS) * len(THRESHOLDS))
    lengths = np.log2(1 + length_of(settings)) / np.log2(len(LENGTHS))
    thresholds = threshold_of(settings)
    kernels = []
    for by_length, by_threshold in _SCALES:
        distance = np.hypot(
            (lengths[:, None] - lengths) / by_length, (thresholds[:, None] - thresholds) / by_threshold
        ) * np.sqrt(5)
        kernels.append((1 + distance + distance**2 / 3) * np.exp(-distance))
    return np.stack(kernels)


class GaussianProcess(Search):
    """A Gaussian process over log speedups, by expected improvement; its scales are refitted after each measurement.

    The scales are those of `_SCALES` that make the measurements likeliest, the variance follows in closed form; plain
    decoding is an exact observation. It begins with Sobol points, or with the universal setting.
    """

    def __init__(self, problem: Searchable, budget: int, universal: Universal | None = None) -> None:
        super().__init__(problem, budget, universal)
        self._points = Sobol(problem, budget)
        lengths = len(LENGTHS)
        settings = np.arange(lengths * len(THRESHOLDS))
        self._out = (length_of(settings) == 0) | (self.facts.fixed[:, None] & (settings >= lengths))

    def searched(self) -> Integers:
        """Return a Sobol point at first, then the setting with the highest expected improvement."""
        if len(self.tried) < _COLD_POINTS and not self.warm:
            self._points.tried = self.tried
            return np.maximum(self._points.searched(), 1)
        mean, deviation = self._posterior()
        best = np.maximum(np.log(np.stack(self.speeds, 1)).max(1), 0)[:, None]
        score = (mean - best) / deviation
        density, below = _normal(score)
        return np.where(self._out, -np.inf, deviation * (score * below + density)).argmax(1)

    def recommend(self) -> Integers:
        """Return the measured setting with the highest mean, which evens out noise, or plain decoding."""
        if not self.tried:
            return self.start
        mean, tried = self._posterior()[0], np.stack(self.tried, 1)
        means = mean[self.rows[:, None], tried]
        best = means.argmax(1)
        return np.where(means[self.rows, best] > 0, tried[self.rows, best], 0)

    def _posterior(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation of log speedups, each of shape (n, settings)."""
        tried = np.concatenate([np.zeros((len(self.rows), 1), np.int64), np.stack(self.tried, 1)], 1)
        seen = np.pad(np.log(np.stack(self.speeds, 1)), ((0, 0), (1, 0)))
        count = tried.shape[1]
        noise = np.diag([1e-6, *[_NOISE] * (count - 1)])
        likeliest = np.full(len(self.rows), -np.inf)
        mean, deviation = np.zeros((2, len(self.rows), self._out.shape[1]))
        for kernel in _kernels():
            lower = np.linalg.cholesky(kernel[tried[:, :, None], tried[:, None]] + noise)
            white = np.linalg.solve(lower, seen[..., None])[..., 0]
            # A speedup of a few tenths is expected, as much as two measurements would tell.
            variance = ((white**2).sum(1) + 2 * 0.3**2) / (count + 2)
            likelihood = -np.log(np.diagonal(lower, axis1=1, axis2=2)).sum(1) - (count + 2) / 2 * np.log(variance)
            better = likelihood > likeliest
            across = np.linalg.solve(lower[better], kernel[tried[better]])
            mean[better] = np.einsum("nc,ncs->ns", white[better], across)
            left = np.maximum(1 - (across**2).sum(1), 1e-9)
            deviation[better] = np.sqrt(variance[better, None] * left)
            likeliest[better] = likelihood[better]
        return mean, deviation


def _normal(values: Floats) -> tuple[Floats, Floats]:
    """Density and distribution function of the standard normal."""
    below: NDArray[np.float64] = torch.special.ndtr(torch.from_numpy(values)).numpy()
    return np.exp(-(values**2) / 2) / np.sqrt(2 * np.pi), below


class Optuna(Search):
    """A search of optuna, one for each world.

    Args:
        problem, budget, universal: as for every search.
        name: of the search, as `searcher` has it.
    """

    def __init__(self, problem: Searchable, budget: int, universal: Universal | None = None, name: str = "tpe") -> None:
        super().__init__(problem, budget, universal)
        seeds = np.random.SeedSequence([*problem.seed, 3]).generate_state(len(problem)).tolist()
        self._histories: list[list[Measurement]] = [[] for _ in seeds]
        self._proposed: list[dict[str, float]] = []
        self._searchers: list[Searcher] = []
        for row, seed in enumerate(seeds):
            knobs = KNOBS[: 1 if self.facts.fixed[row] else 2]
            ranges = {knob.name: (knob.low, knob.high) for knob in knobs}
            start = _knobs(self.start[row], knobs)
            self._searchers.append(searcher(name, SearchSpace(knobs, ranges, start, seed)))

    def searched(self) -> Integers:
        """Return what each world's search asks for."""
        self._proposed = [
            search.propose(history) for search, history in zip(self._searchers, self._histories, strict=True)
        ]
        lengths, thresholds = (np.array([knobs.get(knob.name, 0.0) for knobs in self._proposed]) for knob in KNOBS)
        return setting_of(lengths, thresholds)

    def add(self, settings: Integers, readings: Readings) -> None:
        """Tell every world's search what came of its setting."""
        asked_for = bool(self._proposed)  # the first settings may be others'
        super().add(settings, readings)
        for row, speed in enumerate(readings.speedup.tolist()):
            knobs = (
                self._proposed[row] if asked_for else _knobs(settings[row], KNOBS[: 1 if self.facts.fixed[row] else 2])
            )
            self._histories[row].append(Measurement(knobs, {}, speed))


def _knobs(setting: Any, knobs: Sequence[Knob]) -> dict[str, float]:
    values = (float(length_of(setting)), float(threshold_of(setting)))
    return {knob.name: value for knob, value in zip(knobs, values, strict=False)}


SLOW: Final = ("gp of optuna",)
"""Methods that take a second a world, and are compared only if they are asked for; `gp` is a process of our own."""
_SEARCHES: dict[str, Callable[..., Session]] = {"ucb": UCB, "sobol": Sobol, "gp": GaussianProcess, "tpe": Optuna}


def search_methods(universal: Universal) -> dict[str, Method]:
    """Return every search by name, as it is and from the universal setting of each kind of engine."""
    methods: dict[str, Method] = {SLOW[0]: partial(Optuna, name="gp")}
    for name, search in _SEARCHES.items():
        methods |= {name: search, f"{name} from universal": partial(search, universal=universal)}
    return methods
