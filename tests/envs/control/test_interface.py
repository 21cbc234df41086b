"""Control of the draft length: prompts, seeds, and what Gymnasium and Stable-Baselines3 ask of any environment."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from specgym.envs.control.env import DraftLengthEnv
from tests.helpers.drafted_texts import play

MakeEnv = Callable[..., DraftLengthEnv]


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_every_prompt_comes_before_any_comes_again(
    make_env: MakeEnv, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env(backend)
    begun: list[int] = []
    monkeypatch.setattr(env._drafts, "begin", lambda which, workloads, prompts, rng: begun.extend(prompts.tolist()))
    monkeypatch.setattr(type(env._drafts), "features", np.zeros((1, 11), np.float32))
    env.reset(seed=0)
    for _ in range(7):
        env.reset()
    assert sorted(begun[:4]) == sorted(begun[4:]) == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", ["live", "replay"])
@pytest.mark.parametrize("kind", ["model", "model sampled"])
def test_a_seed_fixes_everything(make_env: MakeEnv, backend: str, kind: str) -> None:
    def rollout(env: DraftLengthEnv, seed: int) -> list[Any]:
        draws = np.random.default_rng(0)
        observation, info = env.reset(seed=seed)
        seen: list[Any] = [observation.tolist(), info]
        for _ in range(60):
            observation, reward, ended, _, info = env.step(int(draws.random() < 0.3))
            seen += [observation.tolist(), reward, ended, info]
            if ended:
                env.reset()
        return seen

    env = make_env(backend, kind)
    first = rollout(env, 7)
    assert rollout(env, 7) == first  # the second time after other texts
    assert rollout(make_env(backend, kind), 7) == first
    assert any(rollout(env, seed) != first for seed in (8, 9, 10))


@pytest.mark.parametrize("backend", ["live", "replay"])
@pytest.mark.parametrize("kind", ["model", "model sampled", "lookup"])
def test_passes_both_checkers_without_a_warning(make_env: MakeEnv, backend: str, kind: str) -> None:
    env = make_env(backend, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
        check_env_sb3(env)


def test_the_spec_survives_json() -> None:
    spec = gymnasium.spec("specgym/DraftLength-v0")
    assert EnvSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_a_pickled_environment_comes_back_with_its_arguments(make_env: MakeEnv, backend: str) -> None:
    env = make_env(backend, rate=1.5)
    again = pickle.loads(pickle.dumps(env))
    assert again.rate == 1.5
    assert again.charges.cost_ratio == env.charges.cost_ratio
    infos = [[info for *_, info in play(single, 1, np.random.default_rng(2))] for single in (env, again)]
    assert infos[0] == infos[1]


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_info_has_the_same_plain_entries_after_every_step_and_reset(make_env: MakeEnv, backend: str) -> None:
    kinds: dict[str, type] = {"seconds": float, "total_seconds": float, "throughput": float, "workload": str}
    for _, reward, ended, info in play(make_env(backend), 0, np.random.default_rng(1)):
        assert info.keys() == {
            *("tokens", "seconds", "drafted", "accepted", "rounds", "remaining_acceptable", "workload"),
            *("total_tokens", "total_seconds", "throughput"),
        }
        assert all(type(value) is kinds.get(name, int) for name, value in info.items())
        assert type(reward) is float
        assert type(ended) is bool
