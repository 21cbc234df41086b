"""Heat maps of a run of `train.py`, by replay of the traces that ship."""

from __future__ import annotations

import numpy as np
import pytest

from specgym.agents import default_settings
from specgym.agents.evaluation.heat_map import heat_maps_of
from specgym.agents.export.knob_policy import ExportedPolicy, KnobRange


@pytest.fixture
def upward() -> ExportedPolicy:
    """A policy that raises the fallback by half a step, whatever it sees."""
    knobs = [KnobRange("fallback", 0.05, 0.95, 0.5, 0.2), KnobRange("rollback", 1.0, 16.0, 1.0, 1.5)]
    zeros = {"hidden.0.weight": np.zeros((3, 2)), "hidden.0.bias": np.zeros(3), "mean.weight": np.zeros((2, 3))}
    zeros |= {"std.weight": np.zeros((2, 3)), "std.bias": np.zeros(2), "mean.bias": np.array([np.arctanh(0.5), 0.0])}
    bounds = {"low": np.array([0.05, 1.0]), "high": np.array([0.95, 16.0])}
    weights = {name: array.astype(np.float32) for name, array in (zeros | bounds).items()}
    return ExportedPolicy(knobs, ["fallback", "rollback"], 0.05, 1.0, weights)


def test_a_map_shows_the_way_of_the_policy_over_the_grid(upward: ExportedPolicy) -> None:
    settings = default_settings("threshold", workloads=("tiny-3m-ngram/prose",))
    (found,) = heat_maps_of(settings, upward, {"tiny-3m-ngram/prose": {"fallback": 0.95, "rollback": 1.0}})
    assert found.reward.shape == (19, 16)
    assert found.default == (0.5, 1.0)
    assert found.recommended == (0.95, 1.0)
    assert found.reward_at(found.best) == pytest.approx(found.reward.max())
    assert [fallback for fallback, _ in found.path[:4]] == pytest.approx([0.5, 0.6, 0.7, 0.8], abs=1e-6)
    assert {rollback for _, rollback in found.path} == {1.0}


def test_workloads_without_a_fitting_trace_have_no_map(upward: ExportedPolicy) -> None:
    settings = default_settings(
        "threshold", workloads=("tiny-3m-ngram/prose",), environment={"decoder_options": {"max_draft_length": 4}}
    )  # traces of thresholds serve the draft length that was recorded
    assert heat_maps_of(settings, upward, {"tiny-3m-ngram/prose": {"fallback": 0.5, "rollback": 1.0}}) == []
