"""Workloads with more to learn are drawn more often; those not seen first of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from specgym.agents.training.sb3_vec_env import FiniteGuard, FiniteRolloutBuffer, VectorEnvAdaptor
from specgym.callbacks import NumericsCallback, WorkloadPriorities
from specgym.callbacks.workloads import workload_probabilities


class KeepAdvantages(BaseCallback):
    """The rollout as it was before training shuffles it."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer: Any = self.model.rollout_buffer  # type: ignore[attr-defined]  # on-policy algorithms have it
        self.advantages = buffer.advantages.copy()
        self.usable = getattr(buffer, "usable", np.ones(self.advantages.shape, bool)).copy()


def learn(venv: VecEnv, *callbacks: BaseCallback, steps: int = 6, buffer: type[RolloutBuffer] = RolloutBuffer) -> PPO:
    model = PPO("MlpPolicy", venv, n_steps=steps, batch_size=6, seed=0, device="cpu", rollout_buffer_class=buffer)
    model.set_logger(Logger(None, []))
    model.learn(steps * venv.num_envs, callback=CallbackList(list(callbacks)), log_interval=1000)
    return model


def test_scores_belong_to_the_workload_a_transition_was_collected_from(toy_vector: Callable[..., Any]) -> None:
    env, kept, priorities = toy_vector(3), KeepAdvantages(), WorkloadPriorities()
    model = learn(VecMonitor(VectorEnvAdaptor(env)), kept, priorities)
    rows = np.array([[0, 1, 0]] * 3 + [[1, 0, 1]] * 3)  # episodes of 3 steps, after which workloads change
    size = np.abs(kept.advantages)
    assert priorities.scores["tiny/prose"] == pytest.approx(size[rows == 0].mean())
    assert priorities.scores["tiny/code"] == pytest.approx(size[rows == 1].mean())
    assert env.weights == [list(priorities.probabilities().values())]
    first = max(priorities.scores, key=priorities.scores.__getitem__)
    assert priorities.probabilities()[first] == pytest.approx(2 / 3)
    logged = model.logger.name_to_value
    assert logged[f"workload_priority/probability/{first}"] == pytest.approx(2 / 3)
    assert logged[f"workload_priority/score/{first}"] == pytest.approx(priorities.scores[first])


def test_transitions_that_cannot_be_used_count_for_nothing(toy_vector: Callable[..., Any]) -> None:
    env, kept, priorities = toy_vector(2), KeepAdvantages(), WorkloadPriorities()
    plain = env.reward_of
    env.reward_of = lambda workloads: np.where((workloads == 1) & (env.steps < 4), np.nan, plain(workloads))
    venv = VecMonitor(FiniteGuard(VectorEnvAdaptor(env)))
    learn(venv, NumericsCallback(), kept, priorities, buffer=FiniteRolloutBuffer)
    rows = np.array([[0, 1]] * 3 + [[1, 0]] * 3)
    chosen = (rows == 1) & kept.usable
    assert 0 < chosen.sum() < (rows == 1).sum()
    assert priorities.scores["tiny/code"] == pytest.approx(np.abs(kept.advantages)[chosen].mean())


def test_a_workload_without_transitions_is_drawn_first(toy_vector: Callable[..., Any]) -> None:
    env, priorities = toy_vector(1), WorkloadPriorities()
    learn(VecMonitor(VectorEnvAdaptor(env)), priorities, steps=3)
    assert env.weights == [[0.0, 1.0]]


def test_stale_workloads_get_their_share() -> None:
    result = workload_probabilities(np.array([3.0, 2.0, 1.0]), np.array([0.0, 1.0, 3.0]), staleness_weight=0.4)
    by_rank = np.array([1, 1 / 2, 1 / 3]) / (1 + 1 / 2 + 1 / 3)
    assert result == pytest.approx(0.6 * by_rank + 0.4 * np.array([0, 0.25, 0.75]))


@given(
    st.lists(st.floats(0, 100) | st.just(float("nan")), min_size=1, max_size=12),
    st.floats(0.05, 20),
    st.floats(0, 1),
    st.data(),
)
def test_probabilities_add_up_and_follow_the_scores(
    scores: list[float], temperature: float, weight: float, data: st.DataObject
) -> None:
    ages = data.draw(st.lists(st.integers(0, 50), min_size=len(scores), max_size=len(scores)))
    result = workload_probabilities(
        np.array(scores), np.array(ages, float), temperature=temperature, staleness_weight=weight
    )
    assert result.sum() == pytest.approx(1)
    assert (result >= 0).all()
    unseen = np.isnan(scores)
    if unseen.any():
        assert (result[~unseen] == 0).all()
    else:
        alone = workload_probabilities(np.array(scores), np.zeros(len(scores)), temperature=temperature)
        assert (np.diff(alone[np.argsort(-np.array(scores), kind="stable")]) <= 1e-12).all()


def test_environments_that_cannot_redraw_are_refused_with_the_way_out(toy_tuning: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"train\.py --tuner"):
        learn(DummyVecEnv([lambda: toy_tuning("tiny/code")]), WorkloadPriorities())


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("staleness_weight", -0.1), ("staleness_weight", 2)])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        WorkloadPriorities(**{name: value})
