"""Sessions in worlds side by side: what is measured, when it ends, and how its outcome is judged."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from specgym.agents.evaluation.worlds.sessions import SERVED, Fixed, Integers, Outcome, Problem, Session, outcomes
from specgym.envs import setting_of

COUNTS = (0, 1, 2, 4)


class Scripted(Session):
    """Measures lengths 1, 2, 3 and so on, stops in every other world after two, recommends the newest."""

    def propose(self) -> Integers:
        self.stopped[::2] |= len(self.tried) == 2
        return np.full(len(self.stopped), 1 + len(self.tried))

    def recommend(self) -> Integers:
        return self.tried[-1] if self.tried else np.zeros(len(self.stopped), np.int64)


def test_what_knows_the_truth_gets_all_of_it(problem: Problem) -> None:
    oracle = partial(Fixed, settings=problem.speedups.argmax(1))
    for outcome in outcomes(problem, oracle, COUNTS).values():
        judged = outcome.judged(problem)
        assert judged["share"] == pytest.approx(1)
        assert judged["session_share"] == pytest.approx(1)
        for name in ("regret", "wrong_speculation", "missed_speculation", "measurements"):
            assert (judged[name] == 0).all()


def test_what_is_worst_is_judged_by_hand(problem: Problem) -> None:
    worst = int(setting_of(16, 0.0))
    recommended, measured = np.zeros(len(problem), np.int64), np.full((len(problem), 2), worst)
    taken = np.array([2, 1] * (len(problem) // 2))
    judged = Outcome(recommended, measured, taken).judged(problem)
    speed, best, tokens = problem.speedups[:, worst], problem.best, problem.tokens_measured
    assert judged["share"] == pytest.approx(1 / best)
    assert judged["regret"] == pytest.approx(taken * tokens * (1 / speed - 1 / best))
    seconds = taken * tokens / speed + SERVED
    assert judged["session_share"] == pytest.approx((taken * tokens + SERVED) / best / seconds)
    assert (judged["missed_speculation"] == (best > 1.03)).all()
    assert 0 < judged["missed_speculation"].mean() < 1
    assert not judged["wrong_speculation"].any()
    eager = Outcome(measured[:, 0], measured[:, :0], 0 * taken).judged(problem)
    assert (eager["wrong_speculation"] == (speed < 1)).all()
    assert (eager["harmful_speculation"] == (speed < 1 / 1.03)).all()
    assert not eager["missed_speculation"].any()


def test_a_session_recommends_on_the_way_and_ends_where_it_stops(problem: Problem) -> None:
    results = outcomes(problem, Scripted, COUNTS)
    assert [result.recommended[1] for result in results.values()] == [0, 1, 2, 4]
    assert [result.taken[1] for result in results.values()] == [0, 1, 2, 4]
    assert [result.taken[0] for result in results.values()] == [0, 1, 2, 2]
    assert results[4].measured[1].tolist() == [1, 2, 3, 4]


def test_a_measurement_is_the_same_whatever_else_was_measured(problem: Problem) -> None:
    settings = np.full(len(problem), 3)
    first = problem.measure(settings, 2)
    problem.measure(settings, 0)
    assert (first.speedup == problem.measure(settings, 2).speedup).all()
    assert (first.speedup != problem.measure(settings, 3).speedup).all()
    # Other settings are timed with the same noise: plain decoding, which always takes the same, shows it.
    plain = problem.measure(0 * settings, 2).speedup
    mixed = np.where(np.arange(len(problem)) < 20, 0, settings)
    assert (problem.measure(mixed, 2).speedup[:20] == plain[:20]).all()


def test_some_engines_do_not_tell_their_drafts_probabilities(problem: Problem) -> None:
    readings = problem.measure(np.full(len(problem), 3), 0)
    assert 0 < problem.reticent.mean() < 1
    assert ((readings.judged.sum(1) == 0) == problem.reticent).all()
    assert (readings.kept.sum(1) > 0).any()
    assert (readings.reached[:, 0] > 0).all()
