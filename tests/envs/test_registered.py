"""Every environment that Gymnasium's registry knows of this package, from what ships alone: no model, no setting."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import specgym
from specgym.envs import VectorObserveContext, VectorWorkloadMark, Workload

IDS = sorted(name for name in gymnasium.registry if name.startswith(f"{specgym.__name__}/"))


SIMULATED = "specgym/SpeculativeWorlds-v0"
"""It decodes nothing, so it has neither a backend nor a workload."""


def built(name: str) -> gymnasium.Env:
    arguments: dict[str, Any] = {"acceptance_worlds": 6} if name == SIMULATED else {"backend": "replay"}
    return gymnasium.make(name, **arguments)


def together(name: str, **arguments: Any) -> VectorEnv:
    """Three environments that step together, with episodes that end at different steps where they can."""
    short: dict[str, Any] = (
        {"acceptance_worlds": 6, "measurements": None} if name == SIMULATED else {"max_new_tokens": 12}
    )
    return gymnasium.make_vec(name, num_envs=3, **short, **arguments)


def steps(env: VectorEnv, count: int, seed: int = 0) -> list[Any]:
    """Results of some steps with sampled actions, arrays as lists."""
    env.action_space.seed(seed)
    return [plain(env.step(env.action_space.sample())) for _ in range(count)]


def plain(results: Any) -> Any:
    if isinstance(results, dict):
        return {name: plain(value) for name, value in results.items()}
    if isinstance(results, tuple | list):
        return [plain(value) for value in results]
    return plain(results.tolist()) if isinstance(results, np.ndarray) else results


def test_all_of_them_are_known() -> None:
    names = [name.removeprefix("specgym/").removesuffix("-v0") for name in IDS]
    assert names == [
        *("DraftChoice", "DraftLength", "DraftTree", "Engine", "Lookahead", "Medusa", "MedusaTypical"),
        *("Pipeline", "RoundKnobs", "Speculative", "SpeculativeWorlds", "Thresholds"),
    ]


NOT_SHIPPED = ("specgym/Engine-v0", "specgym/MedusaTypical-v0", "specgym/RoundKnobs-v0")
"""Environments of which no recording ships, or could."""


@pytest.fixture(params=[name for name in IDS if name not in NOT_SHIPPED])
def shipped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Workload, "load", lambda self: pytest.fail("a pair was loaded"))
    name: str = request.param
    return name


@pytest.fixture
def decoding(shipped: str) -> str:
    if shipped == SIMULATED:
        pytest.skip("it decodes nothing")
    return shipped


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
    assert info["workload"] if shipped != SIMULATED else info["share_of_best"]


def test_environments_that_step_together_keep_to_their_spaces_and_to_the_form_of_gymnasiums_own(shipped: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env, single = together(shipped), built(shipped)
    assert env.metadata["autoreset_mode"] == getattr(env, "autoreset_mode", None) == AutoresetMode.SAME_STEP
    assert env.single_observation_space == single.observation_space
    assert env.single_action_space == single.action_space
    observations, start = env.reset(seed=0)
    env.action_space.seed(0)
    ended, seen = 0, list[tuple[Any, Any]]()
    for _ in range(40):
        result = env.step(env.action_space.sample())
        seen.append((result, copy.deepcopy(result)))
        observations, rewards, terminated, truncated, infos = result
        assert env.observation_space.contains(observations)
        assert [part.dtype for part in result[1:4]] == [np.float64, np.bool_, np.bool_]
        assert rewards.shape == terminated.shape == truncated.shape == (3,)
        over = terminated | truncated
        assert infos.keys() - start.keys() <= {"final_obs", "_final_obs", "final_info", "_final_info"}
        assert start.keys() <= infos.keys()
        assert ("final_obs" in infos) == over.any()
        for number in np.flatnonzero(over):
            assert env.single_observation_space.contains(infos["final_obs"][number])
            ended += 1
    assert ended > 0
    for result, as_it_was in seen:
        assert plain(result) == plain(as_it_was)  # no array is used again


@pytest.mark.parametrize("again", [lambda env: pickle.loads(pickle.dumps(env)), copy.deepcopy])
def test_copies_of_environments_that_step_together_go_on_where_they_stand(
    shipped: str, again: Callable[[VectorEnv], VectorEnv]
) -> None:
    env = together(shipped)
    env.reset(seed=3)
    steps(env, 7)
    twin = again(env)
    ahead = steps(twin, 60, seed=1)
    assert steps(env, 60, seed=1) == ahead
    assert plain(twin.reset()) == plain(env.reset())


@pytest.mark.parametrize("wrapper", [VectorObserveContext, VectorWorkloadMark])
def test_copies_of_wrapped_environments_go_on_as_well(wrapper: Callable[[VectorEnv], VectorEnv]) -> None:
    env = wrapper(together("specgym/Thresholds-v0", workload=["tiny/prose", "tiny/code"]))
    assert getattr(env, "autoreset_mode", None) == AutoresetMode.SAME_STEP
    env.reset(seed=3)
    env.unwrapped.set_workload_weights([1, 3])  # type: ignore[attr-defined]
    steps(env, 7)
    twin = pickle.loads(pickle.dumps(env))
    assert steps(env, 60, seed=1) == steps(twin, 60, seed=1)


def test_a_step_before_the_first_reset_is_refused(shipped: str) -> None:
    single, env = built(shipped).unwrapped, together(shipped)
    for environment in (single, env):
        with pytest.raises(gymnasium.error.ResetNeeded, match="call reset before the"):
            environment.step(environment.action_space.sample())
    single.reset()
    env.reset()
    single.step(single.action_space.sample())
    env.step(env.action_space.sample())


def test_environments_that_step_together_take_a_seed_each(shipped: str) -> None:
    def begun(seed: Any) -> Any:
        env = together(shipped)
        return [plain(env.reset(seed=seed)), *steps(env, 5)]

    first = begun([4, 8, 1])
    assert begun((4, 8, 1)) == begun(np.array([4, 8, 1])) == first
    assert begun([4, 8, 2]) != first
    assert begun([5, 6, 7]) == begun(5) == begun(np.int64(5))  # as Gymnasium's own have it
    env = together(shipped)
    env.reset(seed=5)
    unseeded = plain(env.reset(seed=[None] * 3))  # type: ignore[arg-type]
    env.reset(seed=5)
    assert plain(env.reset()) == unseeded
    for wrong, message in {
        (1, 2): "2 were given for 3 environments",
        (1, 2, -3): "must be a whole number of at least 0, got -3",
        (1, 2, None): "must be a whole number of at least 0, got None",
        0.5: "must be a whole number of at least 0, got 0.5; or give a list with a seed for each environment",
    }.items():
        with pytest.raises(ValueError, match=f"seed.*{message}"):
            env.reset(seed=wrong)  # type: ignore[arg-type]


def test_the_backend_has_a_second_name_for_libraries_that_take_the_first(decoding: str) -> None:
    both: list[dict[str, Any]] = [{"source": "replay"}, {"source": "replay", "backend": "replay"}]
    for arguments in both:
        env = gymnasium.make(decoding, **arguments)
        env.reset(seed=0)
        assert pickle.loads(pickle.dumps(env.unwrapped)).reset(seed=0)[0].tolist() == env.reset(seed=0)[0].tolist()
        gymnasium.make_vec(decoding, num_envs=3, **arguments).reset(seed=0)
    for make in (gymnasium.make, gymnasium.make_vec):
        with pytest.raises(ValueError, match="two names of the same argument; give one of them"):
            make(decoding, backend="live", source="replay")
        with pytest.raises(ValueError, match="source must be one of 'live', 'replay', got 'both'"):
            make(decoding, source="both")


@pytest.mark.parametrize("argument", ["workload", "recording"])
@pytest.mark.parametrize("backend", ["live", "replay"])
def test_a_single_environment_refuses_several_workloads_and_names_what_takes_them(
    decoding: str, backend: str, argument: str
) -> None:
    if (argument, backend) == ("recording", "live"):
        pytest.skip("which is refused for another reason")
    several: dict[str, Any] = {argument: ["tiny/prose", "tiny/code"]}
    with pytest.raises(
        ValueError, match=rf"^{argument}: .* single workload, got 2 in a list; .*make_vec\(.*num_envs=2"
    ):
        gymnasium.make(decoding, backend=backend, **several)


def test_pictures_may_be_asked_for_and_are_not_there(shipped: str) -> None:
    assert together(shipped, render_mode="rgb_array").render_mode is None
    with pytest.raises(ValueError, match="render_mode must be one of None, 'rgb_array', got 'human'"):
        together(shipped, render_mode="human")
