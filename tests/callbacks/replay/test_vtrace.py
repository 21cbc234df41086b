"""V-trace against generalised advantage estimation, and against its definition written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from specgym.callbacks.replay.phase import VTrace, vtrace

GAMMA, LAMBDA = 0.9, 0.8


def some_segments(seed: int, segments: int = 3, steps: int = 12) -> dict[str, Any]:
    """Arguments of `vtrace` whose episodes end inside, by termination and by truncation; all steps usable."""
    rng = np.random.default_rng(seed)
    shape = (segments, steps)
    values, ends = rng.normal(size=shape), rng.random(shape) < 0.2
    after = np.concatenate([values[:, 1:], rng.normal(size=(segments, 1))], axis=1)
    final = np.where(rng.random(shape) < 0.5, rng.normal(size=shape), 0)  # truncated or terminated
    return {
        "rewards": rng.normal(size=shape),
        "values": values,
        "next_values": np.where(ends, final, after),
        "log_ratios": rng.normal(size=shape),
        "ends": ends,
        "usable": np.ones(shape, bool),
    }


def traced(arguments: dict[str, Any]) -> VTrace:
    return vtrace(**arguments, gamma=GAMMA, gae_lambda=LAMBDA)


def written_out(case: dict[str, Any]) -> np.ndarray:
    """Equation 1 of the paper with c = lambda min(1, pi / mu), episode by episode."""
    targets = case["values"].copy()
    for row in range(targets.shape[0]):
        for start in range(targets.shape[1]):
            trace = 1.0
            for step in range(start, targets.shape[1]):
                if not case["usable"][row, step]:
                    break
                ratio = min(1.0, float(np.exp(case["log_ratios"][row, step])))
                delta = case["rewards"][row, step] + GAMMA * case["next_values"][row, step] - case["values"][row, step]
                targets[row, start] += GAMMA ** (step - start) * trace * ratio * delta
                trace *= LAMBDA * ratio
                if case["ends"][row, step]:
                    break
    return targets


@pytest.mark.parametrize("seed", range(5))
def test_off_policy_targets_are_those_of_the_definition(seed: int) -> None:
    case = some_segments(seed)
    case["usable"][1, 4:6] = False
    case["usable"][2, -1] = False
    assert case["ends"][:, :-1].any()
    result = traced(case)
    np.testing.assert_allclose(result.targets, written_out(case), rtol=1e-10)
    np.testing.assert_allclose(result.weights, np.where(case["usable"], np.minimum(1, np.exp(case["log_ratios"])), 0))
    assert (result.advantages[~case["usable"]] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_on_policy_it_is_generalised_advantage_estimation(seed: int) -> None:
    case = some_segments(seed)
    case["log_ratios"] = np.zeros_like(case["log_ratios"])
    rows, steps = case["rewards"].shape
    buffer = RolloutBuffer(
        steps, spaces.Box(0, 1, (1,)), spaces.Box(0, 1, (1,)), gamma=GAMMA, gae_lambda=LAMBDA, n_envs=rows
    )
    buffer.values[:] = case["values"].T
    # Stable-Baselines3 adds the value of a truncated state to the reward.
    buffer.rewards[:] = (case["rewards"] + GAMMA * np.where(case["ends"], case["next_values"], 0)).T
    buffer.episode_starts[1:] = case["ends"].T[:-1]
    last = torch.as_tensor(case["next_values"][:, -1])
    buffer.compute_returns_and_advantage(last, case["ends"][:, -1])
    result = traced(case)
    np.testing.assert_allclose(result.advantages, buffer.advantages.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.targets, buffer.returns.T, rtol=1e-4, atol=1e-6)


def test_nothing_of_an_unusable_step_reaches_another() -> None:
    case = some_segments(7)
    case["usable"][0, 5] = False
    before = traced(case)
    for name in ("rewards", "log_ratios", "next_values"):
        case[name][0, 5] += 100
    after = traced(case)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    case["rewards"][0, 6] += 100
    assert (traced(case).targets != before.targets).any()


def test_an_array_of_another_shape_is_named() -> None:
    case = some_segments(0)
    case["ends"] = case["ends"][:, 1:]
    with pytest.raises(ValueError, match="ends must have the shape"):
        traced(case)
