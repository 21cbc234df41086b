"""Choice between drafts for many texts at once: the same as one at a time, and with the right chances."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from specgym.decoding import CHOICE_FEATURES
from specgym.envs import DraftChoiceEnv, DraftChoiceVectorEnv
from specgym.envs.recordings.mixed_trace import MixedTrace
from tests.helpers.made_up_mixed import made_up_costs, made_up_mixed

K, TOKENS = 4, 12
COUNTS = ("tokens", "seconds", "drafted", "accepted", "rounds")
SMALL: dict[str, Any] = {"max_draft_length": K, "max_new_tokens": TOKENS}


def actions_of(rng: np.random.Generator, count: int) -> Any:
    """Draw actions, shape (count,), of which about a third verify."""
    return np.where(rng.random(count) < 0.3, 0, rng.integers(1, 7, count))


def test_many_texts_are_as_many_single_ones() -> None:
    """Two workloads whose pairs have other drafts, and other numbers of them."""
    traces = {
        "tiny/prose": made_up_mixed("tiny/prose", prompts=5, seed=1),
        "tiny/code": made_up_mixed("tiny/code", free=(True, False, True), right=(0.5, 0.8, 0.6), prompts=3, seed=2),
    }
    profiles = {
        "tiny/prose": made_up_costs(traces["tiny/prose"]),
        "tiny/code": made_up_costs(traces["tiny/code"], drafting=0.3),
    }
    options = {**SMALL, "rate": 1.4, "decision_seconds": 0.0003}
    env = DraftChoiceVectorEnv(12, recording=traces, profile=profiles, **options)
    prompts = np.arange(12) // 2 % np.array(env.prompt_counts)[env.workload_of]
    observations, infos = env.reset(seed=0, options={"prompt": prompts})
    singles = []
    for number, place in enumerate(env.workload_of):
        name = env.workload_names[place]
        single = DraftChoiceEnv(name, "replay", recording=traces[name], profile=profiles[name], **options)
        observation, info = single.reset(seed=0, options={"prompt": int(prompts[number])})
        assert np.array_equal(observations[number], observation)
        assert np.array_equal(infos["remaining_acceptable"][number], info["remaining_acceptable"])
        singles.append(single)
    rng = np.random.default_rng(0)
    running = np.ones(12, np.bool_)
    while running.any():
        masks, actions = env.action_masks(), actions_of(rng, 12)
        results = env.step(actions)
        for number, single in enumerate(singles):
            if not running[number]:
                assert not masks[number, 1:].any()
                continue
            assert np.array_equal(masks[number], single.action_masks())
            observation, reward, ended, _, info = single.step(int(actions[number]))
            assert np.array_equal(results[0][number], observation)
            assert (results[1][number], results[2][number]) == (reward, ended)
            assert all(results[4][name][number] == info[name] for name in COUNTS)
            assert np.array_equal(results[4]["remaining_acceptable"][number], info["remaining_acceptable"])
        running &= ~results[2]
        assert np.array_equal(env.resting, ~running)


def test_drafts_that_cannot_go_on_mean_that_the_target_verifies() -> None:
    trace = made_up_mixed(prompts=8, ending=0.0)
    twins = [DraftChoiceVectorEnv(8, recording=trace, profile=made_up_costs(trace), **SMALL) for _ in range(2)]
    rng = np.random.default_rng(0)
    results: list[Any] = [env.reset(seed=0) for env in twins]
    refused = 0
    for _ in range(60):
        actions, masks = actions_of(rng, 8), twins[0].action_masks()
        allowed = masks[np.arange(8), actions]
        refused += (~allowed).sum()
        assert masks[:, 0].all()
        assert not masks[:, 5:].any()  # there are four drafts
        results = [env.step(chosen) for env, chosen in zip(twins, (actions, actions * allowed), strict=True)]
        assert np.array_equal(results[0][0], results[1][0])
        assert np.array_equal(results[0][1], results[1][1])
        assert (results[0][4]["rounds"][~allowed] == 1).all()
    assert refused > 50


def test_what_more_is_acceptable_is_what_verification_finds() -> None:
    trace = made_up_mixed("tiny/prose@1.0", prompts=30, ending=0.0)
    env = DraftChoiceVectorEnv(30, recording=trace, profile=made_up_costs(trace), **SMALL)
    _, infos = env.reset(seed=0)
    rng = np.random.default_rng(0)
    signs = set()
    for _ in range(40):
        actions = actions_of(rng, 30)
        promised, masks = infos["remaining_acceptable"], env.action_masks()
        *_, infos = env.step(actions)
        for number in np.flatnonzero(infos["rounds"]):
            worst = promised[number, :4].min()
            assert infos["accepted"][number] == infos["drafted"][number] + min(worst, 0)
        for number in np.flatnonzero(infos["rounds"] == 0):
            draft = actions[number] - 1
            assert masks[number, actions[number]]
            assert infos["remaining_acceptable"][number, draft] == promised[number, draft] - 1
            signs.add(int(np.sign(promised[number, draft])))
    assert signs == {-1, 0, 1}


@pytest.mark.parametrize("first", [0, 1])
def test_a_sampled_token_is_accepted_with_the_chance_of_p_over_q_whoever_went_before(first: int) -> None:
    trace = made_up_mixed("tiny/prose@1.0", free=(False, False), right=(1, 1), prompts=40, tokens=40, ending=0.0)
    chances = (0.7, 0.4)

    def with_chance(place: int) -> Any:
        draft = trace.traces[place]
        return replace(draft, q=np.full_like(draft.q, 0.5), p=np.full_like(draft.p, 0.5 * chances[place]))

    trace = MixedTrace(trace.info, trace.drafts, trace.free, (with_chance(0), with_chance(1)))
    env = DraftChoiceVectorEnv(
        400, recording=trace, profile=made_up_costs(trace), max_draft_length=K, max_new_tokens=40
    )
    env.reset(seed=0)
    place = [feature.name for feature in CHOICE_FEATURES].index("place")
    observations = env.reset(seed=0)[0]
    counts = np.zeros(3)
    for _ in range(60):
        # Two tokens, the second by the other draft, and verification.
        actions = np.select([observations[:, place] == 0, observations[:, place] == 1], [first + 1, 2 - first], 0)
        observations, *_, infos = env.step(actions)
        counts += np.bincount(infos["accepted"][infos["drafted"] == 2], minlength=3)
    rounds = counts.sum()
    assert rounds > 3000
    for length, expected in ((1, chances[first]), (2, chances[0] * chances[1])):
        # Four and a half standard errors: one seed in 100,000 would miss it.
        assert abs(counts[length:].sum() / rounds - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / rounds)
