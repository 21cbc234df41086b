"""One run of an experiment from its settings to its folder, its continuation after any kind of end, its judgement."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO

from specgym.callbacks import intact_checkpoints
from specgym.decoding import replacing

from ..evaluation.results import ResultTable
from ..experiments.experiment import Experiment, Learner, RunSettings, experiment_of, load_settings, save_settings
from ..experiments.tune_knobs_settings import default_settings
from .ppo import TrainingInterruptedError, learn, way_on
from .run_folder import RunFolder, console, on_machine, quieten, tell_differences, this_command
from .settings_io import SettingsError, prolonged


def train(settings: RunSettings | None = None, resume: Path | None = None) -> Path:
    """Learn, judge what was learned on held-out prompts, and write ``runs/<name>/`` (see `RunFolder`).

    Args:
        settings: what to learn; by default thresholds with their defaults, or the run's own when resuming.
        resume: folder of a run to go on with, from its newest intact checkpoint. Of a finished run only what is missing
            is made, unless `settings` asks for more.

    Returns:
        The folder of the run.

    Raises:
        SettingsError: the folder is taken, a workload does not suit the decoder, or `settings` contradict those of the
            run to resume.
        RunFileError: `resume` is not the folder of a run, or a file in it is damaged.
        TrainingInterruptedError: interrupted by the user, or by the end of an environment's process.
        SpecgymError: a workload, a recording or a model is not there, or does not fit.
    """
    quieten()
    if resume is None:
        settings = _begin(settings or default_settings())
        run = RunFolder(settings.folder)
        experiment = experiment_of(settings)(settings, run)
    else:
        run = RunFolder.existing(resume)
        experiment = _going_on(run, settings)
    started = time.perf_counter()
    with on_machine(experiment.settings):
        try:
            _run(experiment, resumed=resume is not None)
        except KeyboardInterrupt:
            raise TrainingInterruptedError(f"interrupted. {way_on(run.path)}") from None
    console.print(f"Done in {time.perf_counter() - started:.0f} s.", highlight=False)
    return run.path


def evaluate(folder: Path) -> list[str]:
    """Make a run's table again, print it, and write it to ``evaluation.json`` beside the stored one.

    Returns:
        Differences of the compared columns from the stored table; normally none.

    Raises:
        RunFileError: the folder is not that of a finished run.
    """
    quieten()
    experiment = open_run(folder)
    run = experiment.run
    for learner in experiment.learners():
        learner.folder.require_complete()
    stored = ResultTable.load(run.table)
    with on_machine(experiment.settings):
        experiment.prepare()
        with console.status("Judging on held-out prompts") as status:
            table = experiment.judge(status.update)
    table.save(run.path / "evaluation.json", this_command())
    show(table, run.path)
    lines = table.differences(stored)
    tell_differences(lines, run.table, experiment.FIGURES)
    return lines


def open_run(folder: Path) -> Experiment[Any]:
    """The experiment of a run that has been started.

    Raises:
        RunFileError: the folder is not that of a run, or its settings are damaged.
    """
    run = RunFolder.existing(folder)
    settings = load_settings(run.settings)
    return experiment_of(settings)(settings, run)


def show(table: ResultTable, run: Path) -> None:
    """Print a table and its verdict."""
    console.print(table.render(f"Held-out prompts, {run}"))
    console.print(table.verdict, highlight=False)


def _begin(settings: RunSettings) -> RunSettings:
    """Make the folder of a new run with its settings, which get a name if they have none."""
    if not settings.name:
        settings = replace(settings, name=time.strftime(f"{settings.stem}-%Y%m%d-%H%M%S"))
    run = RunFolder(settings.folder)
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        way_out = f"go on with --resume {run.path}" if run.settings.is_file() else "remove it"
        raise SettingsError(f"{run.path} exists already; {way_out}, or choose another --name")
    with on_machine(settings):
        experiment_of(settings).check(settings)
    run.path.mkdir(parents=True, exist_ok=True)
    save_settings(settings, run.settings, this_command())
    return settings


def _going_on(run: RunFolder, asked: RunSettings | None) -> Experiment[Any]:
    """The experiment of a run to resume; what more steps or seeds make out of date is removed."""
    saved: RunSettings = load_settings(run.settings)
    settings = prolonged(saved, asked or saved)
    experiment = experiment_of(settings)(settings, run)
    if settings != saved:
        save_settings(settings, run.settings, this_command())
        stale = [run.table, *(run.path / name for name in experiment.RESULTS)]
        if settings.total_timesteps != saved.total_timesteps:
            stale += [learner.folder.policy for learner in experiment.learners()]
        for path in stale:
            path.unlink(missing_ok=True)
    return experiment


def _run(experiment: Experiment[Any], resumed: bool) -> None:
    settings, run, learners = experiment.settings, experiment.run, experiment.learners()
    each_of = f"{len(learners)} policies, each with " if len(learners) > 1 else ""
    console.print(
        f"[bold]{run.path}[/]: {len(settings.workloads)} workloads, {each_of}{settings.total_timesteps} steps"
    )
    experiment.prepare()
    for number, learner in enumerate(learners):
        if len(learners) > 1:
            console.print(f"Seed {learner.seed} ({number + 1} of {len(learners)}):")
        _learn(experiment, learner, resumed)
    experiment.conclude()
    if run.table.is_file():
        console.print(f"The table is in {run.table}; python evaluate.py {run.path} makes it again.", soft_wrap=True)
        return
    with console.status("Judging on held-out prompts") as status:
        table = experiment.judge(status.update)
    table.save(run.table, this_command())
    show(table, run.path)
    hints: Sequence[str] = (*experiment.hints(), f"TensorBoard: tensorboard --logdir {run.tensorboard}")
    console.print(" ".join(hints), highlight=False, soft_wrap=True)


def _learn(experiment: Experiment[Any], learner: Learner, resumed: bool) -> None:
    """Learn a policy unless its steps are done, and make whatever of its files is missing."""
    folder, total = learner.folder, experiment.settings.total_timesteps
    checkpoint = next(intact_checkpoints(folder.checkpoints), None)
    done = checkpoint is not None and checkpoint.steps >= total
    # A run that has stopped early has a policy, and fewer steps than it was allowed.
    if done or folder.complete or (checkpoint is not None and folder.policy.is_file()):
        console.print(f"All {checkpoint.steps if checkpoint else total} steps are done.")
    else:
        if resumed:
            began = f"step {checkpoint.steps}" if checkpoint else "the beginning, having no checkpoint"
            console.print(f"Going on from {began}.")
        learn(
            experiment.settings,
            folder,
            learner.seed,
            lambda: experiment.environments(learner),
            experiment.policy,
            experiment.callbacks(learner),
            progress_bar=console.is_terminal,
        )
        for path in [experiment.run.table, *(experiment.run.path / name for name in experiment.RESULTS)]:
            path.unlink(missing_ok=True)  # they were of another policy
        checkpoint = next(intact_checkpoints(folder.checkpoints))
    if folder.complete or checkpoint is None:
        return
    experiment.export(PPO.load(checkpoint.policy, device="cpu"), folder.path)
    for source, target in ((checkpoint.vecnormalize, folder.vecnormalize), (checkpoint.policy, folder.policy)):
        if source.is_file():
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
