"""Knobs as an agent sees them: how far actions move them, linear and logarithmic ones."""

from __future__ import annotations

import numpy as np
import pytest

from specgym.agents.export.knob_policy import KnobRange
from specgym.decoding import Knob, traits_of
from specgym.decoding.errors import KnobError
from specgym.envs.tuning.knob_space import KnobMoves

LINEAR = Knob("linear", 0.0, 10.0, 5.0)
LOGARITHMIC = Knob("logarithmic", 1, 16, 4, True, logarithmic=True)
FROM_ZERO = Knob("from_zero", 0, 16, 4, True, logarithmic=True)
ALL = (LINEAR, LOGARITHMIC, FROM_ZERO)


def test_linear_knobs_move_by_their_scale_wherever_they_are_and_logarithmic_ones_by_doublings() -> None:
    moves = KnobMoves(ALL, None, {"linear": 2.0, "logarithmic": 1.0, "from_zero": 1.0})
    low = moves.moved(np.array([1.0, 1.0, 0.0]), np.ones(3, np.float32))
    np.testing.assert_allclose(low, [3.0, 2.0, 1.0])
    high = moves.moved(np.array([7.0, 4.0, 7.0]), np.ones(3, np.float32))
    np.testing.assert_allclose(high, [9.0, 8.0, 15.0])
    np.testing.assert_allclose(moves.moved(high, -np.ones(3, np.float32)), [7.0, 4.0, 7.0])


def test_by_default_ten_full_actions_cross_a_range_and_no_action_leaves_it() -> None:
    moves = KnobMoves(ALL, None, None)
    state, up = np.array([0.0, 1.0, 0.0]), np.ones(3, np.float32)
    for _ in range(10):
        state = moves.moved(state, up)
    np.testing.assert_allclose(state, [10.0, 16.0, 16.0])
    for _ in range(30):
        state = moves.moved(state, up)
    assert (state <= [10.0, 16.0, 16.0]).all()
    for _ in range(30):
        state = moves.moved(state, -up)
    assert (state >= [0.0, 1.0, 0.0]).all()
    np.testing.assert_allclose(state, [0.0, 1.0, 0.0], atol=1e-12)


def test_a_scale_of_any_size_ends_at_the_range() -> None:
    moves = KnobMoves(ALL, None, dict.fromkeys((knob.name for knob in ALL), 1e6))
    np.testing.assert_allclose(moves.moved(np.array([5.0, 4.0, 4.0]), np.ones(3, np.float32)), [10.0, 16.0, 16.0])
    np.testing.assert_allclose(moves.moved(np.array([5.0, 4.0, 4.0]), -np.ones(3, np.float32)), [0.0, 1.0, 0.0])


def test_placed_knobs_lie_between_their_ends_logarithmic_ones_at_the_geometric_middle() -> None:
    moves = KnobMoves(ALL, None, None, "place")
    state = np.array([5.0, 4.0, 4.0])
    for action, expected in ((-1.0, [0.0, 1.0, 0.0]), (0.0, [5.0, 4.0, 17**0.5 - 1]), (1.0, [10.0, 16.0, 16.0])):
        np.testing.assert_allclose(moves.moved(state, np.full(3, action, np.float32)), expected, atol=1e-12)


def test_drawn_states_are_uniform_on_the_scale_that_actions_move_on() -> None:
    drawn = KnobMoves(ALL, None, None).drawn(np.random.default_rng(0), (20_000,))
    shares = np.stack([drawn[:, 0] / 10, np.log2(drawn[:, 1]) / 4, np.log2(1 + drawn[:, 2]) / np.log2(17)], 1)
    # The greatest gap of 20,000 uniform draws from their distribution is above 0.0137 once in a thousand (Kolmogorov).
    expected = (np.arange(20_000) + 0.5) / 20_000
    assert np.abs(np.sort(shares, 0) - expected[:, None]).max() < 0.0137


def test_many_states_move_as_each_alone() -> None:
    moves, random = KnobMoves(ALL, None, None), np.random.default_rng(1)
    states, actions = moves.drawn(random, (50,)), random.uniform(-1.5, 1.5, (50, 3)).astype(np.float32)
    alone = np.stack([moves.moved(state, action) for state, action in zip(states, actions, strict=True)])
    np.testing.assert_array_equal(moves.moved(states, actions), alone)


def test_moving_leaves_the_state_given_as_it_was() -> None:
    state = np.array([5.0, 4.0, 4.0])
    KnobMoves(ALL, None, None).moved(state, np.ones(3, np.float32))
    np.testing.assert_array_equal(state, [5.0, 4.0, 4.0])


@pytest.mark.parametrize(
    "knobs", [ALL, traits_of("lookahead").knobs_without_pair(), traits_of("threshold").knobs_without_pair()]
)
def test_an_exported_knob_moves_as_the_environments_does(knobs: tuple[Knob, ...]) -> None:
    """The exported policy is followed without an environment."""
    moves, random = KnobMoves(knobs, None, None), np.random.default_rng(2)
    exported = [
        KnobRange(
            knob.name, *moves.ranges[knob.name], knob.default, moves.scales[knob.name], knob.integer, knob.logarithmic
        )
        for knob in knobs
    ]
    for state in moves.drawn(random, (100,)):
        action = random.uniform(-1, 1, len(knobs)).astype(np.float32)
        one_by_one = [
            knob.moved(float(value), float(item)) for knob, value, item in zip(exported, state, action, strict=True)
        ]
        np.testing.assert_allclose(moves.moved(state, action), one_by_one, rtol=1e-12, atol=1e-12)


def test_window_and_guesses_of_lookahead_are_logarithmic() -> None:
    """One guess or none matters most; a linear scale gives that a seventeenth of the range."""
    moves = KnobMoves(traits_of("lookahead").knobs_without_pair(), None, None)
    drawn = moves.values(moves.drawn(np.random.default_rng(3), (4_000,)))
    assert (drawn["guesses"] <= 1).mean() > 0.25
    assert (drawn["window"] <= 2).mean() > 0.25


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_moves_nothing_is_refused_by_name(scale: float) -> None:
    with pytest.raises(KnobError, match="scales: from_zero"):
        KnobMoves(ALL, None, {"from_zero": scale})
