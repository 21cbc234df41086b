"""Workloads that are drawn for every episode, and what follows the workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs import RewardSettings
from specgym.envs.recordings.trace import Trace
from specgym.envs.tuning.vector_env import TuningVectorEnv

MakeVector = Callable[..., TuningVectorEnv]
BOUND = RewardSettings(max_divergence=0.0)


@pytest.fixture
def make_two(
    make_vector: MakeVector, toy_trace: Trace, sampled_trace: Trace, profile: LatencyProfile
) -> Callable[..., TuningVectorEnv]:
    """Two workloads, the second ten times as slow; the first has three prompts, the second two."""

    def make(num_envs: int = 6, **changes: Any) -> TuningVectorEnv:
        slow = replace(profile, target_seconds={1: 0.1, 2: 0.11}, autoregressive_seconds=0.1)
        usual = {"recording": [toy_trace, sampled_trace], "profile": [profile, slow], "max_episode_steps": 2}
        return make_vector(num_envs, **{**usual, **changes})

    return make


def still(env: TuningVectorEnv) -> np.ndarray:
    return np.zeros((env.num_envs, 2), np.float32)


def episode(env: TuningVectorEnv) -> dict[str, Any]:
    """The infos of the step that ends it."""
    for _ in range(env.max_episode_steps):
        infos = env.step(still(env))[4]
    return infos


def test_weights_count_from_the_next_episode_on(make_two: Callable[..., TuningVectorEnv]) -> None:
    env = make_two()
    env.reset(seed=0)
    env.step(still(env))
    env.set_workload_weights([0.0, 1.0])
    assert env.workload_of.tolist() == [0, 1] * 3
    infos = env.step(still(env))[4]
    assert infos["final_info"]["workload"].tolist() == ["toy/ids", "toy/ids@1.0"] * 3
    assert infos["workload"].tolist() == ["toy/ids@1.0"] * 6
    assert env.workload_of.tolist() == [1] * 6


def test_environments_fall_to_workloads_in_proportion_to_the_weights(make_two: Callable[..., TuningVectorEnv]) -> None:
    env = make_two(num_envs=4000, max_episode_steps=1)
    env.set_workload_weights({"toy/ids@1.0": 3.0, "toy/ids": 1.0})
    env.reset(seed=0)
    assert np.bincount(env.workload_of)[1] == pytest.approx(3000, abs=140)  # five standard errors
    first = env.workload_of.tolist()
    env.step(still(env))
    assert env.workload_of.tolist() != first  # drawn anew


def test_none_brings_the_fixed_shares_back(make_two: Callable[..., TuningVectorEnv]) -> None:
    env = make_two()
    env.set_workload_weights([0.0, 1.0])
    env.reset(seed=0)
    env.set_workload_weights(None)
    assert env.workload_of.tolist() == [1] * 6
    env.reset()
    assert env.workload_of.tolist() == [0, 1] * 3


def test_time_and_prompts_follow_the_workload(
    make_two: Callable[..., TuningVectorEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_two(num_envs=50)
    asked: list[tuple[np.ndarray, np.ndarray]] = []
    real = env._backend.decode

    def spy(prompts: Any, traces: Any, *others: Any) -> Any:
        asked.append((prompts, traces))
        return real(prompts, traces, *others)

    monkeypatch.setattr(env._backend, "decode", spy)
    env.set_workload_weights([1, 1])
    env.reset(seed=0)
    firsts = np.array([numbers[0] for numbers in env._backend.prompts])
    for _ in range(12):
        of = env.workload_of
        infos = env.step(still(env))[4]
        infos = infos.get("final_info", infos)
        prompts, traces = asked[-1]
        assert traces.tolist() == of.tolist()
        assert infos["workload"].tolist() == [env.workload_names[place] for place in of]
        local = prompts - firsts[of]
        assert ((local >= 0) & (local < np.where(of == 0, 3, 2))).all()
        target, token = np.where(of == 0, 0.01, 0.1), np.where(of == 0, 0.002, 0.011)
        seconds = target * infos["rounds"] + token * infos["drafted"]
        assert infos["seconds"] == pytest.approx(seconds)
        assert infos["speedup"] == pytest.approx(target * infos["tokens"] / seconds)


def test_who_keeps_a_workload_goes_on_in_its_order(
    make_two: Callable[..., TuningVectorEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_two(num_envs=40, max_episode_steps=1)
    asked: list[list[int]] = []
    real = env._backend.decode

    def spy(prompts: Any, *others: Any) -> Any:
        asked.append(prompts.tolist())
        return real(prompts, *others)

    monkeypatch.setattr(env._backend, "decode", spy)
    env.set_workload_weights([1, 1])
    env.reset(seed=0)
    of = []
    for _ in range(3):
        of.append(env.workload_of.tolist())
        env.step(still(env))
    stayed = [place for place in range(40) if {single[place] for single in of} == {0}]
    assert stayed
    for place in stayed:
        assert sorted(single[place] for single in asked) == [0, 1, 2]


def test_a_seed_fixes_the_workloads_drawn(make_two: Callable[..., TuningVectorEnv]) -> None:
    def rollout(env: TuningVectorEnv, seed: int) -> list[Any]:
        seen: list[Any] = [env.reset(seed=seed)[0].tolist()]
        for _ in range(5):
            step = env.step(still(env))
            seen.append([env.workload_of.tolist(), step[0].tolist(), step[1].tolist()])
        return seen

    env = make_two()
    env.set_workload_weights([1, 2])
    first = rollout(env, 3)
    assert rollout(env, 3) == first  # the second time after other episodes
    again = make_two()
    again.set_workload_weights([1, 2])
    assert rollout(again, 3) == first
    assert rollout(env, 4) != first


def test_a_prompt_is_checked_against_the_workload_drawn(make_two: Callable[..., TuningVectorEnv]) -> None:
    env = make_two()
    env.set_workload_weights([1, 0])
    env.reset(seed=0, options={"prompt": 2})
    env.set_workload_weights([0, 1])
    with pytest.raises(ValueError, match="can replay the train prompts 0, 1"):
        env.reset(seed=0, options={"prompt": 2})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "weights: 1 were given for 2 workloads"),
        ([0, 0], "weights must be 2 finite numbers of at least 0, one for each workload and not all 0"),
        ([1, -1], "weights must be 2 finite numbers"),
        ([1, np.inf], "weights must be 2 finite numbers"),
        ({"toy/ids": 1.0}, "one for each workload"),
        ({"toy/ids": 1.0, "tiny/prose": 1.0}, "weights: there is no workload 'tiny/prose'"),
    ],
)
def test_bad_weights_are_refused(make_two: Callable[..., TuningVectorEnv], weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_two().set_workload_weights(weights)


# The multipliers of the bound on divergence.


def test_each_workload_has_its_own_multiplier(make_two: Callable[..., TuningVectorEnv]) -> None:
    env = make_two(reward=BOUND)
    assert env.divergence_multipliers == {"toy/ids": 30.0, "toy/ids@1.0": 30.0}
    env.set_divergence_multipliers({"toy/ids@1.0": 7.0})
    assert env.divergence_multipliers == {"toy/ids": 30.0, "toy/ids@1.0": 7.0}
    env.reset(seed=0, options={"knobs": {"fallback": 0.9}})
    infos = env.step(still(env))[4]
    assert (infos["divergence"] > 0).all()
    expected = -np.where(env.workload_of == 0, 30.0, 7.0) * infos["divergence"]
    assert infos["reward/divergence"] == pytest.approx(expected)


def test_a_single_environment_has_a_multiplier(make_single: Callable[..., Any]) -> None:
    env = make_single(reward=BOUND).unwrapped
    assert env.divergence_multiplier == 30.0
    env.set_divergence_multiplier(3)
    assert env.divergence_multiplier == 3.0
    env.reset(seed=0, options={"knobs": {"fallback": 0.9}})
    info = env.step(np.zeros(2, np.float32))[4]
    assert info["divergence"] > 0
    assert info["reward/divergence"] == pytest.approx(-3.0 * info["divergence"])


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_bad_multiplier_is_refused(
    make_two: Callable[..., TuningVectorEnv], make_single: Callable[..., Any], bad: float
) -> None:
    message = r"the divergence multiplier of toy/ids must be a finite number of at least 0, got"
    with pytest.raises(ValueError, match=message):
        make_two().set_divergence_multipliers({"toy/ids": bad})
    with pytest.raises(ValueError, match=message):
        make_single().unwrapped.set_divergence_multiplier(bad)


def test_a_multiplier_of_an_unknown_workload_is_refused(make_two: Callable[..., TuningVectorEnv]) -> None:
    with pytest.raises(ValueError, match="there is no workload 'tiny/prose'"):
        make_two().set_divergence_multipliers({"tiny/prose": 1.0})
