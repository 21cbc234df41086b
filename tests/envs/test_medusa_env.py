"""The tuning environment of Medusa decoding, exact and typical: live, and replayed by the outcomes of a toy target."""

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

from random_medusa_heads import random_heads
from specgym.decoding import Pair
from specgym.decoding.digests import heads_digest
from specgym.decoding.latency import LatencyProfile, LatencyProfileError
from specgym.decoding.medusa import (
    MedusaDecoder,
    MedusaHeads,
    MedusaHeadsError,
    load_heads,
    save_heads,
)
from specgym.decoding.sampling import Sampling
from specgym.envs import RewardSettings, TokenPrompts, Workload, profiles, record, shipped_outcomes
from specgym.envs import record_outcomes as record_outcomes_module
from specgym.envs.archives import TraceError
from specgym.envs.outcomes import Outcomes, RecordedKnob
from specgym.envs.record_outcomes import OutcomeSettings, record_outcomes
from specgym.envs.vector_tuning import TuningVectorEnv

MakeEnv = Callable[..., gymnasium.Env]
STILL = np.zeros(2, np.float32)
NAMES = ("medusa", "medusa-typical")


@pytest.fixture(scope="module")
def outcomes(alone_work: Workload, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    settings = OutcomeSettings("medusa", settings=16, prompts=4, tokens=16)
    return record_outcomes(alone_work, "train", tmp_path_factory.mktemp("medusa") / "toy.npz", settings)


@pytest.fixture(scope="module")
def typical(alone: Pair, alone_work: Workload, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of sampled texts, which typical acceptance changes."""
    sampled = Workload(alone, alone_work.prompts, Sampling(1.0))
    settings = OutcomeSettings("medusa-typical", settings=16, prompts=4, tokens=16)
    return record_outcomes(sampled, "train", tmp_path_factory.mktemp("typical") / "toy.npz", settings)


@pytest.fixture
def make(outcomes: Outcomes, cheap_heads: LatencyProfile) -> MakeEnv:
    def make(**changes: Any) -> gymnasium.Env:
        usual = {"backend": "replay", "trace": outcomes, "profile": cheap_heads, "tokens_per_step": 16}
        return gymnasium.make("specgym/Medusa-v0", **{**usual, **changes})

    return make


@pytest.fixture
def make_many(outcomes: Outcomes, cheap_heads: LatencyProfile) -> Callable[..., TuningVectorEnv]:
    def make(num_envs: int, **changes: Any) -> TuningVectorEnv:
        usual = {"trace": outcomes, "profile": cheap_heads, "tokens_per_step": 16}
        env = gymnasium.make_vec("specgym/Medusa-v0", num_envs=num_envs, **{**usual, **changes})
        assert isinstance(env, TuningVectorEnv)
        return env

    return make


def judging(typical: Outcomes, cheap_heads: LatencyProfile) -> dict[str, Any]:
    """What environments of typical acceptance are told otherwise."""
    profile = replace(cheap_heads, rounds="medusa-typical", sampling="sampled")
    return {"decoder": "medusa-typical", "trace": typical, "profile": profile}


@pytest.mark.parametrize("name", NAMES)
def test_passes_both_checkers_without_a_warning(
    make: MakeEnv, typical: Outcomes, cheap_heads: LatencyProfile, name: str
) -> None:
    env = make(**(judging(typical, cheap_heads) if name == "medusa-typical" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        check_env_sb3(env.unwrapped)


def test_live_and_replayed_have_the_same_spaces_and_infos(
    make: MakeEnv, alone_work: Workload, cheap_heads: LatencyProfile
) -> None:
    live = gymnasium.make("specgym/Medusa-v0", workload=alone_work, profile=cheap_heads, tokens_per_step=16)
    replayed = make()
    assert replayed.observation_space == live.observation_space
    assert replayed.action_space == live.action_space
    space = replayed.observation_space
    assert isinstance(space, gymnasium.spaces.Box)
    assert (space.low.tolist(), space.high.tolist()) == ([0, 0], [5, 64])
    infos = []
    for env in (replayed, live):
        env.reset(seed=0, options={"knobs": {"heads": 5, "tree_size": 16}})
        infos.append(env.step(STILL)[4])
    assert list(infos[0]) == list(infos[1])
    assert infos[0]["tokens"] == infos[1]["tokens"] == 16
    assert infos[0]["divergence"] == infos[1]["divergence"] == 0


def test_recorded_settings_cost_on_average_what_they_cost_live(
    make: MakeEnv, outcomes: Outcomes, alone_work: Workload, cheap_heads: LatencyProfile
) -> None:
    decoder = MedusaDecoder(alone_work.load())
    replayed, live = [], []
    env = make(prompts_per_step=400)
    for setting in outcomes.settings[:4]:
        knobs = dict(zip(("heads", "tree_size"), setting.tolist(), strict=True))
        env.reset(seed=0, options={"knobs": knobs})
        replayed.append(env.step(STILL)[4]["speedup"])
        texts = [decoder.generate(prompt, max_new_tokens=16, seed=0, knobs=knobs) for prompt in alone_work.prompt_ids()]
        live.append(0.010 * 64 / sum(cheap_heads.charge(text.rounds) for text in texts))

    assert replayed == pytest.approx(live, rel=0.03)


def test_many_replayed_together_step_as_one_alone(make: MakeEnv, make_many: Callable[..., TuningVectorEnv]) -> None:
    one, many = make(), make_many(1)
    observation, _ = one.reset(seed=5)
    assert many.reset(seed=5)[0][0].tolist() == observation.tolist()
    one.action_space.seed(0)
    for _ in range(8):
        action = one.action_space.sample()
        ours, theirs = one.step(action), many.step(action[None])
        assert theirs[1][0] == pytest.approx(ours[1])
        assert theirs[4]["seconds"][0] == pytest.approx(ours[4]["seconds"])


def test_nothing_is_gained_by_candidates_that_no_head_proposes(outcomes: Outcomes) -> None:
    corners = {(0.0, 64.0), (5.0, 0.0), (0.0, 0.0)}
    assert corners <= set(map(tuple, outcomes.settings.tolist()))
    for number, setting in enumerate(outcomes.settings.tolist()):
        first, last = outcomes.starts[number * 4], outcomes.starts[(number + 1) * 4]
        if tuple(setting) in corners:
            assert set(outcomes.target_tokens[first:last]) == {1}
            assert set(outcomes.draft_steps[first:last]) == {0}
    assert outcomes.accepted.sum() > 0
    assert outcomes.draft_steps.max() > 1
    assert not outcomes.divergence.any()


def test_typical_acceptance_is_recorded_with_its_divergence_and_kept_below_a_bound(
    make: MakeEnv,
    make_many: Callable[..., TuningVectorEnv],
    typical: Outcomes,
    cheap_heads: LatencyProfile,
    tmp_path: Path,
) -> None:
    typical.save(tmp_path / "again.npz")
    again = Outcomes.load(tmp_path / "again.npz")
    assert again.divergence.tolist() == typical.divergence.tolist()
    loose = {"heads": 5.0, "tree_size": 60.0, "epsilon": 0.0, "delta": 0.0}  # all that can be accepted is
    strict = {"heads": 5.0, "tree_size": 60.0, "epsilon": 1.0, "delta": 2.0}
    changes = {**judging(typical, cheap_heads), "reward": RewardSettings(max_divergence=0.01)}
    many = make_many(400, **changes)
    found = {}
    for name, knobs in (("loose", loose), ("strict", strict)):
        many.reset(seed=0, options={"knobs": knobs})
        found[name] = many.step(np.zeros((400, 4), np.float32))[4]
    divergence = found["loose"]["divergence"]
    assert divergence.mean() > max(0.02, found["strict"]["divergence"].mean())
    assert found["loose"]["reward/divergence"] == pytest.approx(-np.maximum(divergence - 0.01, 0))
    infos = []
    for env in (make(**changes), make_many(1, **changes)):
        env.reset(seed=0, options={"knobs": loose})
        infos.append(env.step(np.zeros(env.action_space.shape, np.float32))[4])
    assert infos[0]["divergence"] > 0.02
    assert infos[0]["reward/divergence"] == pytest.approx(0.01 - infos[0]["divergence"])
    assert infos[0]["reward/divergence"] == pytest.approx(infos[1]["reward/divergence"][0])


def test_outcomes_of_one_acceptance_do_not_replay_the_other(make: MakeEnv, outcomes: Outcomes) -> None:
    with pytest.raises(ValueError, match="the decoder asked for is medusa-typical; give decoder='medusa', or record"):
        make(decoder="medusa-typical", trace=outcomes)


@pytest.mark.parametrize("count", [2, 7])
def test_a_target_with_another_number_of_heads_is_recorded_and_replayed_with_that_many(
    alone: Pair,
    alone_work: Workload,
    make: MakeEnv,
    cheap_heads: LatencyProfile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    monkeypatch.setattr(alone.target, "name", str(tmp_path / "toy"))
    save_heads(random_heads(alone.target.model, count, spread=0.2), tmp_path / "toy-medusa", alone.target)
    monkeypatch.setattr(record, "workload", lambda name: alone_work)
    record.main(
        ["toy/ids", "--decoder", "medusa-typical", "--out", str(tmp_path), "--splits", "train", "--settings", "20",
         "--prompts", "1", "--tokens", "4"]
    )  # fmt: skip
    few = Outcomes.load(tmp_path / "toy_ids.medusa-typical.train.npz")
    assert few.info.knobs[0] == RecordedKnob("heads", 0, count, True)
    assert set(few.settings[:, 0]) == set(range(count + 1))
    live = gymnasium.make("specgym/Medusa-v0", workload=alone_work, decoder="medusa-typical", profile=cheap_heads)
    replayed = make(decoder="medusa-typical", trace=few, tokens_per_step=4)
    assert replayed.unwrapped.knobs == live.unwrapped.knobs  # type: ignore[attr-defined]
    assert replayed.observation_space == live.observation_space
    replayed.reset(seed=0, options={"knobs": {"heads": count}})
    assert replayed.step(np.zeros(4, np.float32))[4]["knobs/heads"] == count


def test_parts_that_were_recorded_with_other_heads_are_not_added_to(
    alone: Pair, alone_work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone.target, "name", str(tmp_path / "toy"))
    heads, others = (random_heads(alone.target.model, 3, spread=0.2, seed=seed) for seed in (0, 1))
    save_heads(heads, tmp_path / "toy-medusa", alone.target)
    few = OutcomeSettings("medusa", settings=8, prompts=1, tokens=4)
    decoded, calls = record_outcomes_module._decoded, list[int]()

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decoded(*arguments)

    monkeypatch.setattr(record_outcomes_module, "_decoded", killed)
    with pytest.raises(KeyboardInterrupt):
        record_outcomes(alone_work, "train", tmp_path / "toy.npz", few)
    save_heads(others, tmp_path / "toy-medusa", alone.target)
    with pytest.raises(TraceError, match=r"toy\.npz\.parts holds .*\(with other heads_sha256\); remove it"):
        record_outcomes(alone_work, "train", tmp_path / "toy.npz", few)
    save_heads(heads, tmp_path / "toy-medusa", alone.target)
    again = record_outcomes(alone_work, "train", tmp_path / "toy.npz", few)
    assert again.info.heads_sha256 == heads_digest(load_heads(tmp_path / "toy-medusa", alone.target))


def test_heads_are_told_apart_by_all_that_decides_what_they_propose(alone: Pair) -> None:
    made = [
        random_heads(alone.target.model, 3, seed=seed, **more)
        for seed, more in ((0, {}), (1, {}), (0, {"vocabulary": range(9)}), (0, {"vocabulary": range(1, 10)}))
    ]
    measured_ones = random_heads(alone.target.model, 3)
    measured_ones.accuracies = ((0.5,), (0.25,), (0.125,))
    digests = [heads_digest(heads) for heads in (*made, measured_ones)]
    assert len(set(digests)) == 5
    assert heads_digest(random_heads(alone.target.model, 3)) == digests[0]


def test_what_was_not_recorded_says_how_to_record_it(
    make: MakeEnv, outcomes: Outcomes, alone_work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped_outcomes, "OUTCOMES", tmp_path)
    (tmp_path / "toy_ids.lookahead.train.npz").touch()
    with pytest.raises(ValueError, match=r"no medusa outcomes of toy/ids \(train .*shipped: none.*--decoder medusa"):
        make(trace=None, workload=alone_work)
    outcomes.save(tmp_path / "toy_ids.medusa.train.npz")
    assert make(trace=None, workload=alone_work).reset(seed=0)[1]["workload"] == "toy/ids"


def test_a_target_without_heads_is_told_how_to_train_some(pair: Pair, cheap_heads: LatencyProfile) -> None:
    work = Workload(Pair(pair.target, name="headless"), TokenPrompts([[1]], [[2]]))
    with pytest.raises(MedusaHeadsError, match=r"no Medusa heads ship for .*python -m specgym\.decoding\.fit medusa"):
        gymnasium.make("specgym/Medusa-v0", workload=work, profile=cheap_heads)


def test_the_profile_is_that_of_medusa_rounds_by_default_and_no_other_is_taken(
    alone_work: Workload,
    make: MakeEnv,
    profile: LatencyProfile,
    cheap_heads: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds: list[str] = []

    def found(pair: Pair, *, sampling: Sampling, rounds: str, heads: MedusaHeads | None) -> LatencyProfile:
        kinds.append(rounds)
        return cheap_heads

    monkeypatch.setattr(profiles, "measured", found)
    assert make(workload=alone_work, profile=None).unwrapped.profile == cheap_heads  # type: ignore[attr-defined]
    live = gymnasium.make("specgym/Medusa-v0", workload=alone_work, decoder="medusa-typical")
    assert live.unwrapped.profile == cheap_heads  # type: ignore[attr-defined]
    assert kinds == ["medusa", "medusa"]
    with pytest.raises(LatencyProfileError, match="made for chain rounds, and medusa rounds are to be charged"):
        make(profile=profile)
