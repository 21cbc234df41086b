"""Stable-Baselines3 over native vector environments: it sees what it would see of many single ones."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from specgym.agents.training.sb3_vec_env import FiniteGuard, VectorEnvAdaptor


class Counting(VectorEnv[Any, Any, Any]):
    """Counts its steps. Environment i ends after i + 2 steps; those of odd number are cut off, the others terminate."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int = 3) -> None:
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(0, 100, (1,), np.float32)
        self.single_action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.observation_space = spaces.Box(0, 100, (num_envs, 1), np.float32)
        self.action_space = spaces.Box(-1, 1, (num_envs, 1), np.float32)
        self.count = np.zeros(num_envs, np.int64)
        self.asked: list[tuple[int | None, Any]] = []
        self.weight = 1.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.asked.append((seed, options))
        self.count[:] = 0
        return self.seen(), self.info(np.ones(self.num_envs, bool))

    def seen(self) -> Any:
        return self.count[:, None].astype(np.float32)

    def info(self, held: Any) -> dict[str, Any]:
        return {"count": np.where(held, self.count, 0), "_count": held}

    def step(self, actions: Any) -> Any:
        assert actions.shape == self.action_space.shape
        self.count += 1
        ended = self.count >= np.arange(self.num_envs) + 2
        odd = np.arange(self.num_envs) % 2 == 1
        infos: dict[str, Any] = {}
        if ended.any():
            final = np.full(self.num_envs, None, object)
            for place in np.flatnonzero(ended):
                final[place] = self.seen()[place]
            infos |= {"final_obs": final, "_final_obs": ended, "final_info": self.info(ended), "_final_info": ended}
        rewards = self.count * self.weight
        self.count[ended] = 0
        return self.seen(), rewards, ended & ~odd, ended & odd, infos | self.info(~ended)

    def double(self, number: int) -> int:
        return 2 * number


def test_final_observations_and_cut_offs_are_passed_on() -> None:
    env = VectorEnvAdaptor(Counting())
    assert np.asarray(env.reset()).tolist() == [[0], [0], [0]]
    env.step(np.zeros((3, 1), np.float32))
    observations, rewards, dones, infos = env.step(np.zeros((3, 1), np.float32))
    assert np.asarray(observations).tolist() == [[0], [2], [2]]
    assert (rewards.tolist(), rewards.dtype) == ([2, 2, 2], np.float32)
    assert (dones.tolist(), dones.dtype) == ([True, False, False], np.bool_)
    assert infos[0]["terminal_observation"].tolist() == [2]
    assert infos[0]["TimeLimit.truncated"] is False
    assert infos[1:] == [{}, {}]
    infos = env.step(np.zeros((3, 1), np.float32))[3]
    assert infos[1]["terminal_observation"].tolist() == [3]
    assert infos[1]["TimeLimit.truncated"] is True


def test_infos_on_request_are_those_of_the_step_that_was_made() -> None:
    env = VectorEnvAdaptor(Counting(), infos=True)
    env.reset()
    assert env.reset_infos == [{"count": 0}] * 3
    assert env.step(np.zeros((3, 1), np.float32))[3] == [{"count": 1}] * 3
    infos = env.step(np.zeros((3, 1), np.float32))[3]
    assert [info["count"] for info in infos] == [2, 2, 2]
    assert [type(info["count"]) for info in infos] == [int] * 3


def test_what_the_environment_said_is_kept_as_arrays() -> None:
    env = VectorEnvAdaptor(Counting())
    env.reset()
    env.step(np.zeros((3, 1), np.float32))
    assert env.vector_infos["count"].tolist() == [1, 1, 1]


def test_what_a_wrapper_writes_into_an_info_is_gone_at_the_next_step() -> None:
    env = VectorEnvAdaptor(Counting())
    env.reset()
    env.step(np.zeros((3, 1), np.float32))[3][2]["mark"] = True
    assert env.step(np.zeros((3, 1), np.float32))[3][2] == {}


def test_seed_and_options_count_for_one_reset() -> None:
    inner = Counting()
    env = VectorEnvAdaptor(inner)
    assert env.seed(7) == [7, 7, 7]
    env.set_options({"knobs": {"fallback": 0.3}})
    env.reset(), env.reset()
    assert inner.asked == [(7, {"knobs": {"fallback": 0.3}}), (None, None)]
    env.set_options([{"prompt": 1}, {"prompt": 2}, {"prompt": 3}])
    with pytest.raises(ValueError, match="takes one set of options"):
        env.reset()


def test_attributes_and_methods_are_those_of_the_vector_environment() -> None:
    inner = Counting()
    env = VectorEnvAdaptor(inner)
    assert env.get_attr("weight") == [1.0] * 3
    assert env.get_attr("weight", [0, 2]) == [1.0] * 2
    env.set_attr("weight", 3.0)
    assert inner.weight == 3.0
    assert env.env_method("double", 4) == [8] * 3
    assert env.env_is_wrapped(gymnasium.Wrapper) == [False] * 3
    with pytest.raises(ValueError, match="cannot set weight for some environments alone"):
        env.set_attr("weight", 1.0, 0)
    with pytest.raises(ValueError, match="cannot call double for some environments alone"):
        env.env_method("double", 4, indices=[1])


def test_another_way_to_reset_is_refused() -> None:
    env = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")])
    with pytest.raises(ValueError, match=r"needs AutoresetMode\.SAME_STEP"):
        VectorEnvAdaptor(env)


def test_it_steps_as_stable_baselines_own_vector_environments_do() -> None:
    makers = [lambda: gymnasium.make("CartPole-v1")] * 3
    theirs = DummyVecEnv(list(makers))
    ours = VectorEnvAdaptor(SyncVectorEnv(list(makers), autoreset_mode=AutoresetMode.SAME_STEP))
    theirs.seed(3), ours.seed(3)
    assert np.array_equal(np.asarray(theirs.reset()), np.asarray(ours.reset()))
    draws = np.random.default_rng(0)
    ends = 0
    for _ in range(60):
        actions = draws.integers(0, 2, 3)
        mine, other = ours.step(actions), theirs.step(actions)
        for item, two in zip(mine[:3], other[:3], strict=True):
            assert np.array_equal(np.asarray(item), np.asarray(two))
        for place in np.flatnonzero(mine[2]):
            ends += 1
            for name in ("terminal_observation", "TimeLimit.truncated"):
                assert np.array_equal(mine[3][place][name], other[3][place][name])
    assert ends > 3


def test_it_learns_under_the_usual_wrappers() -> None:
    env = VecNormalize(VecMonitor(FiniteGuard(VectorEnvAdaptor(Counting(4)))))
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=16, n_epochs=1, seed=0, device="cpu")
    model.learn(64)
    # Environment i counts to i + 2, and earns 1, 2, ...
    lengths = {episode["l"]: episode["r"] for episode in model.ep_info_buffer or ()}
    assert lengths == {2: 3.0, 3: 6.0, 4: 10.0, 5: 15.0}
