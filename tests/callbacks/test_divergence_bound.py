"""Multipliers rise where the text strays too far, fall where it does not, and reach the environments."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

from specgym.agents.training.sb3_vec_env import VectorEnvAdaptor
from specgym.callbacks import DivergenceBoundCallback
from specgym.callbacks.workloads import HIGHEST, next_multiplier


def learn(venv: VecEnv, callback: DivergenceBoundCallback, rollouts: int, steps: int = 6) -> dict[str, Any]:
    venv = VecNormalize(VecMonitor(venv), norm_obs=False)
    model = PPO("MlpPolicy", venv, n_steps=steps, batch_size=2 * steps, n_epochs=1, seed=0, device="cpu")
    model.set_logger(Logger(None, []))
    model.learn(steps * venv.num_envs * rollouts, callback=callback, log_interval=1000)
    return dict(model.logger.name_to_value)


def test_single_environments_get_the_multiplier_of_their_workload(toy_tuning: Callable[..., Any]) -> None:
    envs = [toy_tuning("tiny/code"), toy_tuning("tiny/prose", [0.01, 0.25]), toy_tuning("tiny/code")]
    callback = DivergenceBoundCallback(bound=0.05, rate=0.5, start=2.0)
    logged = learn(DummyVecEnv([partial(lambda env: env, env) for env in envs]), callback, 2)
    assert logged["bound/divergence/tiny/prose"] == pytest.approx((0.25 * 20 + 0.01 * 10 + 0.25 * 20) / 50)  # by tokens
    assert logged["bound/divergence/tiny/code"] == pytest.approx(0.01)
    assert logged["bound/kept"] == 0.5
    assert callback.multipliers["tiny/prose"] > callback.multipliers["tiny/code"] == 2.0
    assert envs[0].multipliers == envs[2].multipliers
    for env in envs:
        assert env.multipliers[0] == 2.0  # before the first step
        assert env.multipliers[-1] == callback.multipliers[env.name] == logged[f"bound/multiplier/{env.name}"]
        assert len(env.multipliers) == 3


def test_a_vector_environment_gets_them_by_name(toy_vector: Callable[..., Any]) -> None:
    env = toy_vector(2)
    callback = DivergenceBoundCallback(bound=0.05, rate=0.1, start=1.0)
    learn(VectorEnvAdaptor(env), callback, 1)
    assert env.multipliers[0] == {"tiny/prose": 1.0, "tiny/code": 1.0}
    assert env.multipliers[1] == callback.multipliers
    # Each environment changes its workload after 3 steps; the last step of an episode counts for the old one.
    assert callback.multipliers["tiny/prose"] == pytest.approx(next_multiplier(1.0, 0.2, 0.05, 0.1, 1.0))
    assert callback.multipliers["tiny/code"] == pytest.approx(1.0)


def test_a_multiplier_rises_in_proportion_within_limits_and_falls_more_slowly() -> None:
    def after(multiplier: float, divergence: float, rate: float = 0.1) -> float:
        return next_multiplier(multiplier, divergence, 0.05, rate, lowest=1.0)

    assert after(2.0, 0.05) == 2.0
    assert after(2.0, 0.1) == pytest.approx(2 * math.exp(0.1))
    assert after(2.0, 1.0) == pytest.approx(2 * math.exp(0.2))
    assert 2 * math.exp(-0.1) < after(2.0, 0.0) < after(2.0, 0.04) < 2.0
    assert after(999.0, 1.0, rate=10.0) == HIGHEST == 1000.0
    assert after(1.1, 0.0, rate=10.0) == 1.0


@pytest.mark.parametrize(
    ("early", "late", "kept"), [(0.9, 0.02, 1.0), (0.02, 0.9, 0.0)], ids=["astray at first", "astray in the end"]
)
@pytest.mark.parametrize("steps", [6, 5])
def test_only_the_second_half_of_a_rollout_counts(
    toy_tuning: Callable[..., Any], early: float, late: float, kept: float, steps: int
) -> None:
    env = toy_tuning("tiny/prose", [early] * (steps // 2) + [late] * (steps - steps // 2))
    callback = DivergenceBoundCallback(bound=0.05, start=2.0)
    logged = learn(DummyVecEnv([lambda: env]), callback, 2, steps)
    assert logged["bound/divergence/tiny/prose"] == pytest.approx(late)
    assert logged["bound/kept"] == kept
    assert (callback.multipliers["tiny/prose"] > 2.0) == (not kept)


@pytest.mark.parametrize("steps", [6, 12])
def test_only_the_second_half_of_a_rollout_counts_in_vector_environments(
    toy_vector: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    env = toy_vector(2)
    real, taken = type(env).step, [0]

    def straying_at_first(self: Any, actions: np.ndarray) -> Any:
        *others, infos = real(self, actions)
        infos.get("final_info", infos)["divergence"] = np.full(2, 0.9 if taken[0] < steps // 2 else 0.01)
        taken[0] += 1
        return *others, infos

    monkeypatch.setattr(type(env), "step", straying_at_first)
    callback = DivergenceBoundCallback(bound=0.05, start=2.0)
    logged = learn(VectorEnvAdaptor(env), callback, 1, steps)
    for name in ("tiny/prose", "tiny/code"):
        assert logged[f"bound/divergence/{name}"] == pytest.approx(0.01)
        assert callback.multipliers[name] == 2.0


@pytest.mark.parametrize(("rate", "lowest"), [(0.1, 10.0), (0.3, 30.0)])
@pytest.mark.parametrize("shape", ["concave", "linear", "convex"])
def test_ascent_finds_the_bound_whatever_the_shape_of_the_frontier(shape: str, rate: float, lowest: float) -> None:
    """A policy that takes small uphill steps ends close to the bound, from either side of it."""
    power = {"concave": 0.5, "linear": 1.0, "convex": 2.0}[shape]

    def reward(divergence: np.ndarray, multiplier: float) -> np.ndarray:
        return 1 + 3 * (divergence / 0.5) ** power - multiplier * np.maximum(divergence - 0.05, 0)

    for start in (0.001, 0.45):
        divergence, multiplier, late = start, lowest, []
        for rollout in range(600):
            tried = np.clip(divergence * np.array([0.9, 1.0, 1.1]), 1e-4, 0.5)
            divergence = float(tried[np.argmax(reward(tried, multiplier))])
            multiplier = next_multiplier(multiplier, divergence, 0.05, rate, lowest)
            late += [divergence] if rollout >= 400 else []
        assert 0.03 < np.mean(late) < 0.06


def test_environments_without_workloads_or_multipliers_are_refused(toy_tuning: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="do not name their workload"):
        learn(make_vec_env("Pendulum-v1", 1), DivergenceBoundCallback(0.05), 1)
    parent: Any = toy_tuning  # a class
    lacking = type("Lacking", (parent,), {"set_divergence_multiplier": property(lambda self: self.missing)})
    with pytest.raises(ValueError, match="take no multiplier"):
        learn(DummyVecEnv([lambda: lacking("tiny/code")]), DivergenceBoundCallback(0.05), 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("bound", 0.0), ("bound", 1.5), ("rate", 0.0), ("rate", math.inf), ("start", 0.0), ("start", 1001)],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        DivergenceBoundCallback(**{"bound": 0.05, name: value})
