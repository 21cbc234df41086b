"""Checkpoints: whole or not there, found newest first, random states included."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from specgym.callbacks import CheckpointError, FolderCheckpointCallback, intact_checkpoints
from specgym.callbacks.checkpoints import JsonState, read_checkpoint


class Count(JsonState):
    """A number to be kept."""

    state_name = "count"

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def _state(self) -> dict[str, Any]:
        return {"number": self.number}

    def _restore(self, state: dict[str, Any]) -> None:
        self.number = int(state["number"])


class Other(Count):
    """One whose state is not in the checkpoints."""

    state_name = "other"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    venv = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, seed=0), norm_obs=False)
    model = PPO("MlpPolicy", venv, n_steps=8, batch_size=16, n_epochs=1, seed=0, device="cpu")
    saver = FolderCheckpointCallback(20, tmp_path / "checkpoints", keep=3, resumables=[Count(7)])
    model.learn(96, callback=saver)
    return tmp_path / "checkpoints"


def test_saves_between_rollouts_and_at_the_end_and_keeps_the_newest(folder: Path) -> None:
    # Rollouts of 16 steps: after 32, 64 and 96 at least 20 have passed since the one before.
    assert [checkpoint.steps for checkpoint in intact_checkpoints(folder)] == [96, 64, 32]
    newest = next(intact_checkpoints(folder))
    assert PPO.load(newest.policy, device="cpu").num_timesteps == 96
    assert newest.vecnormalize.is_file()


def test_states_of_callbacks_come_back_and_new_ones_start_afresh(folder: Path) -> None:
    count, other = Count(), Other(5)
    next(intact_checkpoints(folder)).restore([count, other])
    assert count.number == 7
    assert other.number == 5


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"number": null}'])
def test_a_state_that_cannot_be_used_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "count.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"count\.json"):
        Count().load_state(tmp_path)


def test_random_states_come_back(folder: Path) -> None:
    checkpoint = next(intact_checkpoints(folder))

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002

    checkpoint.restore_random_states()
    first = drawn()
    drawn()
    checkpoint.restore_random_states()
    assert drawn() == first


@pytest.mark.parametrize("name", ["policy.zip", "vecnormalize.pkl", "state.json", "count.json"])
def test_a_damaged_checkpoint_is_passed_over(folder: Path, name: str) -> None:
    file = folder / "step_000000096" / name
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        file.write_bytes(content)
        assert [checkpoint.steps for checkpoint in intact_checkpoints(folder)] == [64, 32]
    file.unlink()
    with pytest.raises(CheckpointError, match="step_000000096"):
        read_checkpoint(folder / "step_000000096")
    assert [checkpoint.steps for checkpoint in intact_checkpoints(folder)] == [64, 32]


def test_a_foreign_state_is_refused(folder: Path) -> None:
    for content in ("[]", "{}", '{"format": "x"}', '{"format": "specgym-checkpoint-1", "files": {}, "steps": 1}'):
        (folder / "step_000000096" / "state.json").write_text(content)
        with pytest.raises(CheckpointError):
            read_checkpoint(folder / "step_000000096")


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FolderCheckpointCallback(0, tmp_path)
    with pytest.raises(ValueError, match="at least 2"):
        FolderCheckpointCallback(1, tmp_path, keep=1)
    with pytest.raises(ValueError, match="'count' is taken"):
        FolderCheckpointCallback(1, tmp_path, resumables=[Count(), Other(), Count()])
