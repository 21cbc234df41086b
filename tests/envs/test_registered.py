"""Every environment that Gymnasium's registry knows of this package, from what ships alone: no model, no setting."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import specgym
from specgym.envs import Workload

IDS = sorted(name for name in gymnasium.registry if name.startswith(f"{specgym.__name__}/"))


def built(name: str) -> gymnasium.Env:
    return gymnasium.make(name, backend="replay")


def test_all_of_them_are_known() -> None:
    names = [name.removeprefix("specgym/").removesuffix("-v0") for name in IDS]
    assert names == ["DraftLength", "DraftTree", "Lookahead", "Medusa", "MedusaTypical", "Speculative", "Thresholds"]


@pytest.fixture(params=[name for name in IDS if name != "specgym/MedusaTypical-v0"])  # no recording of it ships
def shipped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Workload, "load", lambda self: pytest.fail("a pair was loaded"))
    name: str = request.param
    return name


def test_passes_both_checkers_without_a_warning(shipped: str) -> None:
    env = built(shipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        check_env_sb3(env.unwrapped)


def test_an_episode_ends_within_what_the_registry_says_and_earns_something(shipped: str) -> None:
    env = built(shipped)
    env.action_space.seed(0)
    env.reset(seed=0)
    rewards, over = list[float](), False
    while not over:
        _, reward, terminated, truncated, info = env.step(env.action_space.sample())
        rewards.append(float(reward))
        over = terminated or truncated
    limit = gymnasium.spec(shipped).max_episode_steps
    assert limit is None or len(rewards) == limit
    assert np.isfinite(rewards).all()
    assert len(set(rewards)) > 1
    assert info["workload"]
