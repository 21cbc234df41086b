"""Choosing on training prompts, judging on test prompts, and what is said about the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specgym.agents import ResultTable, Row, RunFolder
from specgym.agents.evaluation.control.stop_comparison import GAP, METHODS, RATIO, TABLE, compare, stop_verdict
from specgym.agents.evaluation.results import ALL
from specgym.agents.experiments.control.control_settings import ComparisonSettings, ControlLearning
from specgym.agents.experiments.control.stop_drafts import StopDrafts
from specgym.agents.experiments.control.stop_drafts_settings import StopSettings
from specgym.agents.export.stop_rule import ExportedStopRule
from specgym.agents.training.ppo import learn
from specgym.decoding.decoders.stop_rules import ConfidenceBelow, FixedLength, StopRule
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs.recordings.trace import Trace

SETTINGS = StopSettings(
    workloads=("tiny/prose",),
    seeds=(0,),
    max_draft_length=8,
    max_new_tokens=48,
    environments=64,
    total_timesteps=60_000,
    checkpoint_every=60_000,
    comparison=ComparisonSettings(passes=2, resamples=50),
    learning=ControlLearning(rollout_steps=32, batch_size=512, policy_layers=(16,), value_layers=(32,)),
)


def compared(learned: list[StopRule], profile: LatencyProfile, train: Trace, test: Trace) -> dict[str, Row]:
    rows = compare(SETTINGS, learned, [profile], [train], [test])
    return ResultTable(rows).by_workload()["tiny/prose"]


def learned_rule(settings: StopSettings, folder: Path, trace: Trace, profile: LatencyProfile) -> ExportedStopRule:
    """A rule learned from a trace that nobody recorded."""

    class FromTrace(StopDrafts):
        profiles = [profile]  # noqa: RUF012

        def traces(self, split: str) -> list[Trace]:
            return [trace]

    experiment = FromTrace(settings, RunFolder(folder))
    (learner,) = experiment.learners()
    model = learn(
        settings,
        learner.folder,
        learner.seed,
        lambda: experiment.environments(learner),
        experiment.policy,
        experiment.callbacks(learner),
        progress_bar=False,
    )
    experiment.export(model, learner.folder.path)
    return experiment.rules()[0]


def test_the_best_fixed_length_is_found_on_training_prompts_and_judged_on_test_prompts(
    make_drafted_trace: Callable[..., Trace], cheap_drafts: LatencyProfile
) -> None:
    poor = make_drafted_trace(np.zeros((96, 8)), 0.5, prompts=2)
    rich = make_drafted_trace(np.ones((96, 8)), 0.5, prompts=2, split="test")
    row = compared([FixedLength(8)], cheap_drafts, train=poor, test=rich)["fixed"]
    assert row.rule == "length 1"
    # 48 tokens of each text are 24 rounds of one drafted token, the last of them kept short by the text's end.
    assert row.values["throughput"] == pytest.approx(2 / 1.2, rel=0.02)
    assert row.values["draft_acceptance_rate"] == 1
    row = compared([FixedLength(8)], cheap_drafts, train=rich, test=poor)["fixed"]
    assert row.rule == "length 7"  # 6 rounds of 8 tokens; drafting 8 would not save one
    assert row.values["throughput"] == pytest.approx(1 / 2.4, rel=0.1)


def test_ratio_and_gap_are_of_the_learned_policy_over_the_best_fixed_length(
    telling_trace: Callable[..., Trace], cheap_drafts: LatencyProfile
) -> None:
    train, test = telling_trace(0), telling_trace(1, split="test")
    of = compared([ConfidenceBelow(0.5)], cheap_drafts, train, test)
    fixed, learned, oracle = (of[method].values["throughput"] for method in ("fixed", "learned", "oracle"))
    assert of["learned"].values[RATIO] == pytest.approx(learned / fixed)
    assert of["learned"].values[GAP] == pytest.approx((learned - fixed) / (oracle - fixed))
    assert of["learned"].values["throughput"] == of["confidence"].values["throughput"]
    low, high = of["learned"].intervals[RATIO]
    assert low < learned / fixed < high
    assert set(of) == set(METHODS)
    assert of["plain"].values["throughput"] == 1


def test_several_policies_are_averaged_and_widen_the_interval(
    telling_trace: Callable[..., Trace], cheap_drafts: LatencyProfile
) -> None:
    train, test = telling_trace(0), telling_trace(1, split="test")
    good, bad = ConfidenceBelow(0.5), FixedLength(8)
    both = compared([good, bad], cheap_drafts, train, test)["learned"]
    alone = [compared([rule], cheap_drafts, train, test)["learned"] for rule in (good, bad)]
    assert both.by_seed == tuple(row.values["throughput"] for row in alone)
    assert both.values["throughput"] == pytest.approx(np.mean(both.by_seed))
    assert np.ptp(both.intervals["throughput"]) > max(np.ptp(row.intervals["throughput"]) for row in alone)


def test_learning_finds_that_the_confidence_tells(
    telling_trace: Callable[..., Trace], cheap_drafts: LatencyProfile, tmp_path: Path
) -> None:
    train, test = telling_trace(0, prompts=16), telling_trace(1, prompts=16, split="test")
    rule = learned_rule(SETTINGS, tmp_path, train, cheap_drafts)
    learned = compared([rule], cheap_drafts, train, test)["learned"]
    assert learned.values[RATIO] > 1.1
    assert learned.values[GAP] > 0.5


def test_one_policy_learns_several_batch_sizes(
    telling_trace: Callable[..., Trace], cheap_drafts: LatencyProfile, tmp_path: Path
) -> None:
    dear = replace(cheap_drafts, batch_size=64, context=8, draft_seconds={0: 0.0, 1: 0.02}, points=())
    profile = replace(cheap_drafts, context=8, points=(dear,))
    settings = replace(SETTINGS, batch_sizes=(1, 64), total_timesteps=2048)
    trace = telling_trace(0)
    rule = learned_rule(settings, tmp_path, trace, profile)
    groups = ResultTable(compare(settings, [rule], [profile], [trace], [trace])).by_workload()
    assert list(groups) == ["tiny/prose x 1", "tiny/prose x 64", ALL]
    *points, mean = groups.values()
    assert points[1]["fixed"].rule == "length 1"
    assert points[0]["fixed"].rule != "length 1"
    assert mean["fixed"].values["throughput"] == pytest.approx(
        np.mean([point["fixed"].values["throughput"] for point in points])
    )


def hand_made(**throughputs: float) -> list[Row]:
    """A table of one workload: plain 1, fixed 1.5, oracle 2, and what is given."""
    options = dict.fromkeys(METHODS, 1.4) | {"plain": 1.0, "fixed": 1.5, "oracle": 2.0} | throughputs
    rows = []
    for name in ("tiny/prose", ALL):
        for method, throughput in options.items():
            values = {"throughput": throughput, "draft_acceptance_rate": 0.5, "draft_length": 2.0}
            if method == "learned":
                values |= {RATIO: throughput / 1.5, GAP: (throughput - 1.5) / 0.5}
            intervals = dict.fromkeys(("throughput", RATIO, GAP), (1.0, 1.2))
            rows.append(Row(name, method, {}, values, intervals, f"{method} rule"))
    return rows


def test_the_verdict_says_what_holds_and_what_does_not() -> None:
    assert "All targets are met." in stop_verdict(hand_made(learned=1.7))
    short = stop_verdict(hand_made(learned=1.52))
    assert "the mean is 0.017 below 1.03" in short
    assert "of the gap to the oracle 30% was wanted" in short
    assert "below 0.99: tiny/prose (0.933)" in stop_verdict(hand_made(learned=1.4))


def test_the_verdict_says_where_a_simple_rule_is_better() -> None:
    better = stop_verdict(hand_made(learned=1.7, product=1.8))
    assert "A simple rule is better on average: product, 1.800 against 1.700." in better
    assert "tiny/prose (product rule, 1.800)" in better
    assert "better" not in stop_verdict(hand_made(learned=1.7, product=1.69))


def test_a_stored_table_is_compared_number_by_number(tmp_path: Path) -> None:
    table = ResultTable(hand_made(learned=1.7), *TABLE)
    table.save(tmp_path / "table.json", "python train.py")
    stored = ResultTable.load(tmp_path / "table.json")
    assert table.differences(stored) == []
    assert ResultTable(hand_made(learned=1.71), *TABLE).differences(stored) == [
        f"{name}, learned: throughput was 1.7, is 1.71" for name in ("tiny/prose", ALL)
    ]


def test_the_table_has_a_line_for_each_workload_and_the_mean() -> None:
    assert ResultTable(hand_made(learned=1.7), *TABLE).render("title").row_count == 2
