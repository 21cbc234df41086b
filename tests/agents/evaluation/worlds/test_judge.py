"""Judging policies in held-out worlds: rows, tests of which the answer is known, aims, and the file that keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specgym.agents.evaluation.results import LEARNED, Row
from specgym.agents.evaluation.unseen.comparison import PairedTest
from specgym.agents.evaluation.worlds import judge
from specgym.agents.evaluation.worlds.judge import _Kind, judge_worlds
from specgym.agents.evaluation.worlds.transfer import COLUMNS, EVERY_KIND, WorldsTransfer, result_table
from specgym.agents.training.run_folder import RunFileError
from specgym.envs import WorldSampler
from tests.helpers.moving_policy import Moves

METHODS = ("default", "not speculating", "closed form", "closed form by place", "best on training texts")


class Random:
    """A policy that draws its actions."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def actions(self, observations: NDArray[np.float32]) -> NDArray[np.float64]:
        return self._rng.uniform(-1, 1, (len(observations), 3))


def transfer(sampler: WorldSampler, policies: dict[int, Any], **more: Any) -> WorldsTransfer:
    return judge_worlds(
        policies,
        "python evaluate.py run --transfer",
        training=sampler,
        samplers={"pair": sampler, "hardware": sampler},
        worlds=30,
        counts=(0, 4),
        methods=METHODS,
        **more,
    )


@pytest.fixture(scope="module")
def results(sampler: WorldSampler) -> WorldsTransfer:
    return transfer(sampler, {0: Moves(0, 0), 1: Moves(0, 0)})


def test_every_kind_has_a_row_for_every_method_and_so_has_their_mean(results: WorldsTransfer) -> None:
    rows = results.table_rows(4)
    assert list(rows) == ["pair", "hardware", EVERY_KIND]
    for methods in rows.values():
        assert list(methods) == [LEARNED, *METHODS]
        for row in methods.values():
            assert set(row.values) >= {column.name for column in COLUMNS}
            assert len(row.by_seed) == 2
            assert row.values["share"] == pytest.approx(np.mean(row.by_seed))
    row = rows["pair"]["closed form"]
    assert row.intervals["share"][0] < row.values["share"] < row.intervals["share"][1]
    assert rows[EVERY_KIND]["default"].values["share"] == pytest.approx(
        np.mean([rows[kind]["default"].values["share"] for kind in ("pair", "hardware")])
    )


def test_every_seed_has_worlds_of_its_own_that_all_methods_share(results: WorldsTransfer) -> None:
    default = results.table_rows(4)["pair"]["default"]
    assert default.by_seed[0] != default.by_seed[1]
    assert default.values == results.table_rows(0)["pair"]["default"].values


def test_tests_are_corrected_over_all_of_a_count(results: WorldsTransfer) -> None:
    tests = results.tests[4]
    assert [test.against for test in tests["pair"]] == list(METHODS[:-1])
    ordered = sorted((test for group in tests.values() for test in group), key=lambda test: test.p)
    assert ordered[0].p_adjusted == pytest.approx(min(1.0, len(ordered) * ordered[0].p))
    means = results.table_rows(4)["pair"]
    difference = means[LEARNED].values["share"] - means["default"].values["share"]
    assert tests["pair"][0].difference == pytest.approx(difference)


def kind(workloads: list[str], shares: list[float], others: list[float]) -> _Kind:
    values = {(name, 4): {"share": np.array([row])} for name, row in ((LEARNED, shares), ("other", others))}
    return _Kind(values, np.array([workloads]), np.arange(len(workloads))[None])


def test_worlds_of_one_workload_are_one_unit_of_a_test() -> None:
    many = [f"pair/{place // 2}" for place in range(24)]
    differences = kind(many, [0.9, 0.8] * 12, [0.5] * 24).differences(LEARNED, "other", 4)
    assert list(differences) == [f"pair/{place}" for place in range(12)]
    assert list(differences.values()) == pytest.approx([0.35] * 12)
    # Of twelve units that are all better, two of the 4096 ways to draw signs are as far from 0.
    tests = judge._tests({"pair": kind(many, [0.9, 0.8] * 12, [0.5] * 24)}, ["other"], 4)["pair"]
    assert tests[0].p == pytest.approx(2 / 4096)
    assert tests[0].wins == 1
    assert tests[0].units == 12


def test_a_workload_weighs_as_much_as_it_has_worlds() -> None:
    uneven = ["a"] * 4 + [f"b{place}" for place in range(12)]
    differences = kind(uneven, [0.9] * 4 + [0.5] * 12, [0.5] * 16).differences(LEARNED, "other", 4)
    assert differences["a"] == pytest.approx(0.4 * 4 * 13 / 16)
    assert np.mean(list(differences.values())) == pytest.approx(0.1)


def test_deployments_are_the_units_where_workloads_are_few() -> None:
    few = kind(["a"] * 8 + ["b"] * 8, [0.9] * 16, [0.8] * 16)
    assert len(few.differences(LEARNED, "other", 4)) == 16


def test_a_policy_that_draws_its_actions_is_worse_than_the_closed_form(sampler: WorldSampler) -> None:
    random = transfer(sampler, {0: Random()})
    assert {test.against: test.difference < 0 for test in random.tests[4]["pair"]}["closed form"]
    assert "missed" in random.verdict()


def judged(**values: float) -> WorldsTransfer:
    """One kind of worlds with what a policy came to, which the closed form did not."""
    columns = dict.fromkeys((column.name for column in COLUMNS), 0.0)
    rows = [
        Row("pair", LEARNED, values=columns | values),
        Row("pair", "closed form", values=columns | {"share": 0.9}),
    ]
    difference = values["share"] - 0.9
    p = 0.001 if abs(difference) > 0.05 else 0.4
    test = PairedTest(4, LEARNED, "closed form", difference, 0.0, 0.1, p, p, 1.0, 20)
    return WorldsTransfer("", {}, {4: result_table(rows, 4, {})}, {4: {"pair": (test,)}})


def test_the_verdict_says_of_every_aim_whether_it_is_met() -> None:
    good = judged(share=0.99, within=0.95, wrong_speculation=0.01).verdict()
    assert good.count("met.") == 3
    assert "missed" not in good
    bad = judged(share=0.91, within=0.89, wrong_speculation=0.02).verdict()
    assert bad.count("missed (pair).") == 3
    assert "met" not in bad


def test_the_file_keeps_everything(results: WorldsTransfer, tmp_path: Path) -> None:
    path = tmp_path / "worlds.json"
    results.save(path)
    loaded = WorldsTransfer.load(path)
    assert loaded.to_json() == results.to_json()
    assert loaded.verdict() == results.verdict()
    assert loaded.table.render("Worlds").row_count == results.table.render("Worlds").row_count
    path.write_text(path.read_text().replace("specgym-worlds-1", "specgym-worlds-9"))
    with pytest.raises(RunFileError, match="make it again with"):
        WorldsTransfer.load(path)


def test_views_are_tables_of_one_shape(results: WorldsTransfer) -> None:
    for view in results.views():
        assert all(len(line) == len(view.head) for line in view.lines)
        lines = view.markdown().splitlines()
        assert len(lines) == len(view.lines) + 2
        assert len({line.count("|") for line in lines}) == 1
        assert view.render().row_count == len(view.lines)


def test_what_cannot_be_judged_is_refused_before_any_work(sampler: WorldSampler) -> None:
    with pytest.raises(ValueError, match="at least one policy"):
        transfer(sampler, {})
    with pytest.raises(ValueError, match="no method annealing; there are: default"):
        judge_worlds({0: Moves(0, 0)}, "", training=sampler, samplers={}, methods=["annealing"])
    assert judge.MEASUREMENTS == (0, 1, 2, 4, 8)
