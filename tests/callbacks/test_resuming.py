"""An interrupted and resumed run sees what it would have seen without the interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecMonitor

from specgym.agents.training.sb3_vec_env import VectorEnvAdaptor
from specgym.callbacks import (
    DivergenceBoundCallback,
    EarlyStopCallback,
    EntropyScheduleCallback,
    FolderCheckpointCallback,
    PlateauCallback,
    Resumable,
    WorkloadPriorities,
    intact_checkpoints,
)

STEPS = 12  # of 2 environments together, a rollout of 2 episodes


class Journal(BaseCallback):
    """Values in force at the end of every rollout."""

    def __init__(self, priorities: WorkloadPriorities, bound: DivergenceBoundCallback) -> None:
        super().__init__()
        self.priorities, self.bound = priorities, bound
        self.entries: list[tuple[Any, ...]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        weights = tuple(self.priorities.probabilities().values())
        multipliers = tuple(self.bound.multipliers.values())
        self.entries.append((model.num_timesteps, model.lr_schedule(1.0), model.ent_coef, weights, multipliers))


class Interruption(BaseCallback):
    """The user's, in the middle of a rollout."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        if self.model.num_timesteps >= self.step:
            raise KeyboardInterrupt
        return True


def run(
    env: Any, folder: Path, rollouts: int, interrupted_at: int = 10_000, killed: bool = False
) -> tuple[PPO, list[tuple[Any, ...]]]:
    """Learn up to a number of rollouts, from the newest checkpoint if there is one; killed, it saves nothing more."""
    venv = VecMonitor(VectorEnvAdaptor(env))
    priorities, bound = WorkloadPriorities(), DivergenceBoundCallback(0.05)
    callbacks = [
        PlateauCallback(patience=2), EarlyStopCallback(patience=7), EntropyScheduleCallback(0.1, 0.0), priorities, bound
    ]  # fmt: skip
    resumables = [callback for callback in callbacks if isinstance(callback, Resumable)]
    assert len(resumables) == 4
    checkpoint = next(intact_checkpoints(folder), None)
    if checkpoint is None:
        model = PPO("MlpPolicy", venv, n_steps=6, batch_size=12, n_epochs=2, seed=0, device="cpu")
    else:
        model = PPO.load(checkpoint.policy, env=venv, device="cpu")
        model.num_timesteps = checkpoint.steps
        checkpoint.restore(resumables)
        checkpoint.restore_random_states()
    model.set_logger(Logger(None, []))
    saver = FolderCheckpointCallback(2 * STEPS, folder, resumables=resumables)
    journal = Journal(priorities, bound)
    try:
        model.learn(
            rollouts * STEPS - model.num_timesteps,
            callback=CallbackList([*callbacks, saver, journal, Interruption(interrupted_at)]),
            reset_num_timesteps=checkpoint is None,
        )
    except KeyboardInterrupt:
        if not killed:
            saver.save()
    return model, journal.entries


@pytest.mark.parametrize("killed", [False, True])
def test_all_schedules_go_on_where_they_were(toy_vector: Callable[..., Any], tmp_path: Path, killed: bool) -> None:
    whole, expected = run(toy_vector(2), tmp_path / "whole", 7)
    assert len({entry[1:] for entry in expected}) == 7  # there is something to go on with

    env = toy_vector(2)
    _, before = run(env, tmp_path / "parts", 7, interrupted_at=4 * STEPS + 4, killed=killed)
    last = env.multipliers[-1], env.weights[-1]
    resumed_env = toy_vector(2)
    resumed, after = run(resumed_env, tmp_path / "parts", 7)
    assert (resumed_env.multipliers[0], resumed_env.weights[0]) == last  # in force before the first step
    assert len(resumed_env.multipliers) == len(resumed_env.weights) == len(after) + 1
    assert before + after == expected
    if killed:  # from a checkpoint between two rollouts even the draws are the same
        for ours, theirs in zip(resumed.policy.parameters(), whole.policy.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_learning_ends_where_it_would_have_ended(toy_vector: Callable[..., Any], tmp_path: Path) -> None:
    run(toy_vector(2), tmp_path, 20, interrupted_at=4 * STEPS + 4)
    model, entries = run(toy_vector(2), tmp_path, 20)
    assert [entry[0] for entry in entries] == [5 * STEPS, 6 * STEPS, 7 * STEPS, 8 * STEPS]
    assert model.num_timesteps == 8 * STEPS
