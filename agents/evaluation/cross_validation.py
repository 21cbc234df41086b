"""Cross-validation: learn without a pair, a dataset or a target family, and tune what was left out.

Every fold and seed is a training of its own, kept in a folder, so an interrupted cross-validation goes on where it
stopped. A search that begins the same way in several folds is made once, and counted in each.
"""

from __future__ import annotations

import multiprocessing
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..experiments.experiment import load_settings, save_settings
from ..experiments.learned_tuner import LearnedSearcher, LearnedTuner
from ..experiments.tune_unseen_settings import TunerSettings
from ..training.console import quieten
from ..training.run_folder import RunFolder, this_command
from .comparison import LEARNED, MEASUREMENTS, Fold, Kind, Result, compare, folds
from .replayed import Problem, problems_of
from .search_baselines import METHODS, NEEDS_UNIVERSAL, Knobs, SearcherFactory, searchers
from .transfer_file import JudgedFold, Transfer
from .universal import universal_setting

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
        """Whether the folder holds this very training, finished."""
        run = RunFolder(self.settings.folder)
        return run.learned().complete and load_settings(run.settings) == self.settings


@dataclass(frozen=True)
class Search:
    """Searches on one workload that learn from no other; those that start from a universal setting are given it."""

    settings: TunerSettings = field(compare=False)  # those of the run, the same for all
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
    tell: Callable[[str], None] = lambda message: None,
) -> Transfer:
    """Learn and compare on every fold.

    Args:
        settings: of the run; its workloads are those of the folds.
        folder: the trainings are kept in it.
        command: that asked for it, for the record.
        kinds: what to leave out.
        seeds: one training of each fold and one search of each method a seed.
        methods: of `searchers.METHODS`, to compare with.
        jobs: trainings and searches at a time, each in a process of its own.
        tell: called with what is being done.

    Raises:
        FoldError: the workloads are all of one pair, dataset or family, so nothing can be left out.
        MissingOptunaError: a method needs optuna, which is not installed.
    """
    alone = tuple(name for name in methods if name not in NEEDS_UNIVERSAL)
    warm = tuple(name for name in methods if name in NEEDS_UNIVERSAL)
    problems = {problem.name: problem for problem in problems_of(settings)}
    every = [fold for kind in kinds for fold in folds(list(problems.values()), kind)]
    first = next(iter(problems.values()))
    for make in searchers(first.default, methods).values():
        make(first, 0)  # a method that is unknown or not installed should not show after all the training
    tell("The best settings on training prompts")
    best = {name: problem.train_grid().best_reward for name, problem in problems.items()}
    universal = {fold: universal_setting([problems[name] for name in fold.train]) for fold in every}
    trainings = {(fold, seed): training(settings, folder, fold, seed, best) for fold in every for seed in seeds}
    counts = tuple(count for count in MEASUREMENTS if count <= settings.measurements)

    def search(name: str, which: tuple[str, ...], start: Knobs) -> Search:
        return Search(settings, name, which, tuple(start.items()), tuple(seeds), counts)

    of_fold = {
        fold: [each for name in fold.test for each in (search(name, alone, {}), search(name, warm, universal[fold]))]
        for fold in every
    }
    context = multiprocessing.get_context("spawn")  # a fork of a process in which torch has run can hang
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            waiting = [one for one in trainings.values() if not one.done]
            _wait([pool.submit(train_fold, one) for one in waiting], len(trainings), "Trainings", tell)
            searched = _searched(pool, list(dict.fromkeys(one for each in of_fold.values() for one in each)), tell)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    judged = []
    for fold in every:
        tell(f"Judging without {fold.kind} {fold.left_out}")
        tuners = {seed: LearnedTuner.load(trainings[fold, seed].settings.folder) for seed in seeds}
        results = compare([problems[name] for name in fold.test], {LEARNED: _learned(tuners)}, seeds, counts)
        results += [result for one in of_fold[fold] for result in searched[one]]
        judged.append(
            JudgedFold(fold.kind, fold.left_out, fold.test, universal[fold], tuple(_in_order(results, methods)))
        )
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
    """What a measurement is and how recommendations are judged, for the record."""
    return {
        "prompts_per_measurement": settings.prompts_per_measurement,
        "tokens_per_prompt": settings.max_new_tokens,
        "draft_length": settings.max_draft_length,
        "measured_on": "training prompts",
        "judged_on": "held-out prompts, as a share of the best setting of a dense grid there",
        "seeds": list(seeds),
        "steps": settings.total_timesteps,
        "max_divergence": settings.max_divergence,
        "intervals": "95 %, bootstrap over pairs and over workloads within each",
        "tests": "sign flips over pairs, Holm's correction within each kind of fold and number of measurements",
    }


def train_fold(one: Training) -> None:
    """Learn one fold, in a process of its own; one that another version or other settings have begun begins anew."""
    quieten()
    torch.set_num_threads(1)
    from ..experiments.tune_unseen import learn_tuner

    run = RunFolder(one.settings.folder)
    if run.settings.is_file() and load_settings(run.settings) != one.settings:
        shutil.rmtree(run.path)
    run.path.mkdir(parents=True, exist_ok=True)
    save_settings(one.settings, run.settings, this_command())
    learn_tuner(one.settings, run.learned(), one.best)


def make_search(one: Search) -> list[Result]:
    """Make searches and judge them, in a process of its own."""
    torch.set_num_threads(1)
    problems = problems_of(one.settings, [one.workload])
    return compare(problems, searchers(dict(one.universal) or None, one.methods), one.seeds, one.counts)


def _searched(pool: Executor, searches: Sequence[Search], tell: Callable[[str], None]) -> dict[Search, list[Result]]:
    running = {one: pool.submit(make_search, one) for one in searches}
    _wait(list(running.values()), len(searches), "Searches that know no other workload", tell)
    return {one: future.result() for one, future in running.items()}


def _wait(running: Sequence[Future[Any]], total: int, what: str, tell: Callable[[str], None]) -> None:
    """Tell how many are done, and raise what one of them raised."""
    done = total - len(running)
    tell(f"{what}: {done} of {total} done")
    for finished in as_completed(running):
        finished.result()
        done += 1
        tell(f"{what}: {done} of {total} done")


def _learned(tuners: Mapping[int, LearnedTuner]) -> SearcherFactory:
    def make(problem: Problem, seed: int) -> LearnedSearcher:
        return LearnedSearcher(tuners[seed], problem)

    return make


def _in_order(results: Sequence[Result], methods: Sequence[str]) -> list[Result]:
    order = {name: place for place, name in enumerate((LEARNED, *methods))}
    return sorted(results, key=lambda result: order[result.method])
