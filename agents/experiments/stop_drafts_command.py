"""What ``train.py --env specgym/DraftLength-v0`` does, and ``evaluate.py`` with such a run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from specgym.decoding import write_json
from specgym.envs import DraftTable, trace_in

from ..evaluation.stop_live import LiveRow, agreement, compare_live, rendered_live
from ..evaluation.stop_results import Row, compare
from ..evaluation.stop_tables import differences, rendered, row_to_json, save_rows, verdict
from ..export.stop_rule import ExportedStopRule
from ..training.beginning import begin, this_command
from ..training.console import console, quieten, tell_differences
from ..training.ppo import TrainingInterruptedError
from ..training.run_folder import torch_threads
from ..training.stop_run import StoppingRun, new_profile
from .stop_drafts import StoppingSettings, continued
from .stop_drafts_learning import learn

LIVE_FORMAT = "specgym-stopping-live-1"


def train_stopping(settings: StoppingSettings | None = None, resume: Path | None = None) -> Path:
    """Learn a policy for each seed, compare them with other rules, and write ``runs/<name>/`` (see `StoppingRun`).

    Args:
        settings: what to do; by default the defaults, or the run's own when resuming.
        resume: folder of a run to go on with. Seeds that are finished are left alone; whatever is missing is made.

    Returns:
        The folder of the run.

    Raises:
        WorkloadError, TraceError: a workload is not known, or has no trace.
        SettingsError: the folder is taken, or `settings` contradict those of the run to resume.
        RunFileError: `resume` is not the folder of such a run, or a file in it is damaged.
        TrainingInterruptedError: interrupted by the user.
    """
    quieten()
    if resume is not None:
        run = StoppingRun(resume)
        saved = StoppingSettings.load(run.settings)
        settings = continued(saved, settings or saved)
        if settings != saved:
            settings.save(run.settings, this_command())
            run.table.unlink(missing_ok=True)  # it lacks the seeds that were added
    else:
        settings = begin(settings or StoppingSettings(), "stopping", _check)
        run = StoppingRun(settings.folder)
    started = time.perf_counter()
    try:
        with torch_threads(settings.threads):
            _train(run, settings)
    except KeyboardInterrupt:
        raise TrainingInterruptedError(
            f"interrupted. Go on with: python train.py --resume {shlex.quote(str(run.path))}"
        ) from None
    console.print(f"Done in {time.perf_counter() - started:.0f} s.", highlight=False)
    return run.path


def evaluate_stopping(folder: Path, live: Sequence[str] = ()) -> None:
    """Make a run's table again, or measure some workloads live; print it and write it beside the stored one.

    Args:
        folder: of a finished run.
        live: workloads to decode live; none for the replayed table of the run's own.

    Raises:
        RunFileError: the folder is not that of a finished run, or a file in it is damaged.
        WorkloadError, TraceError: a workload to decode live is not known, or has no trace.
    """
    quieten()
    run = StoppingRun(folder)
    settings = StoppingSettings.load(run.settings)
    with torch_threads(settings.threads):
        if live:
            _evaluate_live(run, settings, live)
            return
        rows = _compared(run, settings)
        write_json(
            run.path / "evaluation.json", {"command": this_command(), "rows": [row_to_json(row) for row in rows]}
        )
    _show(run, rows)
    found = differences(rows, run.table)
    tell_differences(found, run.table, "throughputs")


def _check(settings: StoppingSettings) -> None:
    for name in settings.workloads:  # a misspelt name, or a trace that lacks what is asked, should leave no folder
        both = [trace_in(settings.traces, name, split) for split in ("train", "test")]
        DraftTable(both, settings.max_draft_length, settings.tokens)


def _train(run: StoppingRun, settings: StoppingSettings) -> None:
    console.print(
        f"[bold]{run.path}[/]: {len(settings.workloads)} workloads, {len(settings.seeds)} seeds of "
        f"{settings.total_timesteps} decisions"
    )
    kind = f"computed for {settings.hardware}" if settings.hardware else "measured once for this hardware, then cached"
    console.print(f"Latency profiles ({kind}):")
    profiles = run.profiles(settings)
    traces = [trace_in(settings.traces, name, "train") for name in settings.workloads]
    for number, seed in enumerate(settings.seeds):
        if run.learned(seed):
            console.print(f"Seed {seed} is learned already.")
            continue
        run.table.unlink(missing_ok=True)  # it was of another policy
        console.print(f"Seed {seed} ({number + 1} of {len(settings.seeds)}):")
        learn(run, settings, seed, traces, profiles, progress_bar=console.is_terminal)
    if run.table.is_file():
        console.print(f"The table is in {run.table}; python evaluate.py {run.path} makes it again.", soft_wrap=True)
        return
    rows = _compared(run, settings)
    save_rows(run.table, rows, settings, profiles, this_command())
    _show(run, rows)
    console.print(
        f"Live: python evaluate.py {run.path} --live {settings.workloads[0]}. TensorBoard: tensorboard --logdir "
        f"{run.path / 'tensorboard'}",
        highlight=False,
        soft_wrap=True,
    )


def _compared(run: StoppingRun, settings: StoppingSettings) -> list[Row]:
    learned = [ExportedStopRule.load(run.policy_folder(seed)) for seed in settings.seeds]
    train, test = (
        [trace_in(settings.traces, name, split) for name in settings.workloads] for split in ("train", "test")
    )
    profiles = run.profiles(settings)
    with console.status("Comparing on test prompts") as status:
        return compare(
            settings, learned, profiles, train, test, lambda name: status.update(f"Comparing on test prompts: {name}")
        )


def _evaluate_live(run: StoppingRun, settings: StoppingSettings, live: Sequence[str]) -> None:
    kept = dict(zip(settings.workloads, run.profiles(settings), strict=True))
    rows: list[LiveRow] = []
    with console.status("Decoding test prompts live") as status:
        learned = ExportedStopRule.load(run.policy_folder(settings.seeds[0]))
        for name in live:
            rows += compare_live(
                settings,
                name,
                learned,
                kept[name] if name in kept else new_profile(settings, name),
                trace_in(settings.traces, name, "train"),
                trace_in(settings.traces, name, "test"),
                lambda message: status.update(message),
            )
    path = run.path / "live.json"
    write_json(
        path,
        {
            "format": LIVE_FORMAT,
            "command": this_command(),
            "seed": settings.seeds[0],
            "rows": [vars(row) for row in rows],
        },
    )
    console.print(rendered_live(rows, f"Test prompts, {run.path}, the policy of seed {settings.seeds[0]}"))
    console.print(agreement(rows), highlight=False)
    console.print(f"The table is in {path}.", soft_wrap=True)


def _show(run: StoppingRun, rows: Sequence[Row]) -> None:
    console.print(rendered(rows, f"Test prompts, {run.path}"))
    console.print(verdict(rows), highlight=False)
