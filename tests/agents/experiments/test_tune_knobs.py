"""The settings of each decoder that can be tuned: what is kept, what is refused, and that commands know them all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from specgym.agents.command_line import EnvName
from specgym.agents.experiments.settings import TrainSettings
from specgym.agents.experiments.tune_knobs import (
    TUNABLE,
    DraftTreeSettings,
    LookaheadSettings,
    MedusaSettings,
    ReplayedEnvironment,
    ThresholdSettings,
    load_settings,
)
from specgym.agents.training.files import RunFileError
from specgym.agents.training.run import train
from specgym.agents.training.settings_checks import SettingsError
from specgym.agents.training.settings_io import prolonged
from specgym.decoding import decoder_names
from specgym.envs.tuning.reward import RewardSettings


@pytest.mark.parametrize("kind", TUNABLE.values())
def test_written_and_read_by_their_format_they_are_the_same(kind: type[TrainSettings], tmp_path: Path) -> None:
    settings = kind(name="mine", total_timesteps=77, workloads=("tiny/prose",))
    settings.save(tmp_path / "settings.json", "python train.py")
    found = load_settings(tmp_path / "settings.json")
    assert type(found) is kind
    assert found == settings


def test_formats_decoders_and_environments_are_told_apart() -> None:
    assert len({kind.FORMAT for kind in TUNABLE.values()}) == len(TUNABLE)
    assert {kind.DECODER for kind in TUNABLE.values()} <= set(decoder_names())
    assert set(TUNABLE) <= set(get_args(EnvName))


def test_settings_of_another_format_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"format": "specgym-tuner-settings-1", "settings": {}}')
    with pytest.raises(RunFileError, match="of 'specgym-tuner-settings-1'"):
        load_settings(path)
    ThresholdSettings().save(path, "")
    with pytest.raises(RunFileError, match="a run of Lookahead decoding"):
        LookaheadSettings.load(path)


@pytest.mark.parametrize("kind", [LookaheadSettings, DraftTreeSettings])
@pytest.mark.parametrize("name", ["max_divergence", "draft_length"])
def test_what_means_nothing_without_chains_is_not_offered(kind: type[TrainSettings], name: str) -> None:
    with pytest.raises(TypeError, match=name):
        kind(**{name: 4})
    with pytest.raises(TypeError, match=name):
        ReplayedEnvironment(**{name: 4})


@pytest.mark.parametrize("reward", [RewardSettings(max_divergence=0.1), RewardSettings(divergence_weight=1.0)])
def test_a_lossless_decoder_has_no_divergence_to_weigh(reward: RewardSettings) -> None:
    for kind in (LookaheadSettings, MedusaSettings, DraftTreeSettings):
        with pytest.raises(SettingsError, match="the target's own"):
            kind(environment=ReplayedEnvironment(reward=reward))


def test_a_bound_is_for_typical_acceptance_alone(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"leave out max-divergence .*, or give --acceptance typical"):
        MedusaSettings(max_divergence=0.1)
    with pytest.raises(SettingsError, match=r"give --max-divergence 0\.1 instead"):
        MedusaSettings(acceptance="typical", environment=ReplayedEnvironment(reward=RewardSettings(max_divergence=0.1)))
    with pytest.raises(SettingsError, match="acceptance must be one of exact, typical, got 'lax'"):
        MedusaSettings(acceptance="lax")  # type: ignore[arg-type]
    settings = MedusaSettings(acceptance="typical", max_divergence=0.1)
    assert (settings.reward.max_divergence, settings.reward.speed_weight) == (0.1, 1)
    assert (settings.decoder_name, MedusaSettings().decoder_name) == ("medusa-typical", "medusa")
    settings.save(tmp_path / "settings.json", "")
    assert load_settings(tmp_path / "settings.json") == settings


def test_typical_acceptance_needs_a_workload_that_samples() -> None:
    greedy, both = ("tiny-3m/prose",), ("tiny-3m/prose", "tiny-3m/prose@1.0")
    with pytest.raises(SettingsError, match="epsilon and delta would do nothing; name a workload that samples"):
        MedusaSettings(workloads=greedy, acceptance="typical").check_workloads()
    MedusaSettings(workloads=greedy).check_workloads()
    MedusaSettings(workloads=both, acceptance="typical").check_workloads()


def test_a_pair_that_does_not_suit_the_decoder_is_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"tiny-3m/prose cannot be decoded so: .* draft"):
        train(ThresholdSettings(workloads=("tiny-3m/prose",), runs=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_recordings_are_for_replay_and_the_clock_for_live_decoding() -> None:
    with pytest.raises(SettingsError, match="recordings are for"):
        ReplayedEnvironment(backend="live", recordings=Path("outcomes"))
    with pytest.raises(SettingsError, match="a replay has no clock"):
        ReplayedEnvironment(timing="wall")


def test_by_default_speed_is_all_that_a_lossless_decoder_is_rewarded_for() -> None:
    for kind in (LookaheadSettings, DraftTreeSettings):
        reward = kind().reward
        assert reward.speed_weight == 1
        assert reward.acceptance_weight == reward.range_weight == reward.divergence_weight == 0


@pytest.mark.parametrize("kind", [LookaheadSettings, MedusaSettings, DraftTreeSettings])
def test_texts_are_as_long_in_practice_as_in_the_table(kind: type[TrainSettings]) -> None:
    settings = kind()
    assert settings.environment.tokens_per_step == settings.evaluation.tokens


def test_many_practise_on_replay_and_one_a_workload_live() -> None:
    settings = LookaheadSettings(workloads=("tiny-3m/prose", "tiny-3m/code"))
    assert settings.practising == 64
    assert replace(settings, environments=5).practising == 5
    assert replace(settings, environment=ReplayedEnvironment(backend="live")).practising == 2


def test_a_run_goes_on_with_its_own_settings_alone() -> None:
    saved = LookaheadSettings(name="x")
    assert prolonged(saved, replace(saved, total_timesteps=400_000)).total_timesteps == 400_000
    with pytest.raises(SettingsError, match="tokens_per_step = 64, and cannot go on with 8"):
        prolonged(saved, replace(saved, environment=ReplayedEnvironment(tokens_per_step=8)))
