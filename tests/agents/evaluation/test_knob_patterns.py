"""Patterns of good settings, on grids over shipped recordings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from specgym.agents.evaluation.knob_patterns import AIMS, patterns, preferred_ranges, save_patterns, verdict
from specgym.agents.evaluation.replayed import TuningTask
from specgym.envs import RewardSettings

PLAIN = RewardSettings(acceptance_weight=0, range_weight=0)


@pytest.fixture(scope="module")
def task() -> TuningTask:
    """A shipped workload."""
    return TuningTask("tiny/prose", PLAIN)


def test_patterns_say_what_staying_in_the_preferred_ranges_loses(task: TuningTask, tmp_path: Path) -> None:
    rows = patterns([task])
    assert {row.aim for row in rows} <= set(AIMS)
    speed = next(row for row in rows if row.aim == "speed")
    grid = task.grid()
    assert speed.best == grid.values["speedup"].max() == speed.speedup
    inside = (grid.axes["fallback"] >= 0.09) & (grid.axes["fallback"] <= 0.41)
    columns = grid.axes["rollback"] <= 3.2
    best_inside = grid.values["speedup"][np.ix_(inside, columns)].max()
    assert speed.inside_loss == pytest.approx(1 - best_inside / speed.best)
    plateau = grid.values["speedup"] >= 0.99 * speed.best
    assert speed.plateau == plateau.mean()
    assert speed.ends["fallback"][0] <= speed.knobs["fallback"] <= speed.ends["fallback"][1]
    assert speed.ends["rollback"][0] == grid.axes["rollback"][plateau.any(0)].min()
    bounded = {row.aim: row for row in rows if row.aim.startswith("speed, divergence")}
    for aim, row in bounded.items():
        assert row.divergence <= float(aim.rsplit(" ", 1)[1])
        assert row.best <= speed.best
    save_patterns(tmp_path, [task])
    content = json.loads((tmp_path / "patterns.json").read_text())
    assert content["verdict"] == verdict(rows, preferred_ranges(task))
    assert speed.inside_loss is not None
    assert f"loses {100 * speed.inside_loss:.1f} % on average" in content["verdict"]
    assert len(content["rows"]) == len(rows) == len((tmp_path / "patterns.csv").read_text().splitlines()) - 1
    stored = content["rows"][0]
    assert stored["inside_served"] == (stored["inside_loss"] <= 0.03)
    assert {"fallback", "rollback", "fallback_low", "rollback_high", "default_acceptance"} <= set(stored)


def test_the_verdict_counts_workloads_where_no_setting_keeps_a_bound(task: TuningTask) -> None:
    kept = [row for row in patterns([task]) if not row.aim.endswith("0.05")]
    text = verdict(kept, preferred_ranges(task))
    assert "For speed, divergence at most 0.05: no setting keeps the bound on any of the 1 workloads" in text
    assert "no workload" in verdict([], {})


def test_a_lossless_decoder_without_preferred_ranges_has_neither_bounds_nor_losses() -> None:
    task = TuningTask("tiny/prose", PLAIN, "speculative")
    rows = patterns([task])
    assert [row.aim for row in rows] == ["reward", "speed"]
    assert all(row.inside_loss is None for row in rows)
    assert "inside_loss" not in rows[0].row()
    text = verdict(rows, preferred_ranges(task))
    assert "the best draft_length" in text
    assert "preferred" not in text
    assert "divergence" not in text
