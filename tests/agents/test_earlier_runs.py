"""Runs that earlier versions wrote: their settings load, they are resumed, and judged as they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from specgym.agents import ResultTable, load_settings
from specgym.agents.command_line import evaluate_command, train_command

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"
DECODERS = {
    "thresholds": "threshold",
    "lookahead": "lookahead",
    "medusa": "medusa",
    "medusa-typical": "medusa-typical",
    "draft-tree": "draft-tree",
}
JUDGED = ("thresholds", "lookahead", "medusa-typical", "stopping", "tuner")


@pytest.mark.parametrize("name", DECODERS)
def test_settings_say_which_decoder_was_tuned(name: str) -> None:
    settings = load_settings(RUNS / name / "settings.json")
    assert settings.decoder == DECODERS[name]
    assert (settings.environment.max_new_tokens, settings.evaluation.max_new_tokens) == (8, 8)
    if name == "thresholds":
        assert settings.decoder_options == {"max_draft_length": 4}
    if name == "medusa-typical":
        assert settings.max_divergence == 0.1


@pytest.mark.parametrize("name", JUDGED)
def test_a_run_is_resumed_and_its_table_made_again(
    name: str, tmp_path: Path, shown: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))
    run = tmp_path / name
    shutil.copytree(RUNS / name, run)
    assert train_command(["--resume", str(run)]) == 0
    assert "steps are done" in shown()
    assert evaluate_command([str(run)]) == 0
    text = shown()
    # Arithmetic differs between processors, so a figure may differ where the two best tokens are as good as equal.
    assert "equal those in" in text or "differ from" in text
    rows = ResultTable.load(run / "table.json").rows
    again = [(row.workload, row.method) for row in ResultTable.load(run / "evaluation.json").rows]
    # Later versions compare with more methods.
    assert [row for row in again if row in {(row.workload, row.method) for row in rows}] == [
        (row.workload, row.method) for row in rows
    ]


def test_a_run_can_be_prolonged(tmp_path: Path, shown: Callable[[], str]) -> None:
    run = tmp_path / "lookahead"
    shutil.copytree(RUNS / "lookahead", run)
    assert train_command(["--resume", str(run), "--total-timesteps", "80"]) == 0
    assert "Going on from step 40." in shown()


def test_a_live_table_of_stop_rules_is_read() -> None:
    rows = ResultTable.load(RUNS / "stopping" / "live.json").rows
    assert {"replayed", "charged", "clock"} <= set(rows[0].values)
    assert rows[1].rule
