"""``train.py`` and ``evaluate.py``: options in, errors as one line and exit code 2."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Generic, Literal, TypeVar

import tyro

from specgym.decoding import ModelType, check_placement, decoder_names, run_command
from specgym.envs import environment_id, on_ray

from .engines.settings import EngineName, EngineSettings, is_engine_run
from .experiments.control.choose_drafts_settings import ENV as DRAFT_CHOICE
from .experiments.control.choose_drafts_settings import ChoiceSettings
from .experiments.control.control_settings import ControlSettings
from .experiments.control.round_knobs_settings import ENV as ROUND_KNOBS
from .experiments.control.round_knobs_settings import round_settings
from .experiments.control.stop_drafts_settings import ENV as DRAFT_LENGTH
from .experiments.control.stop_drafts_settings import StopSettings
from .experiments.experiment import RunSettings, load_settings
from .experiments.tune_knobs_settings import default_settings
from .experiments.tune_unseen_settings import tuner_settings
from .experiments.tune_worlds_settings import ENV as WORLDS
from .experiments.tune_worlds_settings import WorldsSettings
from .training.run_folder import RunFolder
from .training.settings_io import SettingsError

DEFAULT_DECODER: Final = "threshold"
ExportName = Literal["transformers", "llama.cpp", "openvino", "vllm", "sglang", "tensorrt-llm"]
_S = TypeVar("_S", bound=RunSettings)
_E = TypeVar("_E", bound=str)


@dataclass(frozen=True)
class TrainCommand(Generic[_S, _E]):
    """Options of train.py."""

    settings: Annotated[_S, tyro.conf.arg(name="")]
    env: _E
    """Environment to learn in."""
    tuner: bool = False
    """Learn a tuner that tries a few settings on a workload and recommends one, for pairs never seen, instead of
    settings for the workloads named."""
    resume: Path | None = None
    """Folder of a run to continue from its newest intact checkpoint. Its settings are kept; only --total-timesteps may
    be raised, and --seeds added where there are several."""
    ray: tuple[str, ...] | None = None
    """Step live environments on a Ray cluster: without an address on this machine's cluster or a new one, else at that
    address (auto, host:port, ray://host:10001)."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure a saved run again on held-out prompts, and compare the table with the stored one.

    Or write a report of it; or, for a run of train.py --tuner, recommend settings for any pair, or test how well that
    works on pairs, datasets and targets that were left out of training. Without a run, --pair recommends settings of
    exact decoding for an engine, by the policy that ships.
    """

    run: tyro.conf.Positional[Path | None] = None
    """Folder of the run, such as runs/thresholds-20260101-120000. Needed for all but --pair."""
    live: tuple[str, ...] | None = None
    """Workloads to decode live (by the clock too) and compare with their replay, for a run of --env
    specgym/DraftLength-v0 or specgym/DraftChoice-v0. With --pair: measure and confirm by decoding, and score the texts
    (BLEU, ROUGE) where the prompts have references."""
    report: bool = False
    """Write report.html into the run's folder, one page with every table and figure there is, and the tables as CSV and
    JSON into report/."""
    export: ExportName | None = None
    """Engine to write the settings for: flags, JSON or YAML of its current version, printed and stored in export/ in
    the folder, with what has no equivalent there. The folder is that of a run, or of a recommendation.json."""
    pair: str | None = None
    """Pair to recommend settings for after a few measurements, such as my-target+my-draft; with a run of --tuner for
    its decoder, else for exact decoding."""
    engine: EngineName | None = None
    """Engine to serve with, for --pair without a run of --tuner: its stop rule is measured with, and its arguments are
    printed. Defaults to transformers."""
    out: Path | None = None
    """Folder of recommendation.json, for --pair without a run of --tuner. Defaults to one in recommendations/."""
    prompts: str = "prose"
    """Prompt set, or file of prompts, for --pair; part of them is kept for confirming. They may have references."""
    temperature: float = 0.0
    """Sampling temperature for --pair; 0 for greedy decoding."""
    measurements: int | None = None
    """Settings to try before recommending one, for --pair. Defaults to as many as the tuner of the run has learned
    with, or 4."""
    dtype: ModelType | None = None
    """Type of the models' weights, for --pair. Defaults to the run's own."""
    device: str | None = None
    """Device of the models, for --pair: cpu, cuda, cuda:1, or auto for all cards. Defaults to the run's own."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt, at most, for --pair; longer ones are cut, with a warning. Defaults to the run's own."""
    transfer: bool = False
    """Learn again without each pair, each dataset and each target family, tune what was left out, and compare with
    searches that know no other workload; for a run of --tuner. About a quarter of a minute for each training."""
    leave_out: tuple[Literal["pair", "dataset", "family"], ...] | None = None
    """Kinds of things to leave out, for --transfer. Defaults to all that the run's workloads have at least two of."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds of trainings and searches, for --transfer."""
    jobs: int = 2
    """Trainings at a time, for --transfer."""
    ray: tuple[str, ...] | None = None
    """Run the trainings and searches of --transfer on a Ray cluster: without an address on this machine's cluster or a
    new one, else at that address (auto, host:port, ray://host:10001)."""


@dataclass(frozen=True)
class EngineCommand:
    """Options of train.py --engine."""

    settings: Annotated[EngineSettings, tyro.conf.arg(name="")]
    resume: Path | None = None
    """Folder of a run to go on with after it was interrupted; what it has measured is not measured again."""


def train_command(arguments: Sequence[str] | None = None) -> int:
    """Run ``train.py``. Returns the exit code, as of `run_command`."""
    return run_command(lambda: _train(list(sys.argv[1:] if arguments is None else arguments)))


def evaluate_command(arguments: Sequence[str] | None = None) -> int:
    """Run ``evaluate.py``. Returns the exit code, as of `run_command`."""
    return run_command(lambda: _evaluate(tyro.cli(EvaluateCommand, args=arguments)))


def learnable(tuner: bool = False) -> dict[str, Callable[[], RunSettings]]:
    """Default settings for everything that `train.py --env` offers, with or without --tuner, by environment id."""
    make = tuner_settings if tuner else default_settings
    tuned = {environment_id(name): partial(make, name) for name in decoder_names()}
    return (
        {**tuned}
        if tuner
        else {
            **tuned,
            DRAFT_LENGTH: StopSettings,
            DRAFT_CHOICE: ChoiceSettings,
            ROUND_KNOBS: round_settings,
            WORLDS: WorldsSettings,
        }
    )


def _train(arguments: list[str]) -> None:
    env, tuner, resume = _value_of("--env", arguments), "--tuner" in arguments, _value_of("--resume", arguments)
    if _value_of("--engine", arguments) is not None or (resume is not None and is_engine_run(Path(resume))):
        description = (inspect.getdoc(EngineSettings) or "").partition("\n\nRaises:")[0]
        engine = tyro.cli(
            EngineCommand, args=arguments, default=EngineCommand(EngineSettings()), description=description
        )
        from .engines.command import tune_engine

        tune_engine(engine.settings, engine.resume)
        return
    if env == "specgym/Engine-v0":
        raise SettingsError(
            f"--env {env} has nothing to learn beforehand; a few measurements tune an engine: train.py --engine, with "
            "its models as --target and --draft (docs/engines.md)"
        )
    # An unknown id is left for the parser to refuse.
    chosen = env if env in learnable(tuner) else environment_id(DEFAULT_DECODER)
    decoder = _value_of("--decoder", arguments)
    if chosen == ROUND_KNOBS and decoder is not None:
        default: RunSettings = round_settings(decoder)  # whose workloads are the defaults
    else:
        default = learnable(tuner)[chosen]()
    if resume is not None:
        saved: RunSettings = load_settings(RunFolder.existing(Path(resume)).settings)
        if saved.option != default.option if env else tuner and saved.EXPERIMENT != default.EXPERIMENT:
            raise SettingsError(
                f"{resume} is a run of {saved.option}, not of {default.option}; leave that out to go on with it"
            )
        default = saved  # options left out mean the run's own settings, not the defaults
    command = _parsed(arguments, TrainCommand(default, chosen, tuner, None))
    from .training.run import train

    if command.ray is not None:
        from .training.environments import require_apart

        require_apart(command.settings)
    with on_ray(command.ray):
        train(command.settings, command.resume)


def _parsed(arguments: list[str], default: TrainCommand[Any, Any]) -> TrainCommand[RunSettings, str]:
    names = tuple(learnable(default.tuner))
    description = inspect.getdoc(type(default.settings)) or ""
    if not default.tuner:
        description += (
            f"\n\nThe options are those of --env {default.env}; --env <another> --help shows those of another, and "
            "--tuner --help those of a tuner for pairs never seen. --engine llama.cpp --help shows those of tuning an "
            "engine that you serve with."
        )
    kind: Any = TrainCommand  # mypy takes no type parameter that is a variable
    command: TrainCommand[RunSettings, str] = tyro.cli(
        kind[type(default.settings), Literal[names]], args=arguments, default=default, description=description
    )
    return command


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of an option before the whole command line is understood; the last one counts."""
    value = None
    for place, argument in enumerate(arguments):
        if argument == option and place + 1 < len(arguments):
            value = arguments[place + 1]
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
    return value


def _evaluate(command: EvaluateCommand) -> None:
    if command.export is not None:
        _export(command, command.export)
        return
    if command.report + command.transfer + (command.pair is not None) > 1:
        raise SettingsError("--report, --transfer and --pair are three things to do; give one at a time")
    if command.pair is None and (command.dtype, command.device) != (None, None):
        raise SettingsError("--dtype and --device are for --pair; all else is measured with those of the run")
    if command.pair is None and command.max_prompt_tokens is not None:
        raise SettingsError("--max-prompt-tokens is for --pair; all else is measured with that of the run")
    if command.ray is not None and not command.transfer:
        raise SettingsError("--ray is for --transfer; nothing else here has several things to do at a time")
    check_placement(command.dtype, command.device)
    if command.run is None and command.pair is None:
        raise SettingsError("name the folder of a run, or a pair to recommend settings for with --pair")
    run, kind = command.run, None
    if run is not None and is_engine_run(run):
        _evaluate_engine(command, run)
        return
    if run is not None:
        settings: RunSettings = load_settings(RunFolder.existing(run).settings)
        kind = settings.EXPERIMENT
    exact = command.pair is not None and kind in (None, WorldsSettings.EXPERIMENT)
    if not exact and (command.engine, command.out) != (None, None):
        raise SettingsError("--engine and --out are for --pair without a run, or with one of --env " + WORLDS)
    if exact:
        _use_worlds_tuner(command)
        return
    assert run is not None
    if command.report:
        from .report.page import report_run

        report_run(run)
    elif command.pair is not None or command.transfer:
        if kind == WorldsSettings.EXPERIMENT:
            raise SettingsError(f"{run} is always judged in worlds that were kept apart; leave out --transfer")
        if kind != "tune-unseen":
            raise SettingsError(f"--pair and --transfer are for runs of train.py --tuner; {run} is none")
        _use_tuner(command, run)
    elif command.live is not None:
        if kind in ("tune-unseen", WorldsSettings.EXPERIMENT):
            raise SettingsError("--live needs --pair: which pair should be decoded?")
        if not isinstance(settings, ControlSettings):
            raise SettingsError(
                f"--live is for runs of --env {DRAFT_LENGTH} and {DRAFT_CHOICE}; the table of {run} always is"
            )
        from .experiments.control.control_experiment import evaluate_live

        evaluate_live(run, command.live)
    else:
        from .training.run import evaluate

        evaluate(run)


def _export(command: EvaluateCommand, engine: ExportName) -> None:
    if command != EvaluateCommand(command.run, export=engine):
        raise SettingsError("--export writes settings that there are; leave out all options but the folder")
    if command.run is None:
        raise SettingsError("name the folder of a run, or of a recommendation, to --export")
    from .export.engine_files import export_for_engine

    export_for_engine(command.run, engine)


def _evaluate_engine(command: EvaluateCommand, run: Path) -> None:
    if command not in (EvaluateCommand(run), EvaluateCommand(run, report=True)):
        raise SettingsError(
            f"{run} is a run of train.py --engine, which is judged again or reported on: leave out all but --report"
        )
    from .engines.command import judge_again, report_engine

    (report_engine if command.report else judge_again)(run)


def _use_worlds_tuner(command: EvaluateCommand) -> None:
    from .export.recommend_exact import recommend_for_pair
    from .export.worlds_policy import WorldsTuner, shipped_tuner

    assert command.pair is not None
    recommend_for_pair(
        shipped_tuner() if command.run is None else WorldsTuner.load(RunFolder(command.run).first_policy),
        command.pair,
        command.prompts,
        command.temperature,
        command.engine or "transformers",
        command.measurements,
        live=command.live is not None,
        out=command.out,
        dtype=command.dtype,
        device=command.device,
        max_prompt_tokens=command.max_prompt_tokens,
    )


def _use_tuner(command: EvaluateCommand, run: Path) -> None:
    from .experiments.tune_unseen import recommend_for_pair, transfer_tuner

    if command.pair is None:
        with on_ray(command.ray):
            transfer_tuner(run, command.leave_out, command.seeds, command.jobs)
        return
    live = command.live is not None
    recommend_for_pair(
        run,
        command.pair,
        command.prompts,
        command.temperature,
        command.measurements,
        live=live,
        dtype=command.dtype,
        device=command.device,
        max_prompt_tokens=command.max_prompt_tokens,
    )
