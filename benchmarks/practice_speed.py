"""Replayed measurements a minute, in simulated worlds: of the environments alone, and of PPO that learns in them.

    python -m benchmarks.practice_speed

One process, one thread of torch, the settings of `train.py --env specgym/SpeculativeWorlds-v0`. Decoding the acceptance
worlds, once before practice begins, is timed apart.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from specgym.agents import RunFolder, TuneWorlds, WorldsSettings, learn
from specgym.envs import WorldsVectorEnv, training_sampler


@dataclass(frozen=True)
class Settings:
    """Time practice in simulated worlds."""

    measurements: int = 1_000_000
    """Steps of learning that are timed; of the environments alone half as many."""
    acceptance_worlds: int = 100
    """Acceptance worlds, which change neither speed."""


def main() -> None:
    """Print a Markdown table."""
    options = tyro.cli(Settings, prog="python -m benchmarks.practice_speed", description=__doc__)
    torch.set_num_threads(1)
    settings = WorldsSettings(acceptance_worlds=options.acceptance_worlds, total_timesteps=options.measurements)
    started = time.perf_counter()
    sampler = training_sampler(options.acceptance_worlds)
    decoding = time.perf_counter() - started
    env = WorldsVectorEnv(settings.environments, sampler, None)
    env.reset(seed=0)
    steps = options.measurements // 2 // settings.environments
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, settings.environments, 3)).astype(np.float32)
    started = time.perf_counter()
    for action in actions:
        env.step(action)
    alone = steps * settings.environments / (time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, runs=Path(folder), name="speed")
        experiment = TuneWorlds(settings, RunFolder(settings.folder))
        (learner,) = experiment.learners()
        environments = experiment.environments(learner)
        started = time.perf_counter()
        learn(settings, learner.folder, learner.seed, lambda: environments, experiment.policy, progress_bar=False)
        learning = settings.total_timesteps / (time.perf_counter() - started)
    print("| | a minute | of the environments alone |")
    print("|---|---:|---:|")
    print(f"| environments alone | {60 * alone:,.0f} | 1 |")
    print(f"| learning | {60 * learning:,.0f} | {learning / alone:.2f} |")
    print(f"\nAcceptance worlds: {options.acceptance_worlds / decoding:.0f} decoded a second.")


if __name__ == "__main__":
    main()
