"""Settings of every experiment: written and read, generated from the registry, refused, and changed by a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specgym.agents import (
    KnobSettings,
    RunSettings,
    SettingsError,
    StopSettings,
    default_settings,
    load_settings,
    save_settings,
    tuner_settings,
)
from specgym.agents.command_line import learnable
from specgym.agents.training.run_folder import RunFileError
from specgym.agents.training.settings_io import prolonged
from specgym.decoding import SpecgymError, decoder_names
from specgym.envs import RewardSettings, recorded_workloads
from tests.helpers.sealing import reseal

LOSSLESS = [name for name in decoder_names() if type(default_settings(name)) is KnobSettings]
LOSSY = [name for name in decoder_names() if name not in LOSSLESS]


@pytest.mark.parametrize("kind", [*learnable().values(), *learnable(tuner=True).values()])
def test_written_and_read_they_are_the_same(kind: Any, tmp_path: Path) -> None:
    settings: RunSettings = replace(kind(), name="mine", total_timesteps=77, runs=tmp_path / "runs")
    save_settings(settings, tmp_path / "settings.json", "python train.py --name mine")
    stored = load_settings(tmp_path / "settings.json")
    assert type(stored) is type(settings)
    assert stored == settings
    assert json.loads((tmp_path / "settings.json").read_text())["command"] == "python train.py --name mine"


def test_a_tuner_practises_on_sampled_texts_only_where_the_decoder_names_them() -> None:
    for name in ("threshold", "speculative"):
        practised = tuner_settings(name).workloads
        assert [workload for workload in practised if "@" in workload] == ["tiny/prose@1.0"]
        assert {"tiny-10m-xs/chat", "smollm2-4l/code"} < set(practised) < set(recorded_workloads(name))
    assert "tiny-3m/prose@1.0" in tuner_settings("lookahead").workloads


def test_what_is_nested_survives_being_written_and_read(tmp_path: Path) -> None:
    settings = default_settings(
        "threshold",
        workloads=("tiny/prose", "tiny/code@1.0"),
        environment={
            "backend": "live",
            "timing": "wall",
            "reward": RewardSettings(divergence_weight=2.0, ranges={"fallback": (0.1, 0.2)}),
            "decoder_options": {"max_draft_length": 7},
        },
        learning={"batch_size": 20, "gamma": 1.0},
        evaluation={"seeds": (3, 4, 5)},
    )
    save_settings(settings, tmp_path / "settings.json", "")
    assert load_settings(tmp_path / "settings.json") == settings
    assert settings.decoder_options == {"max_draft_length": 7, "stop": "expected-gain"}


def broken(path: Path, change: dict[str, Any]) -> Path:
    save_settings(default_settings("threshold", name="x"), path, "")
    content = json.loads(path.read_text())
    for place, value in change.items():
        *folders, last = place.split(".")
        inner = content
        for folder in folders:
            inner = inner[folder]
        inner[last] = value
    reseal(path, **content)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings.learning.momentum": 1}, "settings.learning has no 'momentum'; it has: rollout_steps"),
        ({"settings.total_timesteps": "many"}, "settings.total_timesteps must be int, got 'many'"),
        ({"settings.subprocesses": 1}, "settings.subprocesses must be bool"),
        ({"settings.learning.gamma": 1.5}, "gamma must be a number from 0 to 1"),
        ({"settings.environment.timing": "sundial"}, "sundial"),
        ({"settings.environment.reward.speed_weight": -1.0}, "speed_weight"),
        ({"settings.environment.decoder_options": {"length": 3}}, "decoder_options has no 'length'"),
        ({"settings.workloads": []}, "workloads must have at least 1 value"),
        ({"settings.decoder": "oracle"}, "no decoder 'oracle'"),
        ({"settings": [1]}, "settings must be an object"),
        ({"format": "somebody else's"}, "does not hold the settings of a run"),
        ({"experiment": "boil-eggs"}, "is of no known experiment"),
    ],
)
def test_a_file_with_something_wrong_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = broken(tmp_path / "settings.json", change)
    with pytest.raises(RunFileError, match=r"settings\.json") as caught:
        load_settings(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00\x01"])
def test_corrupt_and_foreign_files_are_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(content)
    with pytest.raises(RunFileError, match=r"settings\.json"):
        load_settings(path)
    with pytest.raises(RunFileError, match="there is no"):
        load_settings(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workloads": ("tiny/prose", "tiny/prose")}, "workloads has 'tiny/prose' twice"),
        ({"total_timesteps": 0}, "total_timesteps must be a whole number from 1 to 10000000000, got 0"),
        ({"name": "a/b"}, "plain folder name"),
        ({"name": "a\nb"}, "plain folder name"),
        ({"name": "é" * 101}, "name must have at most 200 bytes, and has 202"),
        ({"workloads": (None,)}, "each of workloads must be a string"),
        ({"threads": 100_000}, "threads must be a whole number from 0 to 1024, got 100000"),
        ({"environments": 10**6}, "environments must be a whole number from 0 to 65536"),
        ({"environments": 2000, "environment": {"backend": "live"}}, "at most 1024 live environments"),
        ({"total_timesteps": 10**11}, "total_timesteps must be a whole number from 1 to 10000000000"),
        ({"seeds": (2**32,)}, "each of seeds must be a whole number from 0 to 4294967295"),
        ({"learning": {"learning_rate": 1e300}}, "learning_rate must be a number above 0 and at most 10"),
        ({"learning": {"rollout_steps": 10**12}}, "rollout_steps must be a whole number from 1 to"),
        ({"weights": (1.0, float("nan"))}, "each of weights must be a finite number above 0, got nan"),
        ({"seeds": (0, -1)}, "each of seeds must be a whole number from 0 to 4294967295, got -1"),
        ({"seeds": ()}, "seeds must have at least 1 value"),
        ({"seeds": (1, 0, 1)}, "seeds has 1 twice"),
        ({"evaluation": {"seeds": ()}}, "seeds must have at least 1 value"),
        ({"learning": {"std_low": 2.0}}, "std_low must be below"),
        ({"learning": {"learning_rate_end": 0.0, "plateau_patience": 3}}, "give one of them, not both"),
        ({"learning": {"workload_priorities": True}}, "it is for train.py --tuner"),
        ({"environment": {"recordings": Path("outcomes"), "backend": "live"}}, "recordings are for"),
        ({"environment": {"backend": "replay", "timing": "wall"}}, "a replay has no clock"),
        ({"max_divergence": 0.0}, "for 0 use a lossless decoder"),
        ({"environment": {"reward": RewardSettings(max_divergence=0.1)}}, r"give --max-divergence 0\.1 instead"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        default_settings("threshold", **changes)


def test_a_decoder_without_knobs_or_name_has_no_settings() -> None:
    with pytest.raises(SettingsError, match="no decoder 'oracle'"):
        default_settings("oracle")


def test_a_resumed_run_may_be_prolonged_and_nothing_else() -> None:
    saved = default_settings("threshold", name="x", total_timesteps=100)
    assert prolonged(saved, replace(saved, total_timesteps=200)).total_timesteps == 200
    with pytest.raises(SettingsError, match="would shorten it"):
        prolonged(saved, replace(saved, total_timesteps=50))
    with pytest.raises(SettingsError, match=r"learning\.gamma = 0\.9, and cannot go on with 0\.5"):
        prolonged(saved, replace(saved, learning=replace(saved.learning, gamma=0.5)))
    assert prolonged(saved, replace(saved, seeds=(0, 1, 2, 3))).seeds == (0, 1, 2, 3)
    stopping = StopSettings(seeds=(0, 1))
    assert prolonged(stopping, replace(stopping, seeds=(2, 0, 1))).seeds == (2, 0, 1)
    with pytest.raises(SettingsError, match="seeds can only be added"):
        prolonged(stopping, replace(stopping, seeds=(0,)))


@pytest.mark.parametrize("decoder", LOSSLESS)
@pytest.mark.parametrize("reward", [RewardSettings(max_divergence=0.1), RewardSettings(divergence_weight=1.0)])
def test_a_lossless_decoder_has_no_divergence_to_weigh(decoder: str, reward: RewardSettings) -> None:
    with pytest.raises(SettingsError, match="the target's own"):
        default_settings(decoder, environment={"reward": reward})
    with pytest.raises(TypeError, match="max_divergence"):
        default_settings(decoder, max_divergence=0.1)


@pytest.mark.parametrize("decoder", LOSSY)
def test_by_default_a_lossy_decoder_is_learned_from_recordings_with_three_seeds_under_a_bound(decoder: str) -> None:
    settings = default_settings(decoder)
    assert settings.replayed
    assert settings.seeds == (0, 1, 2)
    assert settings.bound == settings.reward.max_divergence == 0.05
    weights = (0.1, 0.05) if decoder == "threshold" else (0, 0)  # others name no preferred ranges
    assert (settings.reward.acceptance_weight, settings.reward.range_weight) == weights
    assert default_settings(decoder, max_divergence=None).bound is None
    assert tuner_settings(decoder, workloads=("tiny/prose",)).max_divergence == 0.05


@pytest.mark.parametrize("decoder", LOSSY)
def test_a_lossy_decoder_may_have_a_bound(decoder: str) -> None:
    settings = default_settings(decoder, max_divergence=0.1)
    assert (settings.reward.max_divergence, settings.reward.speed_weight, settings.bound) == (0.1, 1, 0.1)


@pytest.mark.parametrize("decoder", LOSSLESS)
def test_by_default_speed_is_all_that_a_lossless_decoder_is_rewarded_for(decoder: str) -> None:
    settings = default_settings(decoder)
    reward = settings.reward
    assert reward.speed_weight == 1
    assert reward.acceptance_weight == reward.range_weight == reward.divergence_weight == 0
    assert settings.replayed
    # Texts as long in practice as in the table.
    assert settings.environment.max_new_tokens == settings.evaluation.max_new_tokens


def test_many_practise_on_replay_and_one_a_workload_live() -> None:
    settings = default_settings("lookahead", workloads=("tiny-3m/prose", "tiny-3m/code"))
    assert settings.practising == 256
    many = tuple(f"tiny-3m/{name}" for name in ("prose", "code", "definitions", "chat"))
    many += tuple(f"{name}@1.0" for name in many)
    assert replace(settings, workloads=many).practising == 256
    assert (
        replace(settings, workloads=(*many, *(f"{name}@0.{n}" for name in many[:4] for n in range(1, 10)))).practising
        == 8 * 44
    )
    assert replace(settings, environments=5).practising == 5
    assert replace(settings, environment=replace(settings.environment, backend="live")).practising == 2


@pytest.mark.parametrize("kind", [*learnable().values(), *learnable(tuner=True).values()])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"device": "gpu"}, "device must be cpu, cuda, cuda:<number> or auto, got 'gpu'"),
    ],
)
def test_a_type_or_a_device_that_models_cannot_have_is_refused(kind: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecgymError, match=message):
        replace(kind(), **change)


def test_a_run_goes_on_with_its_own_type_and_device(tmp_path: Path) -> None:
    settings = default_settings("threshold", dtype="bfloat16", device="cpu")
    save_settings(settings, tmp_path / "settings.json", "python train.py")
    stored = load_settings(tmp_path / "settings.json")
    assert (stored.dtype, stored.device) == ("bfloat16", "cpu")
    with pytest.raises(SettingsError, match="started with dtype = bfloat16, and cannot go on with float32"):
        prolonged(stored, replace(stored, dtype="float32"))
