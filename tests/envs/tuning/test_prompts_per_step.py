"""Steps that decode several prompts with one setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest

from specgym.envs import Workload
from specgym.envs.backends import live
from specgym.envs.recordings.trace import Trace
from specgym.envs.tuning.vector_env import TuningVectorEnv

MakeEnv = Callable[..., gymnasium.Env]
MakeVector = Callable[..., TuningVectorEnv]
STILL = np.zeros(2, np.float32)
SUMS = ("tokens", "rounds", "drafted", "accepted", "seconds")


def pooled(infos: list[dict[str, Any]]) -> dict[str, float]:
    sums = {name: sum(info[name] for info in infos) for name in SUMS}
    straying = sum(info["divergence"] * info["tokens"] for info in infos)
    return {
        **sums,
        "speedup": 0.010 * sums["tokens"] / sums["seconds"],
        "ms_per_token": 1000 * sums["seconds"] / sums["tokens"],
        "draft_acceptance_rate": sums["accepted"] / sums["drafted"],
        "mean_acceptance_length": sums["tokens"] / sums["rounds"],
        "divergence": straying / sums["tokens"],
    }


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_metrics_are_of_all_prompts_together(make_env: MakeEnv, make_single: MakeEnv, backend: str) -> None:
    make = make_env if backend == "live" else make_single
    # Exact greedy decoding draws nothing, so the order of the prompts does not matter.
    changes: dict[str, Any] = {"decoder": "speculative", "max_new_tokens": 7, "start": "default"}
    still = np.zeros(2, np.float32)
    item, many = make(**changes), make(**changes, prompts_per_step=4)
    infos = []
    for prompt in range(4):
        item.reset(seed=0, options={"prompt": prompt})
        infos.append(item.step(still)[4])
    many.reset(seed=1)
    result = many.step(still)[4]
    assert {name: result[name] for name in pooled(infos)} == pytest.approx(pooled(infos))
    assert result["reward/speed"] == pytest.approx(result["speedup"])


def test_thresholds_are_pooled_too(make_single: MakeEnv, toy_trace: Trace) -> None:
    item, many = make_single(), make_single(prompts_per_step=3)
    # At settings that were recorded for every prompt, and take back whole tokens, a replay draws nothing either.
    recorded = [setting for setting in toy_trace.detour_knobs.tolist() if setting[1] % 1 == 0]
    straying = 0.0
    for fallback, rollback in {tuple(setting) for setting in recorded}:
        knobs = {"fallback": fallback, "rollback": rollback}
        infos = []
        for prompt in range(3):
            item.reset(seed=0, options={"prompt": prompt, "knobs": knobs})
            infos.append(item.step(STILL)[4])
        many.reset(seed=1, options={"knobs": knobs})
        result = many.step(STILL)[4]
        assert {name: result[name] for name in pooled(infos)} == pytest.approx(pooled(infos))
        straying += result["divergence"]
    assert straying > 0


def test_the_prompts_are_the_next_ones_of_the_order(
    make_env: MakeEnv, toy_workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[int, ...]]] = []
    real = live.generate_texts

    def spy(requests: Any, **others: Any) -> Any:
        seen.append([tuple(request.prompt_ids) for request in requests])
        return real(requests, **others)

    monkeypatch.setattr(live, "generate_texts", spy)
    env = make_env(prompts_per_step=3, max_new_tokens=1)
    env.reset(seed=0)
    for _ in range(4):
        env.step(STILL)
    assert len(seen) == 4
    flat = [prompt for prompts in seen for prompt in prompts]
    every = sorted(toy_workload.prompt_ids())
    assert [sorted(flat[start : start + 4]) for start in (0, 4, 8)] == [every] * 3


def test_the_prompt_given_to_reset_stands_for_all(make_env: MakeEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    real = live.generate_texts

    def spy(requests: Any, **others: Any) -> Any:
        calls.extend(tuple(request.prompt_ids) for request in requests)
        return real(requests, **others)

    monkeypatch.setattr(live, "generate_texts", spy)
    env = make_env(prompts_per_step=2, max_new_tokens=1)
    env.reset(seed=0, options={"prompt": 1})
    env.step(STILL)
    assert len(calls) == 2
    assert len(set(calls)) == 1


@pytest.mark.parametrize("decoder", ["threshold", "speculative"])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_one_environment_of_many_steps_as_a_single_one_does(
    make_vector: MakeVector, make_single: MakeEnv, sampled_trace: Trace, decoder: str, kind: str
) -> None:
    changes: dict[str, Any] = {"decoder": decoder, "prompts_per_step": 3}
    changes |= {"recording": sampled_trace} if kind == "sampled" else {}
    vector, single = make_vector(num_envs=1, **changes), make_single(**changes)
    vector.reset(seed=5)
    single.reset(seed=5)
    draws = np.random.default_rng(1)
    for _ in range(25):
        action = draws.uniform(-1, 1, vector.single_action_space.shape or ()).astype(np.float32)
        ours, theirs = vector.step(action[None]), single.step(action)
        infos = ours[4].get("final_info", ours[4])
        assert ours[1][0] == pytest.approx(theirs[1], rel=1e-12)
        for name, value in theirs[4].items():
            assert infos[name][0] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-12)), name
        if theirs[3]:
            single.reset()


def test_many_environments_get_every_prompt_before_any_comes_again(
    make_vector: MakeVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_vector(num_envs=4, prompts_per_step=2)
    seen: list[np.ndarray] = []
    real = env._backend.decode

    def spy(prompts: Any, *others: Any) -> Any:
        seen.append(prompts.reshape(4, 2))
        return real(prompts, *others)

    monkeypatch.setattr(env._backend, "decode", spy)
    env.reset(seed=0)
    for _ in range(3):
        env.step(np.zeros((4, 2), np.float32))
    for item in np.concatenate(seen, 1).tolist():
        assert sorted(item[:3]) == sorted(item[3:]) == [0, 1, 2]


@pytest.mark.parametrize("bad", [0, 1.5, -2])
def test_less_than_one_prompt_is_refused(make_single: MakeEnv, make_vector: MakeVector, bad: float) -> None:
    for make in (make_single, make_vector):
        with pytest.raises(ValueError, match="prompts_per_step must be a whole number of at least 1"):
            make(prompts_per_step=bad)
