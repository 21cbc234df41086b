import json
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import FlattenObservation, RecordEpisodeStatistics
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from stable_baselines3.common.env_util import make_vec_env

from specgym.decoding.autoregressive import AutoregressiveDecoder
from specgym.decoding.latency import LatencyProfile
from specgym.decoding.loading import shipped_models
from specgym.decoding.pairs import Pair
from specgym.decoding.speculative import SpeculativeDecoder
from specgym.decoding.threshold import ThresholdDecoder
from specgym.envs import (
    RewardSettings,
    TokenPrompts,
    TuningEnv,
    Workload,
    measure_setting,
    register_environments,
    sources,
)
from specgym.envs.measuring import summarise

MakeEnv = Callable[..., gymnasium.Env]
STILL = np.zeros(2, np.float32)


def rollout(env: gymnasium.Env, seed: int, steps: int = 5) -> list[Any]:
    env.action_space.seed(seed)
    seen: list[Any] = [env.reset(seed=seed)]
    seen += [env.step(env.action_space.sample()) for _ in range(steps)]
    return [[part.tolist() if isinstance(part, np.ndarray) else part for part in result] for result in seen]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every step of an environment decodes."""
    calls: list[dict[str, Any]] = []
    real = sources.decode_prompts

    def spy(decoder: Any, knobs: Any, prompts: Any, tokens: Any, sampling: Any, seed: Any) -> Any:
        calls.append({"knobs": knobs, "prompt": tuple(prompts[0]), "tokens": tokens, "seed": seed})
        return real(decoder, knobs, prompts, tokens, sampling, seed)

    monkeypatch.setattr(sources, "decode_prompts", spy)
    return calls


# What Gymnasium and Stable-Baselines3 ask of any environment.


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
    env = make_env(tokens_per_step=1)
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
    arguments = {"workload": toy_workload, "profile": profile, "draft_length": 4, "tokens_per_step": 8}
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
    arguments = {"workload": toy_workload, "profile": profile, "draft_length": 4, "tokens_per_step": 1}
    vector = make_vec_env("specgym/Thresholds-v0", n_envs=2, seed=0, env_kwargs=arguments)
    vector.reset()
    for _ in range(20):
        _, _, done, info = vector.step(np.zeros((2, 2), np.float32))
    assert done.all()
    assert info[0]["TimeLimit.truncated"]
    assert info[0]["episode"]["l"] == 20


def test_works_under_wrappers(make_env: MakeEnv) -> None:
    env = RecordEpisodeStatistics(FlattenObservation(make_env(tokens_per_step=1)))
    env.reset(seed=0)
    total = 0.0
    for _ in range(20):
        _, reward, _, _, info = env.step(STILL)
        total += float(reward)
    assert info["episode"]["r"] == pytest.approx(total)


def test_a_pickled_environment_comes_back_with_its_arguments(make_env: MakeEnv) -> None:
    env = make_env(scales={"fallback": 0.3}).unwrapped
    again = pickle.loads(pickle.dumps(env))
    assert isinstance(again, TuningEnv)
    assert again.scales == env.scales
    assert rollout(again, seed=3) == rollout(env, seed=3)


# What a step does.


def test_actions_move_knobs_by_their_scale_and_stop_at_the_range(make_env: MakeEnv) -> None:
    env = make_env(scales={"fallback": 0.2, "rollback": 0.5})
    env.reset(seed=0, options={"knobs": {"fallback": 0.5, "rollback": 2.0}})
    observation = env.step(np.array([0.5, -1.0], np.float32))[0]
    assert observation == pytest.approx([0.6, 1.5])
    for _ in range(5):
        observation = env.step(np.array([1.0, -1.0], np.float32))[0]
    assert observation == pytest.approx([0.95, 1.0])
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
    lengths = [env.step(np.array([0.3], np.float32))[4]["knobs/draft_length"] for _ in range(3)]
    assert lengths == [2.0, 3.0, 3.0]


def test_every_prompt_comes_before_any_comes_again(
    make_env: MakeEnv, toy_workload: Workload, decoded: list[dict[str, Any]]
) -> None:
    env = make_env(tokens_per_step=1)
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


def test_info_has_the_same_plain_entries_at_every_step(make_env: MakeEnv) -> None:
    seen = rollout(make_env(), seed=0)
    infos = [result[4] for result in seen[1:]]
    assert all(info.keys() == infos[0].keys() for info in infos)
    assert all(type(value) in (float, str) for info in infos for value in info.values())
    assert not any("wall" in name for name in infos[0])
    assert seen[0][1].keys() == {"workload", "knobs/fallback", "knobs/rollback"}
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
    assert env.reward_settings == RewardSettings(speed_weight=0.0)


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


# Resetting.


def test_options_set_knobs_and_leave_the_others_random(make_env: MakeEnv) -> None:
    env = make_env()
    found = [env.reset(seed=seed, options={"knobs": {"fallback": 0.25}})[0].tolist() for seed in range(3)]
    assert [fallback for fallback, _ in found] == [0.25] * 3
    assert len({rollback for _, rollback in found}) == 3


def test_knobs_may_start_at_the_decoders_defaults(make_env: MakeEnv) -> None:
    assert make_env(start="default").reset(seed=0)[0].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(("prompt", "expected"), [(1, (4, 5)), ([7, 9], (7, 9)), (np.int64(2), (6,))])
def test_options_set_the_prompt_of_the_whole_episode(
    make_env: MakeEnv, decoded: list[dict[str, Any]], prompt: Any, expected: tuple[int, ...]
) -> None:
    env = make_env(tokens_per_step=1)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knob": {}}, "unknown reset option 'knob'; there are: knobs, prompt"),
        ({"knobs": {"speed": 1}}, "there is no knob 'speed'; the decoder has: fallback, rollback"),
        ({"knobs": {"fallback": 0.99}}, "fallback must be between 0.05 and 0.95, got 0.99"),
        ({"knobs": {"rollback": math.nan}}, "rollback must be between 1 and 4, got nan"),
        ({"knobs": {"rollback": "two"}}, "rollback must be between 1 and 4, got 'two'"),
        ({"knobs": [0.5]}, "must map names to values"),
        ({"prompt": 4}, "train prompts 0 to 3"),
        ({"prompt": -1}, "train prompts 0 to 3"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [64]}, "vocabulary of 64"),
        ({"prompt": list(range(64)) * 2}, "leaves no room to generate"),
        ({"prompt": "words"}, "pair toy has no tokenizer"),
        ({"prompt": 1.5}, r"reset option prompt \(an index, token ids or a string\)"),
    ],
)
def test_bad_options_are_refused(make_env: MakeEnv, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env().reset(seed=0, options=options)


# Bad actions and arguments.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_action_that_is_not_finite_is_refused_by_knob(make_env: MakeEnv, bad: float) -> None:
    env = make_env().unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"the action for knob rollback is -?(nan|inf); actions must be finite"):
        env.step(np.array([0.0, bad], np.float32))


def test_an_action_of_another_shape_is_refused(make_env: MakeEnv) -> None:
    env = make_env().unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"an action has shape \(2,\), one number a knob, got \(3,\)"):
        env.step(np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "recorded"}, "backend must be one of 'live', 'replay', got 'recorded'"),
        ({"trace": "some.npz"}, "a trace is for backend='replay'"),
        ({"batch_size": 8}, "covers batch size 1"),
        ({"timing": "cpu"}, "timing must be one of 'profile', 'wall', got 'cpu'"),
        ({"start": "best"}, "start must be one of 'random', 'default', got 'best'"),
        ({"split": "dev"}, "split must be one of 'train', 'test', got 'dev'"),
        ({"tokens_per_step": 0}, "tokens_per_step must be a whole number of at least 1, got 0"),
        ({"tokens_per_step": 1.5}, "tokens_per_step must be a whole number"),
        ({"decoder": "beam"}, "no decoder 'beam'; there are: threshold, speculative"),
        ({"decoder": AutoregressiveDecoder}, "AutoregressiveDecoder has no knobs"),
        ({"draft_length": 0}, "draft_length must be a whole number of at least 1"),
        ({"ranges": {"fallback": (0.5, 1.5)}}, "ranges: fallback must go from low to high within 0 and 1"),
        ({"ranges": {"fallback": (0.5, 0.5)}}, "ranges: fallback must go from low to high"),
        ({"ranges": {"speed": (0, 1)}}, "ranges: there is no knob 'speed'"),
        ({"scales": {"rollback": 0.0}}, "scales: rollback must be positive and finite"),
        ({"scales": {"rollback": math.inf}}, "scales: rollback must be positive and finite"),
        ({"scales": {"speed": 1.0}}, "scales: there is no knob 'speed'"),
        ({"profile": "nowhere.json"}, "there is no latency profile nowhere.json"),
        ({"workload": "tiny/prosa"}, "Did you mean 'prose'"),
        ({"reward": {"falloff": 0.0}}, "falloff must be above 0"),
    ],
)
def test_bad_arguments_are_refused(make_env: MakeEnv, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env(**arguments)


def test_an_unknown_render_mode_is_refused(toy_workload: Workload) -> None:
    mode: Any = "video"
    with pytest.raises(ValueError, match="render_mode must be one of None, 'ansi', 'human', got 'video'"):
        TuningEnv(workload=toy_workload, render_mode=mode)


# What others may know of the environment.


def test_it_shows_its_knobs_ranges_workload_and_decoder(make_env: MakeEnv, toy_workload: Workload) -> None:
    env = make_env(split="test").unwrapped
    assert isinstance(env, TuningEnv)
    assert [knob.name for knob in env.knobs] == ["fallback", "rollback"]
    assert env.ranges == {"fallback": (0.05, 0.95), "rollback": (1.0, 4.0)}
    assert env.scales == pytest.approx({"fallback": 0.2, "rollback": 0.3})
    assert env.workload == toy_workload.with_split("test")
    assert isinstance(env.decoder, ThresholdDecoder)


def test_any_callable_may_make_the_decoder(make_env: MakeEnv) -> None:
    env = make_env(decoder=lambda pair: SpeculativeDecoder(pair, 3)).unwrapped
    assert env.observation_space.high.tolist() == [3.0]


def test_a_profile_may_be_a_file(make_env: MakeEnv, profile: LatencyProfile, tmp_path: Path) -> None:
    profile.save(tmp_path / "profile.json")
    env = make_env(profile=str(tmp_path / "profile.json")).unwrapped
    assert isinstance(env, TuningEnv)
    assert env.profile == profile


def test_without_a_profile_the_pairs_own_is_measured(make_env: MakeEnv) -> None:
    env = make_env(profile=None).unwrapped
    assert isinstance(env, TuningEnv)
    assert env.profile.pair == "toy"


# Rendering.


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


# Metrics over several prompts.


def test_metrics_are_ratios_of_sums(pair: Pair, profile: LatencyProfile) -> None:
    decoder = ThresholdDecoder(pair, 4)
    knobs = {"fallback": 0.2, "rollback": 1.0}
    whole = measure_setting(decoder, knobs, [[1, 2], [3]], 8, seed=4, profile=profile)
    parts = [measure_setting(decoder, knobs, [[1, 2]], 8, seed=4, profile=profile)]
    parts.append(measure_setting(decoder, knobs, [[3]], 8, seed=5, profile=profile))
    total = {name: sum(part[name] for part in parts) for name in ("tokens", "rounds", "drafted", "accepted", "seconds")}
    for name, value in total.items():
        assert whole[name] == pytest.approx(value)
    assert whole["draft_acceptance_rate"] == pytest.approx(total["accepted"] / total["drafted"])
    assert whole["mean_acceptance_length"] == pytest.approx(total["tokens"] / total["rounds"])
    assert whole["speedup"] == pytest.approx(0.010 * total["tokens"] / total["seconds"])


def test_plain_decoding_has_a_speedup_of_exactly_one(pair: Pair, profile: LatencyProfile) -> None:
    found = measure_setting(AutoregressiveDecoder(pair), None, [[1, 2]], 8, seed=0, profile=profile)
    assert found["speedup"] == 1.0
    assert found["mean_acceptance_length"] == 1.0


def test_measuring_nothing_is_refused(pair: Pair, profile: LatencyProfile) -> None:
    with pytest.raises(ValueError, match="give at least one prompt"):
        measure_setting(ThresholdDecoder(pair, 4), None, [], 8, profile=profile)


def test_the_environment_reports_what_measuring_reports(
    make_env: MakeEnv, decoded: list[dict[str, Any]], profile: LatencyProfile
) -> None:
    env = make_env()
    env.reset(seed=0)
    info = env.step(STILL)[4]
    call = decoded[0]
    decoder = env.unwrapped.decoder  # type: ignore[attr-defined]
    found = measure_setting(decoder, call["knobs"], [call["prompt"]], 8, seed=call["seed"], profile=profile)
    assert {name: info[name] for name in found if name in info} == {
        name: value for name, value in found.items() if "wall" not in name
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
