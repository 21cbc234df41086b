"""Tuning: what resetting and a step do, show and tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.decoders.threshold import ThresholdDecoder
from specgym.decoding.latency.profile import LatencyProfile
from specgym.decoding.loading.find_model import shipped_models
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import Sampling
from specgym.envs import RewardSettings, TokenPrompts, TuningEnv, Workload, measure_setting
from specgym.envs.backends.live import summarise
from tests.helpers.rollouts import STILL, rollout

MakeEnv = Callable[..., gymnasium.Env]


def test_actions_move_knobs_by_their_scale_and_stop_at_the_range(make_env: MakeEnv) -> None:
    env = make_env(scales={"fallback": 0.2, "rollback": 0.5})
    env.reset(seed=0, options={"knobs": {"fallback": 0.5, "rollback": 2.0}})
    observation = env.step(np.array([0.5, -1.0], np.float32))[0]
    assert observation == pytest.approx([0.6, 1.5])
    for _ in range(5):
        observation = env.step(np.array([1.0, -1.0], np.float32))[0]
    assert observation == pytest.approx([1.0, 1.0])
    assert observation.dtype == np.float32
    assert env.observation_space.contains(observation)


def test_the_decoder_gets_the_knobs_that_info_and_observation_show(
    make_env: MakeEnv, decoded: list[dict[str, Any]]
) -> None:
    env = make_env()
    env.reset(seed=0)
    observation, _, _, _, info = env.step(np.array([0.3, 0.1], np.float32))
    assert decoded[0]["knobs"] == {"fallback": info["knobs/fallback"], "rollback": info["knobs/rollback"]}
    assert observation == pytest.approx([info["knobs/fallback"], info["knobs/rollback"]])


def test_small_actions_add_up_for_a_whole_number_knob(make_env: MakeEnv) -> None:
    env = make_env(decoder="speculative", start="default", scales={"draft_length": 1.0})
    env.reset(seed=0, options={"knobs": {"draft_length": 2}})
    lengths = [env.step(np.array([0.3, 0.0], np.float32))[4]["knobs/draft_length"] for _ in range(3)]
    assert lengths == [2.0, 3.0, 3.0]


def test_every_prompt_comes_before_any_comes_again(
    make_env: MakeEnv, toy_workload: Workload, decoded: list[dict[str, Any]]
) -> None:
    env = make_env(max_new_tokens=1)
    env.reset(seed=0)
    for step in range(8):
        if step == 3:
            env.reset()  # a new episode goes on where the last one stopped
        env.step(STILL)
    prompts = [call["prompt"] for call in decoded]
    every = set(toy_workload.prompt_ids())
    assert set(prompts[:4]) == every
    assert set(prompts[4:]) == every


def test_sessions_get_different_seeds(make_env: MakeEnv, decoded: list[dict[str, Any]]) -> None:
    rollout(make_env(), seed=0)
    assert len({call["seed"] for call in decoded}) == len(decoded)


def test_what_is_rehearsed_is_not_decoded_and_leads_to_the_same_steps(
    make_env: MakeEnv, toy_workload: Workload, decoded: list[dict[str, Any]]
) -> None:
    actions = [np.array([0.3 * (-1) ** step, 0.2], np.float32) for step in range(7)]
    ends: list[Any] = []
    for rehearsed in (False, True):
        env = make_env(workload=replace(toy_workload, sampling=Sampling(1.0)), prompts_per_step=2)
        live: Any = env.unwrapped
        with live.rehearsing() if rehearsed else nullcontext():
            env.reset(seed=5)
            for action in actions:
                env.step(action)
            env.reset()
        assert len(decoded) == (0 if rehearsed else 2 * len(actions))
        steps = [env.step(action) for action in actions]
        ends.append([(observation.tolist(), *rest) for observation, *rest in steps])
        decoded.clear()
    assert ends[0] == ends[1]


def test_info_has_the_same_plain_entries_at_the_start_and_at_every_step(make_env: MakeEnv) -> None:
    seen = rollout(make_env(), seed=0)
    first, *infos = seen[0][1], *(result[4] for result in seen[1:])
    assert all(list(info) == list(first) for info in infos)
    assert all(type(value) in (float, str) for info in infos for value in info.values())
    assert not any("wall" in name for name in infos[0])
    named = {"workload", "knobs/fallback", "knobs/rollback"}
    assert all(value == 0.0 and type(value) is float for name, value in first.items() if name not in named)
    assert first["workload"] == infos[0]["workload"]
    assert [first["knobs/fallback"], first["knobs/rollback"]] == pytest.approx(seen[0][0])
    assert type(seen[1][1]) is float


def test_the_reward_is_the_sum_of_the_terms_in_info(make_env: MakeEnv) -> None:
    reward = RewardSettings(speed_weight=2, acceptance_weight=3, range_weight=4, divergence_weight=5)
    for _, total, _, _, info in rollout(make_env(reward=reward), seed=0)[1:]:
        terms = [info[f"reward/{name}"] for name in ("speed", "acceptance", "range", "divergence")]
        assert total == pytest.approx(sum(terms))
        assert info["reward/speed"] == pytest.approx(2 * info["speedup"])
        assert info["reward/divergence"] == pytest.approx(-5 * info["divergence"])


def test_rewards_may_be_given_as_a_mapping(make_env: MakeEnv) -> None:
    env = make_env(reward={"speed_weight": 0.0}).unwrapped
    assert isinstance(env, TuningEnv)
    assert env.reward_settings == RewardSettings(speed_weight=0.0, max_divergence=0.05)


def test_time_is_charged_by_the_profile(make_env: MakeEnv) -> None:
    for *_, info in rollout(make_env(), seed=0)[1:]:
        # 1 ms a drafted token, 10 ms a pass and 1 ms for each token beyond the first
        seconds = 0.010 * info["rounds"] + 0.002 * info["drafted"]
        assert info["seconds"] == pytest.approx(seconds)
        assert info["ms_per_token"] == pytest.approx(1000 * seconds / info["tokens"])
        assert info["speedup"] == pytest.approx(10.0 / info["ms_per_token"])


def test_the_clock_can_be_charged_instead(make_env: MakeEnv) -> None:
    charged = rollout(make_env(), seed=0)[1][4]
    wall = rollout(make_env(timing="wall"), seed=0)[1][4]
    assert wall.keys() == charged.keys()
    assert wall["drafted"] == charged["drafted"]
    assert wall["seconds"] != charged["seconds"]
    assert wall["speedup"] == pytest.approx(10.0 / wall["ms_per_token"])


def test_an_end_of_text_makes_a_step_shorter(
    make_env: MakeEnv, toy_workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_workload.load(), "eos_token_ids", frozenset(range(64)))
    assert rollout(make_env(), seed=0)[1][4]["tokens"] == 1.0


def test_options_set_knobs_and_leave_the_others_random(make_env: MakeEnv) -> None:
    env = make_env()
    outcome = [env.reset(seed=seed, options={"knobs": {"fallback": 0.25}})[0].tolist() for seed in range(3)]
    assert [fallback for fallback, _ in outcome] == [0.25] * 3
    assert len({rollback for _, rollback in outcome}) == 3


def test_knobs_may_start_at_the_decoders_defaults(make_env: MakeEnv) -> None:
    assert make_env(start="default").reset(seed=0)[0].tolist() == pytest.approx([0.3, 1.0])


@pytest.mark.parametrize(("prompt", "expected"), [(1, (4, 5)), ([7, 9], (7, 9)), (np.int64(2), (6,))])
def test_options_set_the_prompt_of_the_whole_episode(
    make_env: MakeEnv, decoded: list[dict[str, Any]], prompt: Any, expected: tuple[int, ...]
) -> None:
    env = make_env(max_new_tokens=1)
    env.reset(seed=0, options={"prompt": prompt})
    env.step(STILL), env.step(STILL)
    env.reset()
    env.step(STILL)
    assert [call["prompt"] for call in decoded[:2]] == [expected] * 2


def test_a_prompt_may_be_a_string_where_there_is_a_tokenizer(
    make_env: MakeEnv, speaking_pair: Pair, decoded: list[dict[str, Any]]
) -> None:
    env = make_env(workload=Workload(speaking_pair, TokenPrompts([[1]], [[2]])))
    env.reset(seed=0, options={"prompt": "seek find"})
    env.step(STILL)
    assert decoded[0]["prompt"] == (2, 3)


def test_it_shows_its_knobs_ranges_workload_and_decoder(make_env: MakeEnv, toy_workload: Workload) -> None:
    env = make_env(split="test").unwrapped
    assert isinstance(env, TuningEnv)
    assert [knob.name for knob in env.knobs] == ["fallback", "rollback"]
    assert env.ranges == {"fallback": (0.0, 1.0), "rollback": (1.0, 4.0)}
    assert env.scales == pytest.approx({"fallback": 0.2, "rollback": 0.3})
    assert env.workload == toy_workload.with_split("test")
    assert isinstance(env.decoder, ThresholdDecoder)


def test_any_callable_may_make_the_decoder(make_env: MakeEnv) -> None:
    env = make_env(decoder=lambda pair: SpeculativeDecoder(pair, 3)).unwrapped
    space: Any = env.observation_space
    assert space.high.tolist() == [3.0, 1.0]


def test_a_profile_may_be_a_file(make_env: MakeEnv, profile: LatencyProfile, tmp_path: Path) -> None:
    profile.save(tmp_path / "profile.json")
    env = make_env(profile=str(tmp_path / "profile.json")).unwrapped
    assert isinstance(env, TuningEnv)
    assert replace(env.profile, chances=None) == profile


def test_without_a_profile_the_pairs_own_is_measured(make_env: MakeEnv) -> None:
    env = make_env(profile=None).unwrapped
    assert isinstance(env, TuningEnv)
    assert env.profile.pair == "toy"


def test_ansi_rendering_shows_the_last_step(make_env: MakeEnv) -> None:
    env = make_env(render_mode="ansi")
    env.reset(seed=0)
    assert "nothing decoded yet" in str(env.render())
    env.step(STILL)
    text = str(env.render())
    assert "taken back" in text
    assert "\x1b[" in text


def test_human_rendering_prints_every_step(make_env: MakeEnv, capsys: pytest.CaptureFixture[str]) -> None:
    env = make_env(render_mode="human")
    env.reset(seed=0)
    env.step(STILL)
    assert env.render() is None
    assert capsys.readouterr().out.count("fallback=") == 2


def test_the_environment_reports_what_measuring_reports(
    make_env: MakeEnv, decoded: list[dict[str, Any]], profile: LatencyProfile
) -> None:
    env = make_env()
    env.reset(seed=0)
    info = env.step(STILL)[4]
    call = decoded[0]
    decoder = env.unwrapped.decoder  # type: ignore[attr-defined]
    outcome = measure_setting(decoder, call["knobs"], [call["prompt"]], 8, seed=call["seed"], profile=profile)
    assert {name: info[name] for name in outcome if name in info} == {
        name: value for name, value in outcome.items() if "wall" not in name
    }
    assert summarise(decoder, [decoder.generate([1], max_new_tokens=2)], profile)["tokens"] == 2


@pytest.mark.skipif("tiny-10m-draft-1l" not in shipped_models(), reason="the shipped models are not built yet")
def test_the_shipped_pair_is_what_an_environment_uses_by_default(profile: LatencyProfile) -> None:
    env = gymnasium.make("specgym/Thresholds-v0", profile=profile, render_mode="ansi")
    observation, info = env.reset(seed=0)
    assert info["workload"] == "tiny/prose"
    assert env.observation_space.contains(observation)
    env.step(STILL)
    assert "tiny/prose" in str(env.render())
    assert env.spec is not None
    json.loads(gymnasium.spec("specgym/Thresholds-v0").to_json())
