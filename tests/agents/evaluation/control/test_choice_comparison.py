"""Judging choices among drafts: rows, ratios, what is said about the result, and the plan that estimates a ceiling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specgym.agents import ResultTable, Row
from specgym.agents.evaluation.control.choice_baselines import FixedChoice
from specgym.agents.evaluation.control.choice_comparison import (
    GAP,
    METHODS,
    OVER_HYBRID,
    OVER_SINGLE,
    TABLE,
    choice_verdict,
    compare_choices,
)
from specgym.agents.evaluation.control.choice_plan import calibration_error, chances_of, decide, fit_plan
from specgym.agents.evaluation.control.choice_tuning import MixedPrompts, oracle
from specgym.agents.evaluation.results import ALL
from specgym.agents.experiments.control.choose_drafts_settings import ChoiceSettings, PlanSettings
from specgym.agents.experiments.control.control_settings import ComparisonSettings
from specgym.envs.recordings.mixed_trace import MixedTrace
from tests.helpers.made_up_mixed import made_up_costs, made_up_mixed

SETTINGS = ChoiceSettings(
    workloads=("tiny/prose", "tiny/prose@1.0"),
    seeds=(0, 1),
    max_draft_length=4,
    max_new_tokens=24,
    environments=8,
    comparison=ComparisonSettings(passes=2, resamples=50),
    plan=PlanSettings(rounds=2, width=8),
)


def prompts(name: str, split: str, passes: int = 2) -> MixedPrompts:
    trace = made_up_mixed(name, split=split, tokens=24, seed=7 if split == "test" else 0)
    return MixedPrompts(trace, made_up_costs(trace), 4, 24, passes=passes)


def telling(split: str, seed: int) -> MixedPrompts:
    """A model that is always right where its table's confidence is low, and a table that is right where it is high."""
    trace = made_up_mixed(free=(False, True), right=(0.5, 0.5), prompts=12, tokens=24, split=split, seed=seed, ending=0)
    model, table = trace.traces
    sure = np.random.default_rng(seed).random(len(table.text)) < 0.5
    confidence = np.where(sure, 0.9, 0.1)[:, None].repeat(4, 1).astype(np.float32)
    drafted = np.full(len(sure), 4)
    match = sure[:, None].repeat(4, 1)
    traces = replace(model, match=~match), replace(table, match=match, confidence=confidence, drafted=drafted)
    mixed = MixedTrace(trace.info, trace.drafts, trace.free, traces)
    return MixedPrompts(mixed, made_up_costs(mixed, drafting=0.05), 4, 24)


def test_every_method_is_judged_and_ratios_are_those_of_the_throughputs() -> None:
    train, test = ([prompts(name, split) for name in SETTINGS.workloads] for split in ("train", "test"))
    rules = [FixedChoice((3, 1), (4, 2), (1, 0)), FixedChoice((2,), (4,), (0,))]
    rows, notes = compare_choices(SETTINGS, rules, train, test)
    groups = ResultTable(rows).by_workload()
    assert list(groups) == [*SETTINGS.workloads, ALL]
    for methods in groups.values():
        assert tuple(methods) == METHODS
        reached = {method: row.values["throughput"] for method, row in methods.items()}
        assert reached["plain"] == 1
        assert max(reached, key=lambda method: reached[method]) == "clairvoyant"
        assert np.mean(methods["learned"].by_seed) == pytest.approx(reached["learned"])
        if methods is not groups[ALL]:
            assert methods["learned"].values[OVER_SINGLE] == pytest.approx(reached["learned"] / reached["single"])
            assert methods["learned"].values[OVER_HYBRID] == pytest.approx(reached["learned"] / reached["hybrid"])
        gap = reached["clairvoyant"] - reached["single"]
        for method in ("learned", "ceiling", "hindsight"):
            assert methods[method].values[GAP] == pytest.approx((reached[method] - reached["single"]) / gap)
        low, high = methods["learned"].intervals[OVER_SINGLE]
        assert low < methods["learned"].values[OVER_SINGLE] < high
    ratios = [groups[name]["learned"].values[OVER_HYBRID] for name in SETTINGS.workloads]
    assert groups[ALL]["learned"].values[OVER_HYBRID] == pytest.approx(np.mean(ratios))
    assert "calibration error" in notes[0]
    assert ResultTable(rows, *TABLE).render("Test").row_count == 3


def test_without_a_plan_there_is_no_ceiling() -> None:
    settings = replace(SETTINGS, plan=PlanSettings(rounds=0), workloads=("tiny/prose",))
    train, test = ([prompts("tiny/prose", split)] for split in ("train", "test"))
    rows, notes = compare_choices(settings, [FixedChoice((3,), (4,), (1,))], train, test)
    assert {row.method for row in rows} == set(METHODS) - {"ceiling", "hindsight"}
    assert not notes
    assert "can be seen" not in choice_verdict(rows)


def test_a_plan_finds_what_tells_the_drafts_apart_and_its_chances_come_true() -> None:
    train, test = telling("train", 0), telling("test", 1)
    fitted = fit_plan([train], PlanSettings(rounds=6, width=16))
    rule = fitted.rule(0, test)
    planned = test.decode([rule])[0].throughput
    best = oracle(test)[1].throughput
    alone = [test.decode([FixedChoice((draft,), (4,), (0,))])[0].throughput for draft in (1, 2)]
    assert planned > 0.9 * best
    assert planned > 1.3 * max(alone)
    decisions, reached = decide([test], fitted.plan, fitted.rates, 0.0, np.random.default_rng(0))
    assert reached[0] == pytest.approx(planned, rel=0.02)
    chances, right = chances_of(fitted.plan, decisions)
    assert calibration_error(chances, right) < 0.1
    assert calibration_error(1 - chances, right) > 0.3


def test_the_calibration_error_is_how_far_chances_are_off() -> None:
    rng = np.random.default_rng(0)
    chances = rng.random(20_000)
    right = rng.random(20_000) < chances
    assert calibration_error(chances, right) < 0.02
    assert calibration_error(np.full(20_000, 0.9), right) == pytest.approx(0.4, abs=0.02)


def table_of(**learned: float) -> list[Row]:
    """Two workloads and their means; `learned` are the throughputs of the learned policy by workload."""
    rows = []
    for name in (*learned, ALL):
        reached = {"single": 1.5, "hybrid": 1.8, "bandit": 1.4, "closed form": 1.9, "ceiling": 2.4, "hindsight": 2.6,
                   "clairvoyant": 3.5}  # fmt: skip
        reached["learned"] = float(np.mean(list(learned.values()))) if name == ALL else learned[name]
        for method, value in reached.items():
            values = {"throughput": value, GAP: (value - 1.5) / 2.0}
            if method == "learned":
                values |= {OVER_SINGLE: value / 1.5, OVER_HYBRID: value / 1.8}
            rows.append(Row(name, method, values=values, rule=f"{method} rule"))
    return rows


def test_the_verdict_names_goals_that_are_met_and_missed_and_what_is_better() -> None:
    text = choice_verdict(table_of(a=2.1, b=2.0))
    assert "1.367 times the throughput of the best single draft and 1.139 times that of the hybrid rule" in text
    assert "All targets are met." in text
    assert "closes 27% of the gap" in text
    assert "sampled" not in text
    assert "closes 45% (fitted to the test prompts themselves 55%)" in text
    assert "Better on average: ceiling, 2.400 against 2.050." in text
    text = choice_verdict(table_of(a=2.1, b=1.4))
    assert "It falls short: 0.972 times the hybrid rule is below 1.05" in text
    assert "below 0.99 of the best single draft: b (0.933)" in text
    assert "below 0.99 of the hybrid rule: b (0.778)" in text
    assert "beats the learned policy on b (closed form rule, 1.900)" in text
    assert "has 0.933 times the throughput of the best single draft, at least 0.933" in choice_verdict(
        table_of(**{"a": 2.1, "b@1.0": 1.4})
    )
    text = choice_verdict(table_of(a=1.6, b=1.6))
    assert "1.067 times the best single draft is below 1.15" in text
