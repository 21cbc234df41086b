"""A workload to tune by replay: what a measurement decodes, and what a setting is worth on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from specgym.agents.evaluation.replayed import TuningTask, TuningTaskError
from specgym.agents.evaluation.statistics import grid_axes, losses, settings_of, universal_setting
from specgym.decoding import Knob
from specgym.decoding.errors import KnobError
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs.recordings.trace import Trace
from specgym.envs.tuning.reward import RewardSettings

SPEED = RewardSettings(acceptance_weight=0, range_weight=0)
STRICT, LOOSE = {"fallback": 0.5, "rollback": 1.0}, {"fallback": 0.7, "rollback": 1.0}
K, TOKENS = 8, 33  # a round that keeps all and begins before the last token has at most 32 others before it


@pytest.fixture
def wrong_drafts(make_drafted_trace: Callable[..., Trace], cheap_drafts: LatencyProfile) -> Callable[..., TuningTask]:
    """Drafts that are never right, and lie at a distance of 0.6: thresholds from there on keep all of them.

    They have K tokens, unless `stop` says otherwise; where `chosen`, all are the target's own choice.
    """

    def make(
        reward: RewardSettings = SPEED, distance: float = 0.6, stop: str = "never", chosen: bool = False, **more: Any
    ) -> TuningTask:
        traces: dict[str, Any] = {}
        for split in ("train", "test"):
            trace = make_drafted_trace(np.zeros((4 * TOKENS, K)), 0.5, split=split)
            match = np.full_like(trace.match, chosen)
            traces[split] = replace(trace, distance=np.full_like(trace.distance, distance), match=match)
        return TuningTask(
            "tiny/prose",
            reward,
            max_new_tokens=TOKENS,
            options={"max_draft_length": K, "stop": stop},
            profile=cheap_drafts,
            **traces,
            **more,
        )

    return make


@pytest.fixture(scope="module")
def sampled() -> TuningTask:
    """A shipped workload whose replay throws dice."""
    return TuningTask("tiny/prose@1.0", RewardSettings())


def test_a_problem_says_what_is_known_of_its_workload(sampled: TuningTask) -> None:
    assert (sampled.name, sampled.pair, sampled.prompts) == ("tiny/prose@1.0", "tiny", "prose")
    assert (sampled.family, sampled.temperature) == ("tiny-10m", 1.0)
    assert 0 < sampled.cost_ratio < 1
    assert sampled.ranges == {"fallback": (0.0, 1.0), "rollback": (1.0, 16.0)}
    assert sampled.default == {"fallback": 0.3, "rollback": 1.0}


def test_measurements_go_through_all_training_prompts_before_any_comes_again(
    wrong_drafts: Callable[..., TuningTask],
) -> None:
    task = wrong_drafts(prompts_per_measurement=3)
    drawn = [prompt for number in range(4) for prompt in task.measured_prompts(number, seed=5)]
    assert [sorted(drawn[first : first + 4]) for first in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert drawn[:4] != drawn[4:8]
    others = [task.measured_prompts(0, seed) for seed in range(10)]
    assert len({tuple(prompts) for prompts in others}) > 1


def test_a_measurement_depends_on_its_number_and_seed_alone(sampled: TuningTask) -> None:
    first = sampled.measure(LOOSE, 0, 0)
    sampled.measure(STRICT, 1, 0)
    assert sampled.measure(LOOSE, 0, 0) == first
    assert sampled.measure(LOOSE, 1, 0).values != first.values
    assert sampled.measure(LOOSE, 0, 1).values != first.values
    assert first.values["tokens"] == 4 * 32


def test_speed_and_divergence_are_those_of_the_rounds(wrong_drafts: Callable[..., TuningTask]) -> None:
    task = wrong_drafts()
    worth = task.worth([STRICT, LOOSE])
    # All is kept: three rounds of 9 tokens, and one that drafts the 5 of the last 6 that it has room for.
    seconds = 3 * (8 * 0.002 + 0.010) + (5 * 0.002 + 0.010)
    assert worth.values["speedup"][1] == pytest.approx(TOKENS * 0.010 / seconds)
    assert worth.values["divergence"][1] == pytest.approx(0.6 * (3 * 8 + 5) / TOKENS, rel=1e-5)
    assert worth.values["divergence"][0] == 0
    assert worth.values["mean_acceptance_length"][0] == 1
    assert worth.reward == pytest.approx(worth.values["speedup"])
    measured = task.measure(LOOSE, 0, 0)
    assert measured.reward == pytest.approx(worth.reward[1])
    assert measured.values["divergence"] == pytest.approx(worth.values["divergence"][1])


def test_drafts_end_where_one_more_token_is_expected_to_cost_more_than_it_brings(
    wrong_drafts: Callable[..., TuningTask],
) -> None:
    task = wrong_drafts(stop="expected-gain")
    values = task.worth([STRICT, LOOSE]).values
    # Half sure drafts are expected to be kept with 0.75 and 0.85, which makes drafts of 3 and of 5 tokens. Strictly,
    # each brings the target's token alone; the last three have room for 2, 1 and no other.
    strict = 30 * (3 * 0.002 + 0.010) + sum(left * 0.002 + 0.010 for left in (2, 1, 0))
    loose = 5 * (5 * 0.002 + 0.010) + (2 * 0.002 + 0.010)
    assert values["speedup"] == pytest.approx([TOKENS * 0.010 / strict, TOKENS * 0.010 / loose])
    assert values["divergence"] == pytest.approx([0, 0.6 * (5 * 5 + 2) / TOKENS], rel=1e-5)


def test_what_greedy_decoding_would_have_chosen_anyway_is_no_divergence(
    wrong_drafts: Callable[..., TuningTask],
) -> None:
    ours, theirs = (wrong_drafts(chosen=chosen).worth([LOOSE]).values for chosen in (True, False))
    assert ours["divergence"] == 0 < theirs["divergence"]
    assert ours["speedup"] == pytest.approx(theirs["speedup"])


def test_the_grid_is_what_its_settings_are_worth(wrong_drafts: Callable[..., TuningTask]) -> None:
    task = wrong_drafts()
    grid = task.grid()
    assert grid.reward.shape == (19, K)
    assert grid.axes["fallback"] == pytest.approx(np.linspace(0.0, 1.0, 19))
    assert grid.axes["rollback"].tolist() == list(range(1, K + 1))
    worth = task.worth(settings_of(grid.axes))
    assert (worth.reward == grid.reward.ravel()).all()
    assert (worth.values["speedup"] == grid.values["speedup"].ravel()).all()
    assert grid.best["fallback"] >= 0.6
    assert grid.best_reward == grid.reward.max()
    assert task.grid() is grid
    assert worth.fraction.max() == 1
    assert worth.kept.all()


def test_what_a_setting_is_worth_does_not_depend_on_which_others_are_judged(sampled: TuningTask) -> None:
    together = sampled.worth([STRICT, LOOSE], passes=2)
    alone = sampled.worth([LOOSE], passes=2)
    assert together.reward[1] == alone.reward[0]
    assert together.values["divergence"][1] == alone.values["divergence"][0]


def test_without_draws_every_pass_and_every_setting_is_as_if_it_were_alone() -> None:
    task = TuningTask("tiny-3m-1l/prose", RewardSettings(), "speculative", max_new_tokens=16)
    settings = [{"draft_length": length, "stop_threshold": stop} for length in (2.0, 5.0) for stop in (0.0, 0.4)]
    together = task.sums(settings, passes=3)
    for number, setting in enumerate(settings):
        (prompts,) = task._backends["test"].prompts
        arrays = {name: np.full(len(prompts), value) for name, value in setting.items()}
        once = task._backends["test"].decode(prompts, np.zeros_like(prompts), arrays, np.random.default_rng(7))
        for ours, theirs in zip(together, once, strict=True):
            np.testing.assert_allclose(ours[number], 3 * theirs, rtol=1e-12)
    assert len(np.unique(together.rounds.sum(1))) == len(settings)


def test_with_a_bound_the_best_is_the_fastest_setting_that_keeps_it(wrong_drafts: Callable[..., TuningTask]) -> None:
    task = wrong_drafts(replace(SPEED, max_divergence=0.05))
    grid = task.grid()
    assert grid.best["fallback"] < 0.6
    assert grid.best_reward == grid.values["speedup"][grid.values["divergence"] <= 0.05].max()
    worth = task.worth([STRICT, LOOSE])
    assert worth.kept.tolist() == [True, False]
    assert worth.fraction.tolist() == [pytest.approx(1), 0]
    # The penalty is so steep that the faster setting is never the better one.
    excess = worth.values["divergence"][1] - 0.05
    assert worth.reward[1] == pytest.approx(worth.values["speedup"][1] - 1000 * excess)
    assert task.measure(LOOSE, 0, 0).reward < 0 < task.measure(STRICT, 0, 0).reward


def test_where_no_setting_keeps_the_bound_the_least_divergent_one_is_the_best(
    wrong_drafts: Callable[..., TuningTask],
) -> None:
    task = wrong_drafts(replace(SPEED, max_divergence=0.0), distance=0.01)
    task.ranges["fallback"] = (0.05, 1.0)  # all of which keep all drafts; at 0 the text is the target's own
    grid = task.grid()
    assert grid.values["divergence"].min() > 0
    assert grid.best_reward == pytest.approx(grid.values["speedup"].max())
    assert not task.worth([LOOSE]).kept.any()


def test_rewards_that_are_not_positive_are_refused(wrong_drafts: Callable[..., TuningTask]) -> None:
    task = wrong_drafts(replace(SPEED, divergence_weight=100.0))
    with pytest.raises(TuningTaskError, match="max_divergence"):
        task.grid()


@pytest.mark.parametrize(
    "knobs",
    [{"fallback": 0.5}, {**STRICT, "more": 1.0}, {**STRICT, "fallback": 1.01}, {**STRICT, "rollback": float("nan")}],
)
def test_a_setting_that_is_incomplete_or_out_of_range_is_refused(sampled: TuningTask, knobs: dict[str, float]) -> None:
    with pytest.raises(KnobError, match=r"tiny/prose@1\.0"):
        sampled.measure(knobs, 0, 0)
    with pytest.raises(KnobError):
        sampled.worth([knobs])


def test_the_universal_setting_has_the_best_mean_share_on_training_prompts(
    wrong_drafts: Callable[..., TuningTask],
) -> None:
    lenient = replace(SPEED, max_divergence=0.9)
    near, far = wrong_drafts(lenient), wrong_drafts(lenient, distance=0.8)
    assert 0.6 <= universal_setting([near])["fallback"] < 0.8  # the first of equals
    both = universal_setting([near, far])
    assert both["fallback"] >= 0.8
    lost = losses([near, far], LOOSE)
    assert lost == {"tiny/prose": pytest.approx(1 - far.worth([LOOSE]).fraction[0])}
    assert lost["tiny/prose"] > 0.5
    with pytest.raises(ValueError, match="at least one task"):
        universal_setting([])


SPEED_ALONE = RewardSettings(acceptance_weight=0, range_weight=0, ranges={})


def test_a_decoder_with_one_knob_has_a_grid_of_one_axis() -> None:
    task = TuningTask("tiny-3m-1l/prose", SPEED_ALONE, "speculative", options={"max_draft_length": 8, "stop": "never"})
    grid = task.grid()
    assert task.default == {"draft_length": 5.0}
    assert {name: axis.tolist() for name, axis in grid.axes.items()} == {"draft_length": list(range(9))}
    assert grid.reward.tolist() == grid.values["speedup"].tolist()
    assert grid.best["draft_length"] == grid.reward.argmax()
    assert not grid.values["divergence"].any()
    assert task.worth([grid.best]).fraction.tolist() == [1]
    measured = task.measure({"draft_length": 3.0}, 0, 0)
    assert measured.reward == measured.values["speedup"] > 0


def test_a_decoder_with_three_knobs_replays_from_its_outcomes() -> None:
    task = TuningTask("tiny-3m/code", SPEED_ALONE, "lookahead")
    assert list(task.ranges) == ["window", "ngram", "guesses"]
    grid = task.grid()
    assert grid.reward.shape == tuple(len(axis) for axis in grid.axes.values())
    assert task.worth([grid.best]).reward[0] == grid.best_reward == grid.reward.max()
    assert universal_setting([task]) == task.grid("train").best


def test_axes_are_thinned_until_the_grid_is_small_enough() -> None:
    knobs = (
        Knob("few", 0, 3, 1, integer=True),
        Knob("many", 1, 64, 1, integer=True, logarithmic=True),
        Knob("share", 0.0, 1.0, 0.5),
    )
    ranges = {knob.name: (knob.low, knob.high) for knob in knobs}
    whole = grid_axes(knobs, ranges, most=10_000)
    assert [len(axis) for axis in whole.values()] == [4, 64, 19]
    axes = grid_axes(knobs, ranges, most=100)
    assert np.prod([len(axis) for axis in axes.values()]) <= 100
    assert axes["few"].tolist() == [0, 1, 2, 3]
    assert axes["many"][0] == 1
    assert axes["many"][-1] == 64
    assert (np.diff(np.diff(axes["many"])) > 0).all()  # the larger, the further apart
    assert len(settings_of(axes)) == np.prod([len(axis) for axis in axes.values()])
