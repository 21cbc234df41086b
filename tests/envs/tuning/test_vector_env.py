"""Many replayed tuning environments at once are as many single ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from specgym.agents.training.sb3_vec_env import VectorEnvAdaptor
from specgym.decoding import Sampling, build_decoder
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs.backends.live import metrics_of
from specgym.envs.recordings.trace import Trace
from specgym.envs.tuning.vector_env import TuningVectorEnv
from specgym.envs.workloads import Workload

MakeVector = Callable[..., TuningVectorEnv]


def actions(env: TuningVectorEnv, seed: int, steps: int) -> list[np.ndarray]:
    shape = (steps, *env.action_space.shape)  # type: ignore[misc]
    return list(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))


def test_it_is_what_make_vec_makes_without_a_warning(make_vector: MakeVector) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make_vector()
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.max_episode_steps == 20
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert env.action_space.contains(actions(env, 0, 1)[0])


@pytest.mark.parametrize("decoder", ["threshold", "speculative"])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_one_environment_steps_as_a_single_one_does(
    make_vector: MakeVector, make_single: Callable[..., Any], sampled_trace: Trace, decoder: str, kind: str
) -> None:
    changes = {"decoder": decoder} | ({"recording": sampled_trace} if kind == "sampled" else {})
    vector, single = make_vector(num_envs=1, **changes), make_single(**changes)
    ours: tuple[Any, ...] = vector.reset(seed=5)
    theirs: tuple[Any, ...] = single.reset(seed=5)
    for action in actions(vector, 1, 45):
        assert ours[0][0].tolist() == theirs[0].tolist()
        ours, theirs = vector.step(action), single.step(action[0])
        assert ours[1][0] == pytest.approx(theirs[1], rel=1e-6)
        truncated = bool(theirs[3])
        assert (bool(ours[2][0]), bool(ours[3][0])) == (False, truncated)
        infos = ours[4]["final_info"] if truncated else ours[4]
        assert {name for name in infos if not name.startswith("_")} == set(theirs[4])
        for name, value in theirs[4].items():
            assert infos[name][0] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), name
            assert infos[f"_{name}"].tolist() == [True]
        if truncated:
            assert ours[4]["final_obs"][0].tolist() == theirs[0].tolist()
            theirs = single.reset()


def test_infos_have_the_form_of_gymnasiums_own_vector_environments(
    make_vector: MakeVector, make_single: Callable[..., Any]
) -> None:
    ours = make_vector(num_envs=2, max_episode_steps=2)
    theirs = SyncVectorEnv(
        [lambda: make_single(max_episode_steps=2)] * 2, autoreset_mode=AutoresetMode.SAME_STEP
    )  # fmt: skip

    def shapes(infos: Any) -> Any:
        if isinstance(infos, dict):
            return {name: shapes(value) for name, value in infos.items()}
        return infos.dtype, infos.shape

    assert shapes(ours.reset(seed=0)[1]) == shapes(theirs.reset(seed=0)[1])
    for action in actions(ours, 0, 4):
        mine, other = ours.step(action), theirs.step(action)
        assert shapes(mine[4]) == shapes(other[4])
        assert [part.dtype for part in mine[:4]] == [part.dtype for part in other[:4]]
        assert mine[3].tolist() == other[3].tolist()


def test_means_are_those_of_single_environments(
    make_vector: MakeVector, make_single: Callable[..., Any], sampled_trace: Trace
) -> None:
    """Over 100 steps at each of 40 settings; the means' standard errors are below 1 %."""
    vector, single = make_vector(num_envs=40, recording=sampled_trace), make_single(recording=sampled_trace)
    draws = np.random.default_rng(1)
    knobs = {"fallback": draws.uniform(0, 1, 40), "rollback": draws.uniform(1, 4, 40)}
    names = ("speedup", "rounds", "drafted", "accepted", "divergence", "tokens", "reward/range")
    ours, theirs = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for episode in range(5):
        vector.reset(seed=episode, options={"knobs": knobs})
        for _ in range(20):
            infos = vector.step(np.zeros((40, 2), np.float32))[4]
            infos = infos.get("final_info", infos)
            for name in names:
                ours[name] += infos[name].sum()
    for place in range(40):
        single.reset(seed=place, options={"knobs": {name: values[place] for name, values in knobs.items()}})
        for _ in range(100):
            info = single.unwrapped.step(np.zeros(2, np.float32))[4]
            for name in names:
                theirs[name] += info[name]
    assert ours == pytest.approx(theirs, rel=0.03)


def test_a_seed_fixes_everything(make_vector: MakeVector) -> None:
    def rollout(env: TuningVectorEnv, seed: int) -> list[Any]:
        observation, _ = env.reset(seed=seed)
        steps = [env.step(action)[:2] for action in actions(env, 0, 25)]
        return [observation.tolist(), *([part.tolist() for part in step] for step in steps)]

    env = make_vector(num_envs=5)
    first = rollout(env, 3)
    assert rollout(env, 3) == first
    assert rollout(make_vector(num_envs=5), 3) == first
    assert rollout(env, 4) != first


def test_steps_do_not_share_arrays(make_vector: MakeVector) -> None:
    env = make_vector()
    env.reset(seed=0)
    first = env.step(actions(env, 0, 1)[0])
    copies = {name: value.copy() for name, value in first[4].items()}
    observation = first[0].copy()
    env.step(actions(env, 1, 1)[0])
    assert (first[0] == observation).all()
    for name, value in first[4].items():
        assert (value == copies[name]).all(), name


def test_every_environment_gets_every_prompt_before_any_comes_again(
    make_vector: MakeVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_vector(num_envs=4)
    seen: list[list[int]] = []
    real = env._backend.decode

    def spy(prompts: Any, *others: Any) -> Any:
        seen.append(prompts.tolist())
        return real(prompts, *others)

    monkeypatch.setattr(env._backend, "decode", spy)
    env.reset(seed=0)
    for action in actions(env, 0, 6):
        env.step(action)
    for item in np.array(seen).T.tolist():
        assert sorted(item[:3]) == sorted(item[3:]) == [0, 1, 2]
    assert len({tuple(item) for item in np.array(seen).T.tolist()}) > 1


def test_options_set_knobs_and_prompts_for_one_episode(
    make_vector: MakeVector, make_single: Callable[..., Any]
) -> None:
    env = make_vector(num_envs=3, max_episode_steps=2)
    knobs = {"fallback": 0.3, "rollback": np.array([1.0, 2.0, 4.0])}
    observation, _ = env.reset(seed=0, options={"knobs": knobs, "prompt": np.array([2, 0, 1])})
    assert observation == pytest.approx(np.array([[0.3, 1], [0.3, 2], [0.3, 4]]))
    still = np.zeros((3, 2), np.float32)
    infos = env.step(still)[4]
    for place, (prompt, rollback) in enumerate(((2, 1.0), (0, 2.0), (1, 4.0))):
        if rollback == 2.0:
            continue  # not recorded, so the path is drawn
        single = make_single()
        single.reset(seed=9, options={"knobs": {"fallback": 0.3, "rollback": rollback}, "prompt": prompt})
        assert infos["seconds"][place] == pytest.approx(single.step(still[0])[4]["seconds"])
    observation = env.step(still)[0]
    assert not np.allclose(observation[:, 0], 0.3)  # the next episode starts at random


def test_stable_baselines_learns_on_it(make_vector: MakeVector) -> None:
    env = VecNormalize(VecMonitor(VectorEnvAdaptor(make_vector(num_envs=4))))
    model = PPO("MlpPolicy", env, n_steps=20, batch_size=40, n_epochs=1, seed=0, device="cpu")
    model.learn(160)
    episodes = list(model.ep_info_buffer or ())
    assert [episode["l"] for episode in episodes] == [20] * 8
    assert env.ret_rms.count > 160


# Several workloads.


def test_workloads_share_the_environments_evenly_or_by_weight(
    make_vector: MakeVector, toy_trace: Trace, sampled_trace: Trace
) -> None:
    env = make_vector(num_envs=7, recording=[toy_trace, sampled_trace])
    assert env.workload_names == ["toy/ids", "toy/ids@1.0"]
    assert env.workload_of.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert env.reset(seed=0)[1]["workload"].tolist() == [env.workload_names[place] for place in env.workload_of]
    weighted = make_vector(num_envs=8, recording=[toy_trace, sampled_trace], weights=[3, 1])
    assert np.bincount(weighted.workload_of).tolist() == [6, 2]


@pytest.mark.parametrize("named", [False, True])
def test_each_workload_is_charged_by_its_own_profile(
    make_vector: MakeVector, toy_trace: Trace, sampled_trace: Trace, profile: LatencyProfile, named: bool
) -> None:
    slow = replace(profile, target_seconds={1: 0.1, 2: 0.11}, autoregressive_seconds=0.1)
    names = [toy_trace.info.workload, sampled_trace.info.workload]
    chosen = {names[1]: slow, names[0]: profile} if named else [profile, slow]
    env = make_vector(num_envs=4, recording=[toy_trace, sampled_trace], profile=chosen)
    env.reset(seed=0)
    infos = env.step(np.zeros((4, 2), np.float32))[4]
    for place, (target, token) in enumerate([(0.01, 0.002), (0.1, 0.011)] * 2):
        seconds = target * infos["rounds"][place] + token * infos["drafted"][place]
        assert infos["seconds"][place] == pytest.approx(seconds)
        assert infos["speedup"][place] == pytest.approx(target * infos["tokens"][place] / seconds)


def test_no_model_is_loaded(make_vector: MakeVector, toy_workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "load", lambda self: pytest.fail("a pair was loaded"))
    make_vector(workload=toy_workload).reset(seed=0)


# Live.


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_live_environments_decode_in_one_batch_what_each_decodes_alone(
    make_vector: MakeVector, toy_workload: Workload, decoded: list[dict[str, Any]], temperature: float
) -> None:
    works = [replace(toy_workload, sampling=Sampling(temperature)), toy_workload]
    vector = make_vector(num_envs=4, recording=None, backend="live", workload=works)
    vector.reset(seed=3)
    decoder = build_decoder("threshold", toy_workload.load(), max_draft_length=4)
    decoder.charge_by(vector.profiles[0])
    for action in actions(vector, 1, 3):
        decoded.clear()
        _, _, _, _, infos = vector.step(action)
        assert len({text["prompt"] for text in decoded}) > 1
        for number, text in enumerate(decoded):
            workload = int(vector.workload_of[number])
            alone = decoder.generate(
                text["prompt"],
                max_new_tokens=text["tokens"],
                sampling=works[workload].sampling,
                seed=text["seed"],
                knobs=text["knobs"],
            )
            metrics = metrics_of([alone], vector.profiles[workload])
            for name, value in metrics.entries().items():
                assert infos[name][number] == pytest.approx(value, rel=1e-6), name
    with pytest.raises(ValueError, match="a recording is for backend='replay'"):
        make_vector(backend="live")


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs must be a whole number of at least 1, got 0"),
        ({"max_episode_steps": 0}, "max_episode_steps must be a whole number of at least 1"),
        ({"max_new_tokens": 13}, "has texts of 12 tokens"),
        ({"max_draft_length": 16}, "has drafts of 4 tokens"),
        ({"start": "best"}, "start must be one of"),
        ({"weights": [1, 2]}, "weights must be 1 positive numbers"),
        ({"weights": [0]}, "weights must be 1 positive numbers"),
        ({"profile": {"tiny/prose": "a.json"}}, "profile: there is no workload 'tiny/prose'"),
        ({"profile": ["a.json", "b.json"]}, "profile: 2 were given for 1 workloads"),
        (
            {"workload": ["tiny/prose", "tiny/code"], "recording": ["a", "b", "c"]},
            "recording: 3 were given for 2 workloads",
        ),
    ],
)
def test_bad_arguments_are_refused(make_vector: MakeVector, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vector(**arguments)


def test_fewer_environments_than_workloads_are_refused(
    make_vector: MakeVector, toy_trace: Trace, sampled_trace: Trace
) -> None:
    with pytest.raises(ValueError, match="num_envs must be at least 2, one for each workload"):
        make_vector(num_envs=1, recording=[toy_trace, sampled_trace])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knob": {}}, "unknown reset option 'knob'"),
        ({"knobs": {"speed": 1}}, "there is no knob 'speed'"),
        ({"knobs": {"fallback": [0.1, 0.2, 1.01]}}, "fallback must be between 0 and 1"),
        ({"knobs": {"fallback": [0.1, 0.2]}}, "one for each of the 3 environments, got shape"),
        ({"knobs": [0.5]}, "must map names to values"),
        ({"prompt": 3}, "can replay the train prompts 0, 1, 2"),
        ({"prompt": 0.5}, "takes an index, not a float"),
    ],
)
def test_bad_options_are_refused(make_vector: MakeVector, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vector().reset(seed=0, options=options)


def test_bad_actions_are_refused(make_vector: MakeVector) -> None:
    env = make_vector()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"an action has shape \(3, 2\), one number a knob, got \(2,\)"):
        env.step(np.zeros(2, np.float32))
    bad = np.zeros((3, 2), np.float32)
    bad[1, 0] = np.nan
    with pytest.raises(ValueError, match="the action for knob fallback of environment 1 is nan"):
        env.step(bad)
