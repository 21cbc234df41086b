"""Control of the draft length for many texts at once: workloads, prompts, seeds, rates and totals."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs import Workload
from specgym.envs.control.vector_env import DraftLengthVectorEnv
from specgym.envs.recordings.trace import Trace
from tests.helpers.drafted_together import CODE, COUNTS, PROSE, SAMPLED, TOKENS, K, actions_of, make, random_trace


def test_environments_are_spread_evenly_over_workloads_and_batch_sizes(
    traces: dict[str, Trace], profile: LatencyProfile
) -> None:
    env = make(traces, profile, num_envs=8, batch_size=[1, 8])
    assert env.workload_names == (PROSE, CODE)
    assert [tuple(point) for point in env.points] == [(PROSE, 1), (PROSE, 8), (CODE, 1), (CODE, 8)]
    assert np.bincount(env.point_of).tolist() == [2, 2, 2, 2]
    assert all(
        env.points[point].workload == env.workload_names[number]
        for point, number in zip(env.point_of, env.workload_of, strict=True)
    )
    observations, _ = env.reset(seed=0)
    assert observations[:, 7].tolist() == [{1: 0.0, 8: 3.0}[env.points[point].batch_size] for point in env.point_of]


def test_all_prompts_of_a_workload_come_before_any_comes_again(
    traces: dict[str, Trace], profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make(traces, profile, num_envs=2)
    begun: dict[int, list[int]] = {0: [], 1: []}
    real = env._drafts.begin

    def spy(which: Any, workloads: Any, prompts: Any, rng: Any) -> None:
        for number, prompt in zip(which.tolist(), prompts.tolist(), strict=True):
            begun[number].append(prompt)
        real(which, workloads, prompts, rng)

    monkeypatch.setattr(env._drafts, "begin", spy)
    env.reset(seed=3)
    draws = np.random.default_rng(0)
    while len(begun[0]) < 10 or len(begun[1]) < 6:
        env.step(actions_of(draws, 2))
    assert sorted(begun[0][:5]) == sorted(begun[0][5:10]) == [0, 1, 2, 3, 4]
    assert sorted(begun[1][:3]) == sorted(begun[1][3:6]) == [0, 1, 2]


def test_a_seed_fixes_everything(profile: LatencyProfile) -> None:
    traces = {PROSE: random_trace(PROSE, 5, seed=1), SAMPLED: random_trace(SAMPLED, 5, seed=2)}

    def rollout(env: DraftLengthVectorEnv, seed: int) -> list[Any]:
        draws = np.random.default_rng(0)
        observations, infos = env.reset(seed=seed)
        seen = [observations.tolist(), infos["remaining_acceptable"].tolist()]
        for _ in range(30):
            observations, rewards, *_, infos = env.step(actions_of(draws, 6))
            seen += [observations.tolist(), rewards.tolist(), *(infos[name].tolist() for name in COUNTS)]
        return seen

    env = make(traces, profile)
    first = rollout(env, 7)
    assert rollout(env, 7) == first
    assert rollout(pickle.loads(pickle.dumps(env)), 7) == first
    assert rollout(env, 8) != first


def test_arrays_that_were_handed_out_do_not_change_any_more(traces: dict[str, Trace], profile: LatencyProfile) -> None:
    env = make(traces, profile)
    draws = np.random.default_rng(0)
    kept, copies = [], []
    results: list[Any] = [env.reset(seed=0)]
    results += [env.step(actions_of(draws, 6)) for _ in range(4)]
    for result in results:
        arrays = [part for part in result if isinstance(part, np.ndarray)] + [result[-1][name] for name in COUNTS]
        kept += arrays
        copies += [array.copy() for array in arrays]
        env.step(actions_of(draws, 6))
    assert all(np.array_equal(array, copy) for array, copy in zip(kept, copies, strict=True))
    assert len({id(array) for array in kept}) == len(kept)


def test_totals_are_sums_since_the_last_call_in_units_of_plain_decoding(
    traces: dict[str, Trace], profile: LatencyProfile
) -> None:
    env = make(traces, profile, num_envs=9, batch_size=[1, 8])
    env.reset(seed=0)
    draws = np.random.default_rng(0)
    env.step(actions_of(draws, 9))
    env.totals()
    sums = {name: np.zeros(4) for name in COUNTS}
    for _ in range(25):
        *_, infos = env.step(actions_of(draws, 9))
        for name in COUNTS:
            np.add.at(sums[name], env.point_of, infos[name])
    totals = env.totals()
    for name in ("tokens", "drafted", "accepted", "rounds"):
        assert getattr(totals, name).tolist() == sums[name].tolist()
    assert totals.seconds == pytest.approx(sums["seconds"] / [0.010, 0.020, 0.010, 0.020])
    assert totals.throughput == pytest.approx(totals.tokens / totals.seconds)
    assert not any(part.any() for part in env.totals())
    assert env.totals().throughput.tolist() == [0.0] * 4


def test_rates_are_set_by_workload_or_by_operating_point(traces: dict[str, Trace], profile: LatencyProfile) -> None:
    env = make(traces, profile, num_envs=4, batch_size=[1, 8], rate=1.1)
    assert env.rates.tolist() == [1.1] * 4
    env.set_rates({CODE: 2.0})
    assert env.rates.tolist() == [1.1, 1.1, 2.0, 2.0]
    env.set_rates([1.0, 2.0, 3.0, 4.0])
    env.reset(seed=0)
    _, rewards, _, _, infos = env.step(np.ones(4, np.int64))
    assert rewards == pytest.approx(infos["tokens"] - env.rates * infos["seconds"] / [0.010, 0.020, 0.010, 0.020])
    env.set_rates(1.5)
    assert env.rates.tolist() == [1.5] * 4


def test_chosen_prompts_are_decoded_once(traces: dict[str, Trace], profile: LatencyProfile) -> None:
    env = make(traces, profile, num_envs=10)
    prompts = np.array([0, 0, 1, 1, 2, 2, 3, -1, 4, -1])  # in turns of the first and the second workload
    env.reset(seed=0, options={"prompt": prompts})
    assert np.flatnonzero(env.resting).tolist() == [7, 9]
    ended = np.zeros(10, np.int64)
    draws = np.random.default_rng(0)
    for _ in range(100):
        _, rewards, terminated, truncated, infos = env.step(actions_of(draws, 10))
        assert not truncated.any()
        assert not rewards[ended > 0].any()
        assert not infos["seconds"][ended > 0].any()
        ended += terminated
    assert env.resting.all()
    assert ended.tolist() == [1] * 7 + [0, 1, 0]
    lengths = [np.diff(traces[name].starts).sum() for name in (PROSE, CODE)]
    assert env.totals().tokens.tolist() == lengths
    env.reset(seed=0)
    assert not env.resting.any()


def test_a_time_limit_cuts_texts_in_the_middle(profile: LatencyProfile) -> None:
    trace = random_trace(PROSE, 3, seed=1, ending=0.0, drafted=K)
    long, cut = (make(trace, profile, num_envs=2, max_episode_steps=limit) for limit in (None, 3))
    long.reset(seed=0, options={"prompt": np.array([0, 1])})
    cut.reset(seed=0, options={"prompt": np.array([0, 1])})
    for step in (1, 2, 3):
        expected = long.step(np.zeros(2, np.int64))
        outcome = cut.step(np.zeros(2, np.int64))
        assert not expected[2].any()
        assert outcome[3].tolist() == [step == 3] * 2
    assert [list(row) for row in outcome[4]["final_obs"]] == expected[0].tolist()
    assert cut.resting.all()
    cut.reset(seed=0)
    flags = [cut.step(np.ones(2, np.int64))[3].tolist() for _ in range(6)]
    assert flags == [[False] * 2, [False] * 2, [True] * 2] * 2


def test_is_made_by_its_id(traces: dict[str, Trace], profile: LatencyProfile, tmp_path: Path) -> None:
    traces[PROSE].save(tmp_path / "trace.npz")
    profile.save(tmp_path / "profile.json")
    env = gymnasium.make_vec(
        "specgym/DraftLength-v0",
        num_envs=3,
        vectorization_mode="vector_entry_point",
        backend="replay",
        workload=PROSE,
        recording=str(tmp_path / "trace.npz"),
        profile=str(tmp_path / "profile.json"),
        max_draft_length=K,
        max_new_tokens=TOKENS,
    )
    assert isinstance(env, DraftLengthVectorEnv)
    observations, _ = env.reset(seed=0)
    assert observations in env.observation_space
    assert env.step(env.action_space.sample())[0] in env.observation_space


def test_no_model_is_loaded_where_there_is_a_profile(
    traces: dict[str, Trace], profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Workload) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Workload, "load", refuse)
    env = make(list(traces.values()), {PROSE: profile, CODE: profile}, workload=[PROSE, CODE])
    env.reset(seed=0)
    env.step(np.ones(6, np.int64))
