"""Ablation of learning a tuner: replay, priorities and schedules beside plain PPO and a matched control.

    python -m benchmarks.tuner_ablation                       # about 20 minutes on two cores
    python -m benchmarks.tuner_ablation --steps 300000
    python -m benchmarks.tuner_ablation --ray auto            # on all cores of a Ray cluster

Every variant learns without one pair and then tunes that pair's workloads: eight measurements on training prompts,
judged on held-out prompts as a share of the best setting of a dense grid. *More epochs* is plain PPO with as many
gradient steps on minibatches of the same size as the variants with replay take. Differences from plain PPO are paired
by pair left out and seed; their p values are of a sign-flip test, corrected for their number.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from specgym.agents import (
    KnobLearning,
    LearnedSearcher,
    LearnedTuner,
    Training,
    holm,
    interval,
    recommendations,
    resampled_means,
    sign_flip_test,
    tasks_of,
    train_fold,
    tuner_settings,
)
from specgym.callbacks import ReplaySettings
from specgym.decoding import write_json
from specgym.envs import Task, on_ray, run_tasks

SEARCHES = 3
"""Sessions on every workload that was left out, with other prompts and dice."""
KEPT_ROLLOUTS = 8


@dataclass
class Settings:
    """Compare ways to learn a tuner."""

    left_out: tuple[str, ...] = ("tiny", "tiny-10m-2l", "tiny-10m-xs")
    """Pairs, one at a time; by default those where a single setting for all loses most."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Random seeds of training."""
    steps: int = 150_000
    """Measurements in training."""
    jobs: int = 2
    """Trainings at a time."""
    ray: tuple[str, ...] | None = None
    """Train on a Ray cluster: this machine's or a new one, or the one at an address (auto, host:port)."""
    json: Path | None = None
    """Write every result here, too."""


@dataclass(frozen=True)
class Job:
    """One training: its variant, what is left out, and its seed."""

    variant: str
    left_out: str
    training: Training


def variants(learning: KnobLearning, environments: int) -> dict[str, KnobLearning]:
    """The ways to learn, the plain one first."""
    plain = replace(
        learning, workload_priorities=False, entropy_coefficient=0.0, entropy_end=None, replay=ReplaySettings(updates=0)
    )
    steps = plain.epochs * math.ceil(plain.rollout_steps * environments / plain.batch_size)
    updates = steps // 2
    replayed = ReplaySettings(
        updates=updates,
        segments_per_update=round(plain.batch_size / plain.rollout_steps),
        capacity=KEPT_ROLLOUTS * environments,
        max_age=KEPT_ROLLOUTS,
    )
    return {
        "plain PPO": plain,
        "more epochs": replace(plain, epochs=plain.epochs + round(plain.epochs * updates / steps)),
        "uniform replay": replace(plain, replay=replace(replayed, priority="uniform")),
        "prioritised replay": replace(plain, replay=replayed),
        "prioritised workloads": replace(plain, workload_priorities=True),
        "both priorities": replace(plain, replay=replayed, workload_priorities=True),
        "falling entropy bonus": replace(plain, entropy_coefficient=0.01, entropy_end=0.0),
        "constant learning rate": replace(plain, plateau_patience=0),
    }


def judged(job: Job) -> list[float]:
    """Train, tune what was left out, and return the shares of the best after 0, 2 and 8 measurements."""
    settings = job.training.settings
    with tempfile.TemporaryDirectory() as folder:
        train_fold(job.training, Path(folder))
        tuner = LearnedTuner.load(Path(folder))
    names = [name for name in tuner_settings().workloads if name.startswith(f"{job.left_out}/")]
    fractions = []
    for task in tasks_of(settings, names):
        for seed in range(SEARCHES):
            settings_by_count = recommendations(task, lambda t, _: LearnedSearcher(tuner, t), seed, (0, 2, 8))
            fractions.append(task.worth(list(settings_by_count.values())).fraction)
    shares: list[float] = np.mean(fractions, axis=0).tolist()
    return shares


def main() -> None:
    """Run the comparison, and print a table."""
    chosen = tyro.cli(Settings, prog="python -m benchmarks.tuner_ablation", description=__doc__)
    with on_ray(chosen.ray):  # first of all, since an address may be wrong
        _compare(chosen)


def _compare(chosen: Settings) -> None:
    base = tuner_settings(total_timesteps=chosen.steps, checkpoint_every=chosen.steps)
    best = {task.name: task.grid("train").best_reward for task in track(tasks_of(base), "Grids")}
    ways = variants(base.learning, base.environments)
    jobs = []
    for seed in chosen.seeds:
        for pair in chosen.left_out:
            kept = tuple(name for name in base.workloads if not name.startswith(f"{pair}/"))
            for variant, learning in ways.items():
                settings = replace(base, workloads=kept, learning=learning, seed=seed)
                jobs.append(Job(variant, pair, Training(settings, {w: best[w] for w in kept})))
    tasks = [Task(f"{job.variant} without {job.left_out}", partial(judged, job)) for job in jobs]
    with Progress() as progress:
        bar = progress.add_task("Learning and tuning", total=len(jobs))
        shares = run_tasks(tasks, chosen.jobs, lambda *_: progress.advance(bar))
    results = {
        variant: np.array([s for job, s in zip(jobs, shares, strict=True) if job.variant == variant])
        for variant in ways
    }
    Console(width=120).print(_table(results, [job.left_out for job in jobs if job.variant == "plain PPO"]))
    if chosen.json:
        rows = [
            {"variant": job.variant, "left_out": job.left_out, "seed": job.training.settings.seed, "shares": scores}
            for job, scores in zip(jobs, shares, strict=True)
        ]
        write_json(chosen.json, {"steps": chosen.steps, "measurements": [0, 2, 8], "rows": rows})


def _table(results: dict[str, np.ndarray], pairs: list[str]) -> Table:
    plain = results["plain PPO"]
    differences = {variant: scores[:, 2] - plain[:, 2] for variant, scores in results.items() if variant != "plain PPO"}
    corrected = dict(zip(differences, holm([sign_flip_test(values) for values in differences.values()]), strict=True))
    table = Table(title="Share of the best on pairs left out", title_justify="left")
    table.add_column("variant")
    for heading in ("0 measurements", "2", "8", "8, against plain PPO", "p, corrected"):
        table.add_column(heading, justify="right")
    for variant, scores in results.items():
        means = [f"{value:.3f}" for value in scores.mean(0)]
        if variant in differences:
            low, high = interval(resampled_means(differences[variant], pairs))
            means += [f"{differences[variant].mean():+.3f} ({low:+.3f} to {high:+.3f})", f"{corrected[variant]:.2f}"]
        table.add_row(variant, *means)
    return table


if __name__ == "__main__":
    main()
