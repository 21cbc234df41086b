"""Sessions of tuning in many worlds side by side: the problem, what a method does, and what came of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from specgym.envs import ENGINES, PROMPTS, RETICENT, Facts, Readings, Worlds, WorldSampler, length_of, setting_of

from ..unseen.comparison import WITHIN

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

DEFAULTS: Final = {
    # transformers 5: GenerationConfig of an assistant, 20 tokens, of which worlds have 16, and a threshold of 0.4.
    "transformers": (16, 0.4),
    # llama.cpp before --spec-type (b9093), as the worlds were judged; b11549 has 3 tokens and no threshold.
    "llama.cpp": (16, 0.75),
    # openvino.genai, continuous_batching/speculative_decoding: default_num_assistant_tokens.
    "openvino": (5, 0.0),
    # vLLM has no default; 5 is what its documentation's examples take as num_speculative_tokens.
    "vllm": (5, 0.0),
}
"""Draft length and stop threshold of each engine, if one sets nothing."""
_DEFAULT_SETTINGS = np.array([int(setting_of(*DEFAULTS[engine.name])) for engine in ENGINES])

Judged = dict[tuple[str, int], dict[str, Floats]]
"""Judgement by method and number of measurements, and by column (`Outcome.judged`)."""

SERVED = 10_000
"""Tokens that are served after measuring, where a whole session is judged."""
WORTHWHILE = 1.03
"""Speedup above which the slower choice, to speculate or not to, is a mistake that matters."""


@dataclass(frozen=True)
class Problem:
    """Worlds to tune, and what is known of them before anything is tried.

    Attributes:
        worlds: that are tuned.
        facts: what is known of them, with its noise.
        reticent: worlds whose engine does not tell its draft's probabilities, as in `WorldsVectorEnv`; shape (n,).
        seed: fixes the texts and the noise of measurements.
    """

    worlds: Worlds
    facts: Facts
    reticent: Flags
    seed: tuple[int, ...]

    @classmethod
    def drawn(cls, sampler: WorldSampler, count: int, seed: Sequence[int]) -> Problem:
        """Draw so many worlds, and learn what is known of them."""
        rng = np.random.default_rng([*seed, 0])
        worlds = sampler.draw(count, rng)
        return cls(worlds, Facts.of(worlds, rng), rng.random(count) < RETICENT, tuple(seed))

    def __len__(self) -> int:
        return len(self.worlds)

    def first(self, count: int) -> Problem:
        """Return the first so many worlds as a problem of their own."""
        rows = np.arange(count)
        facts = Facts._make(column[rows] for column in self.facts)
        return Problem(self.worlds.taken(rows), facts, self.reticent[rows], self.seed)

    @cached_property
    def speedups(self) -> Floats:
        """Speedups on held-out texts with every setting, shape (n, settings)."""
        return self.worlds.speedups().astype(np.float64)

    @cached_property
    def best(self) -> Floats:
        """The best of them in each world, shape (n,)."""
        best: Floats = self.speedups.max(1)
        return best

    @cached_property
    def kinds(self) -> Integers:
        """Kind of each world's engine: 0 drafts a fixed length, 1 stops after a token, 2 before it; shape (n,)."""
        return np.where(self.worlds.fixed, 0, np.where(self.worlds.before, 2, 1))

    @property
    def defaults(self) -> Integers:
        """Each engine's own setting, shape (n,)."""
        settings: Integers = _DEFAULT_SETTINGS[self.worlds.engine]
        return settings

    @cached_property
    def tokens_measured(self) -> Floats:
        """Tokens that a measurement decodes, in the mean over the texts that it may draw, shape (n,)."""
        pool, where = self.worlds.pool, self.worlds.acceptance
        tokens: Floats = PROMPTS * pool.tokens[where].sum(1) / pool.texts[where]
        return tokens

    def measure(self, settings: Integers, number: int) -> Readings:
        """Measure a setting in every world.

        Args:
            settings: shape (n,).
            number: of the measurement in each world's session; it has the same texts and noise whatever is measured.
        """
        rng = np.random.default_rng([*self.seed, 1, number])
        return self.worlds.measure(np.arange(len(self)), settings, rng).without_probabilities(self.reticent)


class Known(Protocol):
    """Worlds of which something is known before anything is tried, real ones or those of a `Problem`."""

    @property
    def facts(self) -> Facts:
        """Facts of n worlds."""
        ...

    def __len__(self) -> int:
        """Return n."""
        ...


class Searchable(Known, Protocol):
    """Worlds that a search can begin in.

    Attributes:
        seed: fixes what is drawn.
    """

    @property
    def seed(self) -> tuple[int, ...]: ...

    @property
    def defaults(self) -> Integers:
        """Settings to begin with where no better is known, shape (n,)."""
        ...

    @property
    def kinds(self) -> Integers:
        """Kind of each world's engine, as `Problem.kinds` has it, shape (n,)."""
        ...


class Session(ABC):
    """Tunes all worlds of a problem at once.

    Args:
        problem: whose worlds are tuned.
        budget: measurements that may be taken in each world.

    Attributes:
        stopped: worlds in which no further measurement is taken, shape (n,).
        tried: settings measured so far, each of shape (n,).
        speeds: the measured speedups, likewise.
    """

    plans: ClassVar = False
    """True if proposals depend on the budget, so that every budget needs a session of its own."""

    def __init__(self, problem: Known, budget: int) -> None:
        self.facts, self.budget = problem.facts, budget
        self.stopped = np.zeros(len(problem), np.bool_)
        self.tried: list[Integers] = []
        self.speeds: list[Floats] = []

    @abstractmethod
    def propose(self) -> Integers:
        """Return the settings to measure next, shape (n,); may stop in some worlds."""

    @abstractmethod
    def recommend(self) -> Integers:
        """Return the settings to use after the measurements so far, shape (n,)."""

    def add(self, settings: Integers, readings: Readings) -> None:
        """Take the readings of all worlds, which count in those only that have not stopped."""
        self.tried.append(settings)
        self.speeds.append(readings.speedup)


Method = Callable[[Problem, int], Session]
"""Begins a session for a problem and a budget."""


@dataclass(frozen=True)
class Outcome:
    """Recommendations of a method after so many measurements at most, and what they cost.

    Attributes:
        recommended: settings, shape (n,).
        measured: settings, shape (n, measurements).
        taken: measurements taken in each world, shape (n,); those beyond them in `measured` were not.
    """

    recommended: Integers
    measured: Integers
    taken: Integers

    def judged(self, problem: Problem) -> dict[str, Floats]:
        """Judge it by the speedups on held-out texts.

        Returns:
            Each of shape (n,): `share` of the best speedup in hindsight, `within` (1 where it is at least `WITHIN`),
            `speedup`, `regret` (tokens of plain decoding
            that would have taken the time lost while measuring, beside measuring with the best setting),
            `session_share` (time of the best setting over the time taken, for the measured texts and another `SERVED`
            tokens), `wrong_speculation` (1 where speculating is recommended and plain decoding is faster),
            `harmful_speculation` (1 where it is more than `WORTHWHILE` times as fast), `missed_speculation` (1 where
            plain decoding is recommended and the best setting is more than that), and `measurements` taken.
        """
        rows = np.arange(len(problem))
        speedup, best = problem.speedups[rows, self.recommended], problem.best
        counted = np.arange(self.measured.shape[1]) < self.taken[:, None]
        spent = problem.tokens_measured * (counted / problem.speedups[rows[:, None], self.measured]).sum(1)
        tokens = problem.tokens_measured * self.taken
        speculates = length_of(self.recommended) > 0
        return {
            "share": speedup / best,
            "within": (speedup >= WITHIN * best).astype(np.float64),
            "speedup": speedup,
            "regret": spent - tokens / best,
            "session_share": (tokens + SERVED) / best / (spent + SERVED / speedup),
            "wrong_speculation": (speculates & (speedup < 1)).astype(np.float64),
            "harmful_speculation": (speculates & (speedup < 1 / WORTHWHILE)).astype(np.float64),
            "missed_speculation": (~speculates & (best > WORTHWHILE)).astype(np.float64),
            "measurements": self.taken.astype(np.float64),
        }


def outcomes(problem: Problem, method: Method, counts: Sequence[int]) -> dict[int, Outcome]:
    """Tune all worlds of a problem with a method.

    Args:
        problem: whose worlds are tuned.
        method: that tunes them.
        counts: numbers of measurements after which to recommend, ascending.

    Returns:
        What it came to, by count.
    """
    session = method(problem, counts[-1])
    if not session.plans:
        return _outcomes(problem, session, counts)
    results: dict[int, Outcome] = {}
    for count in counts:
        results |= _outcomes(problem, method(problem, count), [count])
    return results


def _outcomes(problem: Problem, session: Session, counts: Sequence[int]) -> dict[int, Outcome]:
    results: dict[int, Outcome] = {}
    measured: list[Integers] = []
    taken = np.zeros(len(problem), np.int64)
    for number in range(counts[-1] + 1):
        if number in counts:
            shown = np.stack(measured, 1) if measured else np.zeros((len(problem), 0), np.int64)
            results[number] = Outcome(session.recommend(), shown, taken.copy())
        if number < counts[-1]:
            settings = session.propose()
            measured.append(settings)
            taken += ~session.stopped
            if not session.stopped.all():
                session.add(settings, problem.measure(settings, number))
    return results


class Fixed(Session):
    """Settings that are used without measuring.

    Args:
        problem, budget: as for every session.
        settings: of each world, or of all.
    """

    def __init__(self, problem: Problem, budget: int, settings: Integers | int) -> None:
        super().__init__(problem, budget)
        self.stopped[:] = True
        self._settings: Integers = np.broadcast_to(settings, len(problem))

    def propose(self) -> Integers:
        """Return the settings."""
        return self._settings

    recommend = propose


def judged(
    problem: Problem, methods: Mapping[str, Method], counts: Sequence[int], report: Callable[[str], None]
) -> Judged:
    """Let every method tune a problem, and judge what came of it.

    Args:
        problem: whose worlds are tuned.
        methods: by name.
        counts: numbers of measurements, ascending.
        report: called with the name of each method before it begins.

    """
    results: Judged = {}
    for name, method in methods.items():
        report(name)
        for count, outcome in outcomes(problem, method, counts).items():
            results[name, count] = outcome.judged(problem)
    return results
