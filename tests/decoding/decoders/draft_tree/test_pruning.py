"""Cuts of pruners, and their adaptation."""

from __future__ import annotations

import random

import pytest

from specgym.decoding.decoders.draft_tree.pruning import (
    HIGHEST,
    LOWEST,
    PRUNERS,
    AbsolutePruner,
    LevelPruner,
    RatioPruner,
    ThroughputPruner,
)


def test_an_absolute_threshold_is_the_same_on_every_level() -> None:
    pruner = AbsolutePruner()
    assert pruner.cuts([0.5, 0.1, 0.0999], 0.1) == [False, False, True]
    assert pruner.cuts([0.05, 0.01], 0.1) == [True, True]


def test_a_threshold_by_level_always_leaves_the_best() -> None:
    assert LevelPruner().cuts([0.05, 0.01, 0.004], 0.1) == [False, False, True]
    assert LevelPruner().cuts([], 0.1) == []


@pytest.mark.parametrize("kind", PRUNERS.values(), ids=PRUNERS.keys())
def test_with_a_threshold_of_0_nothing_is_cut(kind: type[AbsolutePruner]) -> None:
    pruner = kind()
    for _ in range(40):
        assert pruner.cuts([0.0, 1.0, 1e-9], 0.0) == [False] * 3
        pruner.observe(drafted=10, cut=0, tokens=1, seconds=1.0)


@pytest.mark.parametrize("goal", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("start", [0.001, 0.1, 0.8])
def test_the_share_that_is_cut_comes_near_the_goal(goal: float, start: float) -> None:
    pruner, rng, cut = RatioPruner(goal), random.Random(1), []
    for _ in range(400):
        scores = [rng.random() ** 2 for _ in range(16)]
        cut.append(sum(pruner.cuts(scores, start)))
        pruner.observe(drafted=16, cut=cut[-1], tokens=2, seconds=1.0)
    assert sum(cut[100:]) / (300 * 16) == pytest.approx(goal, abs=0.05)


def test_an_adapting_threshold_stays_within_bounds_and_comes_back() -> None:
    pruner = RatioPruner(0.5)
    for _ in range(200):  # nothing is ever hopeless
        pruner.observe(drafted=8, cut=sum(pruner.cuts([1.0] * 8, 0.1)), tokens=8, seconds=1.0)
    assert pruner.cuts([HIGHEST - 1e-6, HIGHEST + 1e-6], 0.1) == [True, False]
    for _ in range(200):  # all is
        pruner.observe(drafted=8, cut=8, tokens=1, seconds=1.0)
    assert pruner.cuts([LOWEST - 1e-6, LOWEST + 1e-6], 0.1) == [True, False]
    for _ in range(25):
        pruner.observe(drafted=8, cut=sum(pruner.cuts([0.3] * 4 + [0.2] * 4, 0.1)), tokens=2, seconds=1.0)
    assert 2 <= sum(pruner.cuts([0.3] * 4 + [0.2] * 4, 0.1)) <= 8


def test_a_goal_that_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 to 1, got 1\.5"):
        RatioPruner(1.5)


def test_a_candidate_is_worth_what_it_saves() -> None:
    pruner, rng = ThroughputPruner(), random.Random(0)
    assert pruner.cuts([0.05, 0.2], 0.1) == [True, False]  # by the knob, until enough is known
    for _ in range(50):
        drafted = rng.randint(2, 20)
        # A round takes 10 ms and 1 ms a candidate, and gives two tokens.
        pruner.observe(drafted=drafted, cut=0, tokens=2, seconds=0.010 + 0.001 * drafted)
    # About 21 candidates' time is two tokens: a candidate costs a tenth of a token.
    assert pruner.cuts([0.085, 0.11], 0.5) == [True, False]


@pytest.mark.parametrize("drafted", [lambda place: 8, lambda place: 8 - place % 3], ids=["no spread", "no slope"])
def test_where_the_cost_of_a_candidate_is_unknown_the_knob_holds(drafted: object) -> None:
    pruner = ThroughputPruner()
    for place in range(50):
        pruner.observe(drafted=drafted(place), cut=0, tokens=2, seconds=0.01)  # type: ignore[operator]
    assert pruner.cuts([0.29, 0.31], 0.3) == [True, False]
