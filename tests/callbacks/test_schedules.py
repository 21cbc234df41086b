"""Learning rate, entropy and end of learning, as PPO's updates see them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from specgym.agents.training.sb3_vec_env import VectorEnvAdaptor
from specgym.callbacks import (
    EarlyStopCallback,
    EntropyScheduleCallback,
    FolderCheckpointCallback,
    PlateauCallback,
    intact_checkpoints,
)
from specgym.callbacks.schedules import Improvement

ROLLOUT = 12  # steps of 2 environments together


class Updates(BaseCallback):
    """The rate and the coefficient of every update, as they stand when it is over."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, float]] = []

    def _on_step(self) -> bool:
        return True

    def _note(self) -> None:
        model: Any = self.model
        if model._n_updates > len(self.seen):  # one epoch a rollout
            self.seen.append((model.policy.optimizer.param_groups[0]["lr"], model.ent_coef))

    def _on_rollout_start(self) -> None:
        self._note()

    def _on_training_end(self) -> None:
        self._note()


@pytest.fixture
def model(toy_vector: Callable[..., Any]) -> PPO:
    """Its rewards are what the environments are told, before they are normalised."""
    env = toy_vector(2)
    env.reward_of = lambda workloads: np.full(2, 5.0)
    venv = VecNormalize(VecMonitor(VectorEnvAdaptor(env)), norm_obs=False)
    model = PPO("MlpPolicy", venv, n_steps=6, batch_size=12, n_epochs=1, learning_rate=0.01, seed=0, device="cpu")
    model.set_logger(Logger(None, []))
    return model


def learn(model: PPO, rollouts: int, *callbacks: BaseCallback) -> list[tuple[float, float]]:
    updates = Updates()
    model.learn(ROLLOUT * rollouts, callback=CallbackList([*callbacks, updates]), log_interval=1000)
    return updates.seen


def test_the_rate_of_the_update_falls_when_the_reward_no_longer_rises(model: PPO) -> None:
    plateau = PlateauCallback(patience=2, factor=0.5, minimum_rate=0.004)
    rates = [rate for rate, _ in learn(model, 6, plateau)]
    # The first rollout is the best, the second and third wait; the update of the third is slower already.
    assert rates == [0.01, 0.01, 0.005, 0.005, 0.004, 0.004]
    logged = model.logger.name_to_value
    assert logged["plateau/learning_rate"] == logged["train/learning_rate"] == 0.004
    assert logged["plateau/best"] == pytest.approx(5.0)  # as the environments gave it
    assert logged["plateau/waiting"] == 1


def test_the_rate_stays_while_the_reward_rises(model: PPO) -> None:
    env = model.get_env().unwrapped.env  # type: ignore[union-attr]
    rewards = iter(np.arange(1.0, 100.0))
    env.reward_of = lambda workloads: np.full(2, next(rewards))
    assert {rate for rate, _ in learn(model, 5, PlateauCallback(patience=1))} == {0.01}


def test_a_rate_below_the_minimum_is_left_alone(model: PPO) -> None:
    assert {rate for rate, _ in learn(model, 3, PlateauCallback(patience=1, minimum_rate=0.1))} == {0.01}


def test_a_saved_model_keeps_the_lower_rate(model: PPO, tmp_path: Path) -> None:
    learn(model, 3, PlateauCallback(patience=1))
    model.save(tmp_path / "policy.zip")
    loaded = PPO.load(tmp_path / "policy.zip", device="cpu")
    assert loaded.lr_schedule(1.0) == model.lr_schedule(1.0) == 0.01 / 4


def test_a_schedule_of_another_kind_is_not_overruled(model: PPO) -> None:
    model.learning_rate = lambda progress: progress
    with pytest.raises(ValueError, match="schedule"):
        learn(model, 1, PlateauCallback())


def test_entropy_goes_from_start_to_end(model: PPO) -> None:
    coefficients = [coefficient for _, coefficient in learn(model, 4, EntropyScheduleCallback(0.1, 0.02))]
    assert coefficients == pytest.approx([0.08, 0.06, 0.04, 0.02])
    assert model.logger.name_to_value["entropy/coefficient"] == pytest.approx(0.02)


def test_learning_stops_after_the_update_that_decided_it(model: PPO, tmp_path: Path) -> None:
    stop = EarlyStopCallback(patience=2)
    saver = FolderCheckpointCallback(10_000, tmp_path, resumables=[stop])
    updates = learn(model, 50, stop, saver)
    assert len(updates) == 3
    assert model._n_updates == 3
    assert model.num_timesteps == 3 * ROLLOUT
    checkpoint = next(intact_checkpoints(tmp_path))
    assert checkpoint.steps == 3 * ROLLOUT
    assert stop.reason is not None
    assert f"after {3 * ROLLOUT} steps" in stop.reason
    assert "for 2 rollouts" in stop.reason

    again = EarlyStopCallback(patience=2)
    checkpoint.restore([again])
    assert again.reason == stop.reason
    model.learn(10 * ROLLOUT, callback=again, reset_num_timesteps=False)
    assert model._n_updates == 3


def test_learning_does_not_stop_before_the_minimum(model: PPO) -> None:
    stop = EarlyStopCallback(patience=1, minimum_steps=5 * ROLLOUT)
    assert len(learn(model, 50, stop)) == 5
    assert stop.reason is not None


def test_learning_goes_on_while_the_reward_rises(model: PPO) -> None:
    env = model.get_env().unwrapped.env  # type: ignore[union-attr]
    rewards = iter(np.arange(1.0, 100.0))
    env.reward_of = lambda workloads: np.full(2, next(rewards))
    stop = EarlyStopCallback(patience=1)
    assert len(learn(model, 6, stop)) == 6
    assert stop.reason is None


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (PlateauCallback, {"factor": 1.0}),
        (PlateauCallback, {"minimum_rate": 0.0}),
        (PlateauCallback, {"patience": 0}),
        (EarlyStopCallback, {"minimum_steps": -1}),
        (EarlyStopCallback, {"smoothing": 1.0}),
        (EntropyScheduleCallback, {"start": -0.1, "end": 0.0}),
        (EntropyScheduleCallback, {"end": float("nan"), "start": 0.0}),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        kind(**settings)


def test_waits_for_a_relative_rise_over_the_best() -> None:
    seen = Improvement(patience=2, threshold=0.1, smoothing=0.0)
    waiting = []
    for value in (10.0, 10.9, 11.1, 9.0, 12.0, 12.3):
        seen.update(value)
        waiting.append((seen.waiting, seen.exhausted))
    assert waiting == [(0, False), (1, False), (0, False), (1, False), (2, True), (0, False)]
    assert seen.best == 12.3


def test_a_rise_from_a_negative_best_is_one() -> None:
    seen = Improvement(patience=1, threshold=0.1, smoothing=0.0)
    for value in (-10.0, -9.5):
        seen.update(value)
    assert seen.waiting == 1
    seen.update(-8.9)
    assert seen.waiting == 0


def test_one_lucky_value_is_smoothed_away() -> None:
    seen = Improvement(patience=3, threshold=0.0, smoothing=0.75)
    for value in (4.0, 8.0):
        seen.update(value)
    assert seen.smoothed == pytest.approx((0.75 * 4 + 8) / 1.75)  # the first weighs no more than its share
    seen.update(4.0)
    assert seen.waiting == 1
    assert seen.best is not None
    assert seen.best < 8.0


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.integers(0, 30), st.floats(0, 0.99))
def test_goes_on_from_its_state_as_if_never_stopped(values: list[float], cut: int, smoothing: float) -> None:
    whole, first, second = (Improvement(3, 0.01, smoothing) for _ in range(3))
    for value in values:
        whole.update(value)
    for value in values[:cut]:
        first.update(value)
    second.restore(json.loads(json.dumps(first.state())))
    for value in values[cut:]:
        second.update(value)
    assert second.state() == whole.state()


@pytest.mark.parametrize(("name", "value"), [("patience", 0), ("threshold", -0.1), ("smoothing", 1.0)])
def test_settings_of_an_improvement_out_of_range_are_refused(name: str, value: float) -> None:
    settings = {"patience": 1, "threshold": 0.0, "smoothing": 0.0, name: value}
    with pytest.raises(ValueError, match=name):
        Improvement(**settings)  # type: ignore[arg-type]
