"""Heat maps of a run of `train.py`, by replay of the traces that ship."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specgym.agents.evaluation.heat_map import heat_map, heat_maps_of, load_heat_maps, save_heat_maps
from specgym.agents.evaluation.replayed import TuningTask
from specgym.agents.experiments.tune_knobs_settings import default_settings
from specgym.agents.export.knob_policy import ExportedPolicy, KnobRange
from specgym.envs import RewardSettings


@pytest.fixture
def upward() -> ExportedPolicy:
    """A policy that raises the fallback by half a step, whatever it sees."""
    knobs = [KnobRange("fallback", 0.05, 0.95, 0.3, 0.2), KnobRange("rollback", 1.0, 16.0, 1.0, 1.5)]
    zeros = {"hidden.0.weight": np.zeros((3, 2)), "hidden.0.bias": np.zeros(3), "mean.weight": np.zeros((2, 3))}
    zeros |= {"std.weight": np.zeros((2, 3)), "std.bias": np.zeros(2), "mean.bias": np.array([np.arctanh(0.5), 0.0])}
    bounds = {"low": np.array([0.05, 1.0]), "high": np.array([0.95, 16.0])}
    weights = {name: array.astype(np.float32) for name, array in (zeros | bounds).items()}
    return ExportedPolicy(knobs, ["fallback", "rollback"], 0.05, 1.0, weights)


def test_a_map_shows_the_way_of_the_policy_over_the_grid(upward: ExportedPolicy) -> None:
    settings = default_settings(workloads=("tiny-3m-ngram/prose",))
    (drawn,) = heat_maps_of(settings, upward, {"tiny-3m-ngram/prose": {"fallback": 0.95, "rollback": 1.0}})
    assert drawn.reward.shape == (19, 16)
    assert drawn.default == {"fallback": 0.3, "rollback": 1.0}
    assert drawn.recommended == {"fallback": 0.95, "rollback": 1.0}
    assert drawn.reward_at(drawn.best) == pytest.approx(drawn.reward.max())
    assert [point["fallback"] for point in drawn.path[:4]] == pytest.approx([0.3, 0.4, 0.5, 0.6], abs=1e-6)
    assert {point["rollback"] for point in drawn.path} == {1.0}


def test_workloads_without_a_fitting_recording_have_no_map(upward: ExportedPolicy) -> None:
    settings = default_settings(workloads=("tiny-3m-ngram/prose",))
    options = replace(settings.environment.decoder_options, max_draft_length=4)
    settings = replace(settings, environment=replace(settings.environment, decoder_options=options))
    # Traces of thresholds serve the draft length that was recorded.
    assert heat_maps_of(settings, upward, {"tiny-3m-ngram/prose": {"fallback": 0.5, "rollback": 1.0}}) == []


def test_heat_maps_of_any_decoder_have_its_knobs_as_axes(tmp_path: Path) -> None:
    task = TuningTask("tiny-3m-1l/prose", RewardSettings(), "speculative", options={"stop": "never"})
    drawn = heat_map(task, [task.default], {"draft_length": 3.0})
    save_heat_maps(tmp_path / "maps.json", [drawn], "python maps")
    ((read,), _) = load_heat_maps(tmp_path / "maps.json", "write them again")
    assert list(read.axes) == ["draft_length"]
    assert read.reward.tolist() == drawn.reward.tolist() == task.grid().reward.tolist()
    assert [row["draft_length"] for row in read.rows()] == list(range(17))
    assert read.recommended == {"draft_length": 3.0}
