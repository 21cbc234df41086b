"""One training run from its settings to its folder, and its continuation after any kind of end."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback

from specgym.callbacks import Checkpoint, intact_checkpoints
from specgym.decoding import LatencyProfile, SpecgymError, replacing
from specgym.envs import workload

from ..evaluation.live import evaluate, save_rows
from ..evaluation.results import rendered, verdict
from ..experiments.settings import TrainSettings
from ..experiments.tune_knobs import ThresholdSettings, load_settings
from ..export.knob_policy import DESCRIPTION_FILE, WEIGHTS_FILE, ExportedPolicy, KnobRange
from ..export.recommend import load_knobs, recommend, save_knobs
from ..export.snap_to_recorded import best_nearby
from ..policy import KnobPolicy
from ..report.gather import HEAT_MAPS_FILE
from .beginning import begin, this_command
from .console import console, quieten
from .environments import held_out_environments, make_env, require_recordings, state_names, training_environments
from .ppo import learn
from .run_folder import RunFolder, torch_threads
from .settings_checks import SettingsError
from .settings_io import prolonged


def train(settings: TrainSettings | None = None, resume: Path | None = None) -> Path:
    """Learn a decoder's knobs, judge them on held-out prompts, and write ``runs/<name>/`` (see `RunFolder`).

    Args:
        settings: what to do; by default thresholds with their defaults, or the run's own when resuming.
        resume: folder of a run to go on with, from its newest intact checkpoint. Of a finished run only what is missing
            is made, unless `settings` asks for more steps.

    Returns:
        The folder of the run.

    Raises:
        WorkloadError: a workload is not known.
        SettingsError: the folder is taken, a workload does not suit the decoder, or `settings` contradict those of the
            run to resume.
        MedusaHeadsError: a target has no Medusa heads where they are tuned. Loading errors as for `load_pair`.
        RunFileError: `resume` is not the folder of a run, or a file in it is damaged.
        TrainingInterruptedError: interrupted by the user, or by the end of an environment's process.
    """
    quieten()
    if resume is not None:
        run = RunFolder.existing(resume)
        saved = load_settings(run.settings)
        settings = prolonged(saved, settings or saved)
        if settings != saved:
            settings.save(run.settings, this_command())
            for stale in (run.table, run.knobs, run.policy, run.path / HEAT_MAPS_FILE):
                stale.unlink(missing_ok=True)
    else:
        settings = settings or ThresholdSettings()
        settings = begin(settings, re.sub(r".*/|-v\d+$", "", settings.ENV).lower(), _check)
        run = RunFolder(settings.folder)
    with torch_threads(settings.threads):
        _train(settings, run, going_on=resume is not None)
    return run.path


def _train(settings: TrainSettings, run: RunFolder, going_on: bool) -> None:
    console.print(f"[bold]{run.path}[/]: {len(settings.workloads)} workloads, {settings.total_timesteps} steps")
    console.print("Latency profiles (measured once for this hardware, then read from the cache):")
    profiles = run.measure_profiles(settings)
    checkpoint = next(intact_checkpoints(run.checkpoints), None)
    # A run that has stopped early has a policy, and fewer steps than it was allowed.
    if checkpoint is None or (checkpoint.steps < settings.total_timesteps and not run.policy.is_file()):
        if going_on:
            began = f"step {checkpoint.steps}" if checkpoint else "the beginning, having no checkpoint"
            console.print(f"Going on from {began}.")
        _learn(settings, run, profiles, checkpoint)
        checkpoint = next(intact_checkpoints(run.checkpoints))
    else:
        console.print(f"All {checkpoint.steps} steps are done.")
    _finish(settings, run, profiles, checkpoint)


def _check(settings: TrainSettings) -> None:
    """Raise what would end the run, so that a misspelt name, or heads that are not there, leave no folder behind."""
    settings.check_workloads()
    require_recordings(settings)
    with torch_threads(settings.threads):
        for name in settings.workloads:  # loaded once a process, so this takes no time that would not be taken later
            try:
                settings.decoder(workload(name).load())
            except SpecgymError:
                raise
            except ValueError as error:
                raise SettingsError(f"{name} cannot be decoded so: {error}") from error


def _learn(settings: TrainSettings, run: RunFolder, profiles: Sequence[Path], checkpoint: Checkpoint | None) -> None:
    console.print("Starting the environments ...")
    learn(
        settings, run, lambda: training_environments(settings, profiles), checkpoint, _evaluations(settings, profiles)
    )


def _evaluations(settings: TrainSettings, profiles: Sequence[Path]) -> list[BaseCallback]:
    if not settings.evaluation.during_training:
        return []
    count = len(settings.workloads)
    every = max(settings.total_timesteps // settings.practising // settings.evaluation.during_training, 1)
    held_out = held_out_environments(settings, profiles)
    return [EvalCallback(held_out, n_eval_episodes=count, eval_freq=every, verbose=0)]


def _finish(settings: TrainSettings, run: RunFolder, profiles: Sequence[Path], checkpoint: Checkpoint) -> None:
    """Make whatever of the results is missing."""
    if not (run.policy.is_file() and (run.path / WEIGHTS_FILE).is_file() and (run.path / DESCRIPTION_FILE).is_file()):
        model: PPO = PPO.load(checkpoint.policy, device="cpu")
        assert isinstance(model.policy, KnobPolicy)
        knobs = _knob_ranges(make_env(settings, 0, profiles[0]))
        names = state_names(settings, [knob.name for knob in knobs])
        ExportedPolicy.of(model.policy, knobs, names).save(run.path)
        for source, target in ((checkpoint.vecnormalize, run.vecnormalize), (checkpoint.policy, run.policy)):
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
    if not run.knobs.is_file():
        policy, charged = ExportedPolicy.load(run.path), dict(zip(settings.workloads, profiles, strict=True))

        def improve(name: str, rest: Mapping[str, float]) -> dict[str, float]:
            return best_nearby(settings, name, rest, policy.knobs, LatencyProfile.load(charged[name]).at())

        save_knobs(run.knobs, recommend(policy, settings.workloads, improve))
    if run.table.is_file():
        console.print(f"The table is in {run.table}; python evaluate.py {run.path} makes it again.")
        return
    learned = load_knobs(run.knobs)["workloads"]
    with console.status("Evaluating on held-out prompts") as status:
        rows = evaluate(settings, learned, profiles, lambda name: status.update(f"Evaluating {name}"))
    save_rows(run.table, rows, settings, this_command())
    console.print(rendered(rows, f"Held-out prompts, {run.path}"))
    console.print(verdict(rows, settings.KNOBS, settings.max_divergence), highlight=False)
    console.print(f"Recommended {settings.KNOBS}: {run.knobs}. TensorBoard: tensorboard --logdir {run.path.parent}")


def _knob_ranges(env: Any) -> list[KnobRange]:
    knobs, scales = env.get_wrapper_attr("knobs"), env.get_wrapper_attr("scales")
    ranges: dict[str, tuple[float, float]] = env.get_wrapper_attr("ranges")
    return [
        KnobRange(knob.name, *ranges[knob.name], knob.default, scales[knob.name], knob.integer, knob.logarithmic)
        for knob in knobs
    ]
