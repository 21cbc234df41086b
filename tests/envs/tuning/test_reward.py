import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgym.decoding import Knob
from specgym.envs.tuning.reward import (
    DIVERGENCE_BOUND,
    MULTIPLIER,
    RewardError,
    RewardSettings,
    closeness,
    range_bonus,
    reward_terms,
)

KNOBS = (Knob("fallback", 0, 1, 0.5, preferred=(0.4, 0.7)), Knob("rollback", 1, 16, 1, preferred=(0.3, 0.7)))
fractions = st.floats(0, 1)
positive = st.floats(0.01, 100)


def terms(settings: RewardSettings, **changes: Any) -> dict[str, float]:
    arguments: dict[str, Any] = {"speedup": 2.0, "acceptance_rate": 0.8, "divergence": 0.1, "knobs": KNOBS}
    arguments["values"] = {"fallback": 0.5, "rollback": 8.0}
    return reward_terms(settings, **(arguments | changes))


def test_each_term_is_its_quantity_times_its_weight() -> None:
    settings = RewardSettings(speed_weight=3, acceptance_weight=2, range_weight=5, divergence_weight=7)
    assert terms(settings) == pytest.approx({"speed": 6.0, "acceptance": 1.6, "range": 5.0, "divergence": -0.7})


def test_divergence_costs_nothing_by_default() -> None:
    assert math.copysign(1, terms(RewardSettings())["divergence"]) == 1  # not even a minus sign


@given(value=st.floats(-10, 10), low=fractions, width=fractions, falloff=positive)
def test_closeness_is_one_exactly_inside_the_range(value: float, low: float, width: float, falloff: float) -> None:
    result = closeness(value, low, low + width, falloff)
    assert 0 <= result <= 1
    if low <= value <= low + width:
        assert result == 1


@given(near=st.floats(0, 3), further=st.floats(0, 3), falloff=positive)
def test_closeness_falls_with_the_distance_alike_on_both_sides(near: float, further: float, falloff: float) -> None:
    above = closeness(1 + near, 0, 1, falloff)
    assert above == pytest.approx(closeness(-near, 0, 1, falloff), abs=1e-6)
    assert closeness(1 + near + further, 0, 1, falloff) <= above


@given(edge=st.floats(1e-6, 1e-4))
def test_closeness_has_no_kink_at_the_edge(edge: float) -> None:
    assert 1 - closeness(1 + edge, 0, 1, 0.1) <= (edge / 0.1) ** 2 * 1.001 + 1e-12


def test_one_falloff_outside_earns_exp_minus_one() -> None:
    assert closeness(0.8, 0.4, 0.7, 0.1) == pytest.approx(math.exp(-1))


@pytest.mark.parametrize(("rollback", "bonus"), [(16 * 0.3, 1.0), (16 * 0.7, 1.0), (16 * 0.8, (1 + math.exp(-1)) / 2)])
def test_ranges_are_fractions_of_a_knobs_upper_end(rollback: float, bonus: float) -> None:
    settings = RewardSettings(falloff=0.1)
    assert range_bonus(settings, KNOBS, {"fallback": 0.5, "rollback": rollback}) == pytest.approx(bonus)


def test_a_knob_without_a_range_does_not_dilute_the_bonus() -> None:
    knobs = (*KNOBS, Knob("draft_length", 1, 16, 5, True))
    values = {"fallback": 0.5, "rollback": 8.0, "draft_length": 16.0}
    assert range_bonus(RewardSettings(), knobs, values) == 1


def test_without_any_range_there_is_no_bonus() -> None:
    assert range_bonus(RewardSettings(ranges={}), KNOBS, {"fallback": 0.5, "rollback": 8.0}) == 0


@given(first=positive, second=positive)
def test_the_reward_grows_with_the_speedup(first: float, second: float) -> None:
    slow, fast = sorted((first, second))
    settings = RewardSettings()
    assert sum(terms(settings, speedup=slow).values()) <= sum(terms(settings, speedup=fast).values())


def test_ranges_may_come_as_lists_from_a_file() -> None:
    listed: Any = {"fallback": [0.2, 0.3]}
    assert RewardSettings(ranges=listed) == RewardSettings(ranges={"fallback": (0.2, 0.3)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speed_weight": math.nan}, "speed_weight must be a finite number of at least 0, got nan"),
        ({"divergence_weight": -1.0}, "divergence_weight must be"),
        ({"range_weight": "much"}, "range_weight must be a finite number"),
        ({"falloff": 0.0}, "falloff must be a finite number above 0, got 0.0; take a small one"),
        ({"max_divergence": 1.5}, "max_divergence must be a number from 0 to 1, got 1.5; None for no bound"),
        ({"max_divergence": math.nan}, "max_divergence must be a number from 0 to 1"),
        ({"max_divergence": True}, "max_divergence must be a number from 0 to 1"),
        ({"ranges": {"fallback": (0.7, 0.4)}}, "'fallback' must go from low to high"),
        ({"ranges": {"rollback": 3}}, "'rollback' must be a sequence of values, got 3"),
        ({"ranges": {"rollback": (0.1, math.inf)}}, "each of reward range 'rollback' must be a finite number, got inf"),
    ],
)
def test_senseless_settings_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        RewardSettings(**arguments)


def test_with_a_bound_every_term_counts_and_what_is_above_the_bound_costs_the_multiplier() -> None:
    settings = RewardSettings(
        speed_weight=3, acceptance_weight=2, range_weight=5, divergence_weight=2, max_divergence=0.1
    )
    earned = {"speed": 6.0, "acceptance": 1.6, "range": 5.0}
    at = terms(settings, divergence=0.1, multiplier=5.0)
    assert at == pytest.approx({**earned, "divergence": -0.2})
    above = terms(settings, divergence=0.4, multiplier=5.0)
    assert above == pytest.approx({**earned, "divergence": -0.8 - 1.5})
    usual = terms(settings, divergence=0.4)
    assert usual == pytest.approx({**earned, "divergence": -0.8 - 30 * 0.3})


def test_the_weights_are_too_small_to_outweigh_speed() -> None:
    usual = RewardSettings()
    assert (usual.speed_weight, usual.acceptance_weight, usual.range_weight) == (1, 0.1, 0.05)
    most = terms(usual, acceptance_rate=1.0)
    least = terms(usual, speedup=2.2, acceptance_rate=0.0, values={"fallback": 0.0, "rollback": 1.0})
    assert sum(least.values()) > sum(most.values())


STRAYING = {"knobs": {"fallback": 1.0, "rollback": 1.0}}


def excess(divergence: Any, bound: float) -> Any:
    return -MULTIPLIER * np.maximum(divergence - bound, 0)


@pytest.mark.parametrize("make", ["make_env", "make_single"])
def test_environments_keep_a_bound_unless_they_are_told_otherwise(make: str, request: pytest.FixtureRequest) -> None:
    seen = {}
    for name, reward in {
        "default": None,
        "weights alone": {"speed_weight": 2.0},
        "another": {"max_divergence": 0.1},
        "none": {"max_divergence": None},
        "settings": RewardSettings(),
    }.items():
        env = request.getfixturevalue(make)(reward=reward)
        env.reset(seed=0, options={"prompt": 0, **STRAYING})
        info = env.step(np.zeros(2, np.float32))[4]
        assert info["divergence"] > 0.1
        assert info["reward/acceptance"] == pytest.approx(0.1 * info["draft_acceptance_rate"])
        seen[name] = info["reward/divergence"], info["divergence"]
    for name, bound in {"default": DIVERGENCE_BOUND, "weights alone": DIVERGENCE_BOUND, "another": 0.1}.items():
        assert seen[name][0] == pytest.approx(excess(seen[name][1], bound))
    assert seen["none"][0] == seen["settings"][0] == 0


def test_environments_that_step_together_keep_the_same_bound(make_vector: Callable[..., Any]) -> None:
    for reward, bound in ((None, DIVERGENCE_BOUND), ({"max_divergence": 0.1}, 0.1), ({"max_divergence": None}, 1.0)):
        env = make_vector(reward=reward)
        env.reset(seed=0, options=STRAYING)
        infos = env.step(np.zeros((3, 2), np.float32))[4]
        assert (infos["divergence"] > 0.1).any()
        assert infos["reward/divergence"] == pytest.approx(excess(infos["divergence"], bound))


def test_below_the_bound_divergence_is_free() -> None:
    assert math.copysign(1, terms(RewardSettings(max_divergence=0.2), multiplier=9.0)["divergence"]) == 1


def test_without_a_bound_a_multiplier_does_nothing() -> None:
    assert terms(RewardSettings(), multiplier=9.0) == terms(RewardSettings())


@given(bound=st.floats(0.05, 0.95), steepness=st.floats(1, 6))
def test_the_best_setting_is_at_the_bound_even_where_speed_is_convex_in_divergence(
    bound: float, steepness: float
) -> None:
    divergence = np.sort(np.append(np.linspace(0, 1, 101), bound))
    speedup = np.exp(steepness * divergence)
    values = {"fallback": np.zeros(102), "rollback": np.ones(102)}
    settings = RewardSettings(max_divergence=bound)
    # As steep as the chord from the bound to the far end, and a little more.
    multiplier = 1.01 * (speedup[-1] - math.exp(steepness * bound)) / (1 - bound) + 0.01
    result = reward_terms(
        settings,
        speedup=speedup,
        acceptance_rate=np.zeros(102),
        divergence=divergence,
        knobs=KNOBS,
        values=values,
        multiplier=multiplier,
    )
    assert divergence[np.argmax(sum(result.values()))] == pytest.approx(bound, abs=0.011)


@given(
    speedups=st.lists(positive, min_size=1, max_size=5),
    acceptance=fractions,
    divergence=fractions,
    fallback=fractions,
    rollback=st.floats(1, 16),
    bound=st.none() | fractions,
)
def test_arrays_give_what_their_numbers_give(
    speedups: list[float],
    acceptance: float,
    divergence: float,
    fallback: float,
    rollback: float,
    bound: float | None,
) -> None:
    settings = RewardSettings(divergence_weight=3.0, max_divergence=bound)
    multipliers = np.arange(len(speedups), dtype=np.float64) + 0.5
    many = reward_terms(
        settings,
        speedup=np.array(speedups),
        acceptance_rate=np.full(len(speedups), acceptance),
        divergence=np.full(len(speedups), divergence),
        knobs=KNOBS,
        values={"fallback": np.full(len(speedups), fallback), "rollback": np.full(len(speedups), rollback)},
        multiplier=multipliers,
    )
    for place, speedup in enumerate(speedups):
        single = reward_terms(
            settings,
            speedup=speedup,
            acceptance_rate=acceptance,
            divergence=divergence,
            knobs=KNOBS,
            values={"fallback": fallback, "rollback": rollback},
            multiplier=float(multipliers[place]),
        )
        assert all(type(term) is float for term in single.values())
        assert {name: term[place] for name, term in many.items()} == pytest.approx(single)


def test_a_decoder_without_knobs_earns_no_bonus() -> None:
    assert range_bonus(RewardSettings(), (), {}) == 0


def test_without_ranges_arrays_earn_an_array_of_no_bonus() -> None:
    values = {"fallback": np.array([0.1, 0.5]), "rollback": np.array([1.0, 8.0])}
    assert range_bonus(RewardSettings(ranges={}), KNOBS, values).tolist() == [0, 0]
