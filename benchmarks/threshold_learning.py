"""Learning thresholds: what is recommended, judged on held-out prompts by replay; and ways to learn them compared.

    python -m benchmarks.threshold_learning                       # five seeds on the default workloads, 3 minutes
    python -m benchmarks.threshold_learning --every               # on all workloads whose traces ship
    python -m benchmarks.threshold_learning --ablation            # ways to learn, 10 minutes on two cores
    python -m benchmarks.threshold_learning --weights             # what the reward's weights cost, half a minute

All time is charged by the pairs' reference profiles. *Exact* is the faster, on the held-out prompts, of exact decoding
with the fixed length that is best on training prompts and with the stop rule: a choice in hindsight, in its favour.
*Search* is what learning has to beat: the fastest setting of a fine grid that keeps the bound on the training prompts
with the same margin. In the ablation *more epochs* is plain PPO with as many gradient steps on minibatches of the same
size as the variants with replay take; differences from plain PPO are paired by seed, with p values of a sign-flip test,
corrected for their number.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from specgym.agents import (
    ExportedPolicy,
    KnobRange,
    KnobSettings,
    Recommendation,
    RunFolder,
    TrainingReplay,
    TuneKnobs,
    default_settings,
    fastest_within,
    fixed_length,
    holm,
    interval,
    learn,
    settle,
    sign_flip_test,
)
from specgym.decoding import LatencyProfile, Split, traits_of, write_json
from specgym.envs import DIVERGENCE_BOUND, on_ray, practised_workloads, profile_of, reward_terms, run_tasks, workload
from specgym.envs import Task as WorkerTask

from .tuner_ablation import variants

WEIGHTS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
_WAYS = ("plain PPO", "more epochs", "uniform replay", "prioritised replay", "constant learning rate")


@dataclass
class Settings:
    """Learn thresholds with several seeds, and judge them on held-out prompts."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Random seeds of learning."""
    every: bool = False
    """All workloads whose traces ship, not the default ones."""
    ablation: bool = False
    """Compare ways to learn."""
    weights: bool = False
    """Compare weights of the range bonus, without learning."""
    jobs: int = 2
    """Trainings at a time."""
    ray: tuple[str, ...] | None = None
    """Train on a Ray cluster: this machine's or a new one, or the one at an address (auto, host:port)."""
    json: Path | None = None
    """Write every result here, too."""


class Judged(NamedTuple):
    """One seed's result on one workload, on held-out prompts."""

    knobs: Mapping[str, float] | None
    speedup: float
    divergence: float
    rest_speedup: float
    """Speedup where the policy stays, before anything is enforced; and the divergence there."""
    rest_divergence: float


class Task:
    """A workload with its recorded training and held-out prompts."""

    def __init__(self, name: str, settings: KnobSettings) -> None:
        self.name, self._settings = name, settings
        self.profile: LatencyProfile = profile_of(workload(name), None, replayed=True, decoder=settings.decoder)
        self.replays = {split: self._replay(split) for split in ("train", "test")}
        traits = traits_of(settings.decoder)
        assert traits.lossless_at is not None
        assert settings.bound is not None
        self._lossless, self.bound = dict(traits.lossless_at), settings.bound
        self.length = fixed_length(workload(name), None, self.profile, 16, settings.environment.max_new_tokens)

    def _replay(self, split: Split) -> TrainingReplay:
        options, tokens = self._settings.decoder_options, self._settings.environment.max_new_tokens
        return TrainingReplay(self._settings.decoder, workload(self.name), None, self.profile, options, tokens, split)

    def exact(self) -> float:
        """Speedup of the better kind of exact decoding on held-out prompts."""
        tokens = self._settings.environment.max_new_tokens
        options = {"stop": "never"}
        fixed = TrainingReplay("speculative", workload(self.name), None, self.profile, options, tokens, "test")
        (knob,) = fixed.knobs
        by_length = fixed.measure([{knob.name: self.length}])["speedup"][0]
        return float(max(by_length, self.measure([self._lossless])["speedup"][0]))

    def measure(self, tried: Sequence[Mapping[str, float]], split: Split = "test") -> Mapping[str, np.ndarray]:
        """Metrics of some settings."""
        return self.replays[split].measure(tried)

    def recommend(self, rests: Sequence[Mapping[str, float]], knobs: Sequence[KnobRange]) -> Recommendation:
        """Recommend a setting around the places where policies stay."""
        prompts, sums = self._settings.evaluation.prompts, self.replays["train"].sums
        return fastest_within(self.bound, self._lossless, rests, knobs, sums, prompts)

    def search(self, knobs: Sequence[KnobRange]) -> Recommendation:
        """Recommend the best setting of a fine grid of the first knob."""
        ends = [{**self._lossless, knobs[0].name: knobs[0].high}]
        prompts, sums = self._settings.evaluation.prompts, self.replays["train"].sums
        return fastest_within(self.bound, self._lossless, ends, knobs[:1], sums, prompts, np.linspace(0, 1, 101))

    def judged(self, policy: ExportedPolicy) -> Judged:
        """Judge what one policy leads to."""
        rest = settle(policy, self.name)
        knobs = self.recommend([rest], policy.knobs).knobs
        values = self.measure([rest, knobs or self._lossless])
        rest_speedup, speedup = values["speedup"].tolist()
        rest_divergence, divergence = values["divergence"].tolist()
        return Judged(knobs, speedup if knobs else 1.0, divergence, rest_speedup, rest_divergence)


def learned(settings: KnobSettings) -> tuple[list[Judged], Sequence[KnobRange]]:
    """Learn with the only seed of these settings, and judge on every workload; also the knobs that were moved."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return _learned(settings, RunFolder(Path(folder)))


def _learned(settings: KnobSettings, run: RunFolder) -> tuple[list[Judged], Sequence[KnobRange]]:
    experiment = TuneKnobs(settings, run)
    tasks = [Task(name, settings) for name in settings.workloads]
    experiment.profiles = experiment.run.profile_paths(settings.workloads)
    for task, path in zip(tasks, experiment.profiles, strict=True):
        task.profile.save(path)
    (learner,) = experiment.learners()
    model = learn(
        settings, learner.folder, learner.seed, lambda: experiment.environments(learner), experiment.policy,
        experiment.callbacks(learner), progress_bar=False,
    )  # fmt: skip
    experiment.export(model, learner.folder.path)
    policy = ExportedPolicy.load(learner.folder.path)
    return [task.judged(policy) for task in tasks], policy.knobs


def main() -> None:
    """Run what was asked for, and print a table."""
    chosen = tyro.cli(Settings, prog="python -m benchmarks.threshold_learning", description=__doc__)
    names = practised_workloads("threshold") if chosen.every else traits_of("threshold").workloads
    base = default_settings(workloads=tuple(names), evaluation={"during_training": 0}, checkpoint_every=10**9)
    if chosen.weights:
        Console(width=120).print(_weights(base))
        return
    kept = {name: way for name, way in variants(base.learning, base.practising).items() if name in _WAYS}
    ways = kept if chosen.ablation else {"": base.learning}
    jobs = [
        replace(base, learning=learning, seeds=(seed,), name=f"{name}-{seed}".replace(" ", "-"))
        for (name, learning), seed in itertools.product(ways.items(), chosen.seeds)
    ]
    trainings = [WorkerTask(job.name, partial(learned, job)) for job in jobs]
    with on_ray(chosen.ray), Progress() as progress:
        bar = progress.add_task("Learning", total=len(jobs))
        results = run_tasks(trainings, chosen.jobs, lambda *_: progress.advance(bar))
    tasks = [Task(name, base) for name in base.workloads]
    judged = [of_job for of_job, _ in results]
    console = Console(width=120)
    if chosen.ablation:
        by_way = dict(zip(ways, np.array(judged, dtype=object).reshape(len(ways), -1, len(tasks), 5), strict=True))
        console.print(_compared(by_way, np.array([task.exact() for task in tasks])))
    else:
        console.print(_by_workload(tasks, judged, results[0][1]))
    if chosen.json:
        rows = [
            {"way": job.name, "workload": task.name, **result._asdict()}
            for job, of_job in zip(jobs, judged, strict=True)
            for task, result in zip(tasks, of_job, strict=True)
        ]
        write_json(chosen.json, {"rows": rows})


def _by_workload(tasks: Sequence[Task], judged: Sequence[Sequence[Judged]], knobs: Sequence[KnobRange]) -> Table:
    table = Table(title="Held-out prompts, mean over seeds (range of settings)", title_justify="left")
    headings = ("workload", knobs[0].name, "speedup", "exact", "of exact", "search", "divergence, worst", "kept by")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    columns = []
    for place, task in enumerate(tasks):
        results = [of_seed[place] for of_seed in judged]
        values = [0.0 if result.knobs is None else result.knobs[knobs[0].name] for result in results]
        speedup, exact = float(np.mean([result.speedup for result in results])), max(task.exact(), 1.0)
        best = task.search(knobs).knobs
        search = float(task.measure([best])["speedup"][0]) if best else 1.0
        worst = max(result.divergence for result in results)
        share = np.mean([result.divergence <= task.bound for result in results])
        columns.append([speedup, exact, speedup / exact, search, float(share)])
        table.add_row(
            task.name, f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})", f"{speedup:.2f}",
            f"{exact:.2f}", f"{speedup / exact:.2f}", f"{search:.2f}", f"{worst:.3f}", f"{share:.0%}",
        )  # fmt: skip
    means = np.mean(columns, axis=0)
    table.add_section()
    table.add_row(
        f"all {len(tasks)}", "", f"{means[0]:.2f}", f"{means[1]:.2f}", f"{means[2]:.2f}", f"{means[3]:.2f}", "",
        f"{means[4]:.0%}",
    )  # fmt: skip
    return table


def _compared(by_way: Mapping[str, np.ndarray], exact: np.ndarray) -> Table:
    """Ways to learn, by speedups over that of exact decoding; arrays of shape (seeds, workloads, 5).

    Compared is where policies stay: the speedup there, or 0 where that breaks the bound.
    """
    recommended = {way: (values[..., 1].astype(float) / np.maximum(exact, 1)).mean() for way, values in by_way.items()}
    within = {way: values[..., 4].astype(float) <= DIVERGENCE_BOUND for way, values in by_way.items()}
    ratios = {
        way: (values[..., 3].astype(float) * within[way] / np.maximum(exact, 1)).mean(1)
        for way, values in by_way.items()
    }
    differences = {way: ratio - ratios["plain PPO"] for way, ratio in ratios.items() if way != "plain PPO"}
    corrected = dict(zip(differences, holm([sign_flip_test(values) for values in differences.values()]), strict=True))
    table = Table(title="Ways to learn, on held-out prompts", title_justify="left")
    headings = ("variant", "recommended", "policies within the bound", "where they stay", "against plain PPO", "p")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for way, ratio in ratios.items():
        cells = [f"{recommended[way]:.3f}", f"{within[way].mean():.0%}", f"{ratio.mean():.3f}"]
        if way in differences:
            draws = np.random.default_rng(0).choice(differences[way], (1000, len(ratio))).mean(1)
            low, high = interval(draws)
            cells += [f"{differences[way].mean():+.3f} ({low:+.3f} to {high:+.3f})", f"{corrected[way]:.2f}"]
        table.add_row(way, *cells)
    return table


def _weights(base: KnobSettings) -> Table:
    """Loss of speed by the range bonus: the best setting by the reward against the fastest, both within the bound."""
    table = Table(title="Speed lost to the range bonus on training prompts", title_justify="left")
    for heading in ("weight", "mean", "worst"):
        table.add_column(heading, justify="right")
    tasks = [Task(name, base) for name in track(base.workloads, "Grids")]
    grids = [task.replays["train"].grid for task in tasks]
    measured = [task.measure(grid, "train") for task, grid in zip(tasks, grids, strict=True)]
    for weight in WEIGHTS:
        losses = []
        for task, grid, values in zip(tasks, grids, measured, strict=True):
            inside = values["divergence"] <= task.bound
            terms = reward_terms(
                replace(base.reward, range_weight=weight), speedup=values["speedup"], divergence=values["divergence"],
                acceptance_rate=values["draft_acceptance_rate"], knobs=task.replays["train"].knobs,
                values={name: np.array([setting[name] for setting in grid]) for name in grid[0]},
            )  # fmt: skip
            reward = np.where(inside, np.asarray(sum(terms.values())), -np.inf)
            fastest = np.where(inside, values["speedup"], -np.inf).max()
            losses.append(1 - values["speedup"][int(np.argmax(reward))] / fastest)
        table.add_row(f"{weight:g}", f"{np.mean(losses):.1%}", f"{max(losses):.1%}")
    return table


if __name__ == "__main__":
    main()
