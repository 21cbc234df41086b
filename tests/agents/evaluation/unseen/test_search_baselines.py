"""Baseline searches: all in the same box, deterministic, honest about what they have measured."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specgym.agents.evaluation.replayed import Measurement
from specgym.agents.evaluation.unseen.search_baselines import (
    METHODS,
    NEEDS_UNIVERSAL,
    MissingOptunaError,
    Searcher,
    SearchSpace,
    UnknownMethodError,
    best_measured,
    searcher,
    searchers,
    workload_seed,
)
from specgym.decoding import Knob

KNOBS = (Knob("fallback", 0.0, 1.0, 0.5), Knob("rollback", 1.0, 16, 1.0))
RANGES = {"fallback": (0.05, 0.95), "rollback": (1.0, 16.0)}
DEFAULT, UNIVERSAL = {"fallback": 0.5, "rollback": 1.0}, {"fallback": 0.7, "rollback": 5.0}
SPACE = SearchSpace(KNOBS, RANGES, DEFAULT, seed=3, universal=UNIVERSAL)
SEARCHES = [method for method in METHODS if method not in ("default", "universal")]


def measured(knobs: dict[str, float]) -> Measurement:
    """A smooth hill with its top at fallback 0.8 and rollback 4."""
    reward = 1 - ((knobs["fallback"] - 0.8) / 0.9) ** 2 - ((knobs["rollback"] - 4) / 15) ** 2
    return Measurement(dict(knobs), {}, reward)


def tuned(search: Searcher, measurements: int) -> list[Measurement]:
    history: list[Measurement] = []
    for _ in range(measurements):
        history.append(measured(search.propose(history)))
    return history


@pytest.mark.parametrize("method", METHODS)
def test_proposals_stay_in_the_box_with_a_whole_rollback_and_follow_from_the_seed(method: str) -> None:
    history = tuned(searcher(method, SPACE), 6)
    for measurement in history:
        assert 0.05 <= measurement.knobs["fallback"] <= 0.95
        assert measurement.knobs["rollback"] in range(1, 17)
    assert tuned(searcher(method, SPACE), 6) == history
    if method in SEARCHES:
        other = tuned(searcher(method, SearchSpace(KNOBS, RANGES, DEFAULT, 4, UNIVERSAL)), 6)
        assert [trial.knobs for trial in other] != [trial.knobs for trial in history]
        assert len({trial.knobs["fallback"] for trial in history}) > 3


@pytest.mark.parametrize("method", METHODS)
def test_before_any_measurement_the_start_is_recommended(method: str) -> None:
    search = searcher(method, SPACE)
    assert search.name == method
    assert search.recommend([]) == (UNIVERSAL if method in NEEDS_UNIVERSAL else DEFAULT)


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_recommends_the_best_that_it_has_measured(method: str) -> None:
    search = searcher(method, SPACE)
    history = tuned(search, 5)
    best = max(history, key=lambda measurement: measurement.reward)
    assert search.recommend(history) == best.knobs


@pytest.mark.parametrize("method", ["default", "universal"])
def test_a_fixed_setting_heeds_no_measurement(method: str) -> None:
    search = searcher(method, SPACE)
    history = [measured({"fallback": 0.8, "rollback": 4.0})]
    assert search.recommend(history) == search.recommend([])


def test_the_first_of_equally_good_settings_is_recommended() -> None:
    history = [Measurement({"fallback": place / 10}, {}, reward) for place, reward in enumerate((1.0, 2.0, 2.0))]
    assert best_measured(history, DEFAULT) == {"fallback": 0.1}


@pytest.mark.parametrize("method", ["tpe from universal", "gp from universal"])
def test_a_warm_start_measures_the_universal_setting_first(method: str) -> None:
    assert searcher(method, SPACE).propose([]) == UNIVERSAL


@pytest.mark.parametrize(("method", "measurements"), [("tpe", 20), ("cma-es", 20), ("gp", 8)])
def test_a_model_of_the_reward_leads_towards_its_top(method: str, measurements: int) -> None:
    early, late = [], []
    for seed in range(3):
        rewards = [
            trial.reward for trial in tuned(searcher(method, SearchSpace(KNOBS, RANGES, DEFAULT, seed)), measurements)
        ]
        early.append(np.mean(rewards[:3]))
        late.append(np.mean(rewards[-3:]))
    assert np.mean(late) > np.mean(early) + 0.02


def test_measurements_that_a_search_did_not_ask_for_inform_it_too() -> None:
    measured_elsewhere = [
        measured({"fallback": fallback, "rollback": rollback})
        for fallback in (0.2, 0.5, 0.9)
        for rollback in (1.0, 6.0, 12.0)
    ]
    # Its random measurements are over, so that it looks where the top must be.
    assert measured(searcher("gp", SPACE).propose(measured_elsewhere)).reward > 0.9
    assert measured(searcher("gp", SPACE).propose([])).reward < 0.9


def test_asking_twice_after_the_same_measurements_gives_the_same_proposal() -> None:
    search = searcher("tpe", SPACE)
    history = tuned(search, 6)
    assert search.propose(history) == search.propose(history)


def test_one_search_serves_one_history() -> None:
    search = searcher("tpe", SPACE)
    history = tuned(search, 3)
    search.propose(history)
    with pytest.raises(ValueError, match="a searcher for every history"):
        search.propose(history[:1])


def test_points_of_a_low_discrepancy_sequence_spread_better_than_random_ones() -> None:
    def widest_gap(method: str, seed: int) -> float:
        points = sorted(
            trial.knobs["fallback"] for trial in tuned(searcher(method, SearchSpace(KNOBS, RANGES, DEFAULT, seed)), 16)
        )
        return float(np.max(np.diff([0.05, *points, 0.95])))

    assert all(widest_gap("sobol", seed) < 0.125 for seed in range(5))
    assert np.mean([widest_gap("random", seed) for seed in range(5)]) > 0.125


def test_every_workload_and_seed_has_dice_of_its_own() -> None:
    problems: list[Any] = [
        SimpleNamespace(name=name, knobs=KNOBS, ranges=RANGES, default=DEFAULT) for name in ("a/b", "a/c")
    ]
    make = searchers(UNIVERSAL, ["random", "universal"])
    assert list(make) == ["random", "universal"]
    first = [str(make["random"](problem, seed).propose([])) for problem in problems for seed in (0, 1)]
    assert len(set(first)) == 4
    assert make["random"](problems[0], 0).name == "random"
    assert workload_seed("a/b", 0) == workload_seed("a/b", 0)


def test_an_unknown_method_and_a_missing_universal_setting_are_refused() -> None:
    with pytest.raises(UnknownMethodError, match=r"tpe, cma-es, gp"):
        searcher("grid", SPACE)
    with pytest.raises(UnknownMethodError, match="best single setting"):
        searcher("gp from universal", SearchSpace(KNOBS, RANGES, DEFAULT, 0))


@pytest.mark.parametrize("package", ["optuna", "cmaes", "scipy"])
def test_without_optuna_the_way_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingOptunaError, match=r"specgym\[tuning\]"):
        searcher("tpe", SPACE)
    assert searcher("sobol", SPACE).propose([])


WINDOW = Knob("window", 1, 16, 5, integer=True, logarithmic=True)
SHORT = Knob("heads", 0, 2, 1, integer=True)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("knobs", [(WINDOW,), (WINDOW, SHORT, Knob("share", 0.0, 1.0, 0.5))], ids=["one", "three"])
def test_any_knobs_are_searched_in_their_own_units(method: str, knobs: tuple[Knob, ...]) -> None:
    ranges = {knob.name: (float(knob.low), float(knob.high)) for knob in knobs}
    middle = {knob.name: float(knob.default) for knob in knobs}
    search = searcher(method, SearchSpace(knobs, ranges, middle, 0, middle))
    history: list[Any] = []
    for _ in range(6):
        setting = search.propose(history)
        assert list(setting) == list(ranges)
        for knob in knobs:
            assert knob.low <= setting[knob.name] <= knob.high
            assert not knob.integer or setting[knob.name].is_integer()
        history.append(Measurement(setting, {}, -abs(setting["window"] - 2)))
    assert len({trial.knobs["window"] for trial in history}) > 1


def test_small_values_of_a_logarithmic_knob_are_searched_as_often_as_large_ones() -> None:
    space = SearchSpace((WINDOW,), {"window": (1.0, 16.0)}, {"window": 5.0}, 0)
    search = searcher("sobol", space)
    history: list[Any] = []
    for _ in range(64):
        history.append(Measurement(search.propose(history), {}, 0.0))
    assert sum(trial.knobs["window"] <= 3 for trial in history) >= 20
