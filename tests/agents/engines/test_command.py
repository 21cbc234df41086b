"""``train.py --engine`` from its options to its table, with an engine that is no program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specgym.agents import evaluate_command, train_command
from specgym.agents.engines import command
from specgym.decoding import LOOKUP, EngineError, EngineOptions, Served, SettingIgnoredError
from tests.helpers.fake_engine import Behaviour, FakeEngine


@pytest.fixture
def behaviours(monkeypatch: pytest.MonkeyPatch) -> dict[str | None, Behaviour]:
    """Behaviour of the engine by draft."""
    by_draft: dict[str | None, Behaviour] = {
        "good.gguf": Behaviour(alpha=0.9),
        LOOKUP: Behaviour(alpha=0.3, token_cost=0.02),
        "slow.gguf": Behaviour(alpha=0.4, token_cost=0.9),
    }

    def opened(name: str, target: str, draft: str | None, options: EngineOptions) -> FakeEngine:
        return FakeEngine(target, draft, options, by_draft[draft])

    monkeypatch.setattr(command, "open_engine", opened)
    return by_draft


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--engine", "llama.cpp", "--target", "target.gguf", "--runs", str(folder), "--name", "run",
            "--prompts", "prose", "code", *more]  # fmt: skip


def test_the_best_draft_is_recommended_judged_and_stored(
    behaviours: dict[str | None, Behaviour], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_command(arguments(tmp_path, "--draft", "good.gguf", LOOKUP, "--methods", "tuner", "gp")) == 0
    output = capsys.readouterr().out
    recommendation = json.loads((tmp_path / "run" / "recommendation.json").read_text())
    assert recommendation["draft"] == "good.gguf"
    assert recommendation["draft_length"] == recommendation["recommended"]["num_tokens"] >= 4
    assert recommendation["measurements"] <= 12
    assert "Recommended: num_tokens=" in recommendation["advice"]
    rows = json.loads((tmp_path / "run" / "table.json").read_text())["rows"]
    methods = ["plain", "default", f"default, {LOOKUP}", "one for all", "closed form", "recommended", "gp"]
    assert [row["method"] for row in rows] == methods * 3
    assert {row["workload"] for row in rows} == {"prose", "code", "all workloads"}
    by_method: dict[str, Any] = {row["method"]: row for row in rows if row["workload"] == "all workloads"}
    assert by_method["recommended"]["speedup"] > max(1.5, by_method[f"default, {LOOKUP}"]["speedup"])
    assert by_method["default"]["over_default"] == pytest.approx(1)
    assert by_method["recommended"]["intervals"]["speedup"][0] > 1
    assert "Held-out prompts, llama.cpp 1, target.gguf" in output
    assert output.count("Measured on training prompts") == 2  # a table for each method
    tried = recommendation["tried"]["tuner"]
    assert tried[0]["speedup"] == max(setting["speedup"] for setting in tried)
    assert len(tried[0]["by_set"]) == 2
    assert all(behaviour.open == 0 for behaviour in behaviours.values())
    assert behaviours[LOOKUP].asked.count(None) == 0  # both drafts share the plain engine

    assert train_command(arguments(tmp_path, "--draft", "good.gguf")) == 2
    assert "exists already; go on with --resume" in capsys.readouterr().err
    asked = len(behaviours["good.gguf"].asked)
    assert train_command(["--resume", str(tmp_path / "run")]) == 0
    assert len(behaviours["good.gguf"].asked) == asked  # all was measured already
    assert evaluate_command([str(tmp_path / "run")]) == 0
    assert "once more" in capsys.readouterr().out
    assert evaluate_command([str(tmp_path / "run"), "--report"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "By the engine&#39;s own clock" in page
    assert "latency profiles" not in page
    assert evaluate_command([str(tmp_path / "run"), "--transfer"]) == 2
    assert "leave out all but --report" in capsys.readouterr().err


def test_plain_decoding_is_recommended_where_nothing_pays(
    behaviours: dict[str | None, Behaviour], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_command(arguments(tmp_path, "--draft", "slow.gguf")) == 0
    recommendation = json.loads((tmp_path / "run" / "recommendation.json").read_text())
    assert recommendation["recommended"] is None
    assert recommendation["draft_length"] == 0
    assert recommendation["advice"].startswith("Do not speculate: nothing that was tried pays.")
    rows = json.loads((tmp_path / "run" / "table.json").read_text())["rows"]
    recommended = [row for row in rows if row["method"] == "recommended"]
    assert all(row["speedup"] == 1 and row["over_default"] > 1.25 for row in recommended)


@pytest.mark.parametrize("load", [0.5, 1000.0])
def test_a_busy_machine_is_warned_of(
    behaviours: dict[str | None, Behaviour],
    load: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    assert train_command(arguments(tmp_path, "--draft", "slow.gguf", "--measurements", "3")) == 0
    assert ("This machine is busy (load 1000.0" in capsys.readouterr().out) is (load > 100)


def test_an_engine_that_does_not_sample_exactly_is_not_called_lossless(
    behaviours: dict[str | None, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "lossless_when_sampling", False)
    assert train_command(arguments(tmp_path, "--draft", "good.gguf", "--temperature", "1")) == 0
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert table["notes"] == ["Text sampled with good does not follow the target's distribution in llama.cpp."]
    assert all("equal_texts" not in row for row in table["rows"])


def test_a_setting_that_does_not_hold_on_held_out_prompts_is_withdrawn(
    behaviours: dict[str | None, Behaviour], tmp_path: Path
) -> None:
    behaviours["good.gguf"].slow = "held out"
    prompts = tmp_path / "mine.json"
    texts = {"train": [f"seen {place}" for place in range(6)], "test": [f"held out {place}" for place in range(6)]}
    prompts.write_text(json.dumps(texts))
    command_line = arguments(tmp_path, "--draft", "good.gguf")
    assert train_command([*command_line[: command_line.index("--prompts")], "--prompts", str(prompts),
                          "--draft", "good.gguf"]) == 0  # fmt: skip
    recommendation = json.loads((tmp_path / "run" / "recommendation.json").read_text())
    assert recommendation["tried"]["tuner"][0]["speedup"] > 1.5
    assert recommendation["recommended"] is None
    assert "It did not hold on held-out prompts: do not speculate." in recommendation["advice"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--measurements", "2"], "too few for 1 drafts; give at least 3"),
        (["--minutes", "0"], "minutes must be"),
        (["--draft", "good.gguf", "good.gguf"], "one or several different names"),
        (["--prompts", "no-such-set"], "no-such-set"),
        (["--recorded", "tiny/nothing"], "no trace of tiny/nothing ships to practise on; there are, among others: "),
        (["--target", ""], "name the target for llama.cpp with --target"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_started(
    behaviours: dict[str | None, Behaviour],
    more: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train_command(arguments(tmp_path, "--draft", "good.gguf", *more)) == 2
    assert message in capsys.readouterr().err
    assert not behaviours["good.gguf"].asked
    assert not (tmp_path / "run").exists()


def test_a_run_that_measured_nothing_is_an_error_and_can_be_begun_again(
    behaviours: dict[str | None, Behaviour],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = arguments(tmp_path, "--draft", "good.gguf", "--measurements", "3", "--judged-prompts", "1")

    def fail(*_: object) -> Served:
        raise EngineError("fake does not start")

    with monkeypatch.context() as patched:
        patched.setattr(FakeEngine, "serve", fail)
        assert train_command(words) == 2
    assert "fake does not start" in capsys.readouterr().err

    def ignore(*_: object) -> None:
        raise SettingIgnoredError("fake drafts as it likes")

    with monkeypatch.context() as patched:
        patched.setattr(FakeEngine, "check_effect", ignore)
        assert train_command(words) == 2
    assert "nothing could be measured. fake drafts as it likes" in capsys.readouterr().err
    assert train_command(words) == 0
