"""Reading a run's folder for its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from specgym.agents.evaluation.heat_map import HeatMap, load_heat_maps, save_heat_maps
from specgym.agents.evaluation.results import ResultTable, Row
from specgym.agents.report.content import gather, read_curves, shortened
from specgym.agents.report.summary import summarise
from specgym.agents.training.run_folder import RunFileError


def row(workload: str, method: str, reward: float, width: float = 0.125) -> dict[str, Any]:
    values = {"ms_per_token": 2.0, "speedup": reward, "divergence": 0.0, "reward": reward}
    return {"workload": workload, "method": method, "knobs": {}, **values,
            "intervals": {"reward": [reward - width, reward + width]}}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with nothing but its settings and its table, on which the defaults win once."""
    folder = tmp_path / "mine"
    folder.mkdir()
    settings = {"format": "specgym-settings-1", "command": "python train.py", "settings": {"learning": {"epochs": 3}}}
    rewards = {"a/prose": (1.5, 2.0), "b/code": (2.5, 0.75)}
    rows = [
        row(workload, method, reward)
        for workload, pair in rewards.items()
        for method, reward in zip(("plain", "default", "learned"), (1.0, *pair), strict=True)
    ]
    table = {"format": "specgym-table-1", "command": "python train.py", "hardware": {"cores": 2}, "rows": rows,
             "protocol": {}}  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "table.json").write_text(json.dumps(table))
    return folder


def heat_map() -> HeatMap:
    reward = np.array([[1.0, np.nan], [2.0, 4.0], [0.5, 3.0]])
    axes = {"fallback": np.array([0.1, 0.5, 0.9]), "rollback": np.array([1.0, 8.0])}
    middle, near, best = ({"fallback": x, "rollback": y} for x, y in ((0.5, 8.0), (0.8, 7.0), (0.85, 7.5)))
    return HeatMap("a/prose", axes, reward, [middle, near], middle, best, middle)


def test_what_a_run_lacks_is_listed_with_the_command_that_makes_it(run: Path) -> None:
    report = gather(run, "python evaluate.py mine --report")
    assert set(report.missing) == {"heat_maps", "curves", "transfer", "patterns"}
    assert report.missing["curves"] == f"python train.py --resume {run.as_posix()} --total-timesteps <more>"
    assert report.missing["transfer"] == "python train.py --tuner"
    assert len(report.table.rows) == 6
    assert report.table.rows[2].intervals["reward"] == (1.875, 2.125)
    assert report.settings == {"learning": {"epochs": 3}}
    assert report.table.hardware == {"cores": 2}
    assert report.made_by["the run"] == "python train.py"


def test_the_summary_says_where_something_simpler_is_better(run: Path) -> None:
    text = " ".join(gather(run, "c").summary)
    assert "Against default, the learned reward is higher on 1 of 2 workloads; on 1 of these" in text
    assert "A simpler setting, default, is better on b/code." in text
    assert "Plain decoding is faster than the learned threshold knobs on b/code." in text


@pytest.mark.parametrize("divergence", [0.0, 0.01])
def test_the_text_is_called_the_targets_own_where_no_row_strays(divergence: float) -> None:
    values = {"speedup": 1.5, "reward": 1.5, "target_tokens_per_token": 3.25}
    rows = [
        Row(workload, method, {}, {**values, "divergence": divergence if workload == "b/code" else 0.0}, {})
        for workload in ("a/prose", "b/code")
        for method in ("default", "learned")
    ]
    text = " ".join(summarise(ResultTable(rows), [], None))
    assert ("The text is the target's own." in text) == (divergence == 0)
    assert ("3.2 tokens for every one emitted" in text) == (divergence == 0)
    assert ("with a divergence of" in text) == (divergence > 0)


def test_a_run_of_learning_to_tune_is_told_its_own_commands(run: Path) -> None:
    settings = {"workloads": ["tiny/prose"]}
    (run / "settings.json").write_text(json.dumps({"format": "specgym-tuner-settings-1", "settings": settings}))
    missing = gather(run, "c").missing
    assert missing["transfer"] == f"python evaluate.py {run.as_posix()} --transfer"
    assert missing["heat_maps"] == f"python train.py --resume {run.as_posix()}"


def test_everything_that_other_commands_add_is_read(run: Path, make_transfer: Callable[..., dict[str, Any]]) -> None:
    save_heat_maps(run / "heat_maps.json", [heat_map()], "python maps")
    (run / "transfer.json").write_text(json.dumps(make_transfer("a")))
    (run / "patterns.json").write_text(
        json.dumps({"rows": [{"workload": "a/prose"}], "correlations": [{"of": "x"}], "verdict": "Low ones."})
    )
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for step in (10, 20):
            writer.add_scalar("reward/total", step / 10, step)
            writer.add_scalar("workload/a/prose/decoding/speedup", 1.0, step)
            writer.add_scalar("time/fps", 99.0, step)
    report = gather(run, "c")
    assert report.missing == {}
    assert report.correlations == [{"of": "x"}]
    assert report.heat_maps[0].path == heat_map().path
    assert set(report.curves) == {"reward/total", "workload/a/prose/decoding/speedup"}
    assert report.curves["reward/total"][1].tolist() == [1.0, 2.0]
    assert report.made_by["the heat maps"] == "python maps"
    text = " ".join(report.summary)
    assert "On the grids the recommended settings reach 75.0 %" in text
    assert "A simpler method wins there: tpe (99.0 %)" in text
    assert "significantly worse than tpe" in text
    assert report.pattern_verdict == "Low ones."


def test_learned_is_named_the_best_only_where_it_is(make_transfer: Callable[..., dict[str, Any]]) -> None:
    transfer = make_transfer("a")
    transfer["summary"] = [
        point | ({"fraction": 0.995} if point["method"] == "learned" else {}) for point in transfer["summary"]
    ]
    text = " ".join(summarise(ResultTable([]), [], transfer))
    assert "No other method is better there; next is tpe with 99.0 %" in text
    assert "wins" not in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("table.json", '{"format": "specgym-table-1", "rows": [{"workload": "a"}]}'),
        ("heat_maps.json", '{"format": "specgym-heat-maps-1", "maps": [{"workload": "a"}]}'),
        ("transfer.json", '{"format": "specgym-transfer-1", "folds": [], "results"'),
        ("transfer.json", '{"format": "specgym-transfer-1", "folds": [], "results": [], "summary": [{}], "tests": []}'),
        ("transfer.json", '{"format": "another"}'),
        ("patterns.json", '{"rows": "none"}'),
        ("knobs.json", "[]"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(RunFileError, match=rf"{name}.*write it again with: python"):
        gather(run, "c")


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "settings.json").write_text('{"format": "another", "settings": {}}')
    with pytest.raises(RunFileError, match="does not hold the settings of a run"):
        gather(run, "c")
    with pytest.raises(RunFileError, match="not the folder of a run"):
        gather(tmp_path / "none", "c")


def test_heat_maps_are_read_as_they_were_written(tmp_path: Path) -> None:
    drawn = heat_map()
    save_heat_maps(tmp_path / "maps.json", [drawn], "python maps")
    (read,), command = load_heat_maps(tmp_path / "maps.json", "make them")
    assert command == "python maps"
    np.testing.assert_array_equal(read.reward, drawn.reward)
    assert list(read.axes) == ["fallback", "rollback"]
    np.testing.assert_array_equal(read.axes["rollback"], drawn.axes["rollback"])
    assert (read.path, read.default, read.recommended, read.best) == (
        drawn.path, drawn.default, drawn.recommended, drawn.best
    )  # fmt: skip


def test_heat_maps_of_earlier_versions_are_read(tmp_path: Path) -> None:
    drawn = heat_map()
    entry = {"workload": "a/prose", "fallback": [0.1, 0.5, 0.9], "rollback": [1.0, 8.0],
             "reward": [[1.0, None], [2.0, 4.0], [0.5, 3.0]], "path": [[0.5, 8.0], [0.8, 7.0]], "default": [0.5, 8.0],
             "recommended": [0.85, 7.5], "best": [0.5, 8.0]}  # fmt: skip
    content = {"format": "specgym-heat-maps-1", "command": "python maps", "maps": [entry]}
    (tmp_path / "maps.json").write_text(json.dumps(content))
    ((read,), _) = load_heat_maps(tmp_path / "maps.json", "write them again")
    np.testing.assert_array_equal(read.reward, drawn.reward)
    assert read.reward_at(read.best) == 4
    assert (read.path, read.default, read.recommended, read.best) == (
        drawn.path, drawn.default, drawn.recommended, drawn.best
    )  # fmt: skip


def test_a_report_of_stopping_shows_its_table_and_curves(run: Path) -> None:
    rows = [{"workload": "tiny/prose", "method": "learned", "rule": "a network", "speedup": 1.5, "intervals": {}}]
    stopping = {"format": "specgym-stopping-table-1", "command": "python train.py", "rows": rows}
    (run / "table.json").write_text(json.dumps(stopping))
    (run / "settings.json").write_text('{"format": "specgym-stopping-settings-1", "settings": {}}')
    with SummaryWriter(str(run / "tensorboard" / "seed-0")) as writer:
        for step in (10, 20):
            writer.add_scalar("rollout/ep_rew_mean", step, step)
    report = gather(run, "c")
    assert report.title.startswith("Stopping of drafts")
    assert (report.table.rows[0].rule, report.table.rows[0].values) == ("a network", {"speedup": 1.5})
    assert list(report.curves) == ["seed-0/rollout/ep_rew_mean"]
    assert set(report.missing) == {"hardware"}


def test_of_a_step_logged_twice_the_last_value_counts(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in ((10, 1.0), (20, 2.0), (20, 5.0)):
            writer.add_scalar("reward/total", value, step)
    steps, values = read_curves(tmp_path)["reward/total"]
    assert steps.tolist() == [10, 20]
    assert values.tolist() == [1, 5]


def test_a_long_curve_is_averaged_in_blocks() -> None:
    steps, values = shortened(np.arange(10.0), np.arange(10.0) ** 2, longest=3)
    assert steps.tolist() == [2, 5, 9]
    np.testing.assert_allclose(values, [(0 + 1 + 4) / 3, (9 + 16 + 25) / 3, (36 + 49 + 64 + 81) / 4])
