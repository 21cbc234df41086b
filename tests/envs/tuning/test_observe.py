"""Observations that tell of the workload and of the settings tried."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs import ContextLayout, ObserveContext, VectorObserveContext
from specgym.envs.recordings.trace import Trace
from specgym.envs.tuning.vector_env import TuningVectorEnv

MakeEnv = Callable[..., gymnasium.Env]
MakeVector = Callable[..., TuningVectorEnv]
RANGES = {"fallback": (0.0, 1.0), "rollback": (1.0, 4.0)}


def actions(steps: int, environments: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (steps, environments, 2)).astype(np.float32)


@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version")
def test_passes_both_checkers_without_a_warning(make_single: MakeEnv) -> None:
    env = ObserveContext(make_single())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*different from the unwrapped version")
        check_env(env, skip_render_check=True)
        check_env_sb3(env, skip_render_check=True)


def test_entries_have_names_and_finite_bounds(make_single: MakeEnv) -> None:
    env = ObserveContext(make_single(), history=2)
    outcomes = ["speedup", "draft_acceptance_rate", "divergence"]
    assert env.state_names == [
        *("fallback", "rollback", "temperature", "cost_ratio", "measurements"),
        *(f"last1/{name}" for name in ("fallback", "rollback", *outcomes)),
        *(f"last2/{name}" for name in ("fallback", "rollback", *outcomes)),
    ]
    space = env.observation_space
    assert isinstance(space, gymnasium.spaces.Box)
    assert space.low == pytest.approx([0, 1, 0, 0, 0, *[0, 1, 0, 0, 0] * 2])
    assert space.high == pytest.approx([1, 4, 2, 2, 2, *[1, 4, 8, 1, 1] * 2])
    assert space.dtype == np.float32


def test_settings_tried_are_remembered_newest_first_until_the_episode_ends(
    make_single: MakeEnv, sampled_trace: Trace, profile: LatencyProfile
) -> None:
    env = ObserveContext(make_single(recording=sampled_trace), history=2)
    observation = env.reset(seed=0)[0]
    workload = [1.0, profile.marginal_cost()]
    nothing: list[float] = [0, 1, 0, 0, 0]
    assert observation[2:] == pytest.approx([*workload, 0, *nothing, *nothing])
    names = ("knobs/fallback", "knobs/rollback", "speedup", "draft_acceptance_rate", "divergence")
    tried: list[list[float]] = []
    for step, (action,) in enumerate(actions(3, 1), 1):
        observation, *_, info = env.step(action)
        tried.insert(0, [info[name] for name in names])
        shown = [*tried, nothing, nothing][:2]
        assert observation == pytest.approx([*tried[0][:2], *workload, min(step, 2), *shown[0], *shown[1]])
    assert env.reset()[0][4:] == pytest.approx([0, *nothing, *nothing])


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_many_environments_observe_what_a_single_one_does(
    make_vector: MakeVector, make_single: MakeEnv, toy_trace: Trace, sampled_trace: Trace, kind: str
) -> None:
    trace = toy_trace if kind == "greedy" else sampled_trace
    vector, single = (
        VectorObserveContext(make_vector(1, recording=trace), 3),
        ObserveContext(make_single(recording=trace), 3),
    )
    assert vector.single_observation_space == single.observation_space
    assert vector.state_names == single.state_names
    ours, theirs = vector.reset(seed=5)[0], single.reset(seed=5)[0]
    for action in actions(45, 1):
        assert ours.dtype == theirs.dtype
        assert ours[0] == pytest.approx(theirs, rel=1e-6)
        ours, _, _, ended, infos = vector.step(action)
        theirs = single.step(action[0])[0]
        if ended[0]:
            assert infos["final_obs"][0] == pytest.approx(theirs, rel=1e-6)
            theirs = single.reset()[0]
    assert vector.observation_space.contains(ours)


def test_each_environment_is_told_of_its_own_workload_as_it_changes(
    make_vector: MakeVector, toy_trace: Trace, sampled_trace: Trace, profile: LatencyProfile
) -> None:
    dear = replace(profile, draft_seconds={0: 0.0, 1: 0.005})
    inner = make_vector(6, recording=[toy_trace, sampled_trace], profile=[profile, dear], max_episode_steps=2)
    env = VectorObserveContext(inner, 2)
    inner.set_workload_weights([1, 1])
    observation = env.reset(seed=0)[0]
    costs = np.array([profile.marginal_cost(), dear.marginal_cost()])

    def expected() -> tuple[list[float], Any]:
        return inner.workload_of.tolist(), pytest.approx(costs[inner.workload_of])

    changed = False
    for action in actions(6, 6):
        before = expected()
        observation, _, _, ended, infos = env.step(action)
        if ended.any():
            last = np.stack(infos["final_obs"])
            assert (last[:, 2].tolist(), last[:, 3]) == before
            assert last[:, 4].tolist() == [2] * 6
            assert observation[:, 4].tolist() == [0] * 6
            changed |= before[0] != inner.workload_of.tolist()
        assert (observation[:, 2].tolist(), observation[:, 3]) == expected()
    assert changed


def test_an_observation_can_be_made_from_a_list_of_measurements(make_single: MakeEnv) -> None:
    env = ObserveContext(make_single(), history=2)
    env.reset(seed=0)
    inner = env.unwrapped
    past = []
    for action in actions(3, 1):
        observation, *_, info = env.step(action[0])
        knobs = inner.knob_values()  # type: ignore[attr-defined]
        past.append((knobs, info["speedup"], info["draft_acceptance_rate"], info["divergence"]))
        built = env.layout.observation(knobs, 0.0, inner.profile.marginal_cost(), past)  # type: ignore[attr-defined]
        assert built == pytest.approx(observation)


def test_values_beyond_their_bounds_are_clipped() -> None:
    layout = ContextLayout(RANGES, history=1)
    past = [({"fallback": -0.1, "rollback": 9.0}, 50.0, 0.5, 0.5)]
    built = layout.observation({"fallback": 1.1, "rollback": 2.0}, 5.0, 3.0, past * 4)
    assert built == pytest.approx([1, 2, 2, 2, 1, 0, 4, 8, 0.5, 0.5])
    assert layout.space.contains(built)


def test_the_wrapper_survives_its_spec(make_single: MakeEnv, toy_trace: Trace, profile: LatencyProfile) -> None:
    spec = ObserveContext(make_single(), history=3).spec
    assert spec is not None
    again = gymnasium.make(pickle.loads(pickle.dumps(spec)))
    assert len(again.get_wrapper_attr("state_names")) == 5 + 3 * 5


def test_other_environments_are_refused(make_vector: MakeVector) -> None:
    with pytest.raises(TypeError, match="ObserveContext is for a TuningEnv"):
        ObserveContext(gymnasium.make("CartPole-v1"))
    with pytest.raises(TypeError, match="VectorObserveContext is for a TuningVectorEnv"):
        VectorObserveContext(gymnasium.make_vec("CartPole-v1", num_envs=1))


@pytest.mark.parametrize("history", [0, 1.5])
def test_a_history_of_less_than_one_is_refused(make_single: MakeEnv, history: Any) -> None:
    with pytest.raises(ValueError, match="history must be a whole number of at least 1"):
        ObserveContext(make_single(), history)
