"""Tuning: what Gymnasium and Stable-Baselines3 ask of any environment."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import FlattenObservation, RecordEpisodeStatistics
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from stable_baselines3.common.env_util import make_vec_env

from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs import TuningEnv, Workload, register_environments
from tests.helpers.rollouts import STILL, rollout

MakeEnv = Callable[..., gymnasium.Env]


@pytest.mark.parametrize("start", ["random", "default"])
@pytest.mark.parametrize("decoder", ["threshold", "speculative"])
def test_passes_both_checkers_without_a_warning(make_env: MakeEnv, decoder: str, start: str) -> None:
    env = make_env(decoder=decoder, start=start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        check_env_sb3(env.unwrapped)


def test_a_seed_fixes_everything(make_env: MakeEnv, toy_workload: Workload) -> None:
    sampled = replace(toy_workload, sampling=replace(toy_workload.sampling, temperature=1.0))
    env = make_env(workload=sampled)
    first = rollout(env, seed=7)
    assert rollout(env, seed=7) == first  # the second time after other episodes
    assert rollout(make_env(workload=sampled), seed=7) == first
    assert rollout(env, seed=8) != first


def test_an_episode_is_cut_after_twenty_steps(make_env: MakeEnv) -> None:
    env = make_env(max_new_tokens=1)
    env.reset(seed=0)
    flags = [env.step(STILL)[2:4] for _ in range(20)]
    assert flags == [(False, False)] * 19 + [(False, True)]


def test_registering_twice_changes_nothing() -> None:
    before = gymnasium.spec("specgym/Thresholds-v0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_environments()
    assert gymnasium.spec("specgym/Thresholds-v0") is before


def test_the_spec_survives_json() -> None:
    spec = gymnasium.spec("specgym/Thresholds-v0")
    assert EnvSpec.from_json(spec.to_json()) == spec


def test_an_id_with_its_module_is_found(toy_workload: Workload, profile: LatencyProfile) -> None:
    env = gymnasium.make("specgym:specgym/Thresholds-v0", workload=toy_workload, profile=profile)
    assert isinstance(env.unwrapped, TuningEnv)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments_see_what_single_ones_see(
    mode: str, make_env: MakeEnv, toy_workload: Workload, profile: LatencyProfile
) -> None:
    arguments: dict[str, Any] = {"workload": toy_workload, "profile": profile}
    arguments |= {"max_draft_length": 4, "max_new_tokens": 8}
    vector = gymnasium.make_vec("specgym/Thresholds-v0", num_envs=2, vectorization_mode=mode, **arguments)
    vector.reset(seed=5)
    _, rewards, _, _, info = vector.step(np.zeros((2, 2), np.float32))
    vector.close()
    for place, seed in enumerate((5, 6)):
        env = make_env()
        env.reset(seed=seed)
        _, reward, _, _, expected = env.step(STILL)
        assert rewards[place] == pytest.approx(reward)
        assert info["speedup"][place] == expected["speedup"]


@pytest.mark.filterwarnings("ignore:.*rgb_array")  # Stable-Baselines3 asks for pictures, which there are none of
def test_works_under_stable_baselines3(toy_workload: Workload, profile: LatencyProfile) -> None:
    arguments = {"workload": toy_workload, "profile": profile, "max_draft_length": 4, "max_new_tokens": 1}
    vector = make_vec_env("specgym/Thresholds-v0", n_envs=2, seed=0, env_kwargs=arguments)
    vector.reset()
    for _ in range(20):
        _, _, done, info = vector.step(np.zeros((2, 2), np.float32))
    assert done.all()
    assert info[0]["TimeLimit.truncated"]
    assert info[0]["episode"]["l"] == 20


def test_works_under_wrappers(make_env: MakeEnv) -> None:
    env = RecordEpisodeStatistics(FlattenObservation(make_env(max_new_tokens=1)))
    env.reset(seed=0)
    total = 0.0
    for _ in range(20):
        _, reward, _, _, info = env.step(STILL)
        total += float(reward)
    assert info["episode"]["r"] == pytest.approx(total)


def test_a_pickled_environment_comes_back_with_its_arguments(make_env: MakeEnv) -> None:
    env = make_env(scales={"fallback": 0.3}).unwrapped
    again = pickle.loads(pickle.dumps(env))
    assert isinstance(env, TuningEnv)
    assert isinstance(again, TuningEnv)
    assert again.scales == env.scales
    assert rollout(again, seed=3) == rollout(env, seed=3)
