"""Runs that end early: by a signal, on a full disk, with a process that dies, or before they have begun."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from specgym.agents import Experiment, ResultTable, TunerSettings, train, tuner_settings
from specgym.agents.experiments.experiment import Learner, PolicyChoice
from specgym.agents.training import run as run_module
from specgym.agents.training.run_folder import RunFileError
from specgym.agents.training.settings_io import SettingsError
from specgym.callbacks import intact_checkpoints
from specgym.decoding import TrainingError, run_command
from specgym.envs import WorkerError

ROLLOUT = 36  # steps of 2 environments together


class Ending(BaseCallback):
    """An end of the run, in the middle of a rollout."""

    def __init__(self, at: int, end: Callable[[], object]) -> None:
        super().__init__()
        self.at, self.end = at, end

    def _on_step(self) -> bool:
        if self.model.num_timesteps >= self.at:
            self.end()
        return True


class SmallExperiment(Experiment[TunerSettings]):
    """An experiment whose environments and end are those of a test."""

    start: Callable[[], VecEnv]
    ending: Sequence[BaseCallback] = ()

    @classmethod
    def check(cls, settings: TunerSettings) -> None:
        pass

    def learners(self) -> Sequence[Learner]:
        return [Learner(0, self.run.learned())]

    def environments(self, learner: Learner) -> VecEnv:
        return type(self).start()

    def policy(self, environments: VecEnv) -> PolicyChoice:
        return PolicyChoice(ActorCriticPolicy, {"net_arch": [4]})

    def callbacks(self, learner: Learner) -> Sequence[BaseCallback]:
        return self.ending

    def export(self, model: Any, folder: Path) -> None:
        raise AssertionError("no run of these tests comes to its end")

    def judge(self, report: Callable[[str], None]) -> ResultTable:
        raise AssertionError("no run of these tests comes to its end")


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch, fake_tuning: Callable[..., Any]) -> type[SmallExperiment]:
    """An experiment that `train` starts for any settings."""

    class Small(SmallExperiment):
        pass

    Small.start = staticmethod(lambda: DummyVecEnv([fake_tuning, fake_tuning]))
    monkeypatch.setattr(run_module, "experiment_of", lambda settings: Small)
    return Small


@pytest.fixture
def settings(tmp_path: Path) -> TunerSettings:
    return tuner_settings(runs=tmp_path / "runs", name="a", total_timesteps=4000, checkpoint_every=ROLLOUT)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "inter")]
)
def test_a_signal_saves_what_was_learned_and_says_how_to_go_on(
    number: int, code: int, word: str, experiment: type[SmallExperiment], settings: TunerSettings, shown: Any
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    experiment.ending = [Ending(3 * ROLLOUT - 4, lambda: os.kill(os.getpid(), number))]
    try:
        assert run_command(lambda: train(settings)) == code
    finally:
        signal.signal(signal.SIGINT, before)
    said = shown()
    assert f"error: {word}" in said
    assert f"after {2 * ROLLOUT} steps. Go on with: python train.py --resume {settings.folder}" in said
    assert "Traceback" not in said
    newest = next(intact_checkpoints(settings.folder / "checkpoints"))
    assert newest.steps == 2 * ROLLOUT

    experiment.ending = [Ending(4 * ROLLOUT - 4, lambda: os.kill(os.getpid(), signal.SIGTERM))]
    assert run_command(lambda: train(resume=settings.folder)) == 143
    assert f"Going on from step {2 * ROLLOUT}" in shown()
    assert next(intact_checkpoints(settings.folder / "checkpoints")).steps == 3 * ROLLOUT


def test_an_environment_that_a_cluster_loses_for_good_leaves_what_was_learned(
    experiment: type[SmallExperiment], settings: TunerSettings, shown: Any
) -> None:
    def lose() -> None:
        raise WorkerError("environment 1: the worker was lost 4 times")

    experiment.ending = [Ending(3 * ROLLOUT - 4, lose)]
    assert run_command(lambda: train(settings)) == 2
    said = shown()
    assert "error: environment 1: the worker was lost 4 times. Go on with: python train.py --resume" in said
    assert next(intact_checkpoints(settings.folder / "checkpoints")).steps == 2 * ROLLOUT


@pytest.mark.parametrize("number", [signal.SIGTERM, None])
def test_processes_that_end_first_are_told_from_a_signal_to_all(
    number: int | None, experiment: type[SmallExperiment], settings: TunerSettings
) -> None:
    def end() -> None:
        if number is not None:
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        raise EOFError

    experiment.ending = [Ending(ROLLOUT + 4, end)]
    assert run_command(lambda: train(settings)) == (2 if number is None else 143)
    assert next(intact_checkpoints(settings.folder / "checkpoints")).steps == ROLLOUT


def test_a_process_that_dies_as_it_starts_is_named_and_leaves_no_folder(
    experiment: type[SmallExperiment], settings: TunerSettings
) -> None:
    def start() -> VecEnv:
        raise EOFError

    experiment.start = staticmethod(start)
    with pytest.raises(TrainingError, match=r"ended as it started .* --no-subprocesses starts"):
        train(settings)
    assert not settings.runs.exists()


@pytest.mark.parametrize(("every", "file"), [(ROLLOUT, "checkpoints/step_"), (4000, "tensorboard: ")])
def test_a_full_disk_is_one_line_and_leaves_what_was_saved(
    every: int,
    file: str,
    experiment: type[SmallExperiment],
    settings: TunerSettings,
    capfd: pytest.CaptureFixture[str],
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        assert run_command(lambda: train(replace(settings, checkpoint_every=every))) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith(f"error: {settings.folder / file}")
    assert "File too large" in said


def test_a_start_that_fails_leaves_no_folder_behind(
    experiment: type[SmallExperiment], settings: TunerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: SmallExperiment) -> None:
        raise SettingsError("no such latency")

    monkeypatch.setattr(experiment, "prepare", refuse)
    with pytest.raises(SettingsError, match="no such latency"):
        train(settings)
    assert not settings.runs.exists()
    (settings.runs / "b").mkdir(parents=True)
    settings.folder.mkdir()
    with pytest.raises(SettingsError, match="no such latency"):
        train(settings)
    assert sorted(settings.runs.iterdir()) == [settings.folder, settings.runs / "b"]  # as they were


def test_a_start_that_was_killed_before_its_settings_were_written_can_be_given_again(
    experiment: type[SmallExperiment], settings: TunerSettings
) -> None:
    settings.folder.mkdir(parents=True)
    (settings.folder / ".settings.json.a1b2c3d4.tmp").write_text('{"format"')
    experiment.ending = [Ending(ROLLOUT + 4, lambda: signal.raise_signal(signal.SIGTERM))]
    assert run_command(lambda: train(settings)) == 143
    assert json.loads((settings.folder / "settings.json").read_text())["experiment"] == "tune-unseen"
    assert not list(settings.folder.rglob("*.tmp"))
    with pytest.raises(SettingsError, match="exists already; go on with --resume"):
        train(settings)
    (settings.folder / ".table.json.a1b2c3d4.tmp").write_text("")
    assert run_command(lambda: train(resume=settings.folder)) == 143
    assert not list(settings.folder.rglob("*.tmp"))


def test_a_run_that_is_being_trained_is_not_resumed_beside(
    experiment: type[SmallExperiment], settings: TunerSettings
) -> None:
    def resume() -> None:
        with pytest.raises(RunFileError, match=r"another process is training in .*a; wait for it or stop it"):
            train(resume=settings.folder)
        signal.raise_signal(signal.SIGTERM)

    experiment.ending = [Ending(ROLLOUT + 4, resume)]
    assert run_command(lambda: train(settings)) == 143
    experiment.ending = [Ending(2 * ROLLOUT + 4, lambda: signal.raise_signal(signal.SIGTERM))]
    assert run_command(lambda: train(resume=settings.folder)) == 143  # the folder is free again


def test_of_two_runs_of_one_name_that_begin_at_the_same_time_one_is_refused(
    experiment: type[SmallExperiment], settings: TunerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_meanwhile(asked: TunerSettings) -> None:
        monkeypatch.setattr(experiment, "check", lambda settings: None)
        assert run_command(lambda: train(settings)) == 143

    experiment.ending = [Ending(ROLLOUT + 4, lambda: signal.raise_signal(signal.SIGTERM))]
    monkeypatch.setattr(experiment, "check", train_meanwhile)
    with pytest.raises(RunFileError, match=r"another process has begun .*a meanwhile; choose another --name"):
        train(settings)
    assert next(intact_checkpoints(settings.folder / "checkpoints")).steps == ROLLOUT


def test_folders_that_cannot_be_made_are_refused(
    experiment: type[SmallExperiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for runs, reason in ((tmp_path / "file", "Not a directory"), (tmp_path / ("x" * 300), "File name too long")):
        with pytest.raises(SettingsError, match=f"{reason}; give another folder with --runs"):
            train(tuner_settings(runs=runs, name="a"))

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "runs/a/settings.json")

    monkeypatch.setattr(run_module, "save_settings", refuse)
    with pytest.raises(SettingsError, match=r"settings\.json: Read-only file system; give another folder with --runs"):
        train(tuner_settings(runs=tmp_path / "runs", name="a"))
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_file_that_cannot_be_written_later_says_what_was_saved(
    experiment: type[SmallExperiment], settings: TunerSettings
) -> None:
    def end() -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "runs/a/policy.zip")

    experiment.ending = [Ending(2 * ROLLOUT + 4, end)]
    with pytest.raises(RunFileError, match=rf"policy\.zip: Disk quota exceeded\. .* step {2 * ROLLOUT}\. Go on with"):
        train(settings)
