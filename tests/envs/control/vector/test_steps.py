"""Control of the draft length for many texts at once: the same as one at a time, and with the right chances."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs.control.env import DraftLengthEnv
from specgym.envs.recordings.trace import Trace
from tests.helpers.drafted_together import COUNTS, PROSE, SAMPLED, TOKENS, K, actions_of, make, random_trace


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
            recording=traces[name],
            profile=profile,
            batch_size=batch_size,
            rate=1.4,
            decision_seconds=0.0003,
        )
        observation, info = single.reset(seed=0, options={"prompt": int(prompts[number])})
        singles.append((single, observation, info))
    observations, infos = env.reset(seed=0, options={"prompt": prompts})
    for number, (_, observation, info) in enumerate(singles):
        assert np.array_equal(observations[number], observation)
        assert all(infos[name][number] == info[name] for name in COUNTS)
    rng = np.random.default_rng(0)
    running = np.ones(20, np.bool_)
    steps = 0
    while running.any():
        steps += 1
        actions = actions_of(rng, 20)
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
    rng = np.random.default_rng(0)
    seen = 0
    tokens, seconds = np.zeros(4), np.zeros(4)
    for _ in range(60):
        observations, _, terminated, _, infos = env.step(actions_of(rng, 4))
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


def test_a_token_that_the_end_of_the_text_makes_superfluous_is_not_called_acceptable(profile: LatencyProfile) -> None:
    trace = random_trace(PROSE, 8, seed=1, ending=1.0, drafted=K)
    trace = replace(trace, match=np.ones_like(trace.match))
    env = make(trace, profile, num_envs=8)
    _, infos = env.reset(seed=0, options={"prompt": np.arange(8)})
    # The target's own token, the last of the text, comes with any verification.
    assert infos["remaining_acceptable"].tolist() == np.minimum(K - 1, np.diff(trace.starts) - 2).tolist()
    for _ in range(40):
        useful = infos["remaining_acceptable"]
        *_, infos = env.step((useful <= 0).astype(np.int64))
        ends = infos["rounds"] == 1
        assert (infos["tokens"] == infos["drafted"] + 1)[ends].all()
    assert env.resting.all()


@pytest.mark.parametrize(("p", "q"), [(0.3, 0.5), (0.6, 0.2), (0.2, 0.8), (0.4, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_a_sampled_token_is_accepted_with_the_chance_of_p_over_q(profile: LatencyProfile, p: float, q: float) -> None:
    trace = random_trace(SAMPLED, 40, seed=0, tokens=40, ending=0.0, p=p, q=q, drafted=K)
    env = make(trace, profile, num_envs=500, max_new_tokens=40)
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
