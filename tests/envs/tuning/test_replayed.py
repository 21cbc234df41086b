"""The tuning environment with `backend="replay"`, and where its traces come from."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from specgym.decoding import Pair, Sampling, SpeculativeDecoder
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs import TuningEnv, Workload
from specgym.envs.backends.trace_replay import TraceReplay
from specgym.envs.recordings import find
from specgym.envs.recordings.archive import TraceError
from specgym.envs.recordings.trace import Trace
from tests.helpers.rollouts import STILL, rollout

MakeEnv = Callable[..., gymnasium.Env]


@pytest.mark.parametrize("start", ["random", "default"])
@pytest.mark.parametrize("decoder", ["threshold", "speculative"])
def test_passes_both_checkers_without_a_warning(make_single: MakeEnv, decoder: str, start: str) -> None:
    env = make_single(decoder=decoder, start=start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        check_env_sb3(env.unwrapped)


def test_spaces_and_info_are_those_of_the_live_environment(make_single: MakeEnv, make_env: MakeEnv) -> None:
    for decoder in ("threshold", "speculative"):
        replayed, live = make_single(decoder=decoder), make_env(decoder=decoder)
        assert replayed.observation_space == live.observation_space
        assert replayed.action_space == live.action_space
        for ours, theirs in zip(rollout(replayed, seed=1), rollout(live, seed=1), strict=True):
            assert [type(part) for part in ours] == [type(part) for part in theirs]
            assert list(ours[-1]) == list(theirs[-1])
            assert [type(value) for value in ours[-1].values()] == [type(value) for value in theirs[-1].values()]
            assert ours[0] == theirs[0]  # the same knobs, from the same seed


def test_exact_greedy_steps_are_those_of_the_live_environment(make_single: MakeEnv, make_env: MakeEnv) -> None:
    replayed, live = (make(decoder="speculative", start="default") for make in (make_single, make_env))
    for prompt in range(4):
        for env in (replayed, live):
            env.reset(seed=0, options={"prompt": prompt, "knobs": {"draft_length": 1 + prompt}})
        for action in (0.0, 0.7, -1.0):
            ours, theirs = (env.step(np.array([action, 0.0], np.float32)) for env in (replayed, live))
            assert ours[1] == pytest.approx(theirs[1])
            assert ours[4] == {
                name: value if isinstance(value, str) else pytest.approx(value) for name, value in theirs[4].items()
            }


def test_recorded_thresholds_cost_what_they_cost_live(
    make_single: MakeEnv, make_env: MakeEnv, toy_trace: Trace, profile: LatencyProfile
) -> None:
    charged = replace(profile, chances=toy_trace.chances)
    replayed, live = (make(max_new_tokens=12, profile=charged) for make in (make_single, make_env))
    same = 0
    for prompt in range(3):
        for fallback, rollback in toy_trace.detour_knobs[toy_trace.detour_prompts == prompt]:
            knobs = {"fallback": float(fallback), "rollback": float(rollback)}
            infos = []
            for env in (replayed, live):
                env.reset(seed=0, options={"prompt": prompt, "knobs": knobs})
                infos.append(env.step(STILL)[4])
            same += infos[0] == {
                name: value if isinstance(value, str) else pytest.approx(value, rel=0.01, abs=1e-9)
                for name, value in infos[1].items()
            }
    assert same >= 22  # of 24; the others may have a distance that the file's rounding moved across the threshold


def test_a_seed_fixes_everything(make_single: MakeEnv) -> None:
    env = make_single()
    first = rollout(env, seed=7)
    assert rollout(env, seed=7) == first  # the second time after other episodes
    assert rollout(make_single(), seed=7) == first
    assert rollout(env, seed=8) != first


def test_prompts_with_detours_come_before_any_comes_again(
    make_single: MakeEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = TraceReplay.decode

    def spy(self: Any, prompts: Any, *others: Any) -> Any:
        seen.extend(prompts.tolist())
        return real(self, prompts, *others)

    monkeypatch.setattr(TraceReplay, "decode", spy)
    for decoder, known in (("threshold", [0, 1, 2]), ("speculative", [0, 1, 2, 3])):
        env = make_single(decoder=decoder)
        env.reset(seed=0)
        for _ in range(2 * len(known)):
            env.step(np.zeros(env.action_space.shape or (), np.float32))
        assert sorted(seen[: len(known)]) == known
        assert sorted(seen[len(known) :]) == known
        seen.clear()


def test_no_model_is_loaded(make_single: MakeEnv, toy_workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "load", lambda self: pytest.fail("a pair was loaded"))
    env = make_single(workload=toy_workload)
    env.reset(seed=0)
    env.step(STILL)


def test_without_a_profile_the_pairs_own_is_measured(make_single: MakeEnv, toy_workload: Workload) -> None:
    env = make_single(workload=toy_workload, profile=None).unwrapped
    assert isinstance(env, TuningEnv)
    assert env.profile.pair == "toy"


def test_time_is_charged_at_the_operating_point(make_single: MakeEnv, profile: LatencyProfile) -> None:
    small = replace(profile, context=32)
    big = replace(small, batch_size=8, draft_seconds={0: 0.0, 1: 0.003}, autoregressive_seconds=0.02)
    env = make_single(profile=replace(small, points=(big,)), batch_size=8, decoder="speculative")
    env.reset(seed=0)
    info = env.step(np.zeros(2, np.float32))[4]
    seconds = 0.010 * info["rounds"] + 0.004 * info["drafted"]
    assert info["seconds"] == pytest.approx(seconds)
    assert info["speedup"] == pytest.approx(0.02 * info["tokens"] / seconds)


def test_the_workload_is_by_default_the_traces_own(make_single: MakeEnv, toy_workload: Workload) -> None:
    env = make_single().unwrapped
    assert isinstance(env, TuningEnv)
    assert (env.workload.name, env.workload.split, env.workload.sampling) == ("toy/ids", "train", Sampling(0.0))
    assert env.reset(seed=0)[1]["workload"] == "toy/ids"


def test_there_is_no_decoder_to_show(make_single: MakeEnv) -> None:
    with pytest.raises(AttributeError, match="a replayed environment has no decoder"):
        make_single().unwrapped.decoder  # type: ignore[attr-defined]  # noqa: B018


def test_a_pickled_environment_comes_back_with_its_arguments(make_single: MakeEnv) -> None:
    env = make_single(scales={"fallback": 0.3}).unwrapped
    again = pickle.loads(pickle.dumps(env))
    assert rollout(again, seed=3) == rollout(env, seed=3)


def test_rendering_shows_knobs_and_metrics(make_single: MakeEnv) -> None:
    env = make_single(render_mode="ansi")
    env.reset(seed=0)
    assert "nothing decoded yet" in str(env.render())
    env.step(STILL)
    shown = str(env.render())
    assert "replayed" in shown
    assert "speedup=" in shown
    env.reset()
    assert "nothing decoded yet" in str(env.render())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timing": "wall"}, "timing='wall' needs backend='live'"),
        ({"decoder": "beam"}, "replays the decoders threshold, speculative, pipelined by name, not 'beam'"),
        ({"decoder": SpeculativeDecoder}, "replays the decoders threshold, speculative, pipelined by name"),
        ({"max_draft_length": 3}, r"max_draft_length is 3, and the trace of toy/ids \(train\) has drafts of 4 tokens"),
        (
            {"max_draft_length": 5, "decoder": "speculative"},
            "give max_draft_length=4, or record others: .*--draft-length 5",
        ),
        ({"max_draft_length": 0, "decoder": "speculative"}, "max_draft_length must be a whole number of at least 1"),
        ({"max_new_tokens": 13}, "has texts of 12 tokens; .*--detour-tokens 13"),
        ({"max_new_tokens": 21, "decoder": "speculative"}, "has texts of 20 tokens; .*--tokens 21"),
        ({"split": "test"}, "has the train prompts of toy/ids, not the test prompts"),
        ({"workload": "tiny/code"}, "recorded from toy/ids, and the workload asked for is tiny/code"),
        ({"recording": "nowhere.npz"}, "there is no trace .*nowhere.npz"),
        ({"batch_size": 8}, "covers batch size 1"),
    ],
)
def test_bad_arguments_are_refused(make_single: MakeEnv, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_single(**arguments)


def test_exact_decoding_takes_shorter_drafts_than_recorded(make_single: MakeEnv) -> None:
    env = make_single(decoder="speculative", max_draft_length=3, max_new_tokens=20)
    env.reset(seed=0, options={"knobs": {"draft_length": 3}})
    info = env.step(np.zeros(2, np.float32))[4]
    assert info["drafted"] <= 3 * info["rounds"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (3, r"prompt=3: the recording of toy/ids can replay the train prompts 0, 1, 2"),
        (-1, "can replay the train prompts"),
        ([1, 2], "backend='replay' takes an index, not a list"),
        ("seek", "takes an index, not a str; decode others with backend='live'"),
    ],
)
def test_bad_prompts_are_refused(make_single: MakeEnv, prompt: int | str | Sequence[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_single().reset(seed=0, options={"prompt": prompt})


# Where traces come from.


def test_a_shipped_trace_is_found_by_workload_and_split(
    make_single: MakeEnv, toy_trace: Trace, toy_workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "TRACES", tmp_path)
    with pytest.raises(TraceError, match=r"no trace of toy/ids \(train prompts\).*\(shipped: none\); record one with"):
        make_single(recording=None, workload=toy_workload)
    toy_trace.save(tmp_path / "toy_ids.train.npz")
    with pytest.raises(TraceError, match=r"no trace of toy/ids \(test prompts\).*\(shipped: toy_ids.train\)"):
        make_single(recording=None, workload=toy_workload, split="test")
    env = make_single(recording=None, workload=toy_workload)
    assert rollout(env, seed=1) == rollout(make_single(), seed=1)


def test_a_trace_may_be_a_file(make_single: MakeEnv, toy_trace: Trace, tmp_path: Path) -> None:
    toy_trace.save(tmp_path / "trace.npz")
    assert rollout(make_single(recording=str(tmp_path / "trace.npz")), seed=1) == rollout(make_single(), seed=1)


def test_the_workload_of_a_foreign_trace_has_its_parts(toy_trace: Trace) -> None:
    info = replace(toy_trace.info, workload="some/model+other/model/news@0.7", temperature=0.7)
    result = find.find_trace(replace(toy_trace, info=info), None)[1]
    assert (result.pair, result.prompts) == ("some/model+other/model", "news")
    assert (result.name, result.sampling.temperature) == (info.workload, 0.7)


def test_the_spec_of_a_replayed_environment_survives_json() -> None:
    spec = gymnasium.spec("specgym/Thresholds-v0")
    again = gymnasium.envs.registration.EnvSpec.from_json(spec.to_json())
    assert again == spec
    assert "vector_env" in json.loads(spec.to_json())["vector_entry_point"]


def test_pairs_in_memory_replay_under_their_own_name(make_single: MakeEnv, toy_workload: Workload, pair: Pair) -> None:
    env = make_single(workload=toy_workload).unwrapped
    assert isinstance(env, TuningEnv)
    assert env.workload.load() is pair
