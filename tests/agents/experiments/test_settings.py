"""Settings: what is refused, and that they survive being written and read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specgym.agents.experiments.settings import EvaluationSettings, LearningSettings
from specgym.agents.experiments.tune_knobs import ThresholdEnvironment, ThresholdSettings
from specgym.agents.training.files import RunFileError
from specgym.agents.training.settings_checks import SettingsError
from specgym.agents.training.settings_io import prolonged
from specgym.envs.tuning.reward import RewardSettings


def test_written_and_read_they_are_the_same(tmp_path: Path) -> None:
    settings = ThresholdSettings(
        workloads=("tiny/prose", "tiny/code@1.0"),
        total_timesteps=77,
        name="mine",
        runs=tmp_path / "runs",
        environment=ThresholdEnvironment(
            timing="wall", reward=RewardSettings(divergence_weight=2.0, ranges={"fallback": (0.1, 0.2)})
        ),
        learning=LearningSettings(batch_size=20, gamma=1.0),
        evaluation=EvaluationSettings(seeds=(3, 4, 5)),
    )
    settings.save(tmp_path / "settings.json", "python train.py --name mine")
    assert ThresholdSettings.load(tmp_path / "settings.json") == settings
    assert json.loads((tmp_path / "settings.json").read_text())["command"] == "python train.py --name mine"


def broken(path: Path, change: dict[str, Any]) -> Path:
    ThresholdSettings(name="x").save(path, "")
    content = json.loads(path.read_text())
    for place, value in change.items():
        *folders, last = place.split(".")
        inner = content
        for folder in folders:
            inner = inner[folder]
        inner[last] = value
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings.learning.momentum": 1}, "settings.learning has no 'momentum'; it has: rollout_steps"),
        ({"settings.total_timesteps": "many"}, "settings.total_timesteps must be int, got 'many'"),
        ({"settings.subprocesses": 1}, "settings.subprocesses must be bool"),
        ({"settings.learning.gamma": 1.5}, "gamma must be between 0 and 1"),
        ({"settings.environment.timing": "sundial"}, "sundial"),
        ({"settings.environment.reward.speed_weight": -1.0}, "speed_weight"),
        ({"settings.workloads": []}, "workloads is empty"),
        ({"settings": [1]}, "settings must be an object"),
        ({"format": "somebody else's"}, "does not hold the settings of a run"),
    ],
)
def test_a_file_with_something_wrong_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = broken(tmp_path / "settings.json", change)
    with pytest.raises(RunFileError, match=r"settings\.json") as caught:
        ThresholdSettings.load(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00\x01"])
def test_corrupt_and_foreign_files_are_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(content)
    with pytest.raises(RunFileError, match=r"settings\.json"):
        ThresholdSettings.load(path)
    with pytest.raises(RunFileError, match="there is no"):
        ThresholdSettings.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workloads": ("tiny/prose", "tiny/prose")}, "given twice"),
        ({"total_timesteps": 0}, "total_timesteps must be a whole number of at least 1"),
        ({"name": "a/b"}, "plain folder name"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ThresholdSettings(**settings)
    with pytest.raises(SettingsError, match="at least one seed"):
        EvaluationSettings(seeds=())
    with pytest.raises(SettingsError, match="std_low must be below"):
        LearningSettings(std_low=2.0)


def test_a_bound_is_said_once() -> None:
    with pytest.raises(SettingsError, match=r"give --max-divergence 0\.1 instead"):
        ThresholdSettings(environment=ThresholdEnvironment(reward=RewardSettings(max_divergence=0.1)))
    assert ThresholdSettings(max_divergence=0.1).reward.max_divergence == 0.1


def test_a_resumed_run_may_be_prolonged_and_nothing_else() -> None:
    saved = ThresholdSettings(name="x", total_timesteps=100)
    assert prolonged(saved, replace(saved, total_timesteps=200)).total_timesteps == 200
    with pytest.raises(SettingsError, match="would shorten it"):
        prolonged(saved, replace(saved, total_timesteps=50))
    with pytest.raises(SettingsError, match=r"learning\.gamma = 0\.95, and cannot go on with 0\.5"):
        prolonged(saved, replace(saved, learning=LearningSettings(gamma=0.5)))
