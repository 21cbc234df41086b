"""Cross-validation: learn without a pair, a dataset or a target family, and tune what was left out.

Every fold and seed is a training of its own, kept in a folder, so an interrupted cross-validation goes on where it
stopped: with the trainings that are not finished, each from its beginning. From a checkpoint they would practise on
other prompts, and what comes of a seed would depend on when a worker was lost. A search that begins the same way in
several folds is made once, and counted in all of them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from specgym.decoding import place_models
from specgym.envs import Task, run_tasks

from ...experiments.experiment import load_settings, save_settings
from ...experiments.learned_tuner import LearnedSearcher, LearnedTuner, learn_tuner, tasks_of
from ...experiments.tune_unseen_settings import TunerSettings
from ...training.run_folder import RunFolder, quieten, this_command
from ..replayed import TuningTask
from ..statistics import Grid, universal_setting
from .comparison import LEARNED, MEASUREMENTS, Fold, Kind, Result, compare, folds
from .search_baselines import METHODS, NEEDS_UNIVERSAL, SearcherFactory, searchers
from .transfer import JudgedFold, Transfer

KINDS: tuple[Kind, ...] = ("pair", "dataset", "family")


@dataclass(frozen=True)
class Training:
    """One training of a cross-validation.

    Attributes:
        settings: those of the run, without the workloads that are left out.
        best: the best reward of each workload on its training prompts.
    """

    settings: TunerSettings
    best: Mapping[str, float]

    @property
    def done(self) -> bool:
        """True where the folder holds this very training, finished."""
        return self.done_in(self.settings.folder)

    def done_in(self, folder: Path) -> bool:
        """Return whether a folder holds this very training, finished."""
        run = RunFolder(folder)
        return run.learned().complete and load_settings(run.settings) == self.settings


@dataclass(frozen=True)
class Search:
    """Searches on one workload that learn from no other, but for the universal setting that some start from."""

    settings: TunerSettings = field(compare=False)  # those of the run, the same for all
    grid: Grid = field(compare=False)  # of the workload's held-out prompts, which takes longer than the searches
    workload: str
    methods: tuple[str, ...]
    universal: tuple[tuple[str, float], ...]
    seeds: tuple[int, ...]
    counts: tuple[int, ...]


def cross_validate(
    settings: TunerSettings,
    folder: Path,
    command: str,
    kinds: Sequence[Kind] = KINDS,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = METHODS,
    jobs: int = 2,
    report: Callable[[str], None] = lambda message: None,
) -> Transfer:
    """Learn and compare on every fold.

    Args:
        settings: of the run; its workloads are those of the folds.
        folder: the trainings are kept in it.
        command: that asked for it, for the record.
        kinds: what to leave out.
        seeds: one training of each fold and one search of each method a seed.
        methods: of `searchers.METHODS`, to compare with.
        jobs: trainings and searches at a time, each in a process of its own; within `on_ray` the cluster decides.
        report: called with what is being done.

    Raises:
        FoldError: the workloads are all of one pair, dataset or family, so nothing can be left out.
        MissingOptunaError: a method needs optuna, which is not installed.
    """
    alone = tuple(name for name in methods if name not in NEEDS_UNIVERSAL)
    warm = tuple(name for name in methods if name in NEEDS_UNIVERSAL)
    tasks = {task.name: task for task in tasks_of(settings)}
    every = [fold for kind in kinds for fold in folds(list(tasks.values()), kind)]
    first = next(iter(tasks.values()))
    for make in searchers(first.default, methods).values():
        make(first, 0)  # a method that is unknown or not installed should not show after all the training
    report("The best settings on training prompts")
    best = {name: task.grid("train").best_reward for name, task in tasks.items()}
    universal = {fold: universal_setting([tasks[name] for name in fold.train]) for fold in every}
    trainings = {(fold, seed): training(settings, folder, fold, seed, best) for fold in every for seed in seeds}
    counts = tuple(count for count in MEASUREMENTS if count <= settings.measurements)
    searches: dict[Fold, list[Search]] = {}
    for fold in every:
        for name in fold.test:
            for which, start in ((alone, ()), (warm, tuple(universal[fold].items()))):
                search = Search(settings, tasks[name].grid(), name, which, start, tuple(seeds), counts)
                searches.setdefault(fold, []).append(search)
    different = list(dict.fromkeys(search for group in searches.values() for search in group))
    work: list[Task[Any]] = [
        Task(f"searches on {search.workload}", partial(make_search, search)) for search in different
    ]
    work += [
        Task(f"the training without {fold.left_out}, seed {seed}", partial(train_fold, item), item.settings.folder)
        for (fold, seed), item in trainings.items()
        if not item.done
    ]
    results_of = _run(work, len(trainings) + len(different), jobs, report)
    searched: dict[Search, list[Result]] = dict(zip(different, results_of, strict=False))
    judged = []
    for fold in every:
        report(f"Judging without {fold.kind} {fold.left_out}")
        tuners = {seed: LearnedTuner.load(trainings[fold, seed].settings.folder) for seed in seeds}
        results = compare([tasks[name] for name in fold.test], {LEARNED: _learned(tuners)}, seeds, counts)
        results += [result for search in searches[fold] for result in searched[search]]
        results.sort(key=lambda result: (LEARNED, *methods).index(result.method))
        judged.append(JudgedFold(fold.kind, fold.left_out, fold.test, universal[fold], tuple(results)))
    return Transfer(command, protocol(settings, seeds), tuple(judged))


def training(settings: TunerSettings, folder: Path, fold: Fold, seed: int, best: Mapping[str, float]) -> Training:
    """The training of a fold and seed: as the run, without what is left out."""
    weights = dict(zip(settings.workloads, settings.weights, strict=True)) if settings.weights else {}
    place = folder / f"without-{fold.kind}-{re.sub(r'[^A-Za-z0-9.@-]+', '_', fold.left_out)}"
    kept = replace(
        settings,
        workloads=fold.train,
        weights=tuple(weights[name] for name in fold.train) if weights else (),
        seed=seed,
        name=f"seed-{seed}",
        runs=place,
    )
    return Training(kept, {name: best[name] for name in fold.train})


def protocol(settings: TunerSettings, seeds: Sequence[int]) -> dict[str, object]:
    """Protocol of the measurements and of the judgement, for the record."""
    return {
        "prompts_per_measurement": settings.prompts_per_measurement,
        "max_new_tokens": settings.max_new_tokens,
        "decoder": settings.decoder,
        **settings.options,
        "measured_on": "training prompts",
        "judged_on": "held-out prompts, as a share of the best setting of a dense grid there",
        "seeds": list(seeds),
        "steps": settings.total_timesteps,
        "max_divergence": settings.max_divergence,
        "intervals": "95 %, bootstrap over pairs and over workloads within each",
        "tests": "sign flips over pairs, Holm's correction within each kind of fold and number of measurements",
    }


def train_fold(fold: Training, folder: Path) -> None:
    """Learn one fold, in a process of its own, from the beginning unless it is finished.

    Args:
        fold: what to learn.
        folder: where to; on another machine it is not that of the settings.
    """
    if fold.done_in(folder):
        return
    quieten()
    torch.set_num_threads(1)
    place_models(fold.settings.dtype, fold.settings.device)
    run = RunFolder(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_settings(fold.settings, run.settings, this_command())
    learn_tuner(fold.settings, run.learned(), fold.best)


def make_search(search: Search) -> list[Result]:
    """Make searches and judge them, in a process of its own."""
    torch.set_num_threads(1)
    place_models(search.settings.dtype, search.settings.device)
    (task,) = tasks_of(search.settings, [search.workload])
    task.grids["test"] = search.grid
    return compare([task], searchers(dict(search.universal) or None, search.methods), search.seeds, search.counts)


def _run(tasks: Sequence[Task[Any]], total: int, jobs: int, report: Callable[[str], None]) -> list[Any]:
    """Run tasks, and report how many of the total are done."""
    done = total - len(tasks)

    def count(finished: int = 1) -> None:
        nonlocal done
        done += finished
        report(f"Trainings, and searches that know no other workload: {done} of {total} done")

    count(0)
    return run_tasks(tasks, jobs, lambda *_: count())


def _learned(tuners: Mapping[int, LearnedTuner]) -> SearcherFactory:
    def make(task: TuningTask, seed: int) -> LearnedSearcher:
        return LearnedSearcher(tuners[seed], task)

    return make
