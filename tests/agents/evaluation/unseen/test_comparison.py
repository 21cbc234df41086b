"""Comparing methods on workloads they never saw: who is left out, what is counted, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specgym.agents.evaluation.replayed import Measurement, TuningTask
from specgym.agents.evaluation.unseen.comparison import (
    FoldError,
    Result,
    compare,
    folds,
    kinds_to_leave_out,
    paired_tests,
    summary,
)
from specgym.agents.evaluation.unseen.search_baselines import FixedSetting, Knobs, searchers
from specgym.agents.evaluation.unseen.transfer import JudgedFold, Transfer, least_p
from specgym.agents.training.run_folder import RunFileError
from specgym.envs.tuning.reward import RewardSettings

PLAIN = RewardSettings(acceptance_weight=0, range_weight=0)


@pytest.fixture(scope="module")
def task() -> TuningTask:
    """A shipped workload."""
    return TuningTask("tiny/prose", PLAIN)


def result(workload: str, method: str, fraction: float, *, seed: int = 0, measurements: int = 8) -> Result:
    pair = workload.partition("/")[0]
    return Result(workload, pair, method, seed, measurements, {}, fraction, 1.0, fraction, 1.0, 0.0, True)


def over(method: str, fractions: Sequence[float], **more: Any) -> list[Result]:
    """One workload for each of as many pairs."""
    return [result(f"pair{place}/prose", method, fraction, **more) for place, fraction in enumerate(fractions)]


def test_every_pair_dataset_and_family_is_left_out_once() -> None:
    problems: list[Any] = [
        SimpleNamespace(name=f"{pair}/{prompts}", pair=pair, prompts=prompts, family=pair[0])
        for pair in ("a1", "a2", "b1")
        for prompts in ("prose", "code")
    ]
    by_pair = folds(problems, "pair")
    assert [fold.left_out for fold in by_pair] == ["a1", "a2", "b1"]
    assert by_pair[0].test == ("a1/prose", "a1/code")
    assert by_pair[0].train == ("a2/prose", "a2/code", "b1/prose", "b1/code")
    assert [fold.test for fold in folds(problems, "family")][1] == ("b1/prose", "b1/code")
    assert [fold.test for fold in folds(problems, "dataset")][1] == ("a1/code", "a2/code", "b1/code")
    with pytest.raises(ValueError, match="at least two"):
        folds(problems[:2], "pair")
    with pytest.raises(ValueError, match="pair, dataset, family"):
        folds(problems, "draft")  # type: ignore[arg-type]
    assert kinds_to_leave_out(problems) == (["pair", "dataset", "family"], {})
    assert kinds_to_leave_out(problems[:2]) == (["dataset"], {"pair": "a1", "family": "a"})
    with pytest.raises(FoldError, match=r"nothing can be left out, as all .* are of one pair and one prompt set"):
        kinds_to_leave_out(problems[:1])


def test_few_pairs_are_said_to_show_nothing_whatever_the_results() -> None:
    for units, tests in ((2, 1), (5, 1), (6, 1), (6, 3)):
        rows = over("learned", [0.9] * units)
        for number in range(tests):
            rows += over(f"method {number}", [0.1] * units)
        last = paired_tests(rows)
        assert last[0].p_adjusted == pytest.approx(least_p(units, tests))  # all signs are alike
        fold = JudgedFold("pair", "pair0", ("pair0/prose",), {}, tuple(rows))
        verdict = Transfer("", {}, (fold,)).verdict()
        assert (f"Of {units} pairs no test can be significant" in verdict) == (least_p(units, tests) >= 0.05)


@dataclass
class Recorder:
    """Proposes settings in order, and keeps what it was shown."""

    name: str
    shown: list[list[Measurement]]

    def propose(self, history: Sequence[Measurement]) -> Knobs:
        return {"fallback": 0.1 + 0.1 * len(history), "rollback": 2.0}

    def recommend(self, history: Sequence[Measurement]) -> Knobs:
        self.shown.append(list(history))
        return {"fallback": 0.1 + 0.1 * len(history), "rollback": 2.0}


def test_recommendations_are_judged_after_so_many_measurements_on_held_out_prompts(task: TuningTask) -> None:
    shown: list[list[Measurement]] = []
    messages: list[str] = []
    methods: dict[str, Any] = {
        "recorder": lambda task, seed: Recorder("recorder", shown),
        "fixed": lambda task, seed: FixedSetting("fixed", {"fallback": 0.1, "rollback": 2.0}),
    }
    results = compare([task], methods, seeds=[7], measurements=(0, 1, 3), report=messages.append)
    assert messages == ["tiny/prose"]
    assert [len(history) for history in shown] == [0, 1, 3]
    assert shown[2] == [
        task.measure({"fallback": 0.1 + 0.1 * number, "rollback": 2.0}, number, seed=7) for number in range(3)
    ]
    assert [(row.method, row.measurements) for row in results] == [
        (method, count) for method in ("recorder", "fixed") for count in (0, 1, 3)
    ]
    last = results[2]
    worth = task.worth([last.knobs])
    assert last.knobs["fallback"] == pytest.approx(0.4)
    assert (last.reward, last.fraction) == (worth.reward[0], worth.fraction[0])
    assert (last.speedup, last.divergence) == (worth.values["speedup"][0], worth.values["divergence"][0])
    assert last.best == task.grid().best_reward
    assert (last.workload, last.pair, last.seed, last.kept) == ("tiny/prose", "tiny", 7, True)
    assert results[0].fraction == results[3].fraction  # the same setting, by whatever method


def test_with_a_bound_it_is_said_whether_the_recommendation_keeps_it() -> None:
    bounded = TuningTask("tiny/prose", replace(PLAIN, max_divergence=0.05))
    settings: list[Knobs] = [{"fallback": fallback, "rollback": 1.0} for fallback in (0.05, 0.95)]
    methods = {
        "careful": lambda task, seed: FixedSetting("careful", settings[0]),
        "careless": lambda task, seed: FixedSetting("careless", settings[1]),
    }
    careful, careless = compare([bounded], methods, seeds=[0], measurements=[0])
    assert (careful.kept, careless.kept) == (True, False)
    assert careful.divergence <= 0.05 < careless.divergence
    assert 0 < careful.fraction <= 1
    assert careless.fraction <= 1


def test_a_summary_averages_seeds_within_workloads_and_counts_pairs_served() -> None:
    rows = [
        result("a/prose", "random", 0.9, seed=0),
        result("a/prose", "random", 1.0, seed=1),
        result("a/code", "random", 1.0, seed=0),
        result("b/prose", "random", 0.5, seed=0),
        result("a/prose", "random", 0.2, measurements=0),
    ]
    eight, none = summary(rows)
    assert (eight.method, eight.measurements, none.measurements) == ("random", 8, 0)
    assert eight.fraction == pytest.approx((0.95 + 1 + 0.5) / 3)
    assert eight.within == 0.5  # a has 0.975, b has 0.5
    assert 0.5 <= eight.low < eight.fraction < eight.high <= 1
    assert (none.fraction, none.low, none.high, none.within) == (0.2, 0.2, 0.2, 0)


def test_a_method_that_is_better_on_all_pairs_is_significantly_so_after_correction() -> None:
    rng = np.random.default_rng(0)
    base: Any = rng.uniform(0.7, 0.9, size=9)
    rows = over("learned", base + 0.05) + over("tpe", base + rng.uniform(0, 0.02, size=9))
    rows += over("random", base + 0.05 + rng.permutation([0.01, -0.01, 0.02, -0.02, 0.03, -0.03, 0.04, -0.04, 0]))
    rows += over("tpe", base, measurements=4)
    tpe, random = paired_tests(rows)
    assert (tpe.method, tpe.against, tpe.measurements, tpe.units) == ("learned", "tpe", 8, 9)
    assert tpe.wins == 1
    assert 0.03 < tpe.low < tpe.difference < tpe.high < 0.05
    assert tpe.p == 2 / 2**9
    assert tpe.p_adjusted == 2 * tpe.p
    assert random.p == random.p_adjusted == 1  # its mean difference is 0
    assert random.low < 0 < random.high
    assert random.wins == pytest.approx(4 / 9)


def test_a_pair_counts_once_however_many_workloads_and_seeds_it_has() -> None:
    rows = [result("b/prose", method, fraction) for method, fraction in (("learned", 0.5), ("tpe", 0.9))]
    for prompts in ("prose", "code", "chat"):
        rows += [result(f"a/{prompts}", "learned", 0.9), result(f"a/{prompts}", "tpe", 0.7)]
    (test,) = paired_tests(rows)
    assert test.difference == pytest.approx((0.2 - 0.4) / 2)
    assert (test.units, test.wins) == (2, 0.5)


def test_methods_that_were_judged_differently_are_not_tested() -> None:
    with pytest.raises(ValueError, match="same workloads and seeds"):
        paired_tests([result("a/prose", "learned", 0.9), result("a/code", "tpe", 0.9)])
    with pytest.raises(ValueError, match="no results of 'learned'"):
        paired_tests([result("a/prose", "tpe", 0.9)])


def test_the_file_keeps_every_result_with_its_summary_and_tests(tmp_path: Path) -> None:
    rows = tuple(over("learned", [0.9, 0.123456789]) + over("tpe", [0.5, 0.6]))
    universal = {"fallback": 0.7, "rollback": 5.0}
    fold = JudgedFold("pair", "pair0", ("pair0/prose", "pair1/prose"), universal, rows)
    other = JudgedFold("dataset", "prose", ("pair0/prose",), universal, (result("pair0/prose", "tpe", 0.8),))
    path = tmp_path / "transfer.json"
    Transfer("python evaluate.py", {"tokens": 32}, (fold, other)).save(path)
    content = json.loads(path.read_text())
    assert list(content) == ["format", "command", "protocol", "folds", "results", "summary", "tests", "sha256"]
    assert content["format"] == "specgym-transfer-2"
    assert content["folds"][0] == {
        "kind": "pair",
        "left_out": "pair0",
        "workloads": ["pair0/prose", "pair1/prose"],
        "universal": universal,
    }
    assert content["results"][1]["fraction"] == 0.123457
    assert list(content["results"][0])[:4] == ["kind", "left_out", "workload", "pair"]
    assert [(row["kind"], row["method"]) for row in content["summary"]] == [
        ("pair", "learned"),
        ("pair", "tpe"),
        ("dataset", "tpe"),
    ]
    assert [(row["kind"], row["against"], row["units"]) for row in content["tests"]] == [("pair", "tpe", 2)]
    again = Transfer.load(path)
    assert again.folds[1] == other
    assert (again.command, again.protocol, again.kinds()) == ("python evaluate.py", {"tokens": 32}, ["pair", "dataset"])
    assert again.results("pair")[0] == rows[0]


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "transfer.json"
    path.write_text('{"format": "other"}')
    with pytest.raises(RunFileError, match="has the format 'other'"):
        Transfer.load(path)
    path.write_text('{"format": "specgym-transfer-1", "results": [{"kind": "pair"}], "folds": []}')
    with pytest.raises(RunFileError, match="is damaged"):
        Transfer.load(path)


def test_searches_run_through_a_comparison(task: TuningTask) -> None:
    methods = searchers({"fallback": 0.7, "rollback": 5.0}, ["default", "universal", "tpe", "tpe from universal"])
    first = compare([task], methods, seeds=[0, 1], measurements=(0, 5))
    assert compare([task], methods, seeds=[0, 1], measurements=(0, 5)) == first
    of = {(row.method, row.seed, row.measurements): row for row in first}
    assert of["default", 0, 0] == replace(of["default", 0, 5], measurements=0)
    assert of["tpe", 0, 0].knobs == of["default", 0, 0].knobs
    assert of["tpe from universal", 0, 0].knobs == of["universal", 0, 0].knobs
    assert of["tpe", 0, 5].knobs != of["tpe", 1, 5].knobs
