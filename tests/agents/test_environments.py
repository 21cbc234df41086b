"""The environments that threshold training makes from its settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from specgym.agents.environments import make_env
from specgym.agents.requirements import SettingsError
from specgym.agents.settings import EnvironmentSettings, TrainSettings
from specgym.decoding.latency import LatencyProfile
from specgym.envs.workloads import Workload


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    LatencyProfile("toy", {0: 0.0, 1: 0.001}, {1: 0.010, 2: 0.011}, 0.010, {"device": "imaginary"}).save(path)
    return path


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Workload) -> None:
        raise AssertionError("a replay needs no model")

    monkeypatch.setattr(Workload, "load", refuse)


@pytest.mark.usefixtures("no_models")
def test_thresholds_can_be_learned_from_shipped_traces_without_models(profile: Path) -> None:
    settings = TrainSettings(workloads=("tiny/prose",), environment=EnvironmentSettings(backend="replay"))
    env = make_env(settings, 0, profile)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.zeros(2, np.float32))
    assert np.isfinite(reward)
    assert info["tokens"] > 0


def test_a_replay_by_the_clock_is_refused() -> None:
    with pytest.raises(SettingsError, match="a replay has no clock"):
        EnvironmentSettings(backend="replay", timing="wall")
