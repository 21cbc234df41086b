"""Comparison with rivals: which of several ways is the best, and environments that are whole or not there."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rivals
from benchmarks.against_rivals import Settings, best_of, check_more, over, summary, target_of

SPEEDS = {
    "generate": {"prose": [10.0, 20.0], "code": [10.0, 10.0]},
    "assisted": {"prose": [20.0, 20.0], "code": [10.0, 15.0]},
    "lookup 4": {"prose": [11.0, 22.0], "code": [30.0, 40.0]},
    "lookup 10": {"prose": [10.0, 20.0], "code": [50.0, 60.0]},
    "ours, plain": {"prose": [10.0, 20.0], "code": [10.0, 10.0]},
    "ours, exact": {"prose": [22.0, 22.0], "code": [12.0, 15.0]},
    "ours, mixed": {"prose": [18.0, 36.0], "code": [44.0, 60.0]},
}


def test_speeds_are_compared_prompt_by_prompt() -> None:
    assert over(SPEEDS, "lookup 4", "generate", "prose") == pytest.approx(1.1)
    assert over(SPEEDS, "ours, exact", "assisted") == pytest.approx(1.1)  # of 1.1, 1.1, 1.2 and 1
    assert best_of(SPEEDS, ["lookup 4", "lookup 10"]) == "lookup 10"  # 3 by the median, where the other has 2.05
    assert best_of(SPEEDS, []) is None


def test_the_summary_compares_the_best_of_ours_with_the_best_of_each_rival() -> None:
    figures = summary(SPEEDS)
    assert figures["best of ours"] == "mixed"
    assert figures["generate"] == pytest.approx(3.1)
    assert figures["worst set"] == pytest.approx(1.8)
    assert figures["lookup"] == pytest.approx(1.4)  # of 1.8, 1.8, 0.88 and 1
    assert figures["assisted, same draft"] == pytest.approx(1.1)
    assert "flashspec" not in figures


@pytest.fixture
def installing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would install something; a venv is an empty folder."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        failed = "no-such-rival==1" in command
        return subprocess.CompletedProcess(command, int(failed), "", "ERROR: no matching\ndistribution" * failed)

    monkeypatch.setattr(rivals, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(venv, "create", lambda folder, **_: Path(folder).mkdir())
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_rival_is_installed_once_into_an_environment_of_its_own(installing: list[list[str]], tmp_path: Path) -> None:
    folder = rivals.environment("rival==1.2", "needed>=2")
    assert folder == rivals.environment("rival==1.2", "needed>=2") == tmp_path / "rivals" / "rival-1.2"
    assert folder.is_dir()
    alone, others = installing
    assert alone[-2:] == ["--no-deps", "rival==1.2"]  # torch would come with it, another than is compared with
    assert others[-1] == "needed>=2"


def test_what_pip_says_is_told_and_no_half_environment_stays(installing: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(rivals.RivalError, match=r"no-such-rival==1 \(ERROR: no matching distribution\).*--rivals"):
        rivals.environment("no-such-rival==1", "needed")
    assert list((tmp_path / "rivals").iterdir()) == []


def test_further_pairs_are_told_by_their_target_and_none_is_left_out_without_a_word() -> None:
    assert target_of("smollm2+smollm2-eagle,suffix") == target_of("smollm2-4l") == target_of("smollm2")
    assert target_of("tiny") == target_of("tiny-10m+suffix") != target_of("tiny-3m-1l")
    check_more(Settings(pairs=("smollm2-4l", "tiny"), more=("smollm2+suffix", "tiny-10m-mixed")))
    with pytest.raises(SystemExit, match="--more tiny-3m-mixed has target tiny-3m, of which --pairs has none"):
        check_more(Settings(pairs=("tiny",), more=("tiny-3m-mixed",)))
