"""What ``train.py --tuner`` does, and ``evaluate.py`` with such a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specgym.callbacks import intact_checkpoints
from specgym.decoding import file_name, write_json

from ..evaluation.comparison import Kind, summary
from ..evaluation.cross_validation import cross_validate
from ..evaluation.heat_map import heat_map
from ..evaluation.live import FORMAT as TABLE_FORMAT
from ..evaluation.live import Row, machine, row_to_json
from ..evaluation.replayed import Problem
from ..evaluation.results import differences
from ..evaluation.results import rendered as rendered_live
from ..evaluation.results import verdict as live_verdict
from ..evaluation.threshold_patterns import patterns
from ..evaluation.threshold_patterns import save as save_patterns
from ..evaluation.transfer_file import save as save_transfer
from ..evaluation.transfer_tables import rendered_summary, rendered_tests, transfer_verdict
from ..evaluation.tuner_table import rendered as rendered_table
from ..evaluation.tuner_table import session, table_rows, verdict
from ..evaluation.universal import losses, universal_setting
from ..export.knob_policy import ExportedPolicy
from ..export.recommend import by_pair, save_knobs
from ..export.recommend_pair import confirm, recommend, rendered, workload_of
from ..report.data import HeatMap
from ..report.heat_maps import save_heat_maps
from ..training.beginning import begin, this_command
from ..training.console import console, quieten, tell_differences
from ..training.run_folder import torch_threads
from ..training.settings_checks import SettingsError
from ..training.settings_io import prolonged
from ..training.tuner_run import TunerRun, problems_of
from .learned_tuner import LearnedTuner
from .tune_unseen import TunerSettings
from .tune_unseen_learning import learn


def train_tuner(settings: TunerSettings | None = None, resume: Path | None = None) -> Path:
    """Learn a tuner, judge it on held-out prompts, and write ``runs/<name>/`` (see `TunerRun`).

    Args:
        settings: what to do; by default the defaults, or the run's own when resuming.
        resume: folder of a run to go on with, from its newest intact checkpoint. Of a finished run only what is missing
            is made, unless `settings` asks for more steps.

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
        run = TunerRun(resume)
        saved = TunerSettings.load(run.settings)
        settings = prolonged(saved, settings or saved)
        if settings != saved:
            settings.save(run.settings, this_command())
            for stale in (run.policy, run.knobs, run.table, run.heat_maps, run.transfer):
                stale.unlink(missing_ok=True)
    else:
        # A misspelt name, or a trace that is not there, leaves no folder behind.
        settings = begin(settings or TunerSettings(), "tuner", problems_of)
        run = TunerRun(settings.folder)
    started = time.perf_counter()
    with torch_threads(settings.threads):
        _train(run, settings)
    console.print(f"Done in {time.perf_counter() - started:.0f} s.", highlight=False)
    return run.path


def evaluate_tuner(folder: Path) -> None:
    """Make a run's table again, print it, and write it to ``evaluation.json`` beside the stored one.

    Raises:
        RunFileError: the run is not finished, or a file of it is damaged.
    """
    quieten()
    run, settings = _finished(folder)
    with torch_threads(settings.threads), console.status("Judging on held-out prompts"):
        problems = problems_of(settings)
        rows = _judged(run, settings, problems).rows
        _save_table(run.path / "evaluation.json", settings, problems, rows)
    console.print(rendered_table(rows, f"Held-out prompts, {run.path}"))
    console.print(verdict(rows, settings.max_divergence), highlight=False)
    found = differences(rows, run.table)
    tell_differences(found, run.table, "numbers")


def transfer_tuner(folder: Path, kinds: Sequence[Kind], seeds: Sequence[int], jobs: int) -> None:
    """Cross-validate a run's settings, print what came of it, and write ``transfer.json``.

    Args:
        folder: of the run.
        kinds: what to leave out.
        seeds: one training of each fold a seed.
        jobs: trainings at a time.

    Raises:
        RunFileError: the folder is not that of such a run.
        SettingsError: there is nothing to leave out, no seed, or no job.
    """
    quieten()
    if not kinds or not seeds or min(seeds) < 0 or jobs < 1:
        raise SettingsError(
            f"--transfer needs something to leave out, seeds of at least 0 and at least one job, got {tuple(kinds)}, "
            f"{tuple(seeds)} and {jobs}"
        )
    run = TunerRun(folder)
    settings = TunerSettings.load(run.settings)
    with torch_threads(settings.threads), console.status("Cross-validation") as status:
        found = cross_validate(
            settings,
            run.path / "folds",
            this_command(),
            kinds,
            seeds,
            jobs=jobs,
            tell=lambda message: status.update(message),
        )
    save_transfer(run.transfer, found)
    for kind in found.kinds():
        console.print(rendered_summary(summary(found.results(kind)), kind))
        console.print(rendered_tests(found.results(kind), kind))
    console.print(transfer_verdict(found), highlight=False)
    console.print(f"Everything is in {run.transfer}; python evaluate.py {run.path} --report shows it.", soft_wrap=True)


def recommend_for_pair(
    folder: Path, pair: str, prompts: str, temperature: float, measurements: int | None, live: bool
) -> None:
    """Tune a pair with a run's policy, print what to use and what to expect, and store it in the run's folder.

    Args:
        folder: of the run.
        pair: as `load_pair` takes it.
        prompts: as `load_prompts` takes it.
        temperature: of sampling; 0 for greedy decoding.
        measurements: before the recommendation; by default as many as the tuner has learned with.
        live: measure and confirm by decoding, with the clock beside, even where the pair has a shipped trace.

    Raises:
        RunFileError: the run is not finished. Loading errors as for `load_pair` and `load_prompts`.
    """
    quieten()
    run, settings = _finished(folder)
    found = workload_of(pair, prompts, temperature)
    place = run.path / "recommendations" / file_name(found.name)
    with torch_threads(settings.threads), console.status(f"Tuning {found}") as status:
        recommendation = recommend(
            settings,
            ExportedPolicy.load(run.path),
            found,
            settings.measurements if measurements is None else measurements,
            live,
            lambda message: status.update(message),
        )
        recommendation.save(place / "recommendation.json", this_command())
        console.print(rendered(recommendation))
        if live:
            status.update(f"Confirming on held-out prompts of {found}")
            rows = confirm(settings, found, recommendation.knobs, place)
            console.print(rendered_live(rows, f"Held-out prompts of {found}, decoded live"))
            console.print(live_verdict(rows, max_divergence=settings.max_divergence), highlight=False)
    knobs = ", ".join(f"{name}={value:.3g}" for name, value in recommendation.knobs.items())
    expected = recommendation.expected.values
    console.print(
        f"Recommended for {found}: {knobs}. Expected: {expected['speedup']:.2f} times plain decoding, divergence "
        f"{expected['divergence']:.3f}. Stored in {place / 'recommendation.json'}.",
        highlight=False,
        soft_wrap=True,
    )
    if expected["speedup"] < 1:
        console.print(
            "That is slower than plain decoding: with thresholds this pair does not pay. Try a shorter draft, or "
            "SpeculativeDecoder with a small draft_length.",
            highlight=False,
        )


def _train(run: TunerRun, settings: TunerSettings) -> None:
    console.print(
        f"[bold]{run.path}[/]: {len(settings.workloads)} recorded workloads, {settings.total_timesteps} measurements"
    )
    if run.learned and run.table.is_file():
        console.print(f"The table is in {run.table}; python evaluate.py {run.path} makes it again.", soft_wrap=True)
        return
    problems = problems_of(settings)
    with console.status("The best settings on training prompts") as status:
        for problem in problems:
            status.update(f"The best settings on training prompts: {problem.name}")
            problem.train_grid()
    if not run.learned:
        checkpoint = next(intact_checkpoints(run.checkpoints), None)
        if checkpoint is not None:
            console.print(f"Going on from step {checkpoint.steps}.")
        best = {problem.name: problem.train_grid().best_reward for problem in problems}
        learn(run, settings, best, progress_bar=console.is_terminal)
    with console.status("Judging on held-out prompts"):
        judged = _judged(run, settings, problems)
        save_knobs(run.knobs, judged.thresholds)
        save_heat_maps(run.heat_maps, judged.heat_maps, this_command())
        save_patterns(run.path, patterns(problems))
        _save_table(run.table, settings, problems, judged.rows)  # last: with it the run is complete
    rows = judged.rows
    console.print(rendered_table(rows, f"Held-out prompts, {run.path}"))
    console.print(verdict(rows, settings.max_divergence), highlight=False)
    console.print(
        f"For a pair of your own: python evaluate.py {run.path} --pair <target>+<draft>. On pairs never seen: "
        f"python evaluate.py {run.path} --transfer. TensorBoard: tensorboard --logdir {run.tensorboard}",
        highlight=False,
        soft_wrap=True,
    )


@dataclass(frozen=True)
class Judged:
    """What a tuner comes to on the workloads of its run: the table, thresholds to use, and heat maps."""

    rows: list[Row]
    thresholds: dict[str, Any]
    heat_maps: list[HeatMap]


def _judged(run: TunerRun, settings: TunerSettings, problems: Sequence[Problem]) -> Judged:
    tuner = LearnedTuner.load(run.path)
    paths = {problem.name: session(tuner, problem, settings.measurements, settings.seed) for problem in problems}
    recommended = {name: path[-1] for name, path in paths.items()}
    universal = universal_setting(problems)
    thresholds = {
        "pairs": by_pair(recommended, tuner.policy.knobs),
        "workloads": recommended,
        "universal": universal,
        "loss": losses(problems, universal),
    }
    maps = [
        heat_map(problem, [problem.default, *paths[problem.name]], recommended[problem.name]) for problem in problems
    ]
    return Judged(table_rows(problems, recommended, universal), thresholds, maps)


def _save_table(path: Path, settings: TunerSettings, problems: Sequence[Problem], rows: Sequence[Row]) -> None:
    write_json(
        path,
        {
            "format": TABLE_FORMAT,
            "command": this_command(),
            "hardware": {
                **machine(),
                "time is charged by profiles of": sorted({problem.profiled_on for problem in problems}),
            },
            "protocol": {
                "measurements": settings.measurements,
                "prompts_per_measurement": settings.prompts_per_measurement,
                "tokens": settings.tokens_per_prompt,
                "intervals": "95 %, bootstrap over held-out prompts",
            },
            "rows": [row_to_json(row) for row in rows],
        },
    )


def _finished(folder: Path) -> tuple[TunerRun, TunerSettings]:
    run = TunerRun(folder)
    settings = TunerSettings.load(run.settings)
    run.require_learned()
    return run, settings
