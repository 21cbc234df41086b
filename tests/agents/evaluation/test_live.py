"""Live decoding in turns: its numbers, their intervals, and that the charged ones repeat."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from specgym.agents import ResultTable, Row, judge_live
from specgym.agents.evaluation.live import CHARGED, METHODS, live_columns
from specgym.agents.evaluation.results import ALL, SAME, kept_bound, mean_rows
from specgym.agents.experiments.tune_knobs import knob_verdict
from specgym.agents.training.run_folder import RunFileError
from specgym.decoding import LatencyProfile, ThresholdDecoder
from specgym.envs import RewardSettings, workload

PROFILE = LatencyProfile("pair", {0: 0.0, 16: 0.016}, {1: 0.010, 17: 0.014}, 0.010, {"name": "made up"})


def judged(workloads: tuple[str, str], tokens: int = 12) -> ResultTable:
    rows: list[Row] = []
    for name in workloads:
        chosen = workload(name)
        knobs = {"fallback": 0.9, "rollback": 1.0}
        decoder = ThresholdDecoder(chosen.load())
        rows += judge_live(chosen, decoder, knobs, PROFILE, RewardSettings(), prompts=3, max_new_tokens=tokens)
    rows += mean_rows(rows)
    columns, caption = live_columns(rows)
    return ResultTable(rows, columns, CHARGED, knob_verdict(rows, "thresholds"), caption, {"name": "made up"})


@pytest.fixture(scope="module")
def table(small_workloads: tuple[str, str]) -> ResultTable:
    return judged(small_workloads)


def test_every_method_on_every_workload_and_their_means(table: ResultTable, small_workloads: tuple[str, str]) -> None:
    rows = table.rows
    assert [row.method for row in rows] == list(METHODS) * 3
    assert [row.workload for row in rows[::3]] == [*small_workloads, ALL]
    for row in rows:
        if row.method == "autoregressive":
            assert row.values["ms_per_token"] == pytest.approx(10.0)
            assert row.values["speedup"] == pytest.approx(1.0)
            assert row.values["mean_acceptance_length"] == 1
            assert row.values["wall_speedup"] == pytest.approx(1.0)
            assert row.values["divergence"] == 0
        assert row.values["wall_ms_per_token"] > 0
        for column, (low, high) in row.intervals.items():
            assert low <= row.values[column] + 1e-9
            assert row.values[column] <= high + 1e-9
    mean = (rows[2].values["reward"] + rows[5].values["reward"]) / 2
    assert rows[8].values["reward"] == pytest.approx(mean)
    assert rows[1].knobs == {"fallback": 0.5, "rollback": 1.0}
    assert rows[2].knobs == {"fallback": 0.9, "rollback": 1.0}
    assert rows[2].values["draft_acceptance_rate"] > rows[1].values["draft_acceptance_rate"]


def test_measured_again_the_charged_columns_are_reproduced(
    table: ResultTable, small_workloads: tuple[str, str], tmp_path: Path
) -> None:
    again = judged(small_workloads)
    for before, after in zip(table.rows, again.rows, strict=True):
        assert {name: after.values[name] for name in CHARGED} == pytest.approx(
            {name: before.values[name] for name in CHARGED}, rel=SAME
        )
    table.save(tmp_path / "table.json", "python train.py")
    stored = ResultTable.load(tmp_path / "table.json")
    assert again.differences(stored) == []
    assert any("speedup was" in line for line in judged(small_workloads, tokens=13).differences(stored))


@pytest.mark.parametrize(("factor", "reported"), [(1 + 1e-8, False), (1 + 1e-4, True)])
def test_only_what_rounding_cannot_explain_counts_as_a_difference(
    table: ResultTable, factor: float, reported: bool
) -> None:
    rows = [replace(row, values={**row.values, "speedup": factor * row.values["speedup"]}) for row in table.rows]
    assert bool(replace(table, rows=rows).differences(table)) == reported


def test_the_stored_table_has_its_command_hardware_and_rows(table: ResultTable, tmp_path: Path) -> None:
    table.save(tmp_path / "table.json", "python train.py --seed 1")
    stored = ResultTable.load(tmp_path / "table.json")
    assert (stored.command, stored.hardware, stored.verdict) == (
        "python train.py --seed 1",
        table.hardware,
        table.verdict,
    )
    assert list(stored.rows) == list(table.rows)
    assert tuple(stored.compared) == CHARGED
    lines = stored.to_csv().splitlines()
    assert len(lines) == 1 + len(table.rows)
    assert lines[0].startswith("workload,method,ms_per_token")
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(RunFileError, match=r"table\.json does not hold a table"):
        ResultTable.load(tmp_path / "table.json")


def test_the_table_shows_every_method(table: ResultTable) -> None:
    console = Console(width=90, record=True, file=io.StringIO())
    console.print(table.render("Held-out prompts"))
    text = console.export_text()
    assert text.count("learned") == 3
    assert "0.90, 1.00" in text
    assert "Learned thresholds against the defaults" in table.verdict


def test_the_table_names_the_decoder_s_knobs_and_what_it_reads() -> None:
    values = dict.fromkeys((*CHARGED, "wall_ms_per_token", "wall_speedup"), 2.0) | {"divergence": 0.0}
    rows = [
        Row("a/prose", method, knobs, values | {"target_tokens_per_token": 12.5})
        for method, knobs in (("default", {"window": 5, "guesses": 7}), ("learned", {"window": 2, "guesses": 11}))
    ]
    console = Console(width=110, record=True, file=io.StringIO())
    columns, caption = live_columns(rows)
    console.print(ResultTable(rows, columns, caption=caption).render("Held-out prompts"))
    text = console.export_text()
    assert "2, 11" in text
    assert "tokens read" in text
    assert "12.50" in text
    assert "diver-" not in text
    assert "Learned such against the defaults" in knob_verdict(rows, "such")


def test_the_verdict_says_on_which_workloads_a_bound_is_broken(table: ResultTable) -> None:
    divergences = {row.workload: row.values["divergence"] for row in table.rows if row.method == "learned"}
    strayed = [name for name, value in divergences.items() if value > 0 and name != ALL]
    assert strayed
    text = kept_bound(table.rows, 0.0)
    assert f"kept on the held-out prompts of {len(divergences) - 1 - len(strayed)} of {len(divergences) - 1}" in text
    assert all(name in text for name in strayed)
    assert "kept on the held-out prompts of 2 of 2 workloads." in knob_verdict(table.rows, max_divergence=1.0)
