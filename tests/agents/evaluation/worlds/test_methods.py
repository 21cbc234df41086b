"""Methods that tune worlds: defaults, single settings, closed forms, the schedule, learned policies, and searches."""

from __future__ import annotations

import numpy as np
import pytest

from specgym.agents.evaluation.worlds.methods import (
    FIRST_LENGTH,
    ClosedForm,
    Learned,
    Schedule,
    Universal,
    learned,
    simple_methods,
)
from specgym.agents.evaluation.worlds.searches import SLOW, Sobol, search_methods
from specgym.agents.evaluation.worlds.sessions import Method, Problem, outcomes
from specgym.envs import ENGINES, length_of, setting_of, threshold_of
from tests.helpers.moving_policy import Moves

COUNTS = (0, 1, 2, 4, 8)
NAMES = (
    *("default", "not speculating", "universal", "single setting", "closed form", "closed form by place"),
    *(
        "closed form with thresholds",
        "schedule",
        "best on training texts",
        "ucb",
        "ucb from universal",
        "sobol",
        "sobol from universal",
        "gp",
    ),
    *("gp from universal", "tpe", "tpe from universal"),
)


@pytest.fixture(scope="module")
def methods(universal: Universal) -> dict[str, Method]:
    """All methods that need no learning."""
    return simple_methods(universal) | search_methods(universal)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_tunes_every_world_within_what_its_engine_can_be_set_to(
    name: str, methods: dict[str, Method], problem: Problem
) -> None:
    small = problem.first(8)
    if name.startswith("tpe"):
        pytest.importorskip("optuna")
    results, again = (outcomes(small, methods[name], COUNTS) for _ in range(2))
    for count, result in results.items():
        assert (result.recommended == again[count].recommended).all()
        assert (result.judged(small)["speedup"] > 0).all()  # which is 0 for what an engine cannot be set to
        assert (small.speedups[np.arange(8)[:, None], result.measured] > 0).all()
        assert (result.taken <= count).all()
    assert set(methods) == {*NAMES, *SLOW}


def test_defaults_are_those_of_the_engines(problem: Problem) -> None:
    settings = problem.defaults
    for place, (length, threshold) in enumerate([(16, 0.4), (16, 0.75), (5, 0), (5, 0)]):
        here = problem.worlds.engine == place
        assert set(length_of(settings[here])) == {length}, ENGINES[place].name
        assert threshold_of(settings[here]) == pytest.approx(threshold, abs=0.06)


def test_the_universal_setting_of_a_kind_is_the_best_single_one_of_its_worlds(problem: Problem) -> None:
    settings = Universal.of(problem)
    for kind, setting in enumerate(settings.by_kind.tolist()):
        shares = (problem.speedups / problem.best[:, None])[problem.kinds == kind].mean(0)
        assert shares[setting] == shares.max()
        shares[length_of(np.arange(len(shares))) == 0] = 0
        assert shares[settings.speculating[kind]] == shares.max()
    assert threshold_of(settings.by_kind[:1]) == 0


def test_what_perfect_measuring_finds_is_hardly_worse_than_hindsight(
    methods: dict[str, Method], problem: Problem
) -> None:
    shares = {
        name: outcomes(problem, methods[name], (0,))[0].judged(problem)["share"].mean()
        for name in ("best on training texts", "universal", "single setting", "default", "not speculating")
    }
    assert shares["best on training texts"] > 0.97
    assert shares["best on training texts"] > shares["universal"] >= shares["single setting"] - 0.02
    assert shares["universal"] > max(shares["default"], shares["not speculating"])


def test_the_closed_form_is_that_of_the_paper(problem: Problem) -> None:
    session = ClosedForm(problem, 1)
    assert (np.isin(session.propose(), [FIRST_LENGTH, *session.recommend()])).all()
    session.add(session.propose(), problem.measure(session.propose(), 0))
    alpha = session.beliefs.acceptance()[0]
    facts = problem.facts
    cost = np.maximum((facts.long_round - facts.short_round) / 12, 0)
    for length in (0, 1, 7):
        expected = (1 - alpha ** (length + 1)) / ((1 - alpha) * (length * cost + 1))
        assert session.predicted()[:, length] == pytest.approx(expected)
    assert (session.predicted()[:, 0] == 1).all()


def test_the_closed_form_ends_measuring_where_it_would_not_speculate(problem: Problem) -> None:
    result = outcomes(problem, ClosedForm, (8,))[8]
    ended = result.taken < 8
    assert 0 < ended.mean() < 1
    assert (result.recommended[ended] == 0).all()


def test_a_schedule_lengthens_drafts_that_are_kept_and_shortens_others(problem: Problem) -> None:
    session = Schedule(problem, 1)
    settings = session.propose()
    assert (settings == 5).all()
    readings = problem.measure(settings, 0)
    none, every = np.zeros_like(readings.kept), readings.reached
    session.add(settings, readings._replace(kept=none))
    assert (session.recommend() <= 2).all()
    session = Schedule(problem, 1)
    session.add(settings, readings._replace(kept=every))
    assert (session.recommend() >= 10).all()


def test_a_policy_that_moves_nothing_follows_the_closed_form_with_thresholds(
    methods: dict[str, Method], problem: Problem
) -> None:
    still = outcomes(problem, learned(Moves(0, 0)), (0, 1))
    closed = outcomes(problem, methods["closed form with thresholds"], (0,))
    assert (still[0].recommended == closed[0].recommended).all()
    assert (still[1].measured[:, 0] == closed[0].recommended).all()
    assert (still[1].taken == 1).all()


def test_a_policy_that_stops_keeps_its_recommendation_and_measures_no_more(problem: Problem) -> None:
    results = outcomes(problem, learned(Moves(0.3, -1, stop_after=2)), COUNTS)
    assert [result.taken.max() for result in results.values()] == [0, 1, 2, 2, 2]
    assert (results[4].recommended == results[8].recommended).all()
    assert (results[4].measured[:, :3] == results[8].measured[:, :3]).all()
    # It recommends the setting of the very action that stopped it.
    assert (results[8].recommended == results[8].measured[:, 2]).all()


def test_a_policy_cannot_stop_before_it_has_measured_anything(problem: Problem) -> None:
    session = Learned(problem, 4, Moves(0, 0, stop_after=0))
    session.propose()
    assert not session.stopped.any()


def test_searches_recommend_plain_decoding_where_nothing_measured_is_faster(problem: Problem) -> None:
    session = Sobol(problem, 2)
    settings = np.full(len(problem), 4)
    readings = problem.measure(settings, 0)
    session.add(settings, readings._replace(speedup=np.full(len(problem), 0.99)))
    assert (session.recommend() == 0).all()
    session.add(settings + 1, readings._replace(speedup=np.full(len(problem), 1.01)))
    assert (session.recommend() == 5).all()


def test_more_measurements_serve_a_gaussian_process_better_than_chance(
    methods: dict[str, Method], problem: Problem
) -> None:
    results = outcomes(problem, methods["gp"], (1, 8))
    shares = {count: result.judged(problem)["share"].mean() for count, result in results.items()}
    assert shares[8] > shares[1] + 0.01
    assert shares[8] > 0.95


def test_warm_searches_measure_the_universal_setting_first(
    methods: dict[str, Method], problem: Problem, universal: Universal
) -> None:
    for name in ("ucb", "sobol", "gp"):
        result = outcomes(problem, methods[f"{name} from universal"], (0, 2))
        assert (result[0].recommended == universal.speculating[problem.kinds]).all()
        assert (result[2].measured[:, 0] == universal.speculating[problem.kinds]).all()
        assert (result[2].measured[:, 1] != result[2].measured[:, 0]).any()


def test_lengths_of_a_sobol_search_are_spread_over_doublings(problem: Problem) -> None:
    session = Sobol(problem, 64)
    lengths = []
    for _ in range(64):
        lengths.append(length_of(session.propose()))
        session.tried.append(np.zeros(len(problem), np.int64))
    counts = np.bincount(np.concatenate(lengths), minlength=17) / (64 * len(problem))
    assert counts == pytest.approx(np.diff(np.log2(np.arange(1, 19))) / np.log2(18), abs=0.01)
    assert int(setting_of(3, 0.0)) == 3
