"""The table: its numbers, their intervals, and that the charged ones repeat."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from specgym.agents.evaluation.live import ALL, CHARGED, METHODS, Row, evaluate, save_rows
from specgym.agents.evaluation.results import differences, rendered, verdict
from specgym.agents.experiments.settings import EvaluationSettings
from specgym.agents.experiments.tune_knobs import ThresholdSettings
from specgym.agents.training.files import RunFileError
from specgym.decoding.latency.profile import LatencyProfile

PROFILE = LatencyProfile("pair", {0: 0.0, 16: 0.016}, {1: 0.010, 17: 0.014}, 0.010, {"name": "made up"})


@pytest.fixture
def measured(small_workloads: tuple[str, str], tmp_path: Path) -> tuple[ThresholdSettings, list[Path], list[Row]]:
    settings = ThresholdSettings(
        workloads=small_workloads, evaluation=EvaluationSettings(prompts=3, tokens=12, seeds=(0, 1))
    )
    PROFILE.save(tmp_path / "profile.json")
    profiles = [tmp_path / "profile.json"] * 2
    learned = {name: {"fallback": 0.9, "rollback": 1.0} for name in small_workloads}
    return settings, profiles, evaluate(settings, learned, profiles)


def test_every_method_on_every_workload_and_their_means(
    measured: tuple[ThresholdSettings, list[Path], list[Row]], small_workloads: tuple[str, str]
) -> None:
    rows = measured[2]
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


def test_measured_again_the_charged_columns_are_identical(
    measured: tuple[ThresholdSettings, list[Path], list[Row]], tmp_path: Path
) -> None:
    settings, profiles, rows = measured
    learned = {row.workload: row.knobs for row in rows if row.method == "learned" and row.workload != ALL}
    again = evaluate(settings, learned, profiles)
    for before, after in zip(rows, again, strict=True):
        assert {name: before.values[name] for name in CHARGED} == {name: after.values[name] for name in CHARGED}
    save_rows(tmp_path / "table.json", rows, settings, "python train.py")
    assert differences(again, tmp_path / "table.json") == []
    other = evaluate(replace(settings, evaluation=EvaluationSettings(prompts=3, tokens=13)), learned, profiles)
    assert any("speedup was" in line for line in differences(other, tmp_path / "table.json"))


def test_the_stored_table_has_its_command_and_hardware(
    measured: tuple[ThresholdSettings, list[Path], list[Row]], tmp_path: Path
) -> None:
    settings, _, rows = measured
    save_rows(tmp_path / "table.json", rows, settings, "python train.py --seed 1")
    stored = json.loads((tmp_path / "table.json").read_text())
    assert stored["command"] == "python train.py --seed 1"
    assert {"name", "cores", "threads", "torch"} <= set(stored["hardware"])
    assert len(stored["rows"]) == 9
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(RunFileError, match=r"table\.json"):
        differences(rows, tmp_path / "table.json")


def test_the_table_shows_every_method(measured: tuple[ThresholdSettings, list[Path], list[Row]]) -> None:
    rows = measured[2]
    console = Console(width=90, record=True, file=io.StringIO())
    console.print(rendered(rows, "Held-out prompts"))
    text = console.export_text()
    assert text.count("learned") == 3
    assert "0.90, 1.00" in text
    assert "Learned thresholds against the defaults" in verdict(rows)


def test_the_verdict_says_on_which_workloads_a_bound_is_broken(
    measured: tuple[ThresholdSettings, list[Path], list[Row]],
) -> None:
    rows = measured[2]
    divergences = {row.workload: row.values["divergence"] for row in rows if row.method == "learned"}
    strayed = [name for name, value in divergences.items() if value > 0 and name != ALL]
    assert strayed
    told = verdict(rows, max_divergence=0.0)
    assert f"kept on the held-out prompts of {len(divergences) - 1 - len(strayed)} of {len(divergences) - 1}" in told
    assert all(name in told for name in strayed)
    assert "kept on the held-out prompts of 2 of 2 workloads." in verdict(rows, max_divergence=1.0)
