"""Choice between drafts: what Gymnasium and Stable-Baselines3 ask of any environment, seeds, and what is refused."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from specgym.decoding import FEATURES, MOST_DRAFTS, SLOT_FEATURES, NGramDrafter, Pair
from specgym.envs import DraftChoiceEnv, Workload
from specgym.envs.recordings.mixed_trace import MixedTrace
from tests.helpers.made_up_mixed import made_up_costs, made_up_mixed

Mixed = Callable[[str], tuple[Workload, MixedTrace]]
MakeEnv = Callable[..., DraftChoiceEnv]


def rollout(env: DraftChoiceEnv, seed: int) -> list[Any]:
    """Results of some steps, as lists."""
    rng = np.random.default_rng(0)
    observation, info = env.reset(seed=seed)
    seen: list[Any] = [observation.tolist(), {**info, "remaining_acceptable": info["remaining_acceptable"].tolist()}]
    for _ in range(30):
        action = 0 if rng.random() < 0.3 else int(rng.integers(1, 7))
        observation, reward, ended, _, info = env.step(action)
        seen += [observation.tolist(), reward, ended, info["tokens"], info["seconds"], info["accepted"]]
        if ended:
            env.reset()
    return seen


@pytest.mark.parametrize("backend", ["live", "replay"])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_a_seed_fixes_everything_and_pickles_know_their_arguments(make_env: MakeEnv, backend: str, kind: str) -> None:
    env = make_env(backend, kind, rate=1.5)
    first = rollout(env, 7)
    assert rollout(env, 7) == first  # the second time after other texts
    again = pickle.loads(pickle.dumps(env))
    assert again.rate == 1.5
    assert rollout(again, 7) == first
    assert any(rollout(env, seed) != first for seed in (8, 9))


@pytest.mark.parametrize("backend", ["live", "replay"])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_passes_both_checkers_without_a_warning(make_env: MakeEnv, backend: str, kind: str) -> None:
    env = make_env(backend, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
        check_env_sb3(env)


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_masks_are_the_drafts_that_are_seen_as_available(make_env: MakeEnv, backend: str) -> None:
    env = make_env(backend)
    observation, _ = env.reset(seed=1)
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(40):
        mask = env.action_masks()
        assert mask.dtype == np.bool_
        assert mask.shape == (1 + MOST_DRAFTS,)
        assert mask[0]
        assert mask[1:].tolist() == observation[len(FEATURES) :: len(SLOT_FEATURES)].astype(bool).tolist()
        shares.append(mask[1:6].mean())
        observation, _, ended, _, _ = env.step(int(rng.choice(np.flatnonzero(mask))))
        if ended:
            observation, _ = env.reset()
    assert 0 < np.mean(shares) < 1


def test_the_spec_survives_json() -> None:
    spec = gymnasium.spec("specgym/DraftChoice-v0")
    assert EnvSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("action", [7, -1, 0.5, None, [0], "go"])
def test_an_action_that_is_none_is_refused(make_env: MakeEnv, action: Any) -> None:
    env = make_env("replay")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"an action is 0 \(verify\) or the number of a draft, 1 to 6, got"):
        env.step(action)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_draft_length": 7}, r"drafts of 6 tokens, and max_draft_length is 7.*--draft-length 7"),
        ({"max_new_tokens": 25}, r"texts of 24 tokens, and max_new_tokens is 25.*--tokens 25"),
        ({"split": "test"}, "has the train prompts of mixed-greedy/ids, not the test prompts"),
        ({"recording": None}, "no mixed trace of mixed-greedy/ids"),
        ({"profile": "missing.json"}, "there is no mixed latency profile missing.json"),
        ({"profile": made_up_costs(made_up_mixed())}, "is of the drafts model-0, .*, and charged are to be"),
        ({"decision_seconds": -1.0}, "decision_seconds must be a finite number"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(
    make_env: MakeEnv, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_env("replay", **arguments)


def test_a_live_pair_with_one_draft_is_refused_before_anything_is_measured(mixed: Mixed) -> None:
    workload, _ = mixed("greedy")
    pair = workload.load()
    single = replace(workload, pair=Pair(pair.target, NGramDrafter.fit([[1, 2, 3]], 16), name="single"))
    with pytest.raises(ValueError, match="pair single has 1 draft, and a choice is among 2 to 6; name several"):
        DraftChoiceEnv(single, "live")
