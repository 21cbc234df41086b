"""What ``train.py`` and ``evaluate.py`` do: options in, errors as one line and exit code 2."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Generic, Literal, TypeVar

import tyro

from specgym.decoding import SpecgymError

from .evaluation.comparison import Kind as LeftOut
from .evaluation.cross_validation import KINDS
from .evaluation.heat_map import heat_maps_of
from .evaluation.live import evaluate, save_rows
from .evaluation.results import differences, rendered, verdict
from .experiments.settings import TrainSettings
from .experiments.stop_drafts import StoppingSettings
from .experiments.stop_drafts_command import evaluate_stopping, train_stopping
from .experiments.tune_knobs import TUNABLE, ThresholdSettings, load_settings
from .experiments.tune_unseen import TunerSettings
from .experiments.tune_unseen_command import evaluate_tuner, recommend_for_pair, train_tuner, transfer_tuner
from .export.knob_policy import ExportedPolicy
from .export.recommend import load_knobs
from .report.gather import HEAT_MAPS_FILE, gather
from .report.heat_maps import save_heat_maps
from .report.page import write_report
from .training.beginning import this_command
from .training.console import console, quieten, tell_differences
from .training.files import read_json
from .training.run import train
from .training.run_folder import RunFolder, torch_threads
from .training.settings_checks import SettingsError

EnvName = Literal[
    "specgym/Thresholds-v0",
    "specgym/Lookahead-v0",
    "specgym/Medusa-v0",
    "specgym/DraftTree-v0",
    "specgym/DraftLength-v0",
]
THRESHOLDS: Final = "specgym/Thresholds-v0"
DRAFT_LENGTH: Final = "specgym/DraftLength-v0"
TUNER = "tuner"
_S = TypeVar("_S", bound=TrainSettings)


@dataclass(frozen=True)
class TrainCommand(Generic[_S]):
    """Learn the knobs of a decoder, whichever it is; what its settings are called says more."""

    settings: Annotated[_S, tyro.conf.arg(name="")]
    env: EnvName = THRESHOLDS
    """What to learn: thresholds, the settings of Lookahead or Medusa decoding or of draft trees, or when to stop a
    draft."""
    resume: Path | None = None
    """Go on with this run (its folder) from its newest intact checkpoint. Its settings are kept; only
    --total-timesteps may be raised."""


@dataclass(frozen=True)
class TrainTunerCommand:
    """Learn to tune: a policy that tries a few thresholds on a workload, sees what they gave, and recommends others.

    It practises on recorded workloads, by default all that ship with the package, and then tunes pairs that it never
    saw: python evaluate.py <run> --pair <target>+<draft>.
    """

    settings: Annotated[TunerSettings, tyro.conf.arg(name="")]
    env: Literal["specgym/Thresholds-v0"] = THRESHOLDS
    """What is tuned."""
    tuner: bool = True
    """Learn a tuner, instead of thresholds for the workloads named."""
    resume: Path | None = None
    """Go on with this run (its folder) from its newest intact checkpoint. Its settings are kept; only
    --total-timesteps may be raised."""


@dataclass(frozen=True)
class TrainStoppingCommand:
    """Learn when to stop a draft, from recorded texts of the pairs that ship with the package.

    The options are those of --env specgym/DraftLength-v0. To tune a decoder instead, and for the options of that: --env
    specgym/Thresholds-v0 --help, --env specgym/Lookahead-v0 --help, --env specgym/Medusa-v0 --help, or --env
    specgym/DraftTree-v0 --help.
    """

    settings: Annotated[StoppingSettings, tyro.conf.arg(name="")]
    env: EnvName = DRAFT_LENGTH
    """What to learn: thresholds, the settings of Lookahead or Medusa decoding or of draft trees, or when to stop a
    draft."""
    resume: Path | None = None
    """Go on with this run (its folder). Its settings are kept; only --seeds may be added, and those that are learned
    stay."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure a saved run again on held-out prompts, and compare the table with the stored one.

    Or write a report of it; or, of a run of train.py --tuner, recommend thresholds for any pair, or see how well that
    works on pairs, datasets and targets that were left out of training.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/thresholds-20260101-120000."""
    live: tuple[str, ...] | None = None
    """With --pair: measure and confirm by decoding, with the clock beside. Of a run of --env specgym/DraftLength-v0:
    decode these workloads live instead, by the clock too, beside their replay, for instance tiny/prose
    tiny-3m-1l/definitions."""
    report: bool = False
    """Write report.html into the run's folder, one page with every table and figure there is, and the tables as CSV and
    JSON into report/."""
    pair: str | None = None
    """Of a run of --tuner: recommend thresholds for this pair, such as my-target+my-draft, after a few measurements."""
    prompts: str = "prose"
    """With --pair: a prompt set, or a file of prompts; part of them is kept for confirming."""
    temperature: float = 0.0
    """With --pair: of sampling; 0 for greedy decoding."""
    measurements: int | None = None
    """With --pair: settings to try before recommending one; by default as many as the tuner has learned with."""
    transfer: bool = False
    """Of a run of --tuner: learn again without each pair, each dataset and each target family, tune what was left out,
    and compare with searches that know no other workload. About a quarter of a minute for each training."""
    leave_out: tuple[LeftOut, ...] = KINDS
    """With --transfer: what to leave out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """With --transfer: trainings and searches."""
    jobs: int = 2
    """With --transfer: trainings at a time."""


@dataclass(frozen=True)
class Kind:
    """Something that can be learned: its options, settings and training.

    Attributes:
        command: a dataclass of the options.
        settings: a dataclass of those that are stored.
        learn: called with the settings, and the folder of a run to go on with.
        more: arguments of `command` beside the settings.
        description: of the command; by default its docstring.
    """

    command: Any
    settings: Any
    learn: Callable[[Any, Path | None], Path]
    more: dict[str, Any] = field(default_factory=dict)
    description: str | None = None


def _tuning(kind: type[TrainSettings]) -> Kind:
    others = ", ".join(f"--env {env} --help" for env in (*TUNABLE, DRAFT_LENGTH) if env != kind.ENV)
    told = (
        f"{inspect.getdoc(kind)}\n\nThe options are those of --env {kind.ENV}. For others: {others}. To learn a tuner "
        "for pairs never seen instead: --tuner --help."
    )
    command: Any = TrainCommand  # mypy takes no type parameter that is a variable
    return Kind(command[kind], kind, train, {"env": kind.ENV}, told)


_KINDS: dict[str, Kind] = {
    **{env: _tuning(kind) for env, kind in TUNABLE.items()},
    TUNER: Kind(TrainTunerCommand, TunerSettings, train_tuner),
    DRAFT_LENGTH: Kind(TrainStoppingCommand, StoppingSettings, train_stopping),
}
"""Everything that can be learned."""


def train_command(arguments: Sequence[str] | None = None) -> int:
    """``train.py``. Returns the exit code: 0, 2 for what the user can mend, 130 after an interruption."""

    def run() -> None:
        asked = _asked(sys.argv[1:] if arguments is None else arguments)
        _train(asked if asked in _KINDS else THRESHOLDS, arguments)

    return _guarded(run)


def evaluate_command(arguments: Sequence[str] | None = None) -> int:
    """``evaluate.py``. Returns the exit code: 0, or 2 for what the user can mend."""

    def run() -> None:
        command = tyro.cli(EvaluateCommand, args=arguments)
        folder = RunFolder.existing(command.run).path
        kind = _kind_of(folder)
        if command.report + command.transfer + (command.pair is not None) > 1:
            raise SettingsError("--report, --transfer and --pair are three things to do; give one at a time")
        if command.report:
            _report(folder, kind)
        elif kind == TUNER:
            _evaluate_tuner(command, folder)
        elif command.pair is not None or command.transfer:
            raise SettingsError(f"--pair and --transfer are for runs of train.py --tuner; {folder} is none")
        elif kind == DRAFT_LENGTH:
            evaluate_stopping(folder, command.live or ())
        elif command.live is not None:
            raise SettingsError(f"--live is for runs of --env {DRAFT_LENGTH}; the table of {folder} always is")
        else:
            evaluate_run(folder)

    return _guarded(run)


def _train(kind: str, arguments: Sequence[str] | None) -> None:
    chosen = _KINDS[kind]

    def parsed(settings: Any) -> Any:
        default = chosen.command(settings, **chosen.more)
        return tyro.cli(chosen.command, args=arguments, default=default, description=chosen.description)

    command = parsed(chosen.settings())
    if command.resume is not None:
        learned = _kind_of(RunFolder.existing(command.resume).path)
        if learned != kind:
            raise SettingsError(
                f"{command.resume} is a run of {_option_of(learned)}, not of {_option_of(kind)}; leave that out to go "
                "on with it"
            )
        # Options left out mean the run's own settings, not the defaults.
        command = parsed(chosen.settings.load(RunFolder.existing(command.resume).settings))
    chosen.learn(command.settings, command.resume)


def _option_of(kind: str) -> str:
    return "--tuner" if kind == TUNER else f"--env {kind}"


def _evaluate_tuner(command: EvaluateCommand, folder: Path) -> None:
    if command.pair is not None:
        live = command.live is not None
        recommend_for_pair(folder, command.pair, command.prompts, command.temperature, command.measurements, live=live)
    elif command.live is not None:
        raise SettingsError("--live needs --pair: which pair should be decoded?")
    elif command.transfer:
        transfer_tuner(folder, command.leave_out, command.seeds, command.jobs)
    else:
        evaluate_tuner(folder)


def _report(folder: Path, kind: str) -> None:
    quieten()
    command = this_command()
    with console.status("Drawing"):
        if kind == THRESHOLDS:
            _save_heat_maps(RunFolder(folder), command)
        path = write_report(gather(folder, command), folder)
    console.print(f"The report is in {path}, its tables in {path.parent / 'report'}.", soft_wrap=True)


def _save_heat_maps(run: RunFolder, command: str) -> None:
    """What `train.py --tuner` has written already, and `train.py`, which need not know any trace, has not."""
    if (run.path / HEAT_MAPS_FILE).is_file() or not run.knobs.is_file():
        return
    settings, recommended = ThresholdSettings.load(run.settings), load_knobs(run.knobs)["workloads"]
    maps = heat_maps_of(settings, ExportedPolicy.load(run.path), recommended)
    if maps:
        save_heat_maps(run.path / HEAT_MAPS_FILE, maps, command)


def _asked(arguments: Sequence[str]) -> str:
    """What the options are of; that of the run where one is resumed and nothing is named."""
    env, resume = _value_of("--env", arguments), _value_of("--resume", arguments)
    if "--tuner" in arguments:
        return TUNER
    if env is None and resume is not None and RunFolder(Path(resume)).settings.is_file():
        return _kind_of(Path(resume))
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


def _kind_of(folder: Path) -> str:
    """What a run has learned, by its settings."""
    content = read_json(RunFolder(folder).settings, f"is {folder} the folder of a run that train.py wrote?")
    formats = {kind.settings.FORMAT: name for name, kind in _KINDS.items()}
    return formats.get(str(content.get("format")), THRESHOLDS)


def evaluate_run(folder: Path) -> list[str]:
    """Make a run's table again, print it, and write it to ``evaluation.json`` beside the stored one.

    Returns:
        Where columns that are charged by the latency profiles differ from the stored table; normally nowhere.

    Raises:
        RunFileError: the folder is not that of a finished run.
    """
    quieten()
    run = RunFolder.existing(folder)
    settings = load_settings(run.settings)
    learned = load_knobs(run.knobs)["workloads"]
    with torch_threads(settings.threads), console.status("Evaluating on held-out prompts") as status:
        profiles = run.measure_profiles(settings)
        rows = evaluate(settings, learned, profiles, lambda name: status.update(f"Evaluating {name}"))
    command = this_command()
    save_rows(run.path / "evaluation.json", rows, settings, command)
    console.print(rendered(rows, f"Held-out prompts, {run.path}"))
    console.print(verdict(rows, settings.KNOBS, settings.max_divergence), highlight=False)
    found = differences(rows, run.table)
    tell_differences(found, run.table, "charged numbers")
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
