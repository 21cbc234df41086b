"""The tuning environments that replay recorded outcomes: alone, many at once, and beside the live one."""

from __future__ import annotations

import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from specgym.decoding import Pair
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs import TokenPrompts, TuningEnv, Workload
from specgym.envs.recordings import find
from specgym.envs.recordings.outcome_recorder import OutcomeSettings, record_outcomes
from specgym.envs.recordings.outcomes import OutcomeError
from tests.helpers.recorded_outcomes import TOKENS, Recorded, lengths_alone

LIMITS = {
    "lookahead": ([1, 2, 0], [16, 6, 16]),
    "medusa": ([0, 0], [5, 64]),
    "medusa-typical": ([0, 0, 0, 0], [5, 64, 1, 2]),
    "draft-tree": ([1, 0, 0, 0], [8, 8, 64, 0.3]),
}
"""Low and high ends of what is observed, by decoder."""


def test_passes_both_checkers_without_a_warning(recorded: Recorded) -> None:
    env = recorded.single()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        check_env_sb3(env.unwrapped)


def test_live_and_replayed_have_the_same_spaces_and_infos(recorded: Recorded) -> None:
    live, replayed = recorded.live(), recorded.single()
    space = replayed.observation_space
    assert space == live.observation_space
    assert replayed.action_space == live.action_space
    assert isinstance(space, gymnasium.spaces.Box)
    assert np.stack([space.low, space.high]) == pytest.approx(np.array(LIMITS[recorded.decoder]))
    infos = []
    for env in (replayed, live):
        env.reset(seed=0, options={"knobs": recorded.middle})
        infos.append(env.step(recorded.still())[4])
    assert list(infos[0]) == list(infos[1])
    for info in infos:
        assert info["tokens"] == TOKENS
        assert info["reward/range"] == 0
        assert (info["divergence"] == 0) == recorded.lossless
        assert {name: info[f"knobs/{name}"] for name in recorded.names} == recorded.middle


def test_recorded_settings_cost_what_they_cost_live(recorded: Recorded) -> None:
    decoder = recorded.build(recorded.workload.load())
    prompts = recorded.workload.prompt_ids()
    env = recorded.single(prompts_per_step=len(prompts))  # each once
    for number, setting in enumerate(recorded.outcomes.settings):
        knobs = dict(zip(recorded.names, setting.tolist(), strict=True))
        env.reset(seed=0, options={"knobs": knobs})
        seconds = 0.0
        for place, prompt in enumerate(prompts):
            text = decoder.generate(
                prompt,
                max_new_tokens=TOKENS,
                sampling=recorded.workload.sampling,
                seed=int(np.random.SeedSequence((0, number, place)).generate_state(1)[0]),  # as it was recorded
                knobs=knobs,
            )
            seconds += recorded.profile.charge(text.rounds)
        assert env.step(recorded.still())[4]["speedup"] == pytest.approx(0.010 * 64 / seconds), knobs


def test_one_environment_and_many_agree_in_distribution(recorded: Recorded) -> None:
    many = recorded.many(2000)
    many.reset(seed=0, options={"knobs": recorded.middle})
    together = many.step(recorded.still(2000))[4]
    env = recorded.single()
    alone = []
    for number in range(400):
        env.reset(seed=number, options={"knobs": recorded.middle})
        alone.append(env.step(recorded.still())[4]["seconds"])
    assert np.mean(alone) == pytest.approx(together["seconds"].mean(), rel=0.03)
    assert np.std(alone) == pytest.approx(together["seconds"].std(), rel=0.2)
    assert {round(value, 9) for value in alone} <= {round(value, 9) for value in together["seconds"].tolist()}


def test_one_environment_of_many_steps_as_one_alone(recorded: Recorded) -> None:
    single, many = recorded.single(), recorded.many(1)
    observation, _ = single.reset(seed=5)
    assert many.reset(seed=5)[0][0].tolist() == observation.tolist()
    single.action_space.seed(0)
    for _ in range(8):
        action = single.action_space.sample()
        ours, theirs = single.step(action), many.step(action[None])
        assert theirs[1][0] == pytest.approx(ours[1])
        assert theirs[4]["seconds"][0] == pytest.approx(ours[4]["seconds"])


def test_a_seed_fixes_everything(recorded: Recorded) -> None:
    def rollout(seed: int) -> list[float]:
        env = recorded.single()
        env.reset(seed=seed)
        return [float(env.step(recorded.still())[1]) for _ in range(6)]

    assert rollout(1) == rollout(1)
    assert rollout(1) != rollout(2)


def test_no_model_is_loaded(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "load", lambda self: pytest.fail("a pair was loaded"))
    env = recorded.single(workload=recorded.workload)
    env.reset(seed=0)
    env.step(recorded.still())


def test_outcomes_may_be_a_file_and_may_replay_what_a_trace_replays(
    lookahead: Recorded, pair: Pair, profile: LatencyProfile, tmp_path: Path
) -> None:
    work = Workload(pair, TokenPrompts([[1, 2, 3], [4, 5]], [[11]]))
    settings = OutcomeSettings("speculative", prompts=2, tokens=8, draft_length=4)
    with lengths_alone():
        record_outcomes(work, "train", tmp_path / "earlier.npz", settings)
    with pytest.raises(OutcomeError, match=r"have other knobs than the decoder \(stop_threshold\); record them again"):
        lookahead.single(decoder="speculative", recording=tmp_path / "earlier.npz", max_new_tokens=8, profile=profile)
    record_outcomes(work, "train", tmp_path / "toy.npz", settings)
    changes = {"recording": str(tmp_path / "toy.npz"), "max_new_tokens": 8, "max_draft_length": 4, "profile": profile}
    env = lookahead.single(decoder="speculative", **changes).unwrapped
    assert isinstance(env, TuningEnv)
    assert (env.workload.name, env.workload.split) == ("toy/ids", "train")
    env.reset(seed=0)
    assert env.step(np.zeros(2, np.float32))[4]["tokens"] == 8


def test_shipped_outcomes_are_found_by_workload_decoder_and_split(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "OUTCOMES", tmp_path)
    (tmp_path / "toy_ids.another.train.npz").touch()
    work, name = recorded.workload, recorded.decoder
    message = rf"no {name} outcomes of {work.name} \(train prompts\).*shipped: none.*--decoder {name}"
    with pytest.raises(ValueError, match=message):
        recorded.single(recording=None, workload=work)
    stem = f"{work.name.replace('/', '_')}.{name}.train"
    recorded.outcomes.save(tmp_path / f"{stem}.npz")
    assert recorded.single(recording=None, workload=work).reset(seed=0)[1]["workload"] == work.name
    with pytest.raises(ValueError, match=rf"\(test prompts\).*\(shipped: {stem}\)"):
        recorded.single(recording=None, workload=work, split="test")
