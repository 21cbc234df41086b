"""Sessions in worlds as environments of Gymnasium: spaces, seeds, ends, rewards and pickles."""

from __future__ import annotations

import pickle
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import specgym  # noqa: F401  # registers the environments
from specgym.decoding import ArgumentError
from specgym.envs.worlds.acceptance import LEVELS, length_of, setting_of
from specgym.envs.worlds.beliefs import observation_names
from specgym.envs.worlds.env import BUDGETS, MEASUREMENT_COST, RETICENT, SLOWER_COST, WorldsEnv, WorldsVectorEnv
from specgym.envs.worlds.worlds import WorldSampler

GO, STOP = np.array([0.0, 0.0, -1.0], np.float32), np.array([0.0, 0.0, 1.0], np.float32)


def run(env: WorldsVectorEnv, seed: int, steps: int = 12) -> list[Any]:
    rng = np.random.default_rng(9)
    seen: list[Any] = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        actions = rng.uniform(-1, 1, (env.num_envs, 3)).astype(np.float32)
        observations, rewards, over, _, _ = env.step(actions)
        seen += [observations, rewards, over]
    return seen


def test_gymnasium_makes_and_checks_it(sampler: WorldSampler) -> None:
    env = gymnasium.make("specgym/SpeculativeWorlds-v0", sampler=sampler)
    check_env(env.unwrapped, skip_render_check=True)
    vector = gymnasium.make_vec("specgym/SpeculativeWorlds-v0", num_envs=3, sampler=sampler)
    assert isinstance(vector, WorldsVectorEnv)
    assert vector.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert vector.observation_space.contains(vector.reset(seed=0)[0])


def test_a_seed_fixes_worlds_texts_and_noise(sampler: WorldSampler) -> None:
    env = WorldsVectorEnv(7, sampler)
    first, again, other = run(env, 1), run(env, 1), run(env, 2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_one_of_many_is_a_single_one(sampler: WorldSampler) -> None:
    vector, single = WorldsVectorEnv(1, sampler), WorldsEnv(sampler)
    ours, theirs = vector.reset(seed=3)[0][0], single.reset(seed=3)[0]
    rng, ended = np.random.default_rng(0), 0
    for _ in range(30):
        assert ours.tolist() == theirs.tolist()
        action = rng.uniform(-1, 1, 3).astype(np.float32)
        observations, rewards, over, _, info = vector.step(action[None])
        theirs, reward, ended_now, truncated, single_info = single.step(action)
        assert (rewards[0], over[0], False) == (reward, ended_now, truncated)
        assert {name: info[name][0] for name in single_info} == single_info
        ours = info["final_obs"][0] if over[0] else observations[0]
        if over[0]:
            assert ours.tolist() == theirs.tolist()
            ended += 1
            ours, theirs = vector.reset(seed=ended)[0][0], single.reset(seed=ended)[0]
    assert ended > 1


@pytest.mark.parametrize("measurements", [0, 1, 4])
def test_a_session_ends_with_the_action_after_its_last_measurement(sampler: WorldSampler, measurements: int) -> None:
    env = WorldsEnv(sampler, measurements)
    env.reset(seed=0)
    ends = [env.step(GO)[2] for _ in range(measurements + 1)]
    assert ends == [False] * measurements + [True]


def test_an_agent_may_stop_after_one_measurement_and_not_before(sampler: WorldSampler) -> None:
    env = WorldsEnv(sampler, 4)
    env.reset(seed=0)
    assert [env.step(STOP)[2] for _ in range(2)] == [False, True]


def test_budgets_are_drawn_where_they_are_not_fixed(sampler: WorldSampler) -> None:
    env = WorldsVectorEnv(4000, sampler, measurements=None)
    env.reset(seed=0)
    budgets, counts = np.unique(env.beliefs.left, return_counts=True)
    assert budgets.tolist() == sorted(set(BUDGETS))
    assert counts[budgets == 4].item() == pytest.approx(4000 * 2 / len(BUDGETS), rel=0.15)


def test_rewards_are_losses_against_the_best_in_hindsight(sampler: WorldSampler) -> None:
    env = WorldsVectorEnv(400, sampler, measurements=1)
    env.reset(seed=4)
    rng, every = np.random.default_rng(1), np.arange(400)
    actions = rng.uniform(-1, 1, (2, 400, 3)).astype(np.float32)
    for number, action in enumerate(actions):
        settings, speedups = env.beliefs.settings(action), env.worlds.speedups()
        loss = 1 - speedups[every, settings] / speedups.max(1)
        slower = (speedups[every, settings] < 1) & (length_of(settings) > 0)
        _, rewards, over, _, info = env.step(action)
        expected = -loss - SLOWER_COST * slower if number else -MEASUREMENT_COST * (1 + loss)
        assert rewards == pytest.approx(expected)
        assert over.tolist() == [bool(number)] * 400
        shown = info["final_info"] if number else info
        assert shown["share_of_best"] == pytest.approx(1 - loss)
        assert shown["speedup"] == pytest.approx(speedups[every, settings])
    assert slower.any()
    assert (info["final_info"]["measured_speedup"] == 0).all()


def test_a_plain_recommendation_is_never_slower(sampler: WorldSampler) -> None:
    env = WorldsVectorEnv(50, sampler, measurements=0)
    env.reset(seed=0)
    plain = np.full(50, setting_of(0, 0.0))
    env.beliefs.settings = lambda actions: plain  # type: ignore[method-assign]
    _, rewards, *_ = env.step(np.tile(GO, (50, 1)))
    assert (rewards > -1).all()
    assert (rewards <= 1e-6).all()


def test_pickles_go_on_where_the_original_stands(sampler: WorldSampler) -> None:
    env = WorldsVectorEnv(5, sampler)
    env.reset(seed=1)
    env.step(np.tile(GO, (5, 1)))
    copy = pickle.loads(pickle.dumps(env))  # one's own
    ours, theirs = env.step(np.tile(GO, (5, 1))), copy.step(np.tile(GO, (5, 1)))
    assert np.array_equal(ours[0], theirs[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measurements": 9}, "measurements must be .*8"),
        ({"measurements": -1}, "measurements must be"),
        ({"num_envs": 0}, "num_envs must be"),
        ({"render_mode": "human"}, "render_mode must be"),
    ],
)
def test_bad_arguments_are_named(sampler: WorldSampler, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        WorldsVectorEnv(**{"num_envs": 1, **arguments}, sampler=sampler)


def test_bad_actions_options_and_a_missing_reset_are_named(sampler: WorldSampler) -> None:
    env = WorldsVectorEnv(2, sampler)
    with pytest.raises(gymnasium.error.ResetNeeded, match="call reset"):
        env.step(np.zeros((2, 3), np.float32))
    env.reset(seed=0)
    with pytest.raises(ArgumentError, match=r"have shape \(2, 3\), got shape \(3,\)"):
        env.step(np.zeros(3, np.float32))
    with pytest.raises(ArgumentError, match="actions are finite"):
        env.step(np.full((2, 3), np.nan, np.float32))
    with pytest.raises(ArgumentError, match="unknown reset option 'knobs'"):
        env.reset(options={"knobs": {}})


def test_some_engines_do_not_tell_the_probabilities_of_their_drafts(sampler: WorldSampler) -> None:
    env = WorldsVectorEnv(2000, sampler, measurements=2)
    env.reset(seed=0)
    env.step(np.tile(np.array([0.5, -1.0, -1.0], np.float32), (2000, 1)))
    names = observation_names()
    levels = [names.index(f"level_tokens/{level}") for level in range(LEVELS)]
    shown = env.beliefs.observations()
    drafted = shown[:, names.index("before/1/length")] > 0
    assert drafted.any()
    silent = shown[drafted][:, levels].sum(1) == 0
    assert silent.mean() == pytest.approx(RETICENT, abs=0.05)
