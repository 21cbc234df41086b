"""What ``train.py`` and ``evaluate.py`` do: options in, errors as one line and exit code 2."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..decoding.errors import SpecgymError
from .evaluation import evaluate, save_rows
from .files import read_json
from .recommend import load_thresholds
from .run import RunFolder, torch_threads
from .settings import SettingsError, TrainSettings
from .stopping.command import evaluate_stopping, train_stopping
from .stopping.settings import FORMAT as STOPPING_FORMAT
from .stopping.settings import StoppingSettings
from .tables import differences, rendered, verdict
from .telling import console, quieten
from .training import train

EnvName = Literal["specgym/Thresholds-v0", "specgym/DraftLength-v0"]
THRESHOLDS: EnvName = "specgym/Thresholds-v0"
DRAFT_LENGTH: EnvName = "specgym/DraftLength-v0"


@dataclass(frozen=True)
class TrainCommand:
    """Learn decoding thresholds by reinforcement learning. Without options: on the pairs that ship with the package.

    The options are those of --env specgym/Thresholds-v0. To learn when to stop a draft instead, and for the options of
    that: --env specgym/DraftLength-v0 --help.
    """

    settings: Annotated[TrainSettings, tyro.conf.arg(name="")]
    env: EnvName = THRESHOLDS
    """What to learn: thresholds for a prompt, or when to stop a draft."""
    resume: Path | None = None
    """Go on with this run (its folder) from its newest intact checkpoint. Its settings are kept; only
    --total-timesteps may be raised."""


@dataclass(frozen=True)
class TrainStoppingCommand:
    """Learn when to stop a draft, from recorded texts of the pairs that ship with the package.

    The options are those of --env specgym/DraftLength-v0. To learn decoding thresholds instead, and for the options of
    that: --env specgym/Thresholds-v0 --help.
    """

    settings: Annotated[StoppingSettings, tyro.conf.arg(name="")]
    env: EnvName = DRAFT_LENGTH
    """What to learn: thresholds for a prompt, or when to stop a draft."""
    resume: Path | None = None
    """Go on with this run (its folder). Its settings are kept; only --seeds may be added, and those that are learned
    stay."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure a saved run again on held-out prompts, and compare the table with the stored one."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/thresholds-20260101-120000."""
    live: tuple[str, ...] = ()
    """Of a run of --env specgym/DraftLength-v0: decode these workloads live instead, by the clock too, beside their
    replay. For instance tiny/prose tiny-3m-1l/definitions."""


def train_command(arguments: Sequence[str] | None = None) -> int:
    """``train.py``. Returns the exit code: 0, 2 for what the user can mend, 130 after an interruption."""

    def run() -> None:
        if _asked_env(sys.argv[1:] if arguments is None else arguments) == DRAFT_LENGTH:
            _train_stopping(arguments)
        else:
            _train_thresholds(arguments)

    return _guarded(run)


def evaluate_command(arguments: Sequence[str] | None = None) -> int:
    """``evaluate.py``. Returns the exit code: 0, or 2 for what the user can mend."""

    def run() -> None:
        command = tyro.cli(EvaluateCommand, args=arguments)
        folder = RunFolder.existing(command.run).path
        if _env_of(folder) == DRAFT_LENGTH:
            evaluate_stopping(folder, command.live)
        elif command.live:
            raise SettingsError(f"--live is for runs of --env {DRAFT_LENGTH}; the thresholds of {folder} always are")
        else:
            evaluate_run(folder)

    return _guarded(run)


def _train_thresholds(arguments: Sequence[str] | None) -> None:
    command = tyro.cli(TrainCommand, args=arguments, default=TrainCommand(TrainSettings()))
    settings = command.settings
    if command.resume is not None:
        # Options left out mean the run's own settings, not the defaults.
        saved = TrainSettings.load(RunFolder.existing(command.resume).settings)
        settings = tyro.cli(TrainCommand, args=arguments, default=TrainCommand(saved)).settings
    train(settings, command.resume)


def _train_stopping(arguments: Sequence[str] | None) -> None:
    command = tyro.cli(TrainStoppingCommand, args=arguments, default=TrainStoppingCommand(StoppingSettings()))
    settings = command.settings
    if command.resume is not None:
        saved = StoppingSettings.load(RunFolder.existing(command.resume).settings)
        settings = tyro.cli(TrainStoppingCommand, args=arguments, default=TrainStoppingCommand(saved)).settings
    train_stopping(settings, command.resume)


def _asked_env(arguments: Sequence[str]) -> str:
    """The environment whose options these are; that of the run where one is resumed and no environment is named."""
    env, resume = _value_of("--env", arguments), _value_of("--resume", arguments)
    if env is None and resume is not None and RunFolder(Path(resume)).settings.is_file():
        return _env_of(Path(resume))
    return env or THRESHOLDS


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """What an option is given, before the whole command line is understood; the last one counts."""
    found = None
    for place, argument in enumerate(arguments):
        if argument == option and place + 1 < len(arguments):
            found = arguments[place + 1]
        elif argument.startswith(f"{option}="):
            found = argument.removeprefix(f"{option}=")
    return found


def _env_of(folder: Path) -> str:
    """What a run has learned, by its settings."""
    content = read_json(RunFolder(folder).settings, f"is {folder} the folder of a run that train.py wrote?")
    return DRAFT_LENGTH if content.get("format") == STOPPING_FORMAT else THRESHOLDS


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
