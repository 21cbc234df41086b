"""What ``train.py`` and ``evaluate.py`` do: options in, errors as one line and exit code 2."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..decoding.errors import SpecgymError
from .evaluation import evaluate, save_rows
from .recommend import load_thresholds
from .run import RunFolder, torch_threads
from .settings import TrainSettings
from .tables import differences, rendered, verdict
from .telling import console, quieten
from .training import train


@dataclass(frozen=True)
class TrainCommand:
    """Learn decoding thresholds by reinforcement learning. Without options: on the pairs that ship with the package."""

    settings: Annotated[TrainSettings, tyro.conf.arg(name="")]
    resume: Path | None = None
    """Go on with this run (its folder) from its newest intact checkpoint. Its settings are kept; only
    --total-timesteps may be raised."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure a saved run's thresholds again on held-out prompts, and compare the table with the stored one."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/thresholds-20260101-120000."""


def train_command(arguments: Sequence[str] | None = None) -> int:
    """``train.py``. Returns the exit code: 0, 2 for what the user can mend, 130 after an interruption."""

    def run() -> None:
        command = tyro.cli(TrainCommand, args=arguments, default=TrainCommand(TrainSettings()))
        settings = command.settings
        if command.resume is not None:
            # Options left out mean the run's own settings, not the defaults.
            saved = TrainSettings.load(RunFolder.existing(command.resume).settings)
            settings = tyro.cli(TrainCommand, args=arguments, default=TrainCommand(saved)).settings
        train(settings, command.resume)

    return _guarded(run)


def evaluate_command(arguments: Sequence[str] | None = None) -> int:
    """``evaluate.py``. Returns the exit code: 0, or 2 for what the user can mend."""

    def run() -> None:
        evaluate_run(tyro.cli(EvaluateCommand, args=arguments).run)

    return _guarded(run)


def evaluate_run(folder: Path) -> list[str]:
    """Make a run's table again, print it, and write it to ``evaluation.json`` beside the stored one.

    Returns:
        Where columns that are charged by the latency profiles differ from the stored table; normally nowhere.

    Raises:
        RunFileError: the folder is not that of a finished run.
    """
    quieten()
    run = RunFolder.existing(folder)
    settings = TrainSettings.load(run.settings)
    thresholds = load_thresholds(run.thresholds)["workloads"]
    with torch_threads(settings.threads), console.status("Evaluating on held-out prompts") as status:
        profiles = run.measure_profiles(settings)
        rows = evaluate(settings, thresholds, profiles, lambda name: status.update(f"Evaluating {name}"))
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    save_rows(run.path / "evaluation.json", rows, settings, command)
    console.print(rendered(rows, f"Held-out prompts, {run.path}"))
    console.print(verdict(rows), highlight=False)
    found = differences(rows, run.table)
    if found:
        console.print(f"{len(found)} charged numbers differ from {run.table} (another machine or version?):")
        for line in found[:10]:
            console.print(f"  {line}", highlight=False, soft_wrap=True)
    else:
        console.print(f"All charged numbers equal those in {run.table}.")
    return found


def _guarded(run: Callable[[], None]) -> int:
    try:
        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SpecgymError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
