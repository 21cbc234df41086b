"""Experiment: learn to tune, by replay, in episodes in which settings are tried one after another on a workload."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich import box
from rich.table import Table
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from specgym.decoding import ModelType, file_name, seed_number, sequence_of, whole_number
from specgym.envs import TraceError, recorded_workloads

from ..evaluation.contenders import live_verdict
from ..evaluation.heat_map import heat_map, save_heat_maps
from ..evaluation.knob_patterns import save_patterns
from ..evaluation.live import live_columns
from ..evaluation.replayed import TuningTask
from ..evaluation.results import ALL, LEARNED, RESAMPLES, Column, ResultTable, Row, kept_bound, machine, mean_rows
from ..evaluation.statistics import Floats, interval, losses, universal_setting
from ..evaluation.text_quality import require_text_quality, scored_texts
from ..evaluation.unseen.comparison import Kind, kinds_to_leave_out
from ..evaluation.unseen.cross_validation import cross_validate
from ..export.knob_policy import ExportedPolicy
from ..export.recommend import by_pair, load_knobs, save_knobs
from ..export.recommend_pair import confirm, recommend_pair, workload_of
from ..training.run_folder import RunFolder, console, on_machine, quieten, this_command
from ..training.settings_io import SettingsError
from .experiment import Experiment, Learner, PolicyChoice, load_settings
from .learned_tuner import LearnedSearcher, LearnedTuner, exported, practice, tasks_of, tuner_callbacks
from .tune_knobs import knob_policy
from .tune_unseen_settings import TunerSettings

MOST_JOBS: Final = 256
METHODS = ("default", "universal", LEARNED, "best")
"""`universal` is the best single setting over the training prompts of all workloads; `best` is the best of a dense grid
on the very prompts that the others are judged on, which none of them could know."""
COLUMNS = (
    "ms_per_token",
    "speedup",
    "draft_acceptance_rate",
    "mean_acceptance_length",
    "divergence",
    "reward",
    "share_of_best",
)
SHOWN = (
    Column("speedup", "speedup: default,\nlearned, best", methods=("default", LEARNED, "best")),
    Column("divergence", "divergence: de-\nfault, learned", ".3f", methods=("default", LEARNED)),
    Column("share_of_best", "share of the best:\ndefault, universal, learned", ".3f", methods=METHODS[:3]),
)
_CAPTION = (
    "Held-out prompts, replayed; time is charged by the reference latency profiles. The share is of the reward of the "
    "best setting of a dense grid on the same prompts."
)


class TuneUnseen(Experiment[TunerSettings]):
    """Learning to tune a decoder on recorded workloads."""

    RESULTS = ("knobs.json", "heat_maps.json", "patterns.json", "transfer.json")
    FIGURES = "numbers"

    @classmethod
    def check(cls, settings: TunerSettings) -> None:
        """Raise an error unless every workload has its recordings."""
        try:
            tasks_of(settings)
        except TraceError as error:
            if settings.recordings is None and not recorded_workloads(settings.decoder):
                names = " ".join(settings.workloads)
                raise SettingsError(
                    f"no recordings of {settings.decoder} ship with specgym; record some with `python -m "
                    f"specgym.envs.record {names} --decoder {settings.decoder} --out recordings`, and add --workloads "
                    f"{names} --recordings recordings"
                ) from error
            raise

    @cached_property
    def tasks(self) -> list[TuningTask]:
        """The workloads as tasks to tune."""
        return tasks_of(self.settings)

    @cached_property
    def paths(self) -> dict[str, list[dict[str, float]]]:
        """The settings that the learned tuner tries on each workload, the recommended one last."""
        settings, tuner = self.settings, LearnedTuner.load(self.run.path)
        return {
            task.name: LearnedSearcher(tuner, task).session(settings.measurements, settings.seed) for task in self.tasks
        }

    @property
    def recommended(self) -> dict[str, dict[str, float]]:
        """The recommended setting of each workload."""
        return {name: path[-1] for name, path in self.paths.items()}

    def learners(self) -> Sequence[Learner]:
        """One policy."""
        return [Learner(self.settings.seed, self.run.learned())]

    def environments(self, learner: Learner) -> VecEnv:
        """Sessions of tuning on training prompts."""
        best = {}
        with console.status("The best settings on training prompts") as status:
            for task in self.tasks:
                status.update(f"The best settings on training prompts: {task.name}")
                best[task.name] = task.grid("train").best_reward
        return practice(self.settings, best)

    def policy(self, environments: VecEnv) -> PolicyChoice:
        """A Gaussian over places of the knobs."""
        return knob_policy(self.settings.learning, environments)

    def callbacks(self, learner: Learner) -> Sequence[BaseCallback]:
        """The bound on the divergence and priorities of workloads, where they are asked for."""
        return tuner_callbacks(self.settings)

    def export(self, model: PPO, folder: Path) -> None:
        """Write the policy with the ranges of its knobs."""
        exported(model, self.settings).save(folder)

    def conclude(self) -> None:
        """Recommend settings, and make heat maps and patterns."""
        run = self.run
        if all((run.path / name).is_file() for name in self.RESULTS[:3]):
            return
        universal = universal_setting(self.tasks)
        speeds = {
            task.name: float(task.worth([self.recommended[task.name]], split="train").values["speedup"][0])
            for task in self.tasks
        }
        paying = {name: knobs for name, knobs in self.recommended.items() if speeds[name] > 1}
        pairs = by_pair(paying, LearnedTuner.load(run.path).policy.knobs)
        save_knobs(
            run.knobs,
            {
                "pairs": pairs,
                "workloads": {name: paying.get(name) for name in self.recommended},
                "reasons": {
                    name: f"{speed:.2f} times plain speed on the training prompts" for name, speed in speeds.items()
                },
                "universal": universal,
                "loss": losses(self.tasks, universal),
                "by_pair": judged_pairs(self.tasks, pairs, universal),
            },
        )
        maps = [
            heat_map(task, [task.default, *self.paths[task.name]], self.recommended[task.name]) for task in self.tasks
        ]
        save_heat_maps(run.path / "heat_maps.json", maps, this_command())
        save_patterns(run.path, self.tasks)

    def judge(self, report: Callable[[str], None]) -> ResultTable:
        """Replay held-out prompts with the recommended settings, and with those that need no measurement."""
        settings, tasks, universal = self.settings, self.tasks, universal_setting(self.tasks)
        rows: list[Row] = []
        for task in tasks:
            report(task.name)
            rows += judged_rows(task, universal, self.recommended[task.name])
        rows += mean_rows(rows)
        hardware = machine() | {"time is charged by profiles of": sorted({task.profiled_on for task in tasks})}
        protocol = {
            "measurements": settings.measurements,
            "prompts_per_measurement": settings.prompts_per_measurement,
            "tokens": settings.max_new_tokens,
            "intervals": "95 %, bootstrap over held-out prompts",
        }
        verdict = tuner_verdict(rows, settings.max_divergence)
        return ResultTable(rows, SHOWN, COLUMNS, verdict, _CAPTION, hardware, protocol)

    def tables(self) -> Sequence[Table]:
        """The settings recommended for every pair and for all of them, and what the latter loses on each."""
        stored = load_knobs(self.run.knobs)
        return [pairs_table(stored)] if "by_pair" in stored else []

    def hints(self) -> Sequence[str]:
        """Commands that use the tuner."""
        return (
            f"For a pair of your own: python evaluate.py {self.run.path} --pair <target>+<draft>.",
            f"On pairs never seen: python evaluate.py {self.run.path} --transfer.",
        )


def judged_pairs(
    tasks: Sequence[TuningTask], pairs: Mapping[str, Mapping[str, float]], universal: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Speedup and loss of each pair's setting and of the one for all, means over the pair's held-out prompts.

    Args:
        tasks: all workloads.
        pairs: the setting of each pair; none where plain decoding is to be preferred.
        universal: the one for all.

    Returns:
        By pair: `speedup` and `loss` where the pair has a setting, `universal_speedup` and `universal_loss`. A loss is
        a share of the reward of each workload's best setting.
    """
    judged: dict[str, dict[str, float]] = {}
    for pair in dict.fromkeys(task.pair for task in tasks):
        for prefix, knobs in (("", pairs.get(pair)), ("universal_", universal)):
            if knobs is not None:
                worths = [task.worth([knobs]) for task in tasks if task.pair == pair]
                speedup = float(np.mean([worth.values["speedup"][0] for worth in worths]))
                loss = float(np.mean([1 - worth.fraction[0] for worth in worths]))
                judged.setdefault(pair, {}).update({f"{prefix}speedup": speedup, f"{prefix}loss": loss})
    return judged


def pairs_table(stored: Mapping[str, Any]) -> Table:
    """The settings recommended by pair, and the one for all, with what each loses; from the content of knobs.json."""
    universal: Mapping[str, float] = stored["universal"]
    table = Table(title="Recommended settings", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("pair")
    knobs = ",\n".join(universal)
    for heading in (knobs, "speedup", "loses", "one for all:\nspeedup", "\nloses"):
        table.add_column(heading, justify="right", no_wrap=True)
    judged: Mapping[str, Mapping[str, float]] = stored["by_pair"]
    for pair, values in judged.items():
        setting = stored["pairs"].get(pair)
        figures = (f"{values['speedup']:.2f}", f"{values['loss']:.1%}") if setting else ("1.00", "-")
        shown = setting_text(setting) if setting else "do not speculate"
        table.add_row(pair, shown, *figures, f"{values['universal_speedup']:.2f}", f"{values['universal_loss']:.1%}")
    means = (
        float(np.mean([values[name] for values in judged.values()])) for name in ("universal_speedup", "universal_loss")
    )
    table.add_row(
        "one for all pairs",
        setting_text(universal),
        "",
        "",
        *(format(mean, form) for mean, form in zip(means, (".2f", ".1%"), strict=True)),
        style="bold",
    )
    table.caption = (
        "Held-out prompts, replayed; means over each pair's workloads. What is lost is a share of the best setting of "
        "a dense grid on the same prompts."
    )
    return table


def setting_text(knobs: Mapping[str, float]) -> str:
    """Values of a setting in the order of its knobs, in a few characters."""
    return ", ".join(f"{value:.3g}" for value in knobs.values())


def judged_rows(task: TuningTask, universal: Mapping[str, float], learned: Mapping[str, float]) -> list[Row]:
    """The rows of a workload, one for each of `METHODS`, with 95 % bootstrap intervals over its held-out prompts."""
    settings = [task.default, dict(universal), dict(learned), task.grid().best]
    columns = _columns(task, settings)
    rows = []
    for place, (method, knobs) in enumerate(zip(METHODS, settings, strict=True)):
        # The first way takes every prompt once, the others are resamples.
        values = {name: float(column[place, 0]) for name, column in columns.items()}
        rows.append(Row(task.name, method, knobs, values, {n: interval(c[place, 1:]) for n, c in columns.items()}))
    return rows


def tuner_verdict(rows: Sequence[Row], max_divergence: float | None) -> str:
    """Result in a sentence or two."""
    share = {row.method: row.values["share_of_best"] for row in rows}  # the means stand last
    sentence = (
        f"Share of the best that the grid has: learned {share[LEARNED]:.3f}, one setting for all "
        f"{share['universal']:.3f}, default {share['default']:.3f}. These workloads were practised on; for others see "
        "--transfer."
    )
    slow = [
        row.workload
        for row in rows
        if row.method == LEARNED and row.workload != ALL and round(row.values["speedup"], 2) <= 1
    ]
    if slow:
        sentence += f" Do not speculate on {', '.join(slow)}: no setting that was learned pays there."
    return sentence if max_divergence is None else sentence + kept_bound(rows, max_divergence)


def transfer_tuner(folder: Path, kinds: Sequence[Kind] | None, seeds: Sequence[int], jobs: int) -> None:
    """Cross-validate a run's settings, print what came of it, and write ``transfer.json``.

    Args:
        folder: of the run.
        kinds: what to leave out; None for all that can be.
        seeds: one training of each fold a seed.
        jobs: trainings at a time.

    Raises:
        RunFileError: the folder is not that of such a run.
        SettingsError: there is nothing to leave out, no seed, or no job.
    """
    quieten()
    seed = partial(seed_number, error=SettingsError)
    seeds = sequence_of("--seeds", seeds, seed, distinct=True, error=SettingsError)
    jobs = whole_number("--jobs", jobs, at_most=MOST_JOBS, error=SettingsError)
    if kinds is not None and not kinds:
        raise SettingsError("--transfer needs something to leave out; give --leave-out one kind at least")
    run = RunFolder.existing(folder)
    settings = load_settings(run.settings)
    with on_machine(settings), console.status("Cross-validation") as status:
        if kinds is None:
            kinds, shared = kinds_to_leave_out(tasks_of(settings))
            for kind, name in shared.items():
                console.print(f"No {kind} is left out: all workloads have the same, {name}.", highlight=False)
        transfer = cross_validate(
            settings, run.path / "folds", this_command(), kinds, seeds, jobs=jobs, report=status.update
        )
    path = run.path / "transfer.json"
    transfer.save(path)
    for kind in transfer.kinds():
        for table in transfer.tables(kind):
            console.print(table)
    console.print(transfer.verdict(), highlight=False)
    console.print(f"Everything is in {path}; python evaluate.py {run.path} --report shows it.", soft_wrap=True)


def recommend_for_pair(
    folder: Path,
    pair: str,
    prompts: str,
    temperature: float,
    measurements: int | None,
    live: bool,
    dtype: ModelType | None = None,
    device: str | None = None,
    max_prompt_tokens: int | None = None,
) -> None:
    """Tune a pair with a run's policy, print what to use and what to expect, and store it in the run's folder.

    Args:
        folder: of the run.
        pair: as `load_pair` takes it.
        prompts: as `load_prompts` takes it.
        temperature: of sampling; 0 for greedy decoding.
        measurements: before the recommendation; by default as many as the tuner has learned with.
        live: measure and confirm by decoding, with the clock beside, even where the pair has a shipped recording.
        dtype: of the pair's weights; by default the run's own.
        device: of the pair; by default the run's own.
        max_prompt_tokens: tokens of a prompt, at most; by default the run's own.

    Raises:
        PlacementError: this machine has no such device.
        RunFileError: the run is not finished. Loading errors as for `load_pair` and `load_prompts`.
    """
    quieten()
    run = RunFolder.existing(folder)
    settings: TunerSettings = load_settings(run.settings)
    run.learned().require_complete()
    settings = replace(
        settings,
        dtype=dtype or settings.dtype,
        device=device or settings.device,
        max_prompt_tokens=settings.max_prompt_tokens if max_prompt_tokens is None else max_prompt_tokens,
    )
    workload = workload_of(pair, prompts, temperature)
    if live:
        require_text_quality([workload])
    place = run.path / "recommendations" / file_name(workload.name)
    with on_machine(settings), console.status(f"Tuning {workload}") as status:
        recommendation = recommend_pair(
            settings, ExportedPolicy.load(run.path), workload, measurements, live, status.update
        )
        recommendation.save(place / "recommendation.json", this_command())
        console.print(recommendation.render())
        if live:
            status.update(f"Confirming on held-out prompts of {workload}")
            rows = confirm(settings, workload, recommendation.knobs, place)
            columns, caption = live_columns(rows)
            table = ResultTable(rows, columns, caption=caption, notes=scored_texts(rows))
            console.print(table.render(f"Held-out prompts of {workload}, decoded live"))
            console.print(live_verdict(rows, max_divergence=settings.max_divergence), highlight=False)
    stored = f"Stored in {place / 'recommendation.json'}."
    if recommendation.advice:
        advice = f"{recommendation.advice} Try another draft, a shorter one, or a decoder without a draft. {stored}"
        console.print(advice, highlight=False, soft_wrap=True)
        return
    knobs = ", ".join(f"{name}={value:.3g}" for name, value in recommendation.knobs.items())
    expected = recommendation.expected.values
    console.print(
        f"Recommended for {workload}: {knobs}. Expected: {expected['speedup']:.2f} times plain decoding, divergence "
        f"{expected['divergence']:.3f}. {stored}",
        highlight=False,
        soft_wrap=True,
    )


def _columns(task: TuningTask, settings: Sequence[Mapping[str, float]]) -> dict[str, Floats]:
    """Every column on all held-out prompts and on resamples of them, shape (settings, 1 + resamples)."""
    sums = task.sums(settings)
    prompts = sums.tokens.shape[1]
    drawn = np.random.default_rng(0).integers(prompts, size=(RESAMPLES, prompts))
    ways = np.concatenate([np.arange(prompts)[None], drawn])
    values, reward = task.valued(settings, type(sums)(*(column[:, ways].sum(2) for column in sums)))
    columns = {**values, "reward": reward, "share_of_best": task.share_of_best(values, reward)}
    return {name: columns[name] for name in COLUMNS}
