"""Control of the draft length for many texts at once: the same as one at a time, and its own bookkeeping."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from made_up import trace_info
from specgym.decoding.latency import LatencyProfile
from specgym.envs import Workload
from specgym.envs.draft_length import DraftLengthEnv
from specgym.envs.traces import Trace
from specgym.envs.vector_draft_length import DraftLengthVectorEnv

GO, STOP = 0, 1
K, TOKENS = 4, 12
PROSE, CODE, SAMPLED = "tiny/prose", "tiny/code", "tiny/prose@1.0"
COUNTS = ("tokens", "seconds", "drafted", "accepted", "rounds", "remaining_acceptable")


def random_trace(
    name: str, prompts: int, seed: int, tokens: int = TOKENS, ending: float = 0.4, **columns: float
) -> Trace:
    """A trace that nobody recorded: drafts of 0 to K tokens, right about two times out of three.

    Args:
        ending: about how many of the texts end early.
        columns: values for all of a column, in place of random ones.
    """
    dice = np.random.default_rng(seed)
    ended = dice.random(prompts) < ending
    lengths = np.where(ended, dice.integers(2, tokens, prompts), tokens)
    rows = int(lengths.sum())

    def column(key: str, high: float = 1.0) -> Any:
        return np.full((rows, K), columns[key]) if key in columns else high * dice.random((rows, K))

    drafted = np.full(rows, int(columns["drafted"])) if "drafted" in columns else dice.integers(0, K + 1, rows)
    temperature = float(name.partition("@")[2] or 0)
    return Trace(
        info=trace_info(workload=name, temperature=temperature, draft_length=K, tokens=tokens),
        prompt_lengths=np.full(prompts, 3),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        ended=ended,
        text=dice.integers(0, 50, rows),
        tokens=dice.integers(0, 50, (rows, K)),
        confidence=column("confidence"),
        entropy=column("entropy", 5.0),
        q=column("q"),
        p=column("p"),
        target_entropy=column("target_entropy"),
        drafted=drafted,
        match=dice.random((rows, K)) < 0.67,
        distance=column("distance"),
        jump=np.full((rows, K + 1), -1),
        detour_prompts=np.empty(0, np.int64),
        detour_knobs=np.empty((0, 2)),
        detour_rows=np.empty((0, 0), np.int64),
    )


@pytest.fixture
def traces() -> dict[str, Trace]:
    return {PROSE: random_trace(PROSE, 5, seed=1), CODE: random_trace(CODE, 3, seed=2)}


@pytest.fixture
def profile(profile: LatencyProfile) -> LatencyProfile:
    """Two batch sizes; of the larger, a pass over each further token costs 5 ms."""
    eight = replace(profile, batch_size=8, context=8, target_seconds={1: 0.02, 2: 0.025}, autoregressive_seconds=0.02)
    return replace(profile, context=8, points=(eight,))


def make(traces: Any, profile: Any, num_envs: int = 6, **changes: Any) -> DraftLengthVectorEnv:
    arguments = {"max_draft_length": K, "tokens": TOKENS, "trace": traces, "profile": profile}
    return DraftLengthVectorEnv(num_envs, **(arguments | changes))


def actions_of(dice: np.random.Generator, count: int, stopping: float = 0.4) -> Any:
    return (dice.random(count) < stopping).astype(np.int64)


# The same as one text at a time.


def test_many_texts_are_as_many_single_ones(traces: dict[str, Trace], profile: LatencyProfile) -> None:
    env = make(traces, profile, num_envs=20, batch_size=[1, 8], rate=1.4, decision_seconds=0.0003)
    prompts = np.arange(20) // 4 % np.array(env.prompt_counts)[env.workload_of]
    singles = []
    for number, point in enumerate(env.point_of):
        name, batch_size = env.points[point]
        single = DraftLengthEnv(
            name,
            "replay",
            K,
            TOKENS,
            trace=traces[name],
            profile=profile,
            batch_size=batch_size,
            rate=1.4,
            decision_seconds=0.0003,
        )
        observation, info = single.reset(seed=0, options={"prompt": int(prompts[number])})
        singles.append((single, observation, info))
    observations, infos = env.reset(seed=0, options={"prompts": prompts})
    for number, (_, observation, info) in enumerate(singles):
        assert np.array_equal(observations[number], observation)
        assert all(infos[name][number] == info[name] for name in COUNTS)
    dice = np.random.default_rng(0)
    running = np.ones(20, np.bool_)
    steps = 0
    while running.any():
        steps += 1
        actions = actions_of(dice, 20)
        observations, rewards, terminated, truncated, infos = env.step(actions)
        assert not truncated.any()
        for number, (single, *_) in enumerate(singles):
            if not running[number]:
                assert (rewards[number], terminated[number]) == (0.0, False)
                continue
            observation, reward, ended, _, info = single.step(int(actions[number]))
            assert np.array_equal(observations[number], observation)
            assert rewards[number] == reward
            assert terminated[number] == ended
            assert all(infos[name][number] == info[name] for name in COUNTS)
            if ended:
                assert np.array_equal(infos["final_obs"][number], observation)
                final = infos["final_info"]
                assert all(final[name][number] == info[name] for name in (*COUNTS, "total_tokens", "total_seconds"))
                assert final["throughput"][number] == pytest.approx(info["throughput"])
        assert np.array_equal(infos.get("_final_obs", np.zeros(20, np.bool_)), terminated)
        running &= ~terminated
        assert np.array_equal(env.resting, ~running)
    assert steps > 5


def test_a_text_that_ends_is_followed_by_another_in_the_same_step(
    traces: dict[str, Trace], profile: LatencyProfile
) -> None:
    env = make(traces, profile, num_envs=4)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    env.reset(seed=0)
    dice = np.random.default_rng(0)
    seen = 0
    tokens, seconds = np.zeros(4), np.zeros(4)
    for _ in range(60):
        observations, _, terminated, _, infos = env.step(actions_of(dice, 4))
        tokens += infos["tokens"]
        seconds += infos["seconds"]
        for number in np.flatnonzero(terminated):
            assert infos["final_info"]["total_tokens"][number] == tokens[number]
            assert infos["final_info"]["total_seconds"][number] == pytest.approx(seconds[number])
            tokens[number] = seconds[number] = 0
            assert infos["final_obs"][number][3] == 0  # place: nothing is drafted after the end
            assert infos["final_info"]["remaining_acceptable"][number] == 0
            assert infos["tokens"][number] == infos["final_info"]["tokens"][number] > 0
            assert observations[number][3] <= 1
            assert observations[number][4:6].tolist() == [0.5, 2.0]  # nothing is known of the new text
            seen += 1
        if terminated.any():
            assert all(infos["final_obs"][number] is None for number in np.flatnonzero(~terminated))
        assert (infos["remaining_acceptable"] >= -K).all()
    assert seen > 10


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
    real = env._replay.begin

    def spy(which: Any, rows: Any, generator: Any) -> None:
        for number, row in zip(which.tolist(), rows.tolist(), strict=True):
            begun[number].append(row)
        real(which, rows, generator)

    monkeypatch.setattr(env._replay, "begin", spy)
    env.reset(seed=3)
    dice = np.random.default_rng(0)
    while len(begun[0]) < 10 or len(begun[1]) < 6:
        env.step(actions_of(dice, 2))
    own = [traces[name].starts[:-1] for name in (PROSE, CODE)]
    assert sorted(begun[0][:5]) == sorted(begun[0][5:10]) == own[0].tolist()
    assert sorted(begun[1][:3]) == sorted(begun[1][3:6]) == (own[1] + traces[PROSE].starts[-1]).tolist()


def test_a_seed_fixes_everything(profile: LatencyProfile) -> None:
    traces = {PROSE: random_trace(PROSE, 5, seed=1), SAMPLED: random_trace(SAMPLED, 5, seed=2)}

    def rollout(env: DraftLengthVectorEnv, seed: int) -> list[Any]:
        dice = np.random.default_rng(0)
        observations, infos = env.reset(seed=seed)
        seen = [observations.tolist(), infos["remaining_acceptable"].tolist()]
        for _ in range(30):
            observations, rewards, *_, infos = env.step(actions_of(dice, 6))
            seen += [observations.tolist(), rewards.tolist(), *(infos[name].tolist() for name in COUNTS)]
        return seen

    env = make(traces, profile)
    first = rollout(env, 7)
    assert rollout(env, 7) == first
    assert rollout(pickle.loads(pickle.dumps(env)), 7) == first
    assert rollout(env, 8) != first


def test_arrays_that_were_handed_out_do_not_change_any_more(traces: dict[str, Trace], profile: LatencyProfile) -> None:
    env = make(traces, profile)
    dice = np.random.default_rng(0)
    kept, copies = [], []
    results: list[Any] = [env.reset(seed=0)]
    results += [env.step(actions_of(dice, 6)) for _ in range(4)]
    for result in results:
        arrays = [part for part in result if isinstance(part, np.ndarray)] + [result[-1][name] for name in COUNTS]
        kept += arrays
        copies += [array.copy() for array in arrays]
        env.step(actions_of(dice, 6))
    assert all(np.array_equal(array, copy) for array, copy in zip(kept, copies, strict=True))
    assert len({id(array) for array in kept}) == len(kept)


def test_a_token_that_the_end_of_the_text_makes_superfluous_is_not_called_acceptable(profile: LatencyProfile) -> None:
    trace = random_trace(PROSE, 8, seed=1, ending=1.0, drafted=K)
    trace = replace(trace, match=np.ones_like(trace.match))
    env = make(trace, profile, num_envs=8)
    _, infos = env.reset(seed=0, options={"prompts": np.arange(8)})
    # The target's own token, the last of the text, comes with any verification.
    assert infos["remaining_acceptable"].tolist() == np.minimum(K - 1, np.diff(trace.starts) - 2).tolist()
    for _ in range(40):
        useful = infos["remaining_acceptable"]
        *_, infos = env.step((useful <= 0).astype(np.int64))
        ends = infos["rounds"] == 1
        assert (infos["tokens"] == infos["drafted"] + 1)[ends].all()
    assert env.resting.all()


# Sampling.


@pytest.mark.parametrize(("p", "q"), [(0.3, 0.5), (0.6, 0.2), (0.2, 0.8), (0.4, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_a_sampled_token_is_accepted_with_the_chance_of_p_over_q(profile: LatencyProfile, p: float, q: float) -> None:
    trace = random_trace(SAMPLED, 40, seed=0, tokens=40, ending=0.0, p=p, q=q, drafted=K)
    env = make(trace, profile, num_envs=500, tokens=40)
    env.reset(seed=0)
    chance = min(1.0, p / q) if q else float(p > 0)
    counts = np.zeros(K + 1)
    for _ in range(100):
        *_, infos = env.step(np.zeros(500, np.int64))
        counts += np.bincount(infos["accepted"][infos["drafted"] == K], minlength=K + 1)
    rounds = counts.sum()
    assert rounds > 3000
    for length in range(1, K + 1):
        at_least, expected = counts[length:].sum() / rounds, chance**length
        # Four and a half standard errors: one seed in 100,000 would miss it.
        assert abs(at_least - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / rounds)


# Bookkeeping.


def test_totals_are_sums_since_the_last_call_in_units_of_plain_decoding(
    traces: dict[str, Trace], profile: LatencyProfile
) -> None:
    env = make(traces, profile, num_envs=9, batch_size=[1, 8])
    env.reset(seed=0)
    dice = np.random.default_rng(0)
    env.step(actions_of(dice, 9))
    env.totals()
    sums = {name: np.zeros(4) for name in COUNTS}
    for _ in range(25):
        *_, infos = env.step(actions_of(dice, 9))
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
    env.reset(seed=0, options={"prompts": prompts})
    assert np.flatnonzero(env.resting).tolist() == [7, 9]
    ended = np.zeros(10, np.int64)
    dice = np.random.default_rng(0)
    for _ in range(100):
        _, rewards, terminated, truncated, infos = env.step(actions_of(dice, 10))
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
    long.reset(seed=0, options={"prompts": np.array([0, 1])})
    cut.reset(seed=0, options={"prompts": np.array([0, 1])})
    for step in (1, 2, 3):
        expected = long.step(np.zeros(2, np.int64))
        found = cut.step(np.zeros(2, np.int64))
        assert not expected[2].any()
        assert found[3].tolist() == [step == 3] * 2
    assert [list(row) for row in found[4]["final_obs"]] == expected[0].tolist()
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
        trace=str(tmp_path / "trace.npz"),
        profile=str(tmp_path / "profile.json"),
        max_draft_length=K,
        tokens=TOKENS,
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


# Bad arguments and actions.


def test_a_step_before_the_first_reset_is_refused(traces: dict[str, Trace], profile: LatencyProfile) -> None:
    with pytest.raises(gymnasium.error.ResetNeeded, match="call reset before the first step"):
        make(traces, profile).step(np.ones(6, np.int64))


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.ones(5, np.int64), r"actions have shape \(6,\), one for each environment, got \(5,\)"),
        (np.array([0, 1, 0, 2, 0, 0]), r"an action is 0 \(go on\) or 1 \(stop\), got 2"),
        (np.array([0, 1, 0, math.nan, 0, 0]), r"an action is 0 \(go on\) or 1 \(stop\), got nan"),
    ],
)
def test_bad_actions_are_refused(traces: dict[str, Trace], profile: LatencyProfile, actions: Any, message: str) -> None:
    env = make(traces, profile)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(actions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 1}, "unknown reset option 'prompt'; there are: prompts"),
        ({"prompts": [0, 1]}, r"reset option prompts has shape \(6,\)"),
        ({"prompts": np.full(6, 0.5)}, r"reset option prompts has shape \(6,\), an index for each"),
        ({"prompts": [0, 0, 0, 3, 0, 0]}, "the trace of tiny/code has prompts 0 to 2 .*, got 3"),
        ({"prompts": [-2, 0, 0, 0, 0, 0]}, "the trace of tiny/prose has prompts 0 to 4 .*, got -2"),
    ],
)
def test_bad_options_are_refused(
    traces: dict[str, Trace], profile: LatencyProfile, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(traces, profile).reset(seed=0, options=options)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"tiny/chat": 1.0}, "there is no workload 'tiny/chat'; there are: tiny/prose, tiny/code"),
        ({CODE: -1.0}, "a rate is a throughput"),
        ([1.0, math.nan], "a rate is a throughput"),
        ([1.0, 2.0, 3.0], r"set_rates takes shape \(2,\)"),
    ],
)
def test_bad_rates_are_refused_and_change_nothing(
    traces: dict[str, Trace], profile: LatencyProfile, rates: Any, message: str
) -> None:
    env = make(traces, profile)
    with pytest.raises(ValueError, match=message):
        env.set_rates(rates)
    assert env.rates.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "live"}, "backend must be 'replay' here, got 'live'; .*vectorization_mode='sync'"),
        ({"num_envs": 1}, "num_envs must be at least 2, one for each workload with each batch size, got 1"),
        ({"max_draft_length": 5}, r"drafts of 4 tokens, and max_draft_length is 5"),
        ({"max_draft_length": 0}, "max_draft_length must be a whole number of at least 1"),
        ({"tokens": 13}, "texts of 12 tokens, and tokens is 13"),
        ({"tokens": 0}, "tokens must be a whole number of at least 1"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1, got 0"),
        ({"batch_size": []}, "batch_size must be one or more different whole numbers"),
        ({"batch_size": [1, 1]}, "batch_size must be one or more different whole numbers"),
        ({"batch_size": 64}, "has no point at batch size 64"),
        ({"workload": []}, "trace: there is no workload 'tiny/code'"),
        ({"workload": [PROSE, PROSE]}, "trace: there is no workload 'tiny/code'"),
        ({"profile": []}, "profile: 0 were given for 2 workloads"),
        ({"profile": {"tiny/chat": None}}, "profile: there is no workload 'tiny/chat'"),
        ({"split": "test"}, "not the test prompts"),
        ({"rate": -0.5}, "a rate is a throughput"),
        ({"decision_seconds": -0.5}, "decision_seconds must be finite"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(
    traces: dict[str, Trace], profile: LatencyProfile, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"traces": traces, "profile": profile, **arguments})


def test_one_trace_for_several_workloads_is_refused(traces: dict[str, Trace], profile: LatencyProfile) -> None:
    with pytest.raises(ValueError, match="trace: one was given for 2 workloads; give a mapping"):
        make(traces[PROSE], profile, workload=[PROSE, CODE])


def test_a_workload_named_twice_is_refused(traces: dict[str, Trace], profile: LatencyProfile) -> None:
    with pytest.raises(ValueError, match=r"workload must name one or more different workloads, got \['tiny/prose'"):
        make([traces[PROSE], traces[PROSE]], profile, workload=[PROSE, PROSE])
