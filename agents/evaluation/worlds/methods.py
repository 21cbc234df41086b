"""Ways to set exact decoding: defaults, single settings, closed forms, a schedule, and what was learned."""

from __future__ import annotations

from functools import partial
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from specgym.envs import (
    LENGTHS,
    PROFILED,
    THRESHOLDS,
    Beliefs,
    Readings,
    length_of,
)

from .sessions import Fixed, Flags, Floats, Integers, Known, Method, Problem, Session

FIRST_LENGTH: Final = PROFILED[0]
"""Draft length that closed forms measure where they would not speculate."""
_SCHEDULE_START = 5.0


class Universal(NamedTuple):
    """Single settings with the highest mean share of the best over many worlds.

    Attributes:
        by_kind: of each kind of engine (`Problem.kinds`), shape (3,).
        single: of all engines; those that draft a fixed length leave its threshold out.
        speculating: of each kind, the best that speculates, for searches to start from: plain decoding is known.
    """

    by_kind: Integers
    single: int
    speculating: Integers

    @classmethod
    def of(cls, problem: Problem) -> Universal:
        """Find them in the worlds of a problem, by their true speedups; of a kind that is not there, in all of them."""
        shares = problem.speedups / problem.best[:, None]
        fixed, lengths = problem.kinds == 0, len(LENGTHS)
        shares[fixed, lengths:] = np.tile(shares[fixed, :lengths], len(THRESHOLDS) - 1)
        rows = [problem.kinds == kind for kind in range(3)]
        by_kind = np.stack([shares[here if here.any() else slice(None)].mean(0) for here in rows])
        by_kind[0, lengths:] = 0
        drafting = np.where(length_of(np.arange(shares.shape[1])) > 0, by_kind, 0)
        return cls(by_kind.argmax(1), int(shares.mean(0).argmax()), drafting.argmax(1))


def best_on_training_texts(problem: Problem) -> Integers:
    """Return the best settings on all texts that can be measured, as if costs were known exactly, shape (n,)."""
    worlds, pool = problem.worlds, problem.worlds.pool
    places, which = np.unique(worlds.acceptance, return_inverse=True)
    rounds = np.stack([pool.drafts[place].sum(1, dtype=np.float64) for place in places])
    seconds = np.einsum("nsk,nk->ns", rounds[which], worlds.costs)
    seconds[worlds.fixed, len(LENGTHS) :] = np.inf
    best: Integers = seconds.argmin(1)
    return best


class _Believing(Session):
    """A session that keeps beliefs."""

    def __init__(self, problem: Known, budget: int) -> None:
        super().__init__(problem, budget)
        self.beliefs = Beliefs(len(problem))
        self.beliefs.begin(np.arange(len(problem)), problem.facts, budget)

    def add(self, settings: Integers, readings: Readings) -> None:
        """Add to the beliefs of those worlds that have not stopped."""
        rows = np.flatnonzero(~self.stopped)
        self.beliefs.add(rows, settings[rows], Readings._make(values[rows] for values in readings))


class ClosedForm(_Believing):
    """The draft length with the highest expected speedup, by Leviathan et al. (arXiv 2211.17192), theorem 3.8.

    With drafts of g tokens it is (1 - a^(g + 1)) / ((1 - a) (g c + 1)). a is the share of the judged tokens that were
    kept so far, c the time of a drafted token over that of a plain one: a twelfth of what the timed rounds differ by.
    Each measurement takes the length that the formula says so far, the first one `FIRST_LENGTH` if that is not to
    speculate; later that ends the measuring.
    """

    def predicted(self) -> Floats:
        """Return the speedups by length, shape (n, K + 1)."""
        alpha, facts = self.beliefs.acceptance()[0], self.facts
        cost = np.maximum((facts.long_round - facts.short_round) / (PROFILED[1] - PROFILED[0]), 0)
        speedups: Floats = (alpha[:, None] ** LENGTHS).cumsum(1) / (1 + cost[:, None] * LENGTHS)
        return speedups

    def propose(self) -> Integers:
        """Return what the formula says, or `FIRST_LENGTH`; stop where measurements say not to speculate."""
        settings = self.recommend()
        plain = length_of(settings) == 0
        self.stopped |= plain & (self.beliefs.done > 0)
        return np.where(plain, FIRST_LENGTH, settings)

    def recommend(self) -> Integers:
        """Return the lengths with the highest expected speedups, without a threshold."""
        lengths: Integers = self.predicted().argmax(1)
        return lengths


class ClosedFormByPlace(ClosedForm):
    """The closed form with a rate for every place of a draft and the verification's cost: `Beliefs.predicted`."""

    def predicted(self) -> Floats:
        """Return the speedups by length, shape (n, K + 1)."""
        return self.beliefs.predicted()[:, 0]


class ClosedFormWithThresholds(ClosedForm):
    """The closed form by place that also says which threshold to set, from which learned policies move away."""

    def recommend(self) -> Integers:
        """Return the settings with the highest expected speedups."""
        return self.beliefs.settings(np.zeros((len(self.stopped), 2)))


class Schedule(_Believing):
    """The heuristic schedule of assisted generation in transformers.

    After a round whose drafted tokens were all kept the next drafts two more, otherwise one less, 1 at least. It began
    with 5 (transformers up to 4.45). Each measurement is taken with the length reached so far; its rounds then move
    the length on, by the mean of what they would: by the rates at which tokens were kept so far.
    """

    def __init__(self, problem: Known, budget: int) -> None:
        super().__init__(problem, budget)
        self._length = np.full(len(problem), _SCHEDULE_START)

    def propose(self) -> Integers:
        """Return the length reached, without a threshold."""
        return np.rint(self._length).astype(np.int64)

    recommend = propose

    def add(self, settings: Integers, readings: Readings) -> None:
        """Let the rounds that were measured move the length."""
        super().add(settings, readings)
        all_kept = np.pad(self.beliefs.acceptance()[1].cumprod(1), ((0, 0), (1, 0)), constant_values=1.0)
        rounds, rows = readings.drafts.sum(1), np.arange(len(settings))
        for number in range(int(rounds.max())):
            moved = self._length + 3 * all_kept[rows, self.propose()] - 1
            self._length = np.where(number < rounds, np.clip(moved, 1, LENGTHS[-1]), self._length)


class Tuner(Protocol):
    """A policy that was learned in worlds."""

    def actions(self, observations: NDArray[np.float32]) -> NDArray[np.floating]:
        """Return the actions, shape (n, 3), for observations of shape (n, entries)."""
        ...


class Learned(_Believing):
    """A learned policy, which measures and stops as in `WorldsVectorEnv`.

    Args:
        problem, budget: as for every session.
        policy: that was learned.
    """

    plans = True

    def __init__(self, problem: Known, budget: int, policy: Tuner) -> None:
        super().__init__(problem, budget)
        self._policy = policy
        self._kept: Integers = np.zeros(len(problem), np.int64)

    def propose(self) -> Integers:
        """Return the settings to measure; where the policy stops, the setting is what it recommends."""
        settings, over = self._acted()
        ending = over & ~self.stopped
        self._kept[ending] = settings[ending]
        self.stopped |= ending
        return settings

    def recommend(self) -> Integers:
        """Return what was recommended on stopping, elsewhere what the policy says now."""
        return np.where(self.stopped, self._kept, self._acted()[0])

    def _acted(self) -> tuple[Integers, Flags]:
        actions = np.asarray(self._policy.actions(self.beliefs.observations()))
        return self.beliefs.settings(actions), self.beliefs.over(actions)


def learned(policy: Tuner) -> Method:
    """Return the method that follows a policy."""
    return partial(Learned, policy=policy)


def simple_methods(universal: Universal) -> dict[str, Method]:
    """Return what measures nothing, the closed forms and the schedule, by name."""
    return {
        "default": lambda problem, budget: Fixed(problem, budget, problem.defaults),
        "not speculating": partial(Fixed, settings=0),
        "universal": lambda problem, budget: Fixed(problem, budget, universal.by_kind[problem.kinds]),
        "single setting": lambda problem, budget: Fixed(
            problem, budget, np.where(problem.worlds.fixed, length_of(np.array(universal.single)), universal.single)
        ),
        "closed form": ClosedForm,
        "closed form by place": ClosedFormByPlace,
        "closed form with thresholds": ClosedFormWithThresholds,
        "schedule": Schedule,
        "best on training texts": lambda problem, budget: Fixed(problem, budget, best_on_training_texts(problem)),
    }
