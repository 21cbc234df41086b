"""Control of the draft length: what a step does, is worth and tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs.control.env import DraftLengthEnv
from tests.helpers.drafted_texts import GO, LONGEST, PLACE, STOP, TOKENS, play

MakeEnv = Callable[..., DraftLengthEnv]


@pytest.mark.parametrize("backend", ["live", "replay"])
@pytest.mark.parametrize(("action", "length"), [(STOP, 1), (GO, LONGEST)])
def test_stopping_at_once_and_never_stopping_are_fixed_draft_lengths(
    make_env: MakeEnv, backend: str, action: int, length: int
) -> None:
    emitted, rounds = 0, []
    for *_, info in play(make_env(backend), 0, action):
        if info["rounds"]:
            rounds.append((info["drafted"], min(length, TOKENS - emitted - 1)))
        emitted += info["tokens"]
    assert len(rounds) > 4
    assert all(drafted == expected for drafted, expected in rounds)


def test_going_on_emits_nothing_until_the_draft_is_as_long_as_it_may_be(make_env: MakeEnv) -> None:
    seen = play(make_env("live"), 0, GO)[: LONGEST + 1]
    assert [observation[PLACE] for observation, *_ in seen] == [1, 2, 3, 4, 5, 1]
    assert [info["rounds"] for *_, info in seen] == [0, 0, 0, 0, 0, 1]
    assert [info["tokens"] > 0 for *_, info in seen] == [False] * 5 + [True]


@pytest.mark.parametrize("backend", ["live", "replay"])
@pytest.mark.parametrize("rate", [0.0, 1.0, 1.7])
def test_the_rewards_of_a_round_are_its_tokens_minus_the_price_of_its_time(
    make_env: MakeEnv, backend: str, rate: float, profile: LatencyProfile
) -> None:
    rewards, tokens = 0.0, 0
    for _, reward, _, info in play(make_env(backend, rate=rate), 1, np.random.default_rng(3))[1:]:
        rewards += reward
        tokens += info["tokens"]
        if info["rounds"] == 1:
            seconds = profile.round(info["drafted"])
            assert rewards == pytest.approx(info["tokens"] - rate * seconds / profile.autoregressive_seconds)
        if info["rounds"]:
            rewards = 0.0
    assert tokens == TOKENS


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_totals_are_sums_over_the_text(make_env: MakeEnv, backend: str, profile: LatencyProfile) -> None:
    seen = play(make_env(backend), 1, np.random.default_rng(3))
    last = seen[-1][3]
    assert last["total_tokens"] == sum(info["tokens"] for *_, info in seen) == TOKENS
    assert last["total_seconds"] == pytest.approx(sum(info["seconds"] for *_, info in seen))
    # 1 ms a drafted token, 10 ms a pass and 1 ms for each token beyond the first
    drafted, rounds = (sum(info[name] for *_, info in seen) for name in ("drafted", "rounds"))
    assert last["total_seconds"] == pytest.approx(0.010 * rounds + 0.002 * drafted)
    assert last["throughput"] == pytest.approx(TOKENS * profile.autoregressive_seconds / last["total_seconds"])
    assert seen[0][3]["throughput"] == 0.0


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_every_decision_about_a_token_is_charged(make_env: MakeEnv, backend: str) -> None:
    free, paid = (play(make_env(backend, "lookup", decision_seconds=cost), 2, GO) for cost in (0.0, 0.002))
    decided = sum(observation[PLACE] > 0 for observation, *_ in free[:-1])
    assert decided == len(free) - 2  # nothing was drafted when the text began
    extra = paid[-1][3]["total_seconds"] - free[-1][3]["total_seconds"]
    assert extra == pytest.approx(0.002 * decided)


def test_a_rate_can_be_changed_while_a_text_is_decoded(make_env: MakeEnv) -> None:
    env = make_env("replay", rate=0.0)
    env.reset(seed=0, options={"prompt": 0})
    assert env.step(GO)[1] == 0.0
    env.set_rate(2.0)
    assert env.rate == 2.0
    assert env.step(GO)[1] == pytest.approx(-2.0 * 0.002 / 0.010)


def test_what_more_is_acceptable_is_what_verification_finds(make_env: MakeEnv) -> None:
    env = make_env("replay")
    rng = np.random.default_rng(0)
    signs = set()
    for prompt in range(4):
        for _ in range(5):
            _, info = env.reset(options={"prompt": prompt})
            ended = False
            while not ended:
                promised = info["remaining_acceptable"]
                action = int(rng.random() < 0.3)
                _, _, ended, _, info = env.step(action)
                if info["rounds"]:
                    assert info["accepted"] == info["drafted"] + min(promised, 0)
                    signs.add(np.sign(promised))
                    assert promised <= LONGEST - info["drafted"]
                else:
                    assert info["remaining_acceptable"] == promised - 1
            assert info["remaining_acceptable"] == 0
    assert signs == {-1, 0, 1}


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_the_operating_point_shows_in_observations_and_charges(
    make_env: MakeEnv, backend: str, profile: LatencyProfile
) -> None:
    two = replace(
        profile, context=8, points=(replace(profile, batch_size=8, context=8, target_seconds={1: 0.02, 2: 0.05}),)
    )
    env = make_env(backend, profile=two, batch_size=8)
    observation, _ = env.reset(seed=0)
    assert observation[7] == 3.0
    assert observation[6] == pytest.approx(3.1)  # 1 ms of drafting and 30 ms of the pass, over 10 ms
    assert env.step(STOP)[4]["seconds"] == pytest.approx(0.001 + 0.05)
