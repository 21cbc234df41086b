"""The tuning environment of Lookahead decoding, replayed by outcomes: alone, many at once, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from specgym.decoding import LookaheadDecoder, Pair
from specgym.decoding.latency import LatencyProfile
from specgym.envs import TokenPrompts, TuningEnv, Workload, shipped_outcomes
from specgym.envs.decoders import DECODERS, build_decoder, default_workload, rounds_of
from specgym.envs.outcomes import Outcomes
from specgym.envs.record_outcomes import OutcomeSettings, record_outcomes
from specgym.envs.traces import Trace
from specgym.envs.vector_tuning import TuningVectorEnv

MakeEnv = Callable[..., gymnasium.Env]
STILL = np.zeros(3, np.float32)


@pytest.fixture(scope="module")
def work(pair: Pair) -> Workload:
    alone = Pair(pair.target, name="toy")
    return Workload(alone, TokenPrompts([[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], [[11, 12], [13]]))


@pytest.fixture(scope="module")
def outcomes(work: Workload, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    settings = OutcomeSettings("lookahead", settings=12, prompts=4, tokens=16)
    return record_outcomes(work, "train", tmp_path_factory.mktemp("lookahead") / "toy.npz", settings)


@pytest.fixture
def cheap(profile: LatencyProfile) -> LatencyProfile:
    """Half a millisecond for each further token of a pass."""
    return replace(profile, draft_seconds={0: 0.0}, target_seconds={1: 0.010, 2: 0.0105}, rounds="lookahead")


@pytest.fixture
def make(outcomes: Outcomes, cheap: LatencyProfile) -> MakeEnv:
    def make(**changes: Any) -> gymnasium.Env:
        usual = {"backend": "replay", "trace": outcomes, "profile": cheap, "tokens_per_step": 16}
        return gymnasium.make("specgym/Lookahead-v0", **{**usual, **changes})

    return make


@pytest.fixture
def make_many(outcomes: Outcomes, cheap: LatencyProfile) -> Callable[..., TuningVectorEnv]:
    def make(num_envs: int, **changes: Any) -> TuningVectorEnv:
        usual = {"trace": outcomes, "profile": cheap, "tokens_per_step": 16}
        env = gymnasium.make_vec("specgym/Lookahead-v0", num_envs=num_envs, **{**usual, **changes})
        assert isinstance(env, TuningVectorEnv)
        return env

    return make


def test_passes_both_checkers_without_a_warning(make: MakeEnv) -> None:
    env = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        check_env_sb3(env.unwrapped)


def test_spaces_are_those_of_the_live_environment(make: MakeEnv, work: Workload, cheap: LatencyProfile) -> None:
    live = gymnasium.make("specgym/Lookahead-v0", workload=work, profile=cheap, tokens_per_step=16)
    replayed = make()
    assert replayed.observation_space == live.observation_space
    assert replayed.action_space == live.action_space
    assert replayed.observation_space.low.tolist() == [1, 2, 0]  # type: ignore[attr-defined]
    infos = []
    for env in (replayed, live):
        env.reset(seed=0, options={"knobs": {"window": 5, "ngram": 3, "guesses": 5}})
        infos.append(env.step(STILL)[4])
    assert list(infos[0]) == list(infos[1])
    assert infos[0]["tokens"] == infos[1]["tokens"] == 16
    assert infos[0]["reward/range"] == infos[0]["reward/divergence"] == 0


def test_recorded_settings_cost_what_they_cost_live(
    make: MakeEnv, outcomes: Outcomes, work: Workload, cheap: LatencyProfile
) -> None:
    decoder = LookaheadDecoder(work.load())
    env = make(prompts_per_step=4)  # each once
    for number, setting in enumerate(outcomes.settings):
        knobs = dict(zip(("window", "ngram", "guesses"), setting.tolist(), strict=True))
        env.reset(seed=0, options={"knobs": knobs})
        seconds = 0.0
        for place, prompt in enumerate(work.prompt_ids()):
            seed = int(np.random.SeedSequence((0, number, place)).generate_state(1)[0])  # as it was recorded
            seconds += cheap.charge(decoder.generate(prompt, max_new_tokens=16, seed=seed, knobs=knobs).rounds)
        assert env.step(STILL)[4]["speedup"] == pytest.approx(0.010 * 64 / seconds), knobs


def test_one_environment_and_many_agree_in_distribution(
    make: MakeEnv, make_many: Callable[..., TuningVectorEnv]
) -> None:
    knobs = {"window": 7.0, "ngram": 3.0, "guesses": 4.0}
    many = make_many(2000)
    many.reset(seed=0, options={"knobs": knobs})
    together = many.step(np.zeros((2000, 3), np.float32))[4]
    env = make()
    alone = []
    for number in range(400):
        env.reset(seed=number, options={"knobs": knobs})
        alone.append(env.step(STILL)[4]["seconds"])
    assert np.mean(alone) == pytest.approx(together["seconds"].mean(), rel=0.03)
    assert np.std(alone) == pytest.approx(together["seconds"].std(), rel=0.2)
    assert {round(value, 9) for value in alone} <= {round(value, 9) for value in together["seconds"].tolist()}


def test_one_environment_of_many_steps_as_one_alone(make: MakeEnv, make_many: Callable[..., TuningVectorEnv]) -> None:
    one, many = make(), make_many(1)
    observation, _ = one.reset(seed=5)
    assert many.reset(seed=5)[0][0].tolist() == observation.tolist()
    one.action_space.seed(0)
    for _ in range(8):
        action = one.action_space.sample()
        ours, theirs = one.step(action), many.step(action[None])
        assert theirs[1][0] == pytest.approx(ours[1])
        assert theirs[4]["seconds"][0] == pytest.approx(ours[4]["seconds"])


def test_a_seed_fixes_everything(make: MakeEnv) -> None:
    def rollout(seed: int) -> list[float]:
        env = make()
        env.reset(seed=seed)
        return [float(env.step(STILL)[1]) for _ in range(6)]

    assert rollout(1) == rollout(1)
    assert rollout(1) != rollout(2)


def test_no_model_is_loaded(make: MakeEnv, work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "load", lambda self: pytest.fail("a pair was loaded"))
    env = make(workload=work)
    env.reset(seed=0)
    env.step(STILL)


def test_outcomes_may_be_a_file_and_may_replay_what_a_trace_replays(
    make: MakeEnv, pair: Pair, profile: LatencyProfile, tmp_path: Path
) -> None:
    work = Workload(pair, TokenPrompts([[1, 2, 3], [4, 5]], [[11]]))
    settings = OutcomeSettings("speculative", prompts=2, tokens=8, draft_length=4)
    record_outcomes(work, "train", tmp_path / "toy.npz", settings)
    changes = {"trace": str(tmp_path / "toy.npz"), "tokens_per_step": 8, "draft_length": 4, "profile": profile}
    env = make(decoder="speculative", **changes).unwrapped
    assert isinstance(env, TuningEnv)
    assert (env.workload.name, env.workload.split) == ("toy/ids", "train")
    env.reset(seed=0)
    assert env.step(np.zeros(1, np.float32))[4]["tokens"] == 8


def test_shipped_outcomes_are_found_by_workload_decoder_and_split(
    make: MakeEnv, outcomes: Outcomes, work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped_outcomes, "OUTCOMES", tmp_path)
    message = r"no lookahead outcomes of toy/ids \(train prompts\).*shipped: none.*--decoder lookahead"
    with pytest.raises(ValueError, match=message):
        make(trace=None, workload=work)
    outcomes.save(tmp_path / "toy_ids.lookahead.train.npz")
    assert make(trace=None, workload=work).reset(seed=0)[1]["workload"] == "toy/ids"
    with pytest.raises(ValueError, match=r"\(test prompts\).*\(shipped: toy_ids.lookahead.train\)"):
        make(trace=None, workload=work, split="test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens_per_step": 17}, r"the lookahead outcomes of toy/ids \(train\) have texts of 16 tokens.*--tokens 17"),
        ({"decoder": "speculative"}, "the decoder asked for is speculative; give decoder='lookahead', or record"),
        ({"decoder": "beam"}, "replays the decoders threshold, speculative, lookahead, .* by name, not 'beam'"),
        ({"split": "test"}, "has the train prompts of toy/ids, not the test prompts"),
        ({"workload": "tiny-3m/code"}, "recorded from toy/ids, and the workload asked for is tiny-3m/code"),
        ({"trace": "nowhere.npz"}, "there is no file of outcomes .*nowhere.npz"),
    ],
)
def test_what_was_not_recorded_is_refused(
    make: MakeEnv, make_many: Callable[..., TuningVectorEnv], arguments: dict[str, Any], message: str
) -> None:
    for attempt in (make, lambda **changes: make_many(2, **changes)):
        with pytest.raises(ValueError, match=message):
            attempt(**arguments)


def test_ranges_beyond_what_was_recorded_are_refused(
    make: MakeEnv, make_many: Callable[..., TuningVectorEnv], outcomes: Outcomes
) -> None:
    window, *others = outcomes.info.knobs
    narrow = replace(outcomes, info=replace(outcomes.info, knobs=(replace(window, low=0, high=12), *others)))
    for attempt in (make, lambda **changes: make_many(2, **changes)):
        with pytest.raises(ValueError, match=r"window goes from 1 to 16, .* recorded from 0 to 12; give narrower"):
            attempt(trace=narrow)
        attempt(trace=narrow, ranges={"window": (2, 10)}).reset(seed=0)


def test_a_trace_is_refused_and_the_way_to_record_outcomes_is_named(
    make: MakeEnv, toy_trace: Trace, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"a trace replays the decoders threshold, speculative .*--decoder lookahead"):
        make(trace=toy_trace)
    toy_trace.save(tmp_path / "trace.npz")
    with pytest.raises(ValueError, match=r"trace\.npz is no file of outcomes of this version"):
        make(trace=tmp_path / "trace.npz")


def test_traces_and_outcomes_do_not_mix(
    make_many: Callable[..., TuningVectorEnv], toy_trace: Trace, pair: Pair, profile: LatencyProfile, tmp_path: Path
) -> None:
    work = Workload(pair, TokenPrompts([[1, 2, 3]], [[11]], name="other"))
    settings = OutcomeSettings("threshold", settings=2, prompts=1, tokens=12, draft_length=4)
    found = record_outcomes(work, "train", tmp_path / "toy.npz", settings)
    changes = {"decoder": "threshold", "profile": profile, "tokens_per_step": 8}
    with pytest.raises(ValueError, match="workloads that are replayed together need the same"):
        make_many(2, trace=[toy_trace, found], draft_length=4, **changes)
    with pytest.raises(ValueError, match=r"draft_length is 16, and .* are of 4; .*--draft-length 16"):
        make_many(2, trace=found, **changes)


def test_a_decoders_kind_of_rounds_and_workload_are_known_by_name(pair: Pair) -> None:
    for name in ("threshold", "speculative", "lookahead"):
        decoder = build_decoder(name, pair, 4)
        assert decoder.knobs == DECODERS[name].knobs(4)
        assert rounds_of(name) == rounds_of(decoder) == rounds_of(type(decoder))
    assert (rounds_of("lookahead"), rounds_of("threshold")) == ("lookahead", "chain")
    assert default_workload("lookahead") == "tiny-10m/prose"
