"""Beliefs: what follows from measurements, what an observation holds, and what actions mean."""

from __future__ import annotations

import numpy as np
import pytest

from specgym.envs.worlds.acceptance import LENGTHS, LEVELS, LONGEST, THRESHOLDS, length_of, setting_of, threshold_of
from specgym.envs.worlds.beliefs import Beliefs, Facts, observation_bounds, observation_names
from specgym.envs.worlds.worlds import Readings, WorldSampler

ROW = np.array([0])


def facts(fixed: bool = False, before: bool = False, cost: float = 0.1) -> Facts:
    """Facts of one world, where a drafted token costs so many plain ones and verification nothing."""
    rounds = 1 + cost * np.array([[4.0], [16.0]])
    return Facts(np.array([fixed]), np.array([before]), np.zeros(1), ROW + 1, *rounds)


def geometric(rate: float, rounds: int = 100_000, level: int = 4) -> Readings:
    """A measurement with drafts of 16, each token of which is kept with the same chance, whatever came before."""
    reached = np.rint(rounds * rate ** np.arange(LONGEST)).astype(np.int64)
    kept = np.rint(rounds * rate ** np.arange(1, LONGEST + 1)).astype(np.int64)
    drafts = np.zeros((1, LONGEST + 1), np.int64)
    drafts[0, -1] = rounds
    judged, passed = np.zeros((2, 1, LEVELS), np.int64)
    judged[0, level], passed[0, level] = reached.sum(), kept.sum()
    return Readings(np.array([1.5]), drafts, kept[None], reached[None], judged, passed, np.array([2.0]))


def begun(measurements: int = 4, **kinds: float) -> Beliefs:
    beliefs = Beliefs(1)
    beliefs.begin(ROW, facts(**kinds), measurements)  # type: ignore[arg-type]
    return beliefs


@pytest.mark.parametrize("rate", [0.3, 0.7, 0.9])
def test_with_one_rate_for_all_places_the_closed_form_is_that_of_leviathan(rate: float) -> None:
    beliefs = begun(cost=0.05)
    beliefs.add(ROW, setting_of(np.array([16]), np.array([0.0])), geometric(rate))
    tokens = (1 - rate ** (LENGTHS + 1)) / (1 - rate)
    assert beliefs.predicted()[0, 0] == pytest.approx(tokens / (1 + 0.05 * LENGTHS), rel=1e-3)


def test_thresholds_are_predicted_from_the_levels() -> None:
    """Half of the tokens are sure and always kept, half are unsure and never: drafts should stop before those."""
    reading = geometric(0.5)
    total = int(reading.judged.sum())
    reading.judged[0, [0, 4]] = total // 2
    reading.passed[0, [0, 4]] = 0, total // 2
    for before in (False, True):
        beliefs = begun(before=before, cost=0.1)
        beliefs.add(ROW, setting_of(np.array([16]), np.array([0.0])), reading)
        speeds = beliefs.predicted()[0]
        level, length = divmod(int(speeds.argmax()), LONGEST + 1)
        assert 1 <= level <= 4
        assert length == LONGEST
        # Expected: sure tokens s with chance 1/2 each; before the unsure one, or after it, which is never kept.
        places = np.arange(LONGEST)
        kept = (0.5 ** (places + 1)).sum()
        # Before the unsure one: it is drafted and thrown away, in every round but those that are sure to the end.
        drafted = (0.5**places).sum() if not before else kept + 1 - 0.5**LONGEST
        assert speeds[level, LONGEST] == pytest.approx((1 + kept) / (1 + 0.1 * drafted), rel=2e-2)


def test_fixed_lengths_take_no_threshold() -> None:
    beliefs = begun(fixed=True)
    assert (beliefs.predicted()[0, 1:] == 0).all()
    settings = beliefs.settings(np.array([[0.3, 1.0, 0.0]]))
    assert threshold_of(settings).tolist() == [0.0]


def test_no_action_is_the_best_setting_predicted() -> None:
    beliefs = begun(cost=0.02)
    beliefs.add(ROW, setting_of(np.array([16]), np.array([0.0])), geometric(0.8))
    level, length = divmod(int(beliefs.predicted()[0].argmax()), LONGEST + 1)
    chosen = beliefs.settings(np.zeros((1, 3)))
    assert (length_of(chosen).item(), threshold_of(chosen).item()) == (length, level / LEVELS)


def test_actions_reach_every_length_and_threshold() -> None:
    beliefs = begun()
    lengths = {length_of(beliefs.settings(np.array([[a, 0, 0]]))).item() for a in np.linspace(-1, 1, 401)}
    start = length_of(beliefs.settings(np.zeros((1, 3)))).item()
    assert {0, start} <= lengths
    thresholds = {threshold_of(beliefs.settings(np.array([[0, a, 0]]))).item() for a in np.linspace(-1, 1, 401)}
    assert thresholds == set(THRESHOLDS.tolist())


def test_a_session_is_over_when_nothing_is_left_or_when_the_agent_stops_after_a_measurement() -> None:
    beliefs = begun(measurements=2)
    stop, go = np.array([[0.0, 0.0, 0.9]]), np.array([[0.0, 0.0, 0.1]])
    setting = setting_of(np.array([4]), np.array([0.0]))
    assert not beliefs.over(stop)[0]
    beliefs.add(ROW, setting, geometric(0.5))
    assert beliefs.over(stop)[0]
    assert not beliefs.over(go)[0]
    beliefs.add(ROW, setting, geometric(0.5))
    assert beliefs.over(go)[0]


def test_an_observation_shows_what_was_measured_by_name(sampler: WorldSampler) -> None:
    beliefs = begun(measurements=3)
    for length, speed in ((2, 1.2), (8, 2.0), (4, 0.5)):
        reading = geometric(0.5)._replace(speedup=np.array([speed]))
        beliefs.add(ROW, setting_of(np.array([length]), np.array([0.3])), reading)
    seen = dict(zip(observation_names(), beliefs.observations()[0].tolist(), strict=True))
    assert seen["last"] == 1
    assert seen["measured"] == pytest.approx(3 / 8)
    assert seen["best/log_speedup"] == pytest.approx(1 / 3)
    assert seen["best/length"] == pytest.approx(np.log2(9) / np.log2(17))
    assert [seen[f"before/{number}/log_speedup"] for number in (1, 2, 3)] == pytest.approx(
        [-1 / 3, 1 / 3, np.log2(1.2) / 3]
    )
    assert seen["before/4/length"] == 0
    assert seen["entropy"] == pytest.approx(0.25)
    assert seen["stops_after"] == 1
    assert seen["fixed_length"] == 0


def test_observations_stay_within_their_bounds_and_forget(sampler: WorldSampler) -> None:
    rng = np.random.default_rng(0)
    worlds = sampler.draw(300, rng)
    beliefs, every = Beliefs(300), np.arange(300)
    beliefs.begin(every, Facts.of(worlds, rng), 8)
    first = beliefs.observations()
    low, high = observation_bounds()
    for _ in range(8):
        settings = beliefs.settings(rng.uniform(-1, 1, (300, 3)))
        beliefs.add(every, settings, worlds.measure(every, settings, rng))
        seen = beliefs.observations()
        assert seen.shape == (300, len(observation_names()))
        assert np.isfinite(seen).all()
        assert ((seen >= low) & (seen <= high)).all()
    beliefs.begin(every, beliefs.facts, 8)
    assert np.array_equal(beliefs.observations(), first)
