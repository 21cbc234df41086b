"""One run of an experiment from its settings to its folder, its continuation after any kind of end, its judgement."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from stable_baselines3 import PPO

from specgym.callbacks import intact_checkpoints
from specgym.decoding import interruption_code, io_message, remove_leftovers, replacing

from ..evaluation.results import ResultTable
from ..experiments.experiment import Experiment, Learner, RunSettings, experiment_of, load_settings, save_settings
from ..experiments.tune_knobs_settings import default_settings
from .ppo import TrainingInterruptedError, learn, way_on
from .run_folder import (
    RunFileError,
    RunFolder,
    alone_in,
    console,
    on_machine,
    quieten,
    require_writable,
    tell_differences,
    this_command,
)
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
        SettingsError: the folder is taken or cannot be made, a workload does not suit the decoder, or `settings`
            contradict those of the run to resume.
        RunFileError: `resume` is not the folder of a run, or a file in it is damaged, or cannot be written; or another
            process is training in the folder.
        TrainingInterruptedError: interrupted by the user, or by the end of an environment's process.
        SpecgymError: a workload, a recording or a model is not there, or does not fit.
    """
    quieten()
    started = time.perf_counter()
    new_folders: list[Path] | None = None
    with contextlib.ExitStack() as alone:
        if resume is None:
            experiment, new_folders = _begin(settings or default_settings(), alone)
        else:
            run = RunFolder.existing(resume)
            alone.enter_context(alone_in(run.path))
            experiment = _going_on(run, settings)
        run = experiment.run
        with on_machine(experiment.settings), _ending(experiment, new_folders):
            _run(experiment, resumed=resume is not None)
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
    show(table, run.path, experiment.tables())
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


def show(table: ResultTable, run: Path, others: Sequence[Table] = ()) -> None:
    """Print a table and its verdict, and then other tables."""
    console.print(table.render(f"Held-out prompts, {run}"))
    console.print(table.verdict, highlight=False)
    for other in others:
        console.print(other)


def _begin(settings: RunSettings, alone: contextlib.ExitStack) -> tuple[Experiment[Any], list[Path]]:
    """Make the folder of a new run with its settings, which get a name if they have none; `alone` keeps it.

    Returns:
        The experiment, and the folders that were not there before, the run's own first.
    """
    if not settings.name:
        settings = replace(settings, name=time.strftime(f"{settings.stem}-%Y%m%d-%H%M%S"))
    run = RunFolder(settings.folder)
    with _folder_errors():
        remove_leftovers(run.path)  # nothing else is left of a start that was killed before the settings were written
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            way_out = f"go on with --resume {run.path}" if run.settings.is_file() else "remove it"
            raise SettingsError(f"{run.path} exists already; {way_out}, or choose another --name")
        new_folders = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
        require_writable(run.path)
    with on_machine(settings):
        experiment_of(settings).check(settings)
    try:
        with _folder_errors():
            run.path.mkdir(parents=True, exist_ok=True)
        alone.enter_context(alone_in(run.path))
        if run.settings.is_file():  # of one that began after the first look
            raise RunFileError(f"another process has begun {run.path} meanwhile; choose another --name")
        with _folder_errors():
            save_settings(settings, run.settings, this_command())
    except SettingsError:
        _remove(run, new_folders)
        raise
    return experiment_of(settings)(settings, run), new_folders


@contextmanager
def _folder_errors() -> Iterator[None]:
    """Refuse a folder of runs that cannot be read or written."""
    try:
        yield
    except OSError as error:
        raise SettingsError(f"{io_message(error)}; give another folder with --runs, or another --name") from error


@contextmanager
def _ending(experiment: Experiment[Any], new_folders: Sequence[Path] | None) -> Iterator[None]:
    """Say how to go on with a run that ends early; remove one that fails before it has learned anything.

    Args:
        experiment: of the run.
        new_folders: folders that the run has made, its own first; None for a run that is resumed.
    """
    run = experiment.run
    try:
        yield
    except KeyboardInterrupt as interruption:
        message = f"interrupted. {way_on(run.path)}"
        raise TrainingInterruptedError(message, interruption_code(interruption)) from None
    except TrainingInterruptedError:
        raise
    except Exception as error:
        newest = [next(intact_checkpoints(learner.folder.checkpoints), None) for learner in experiment.learners()]
        steps = [checkpoint.steps for checkpoint in newest if checkpoint is not None]
        if new_folders is not None and not steps:
            _remove(run, new_folders)
        if not isinstance(error, OSError):
            raise
        saved = f"The newest checkpoint is of step {steps[-1]}." if steps else "There is no checkpoint yet."
        removed = new_folders is not None and not steps
        hint = f"{run.path} is removed again; start anew." if removed else way_on(run.path)
        raise RunFileError(f"{io_message(error)}. {saved} {hint}") from error


def _remove(run: RunFolder, new_folders: Sequence[Path]) -> None:
    """Remove a run that was empty before, and folders that are empty without it."""
    with contextlib.suppress(OSError):
        for entry in run.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
        for folder in new_folders:
            folder.rmdir()


def _going_on(run: RunFolder, asked: RunSettings | None) -> Experiment[Any]:
    """The experiment of a run to resume; what more steps or seeds make out of date is removed."""
    remove_leftovers(run.path)
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
    show(table, run.path, experiment.tables())
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
