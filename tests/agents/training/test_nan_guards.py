"""NaN and infinities, really injected: replaced, counted, left out, and never learned from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from specgym.agents.policy import KnobPolicy
from specgym.agents.training.sb3_vec_env import FiniteAdam, FiniteGuard, FiniteRolloutBuffer
from specgym.callbacks import LEFT_OUT, NumericsCallback
from specgym.decoding import NumericalError

STATES = spaces.Box(0, 1, (1,), np.float32)


def run(guard: FiniteGuard, steps: int) -> list[dict[str, Any]]:
    """Step with no change; observations and rewards must be finite. Returns the first environment's infos."""
    seen = []
    for _ in range(steps):
        observations, rewards, _, infos = guard.step(np.zeros((guard.num_envs, 2), np.float32))
        assert np.isfinite(np.asarray(observations)).all()
        assert np.isfinite(rewards).all()
        seen.append(infos[0])
    return seen


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_guard_replaces_a_broken_observation_by_the_last_one_and_marks_both_sides(
    fake_tuning: Callable[..., Any], value: float
) -> None:
    guard = FiniteGuard(DummyVecEnv([lambda: fake_tuning({"obs": {3}}, value)]))
    first = np.asarray(guard.reset())
    infos = run(guard, 6)
    assert [bool(info.get(LEFT_OUT)) for info in infos] == [False, False, True, True, False, False]
    assert guard.caught["observations"] == 1
    assert guard.caught["rewards"] == 0
    np.testing.assert_array_equal(guard._last, first)  # nothing has changed since


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_guard_replaces_and_marks_a_broken_reward(fake_tuning: Callable[..., Any], value: float) -> None:
    guard = FiniteGuard(DummyVecEnv([lambda: fake_tuning({"reward": {1, 4}}, value)]))
    guard.reset()
    infos = run(guard, 6)
    assert [bool(info.get(LEFT_OUT)) for info in infos] == [True, False, False, True, False, False]
    assert guard.caught["rewards"] == 2


def test_guard_mends_the_final_observation_of_an_episode(fake_tuning: Callable[..., Any]) -> None:
    guard = FiniteGuard(DummyVecEnv([lambda: fake_tuning({"obs": {20}})]))
    guard.reset()
    infos = run(guard, 21)
    assert np.isfinite(infos[19]["terminal_observation"]).all()
    assert infos[19].get(LEFT_OUT)
    assert not infos[20].get(LEFT_OUT)


def test_guard_marks_the_first_step_after_a_broken_reset(fake_tuning: Callable[..., Any]) -> None:
    guard = FiniteGuard(DummyVecEnv([lambda: fake_tuning({"reset": {0}})]))
    assert np.isfinite(np.asarray(guard.reset())).all()
    infos = run(guard, 21)
    assert [step for step, info in enumerate(infos) if info.get(LEFT_OUT)] == [0, 20]
    assert guard.caught["observations"] == 2


def filled(rewards: list[float], values: list[float], out: tuple[int, ...] = ()) -> FiniteRolloutBuffer:
    buffer = FiniteRolloutBuffer(len(rewards), STATES, STATES, gamma=0.9, gae_lambda=0.8, n_envs=1)
    for step, (reward, value) in enumerate(zip(rewards, values, strict=True)):
        buffer.leave_out(np.array([step in out]))
        start = np.array([step == 0])
        state = np.full((1, 1), step / 10, np.float32)
        buffer.add(state, state, np.array([reward]), start, torch.tensor([value]), torch.zeros(1))
    return buffer


def test_advantages_without_spoiled_transitions_are_those_of_sb3() -> None:
    ours = filled([1.0, -2.0, 0.5, 3.0], [0.1, 0.2, 0.3, 0.4])
    theirs = RolloutBuffer(4, STATES, STATES, gamma=0.9, gae_lambda=0.8, n_envs=1)
    for name in ("rewards", "values", "episode_starts"):
        getattr(theirs, name)[:] = getattr(ours, name)
    for starts in ([1, 0, 0, 0], [1, 0, 1, 0]):
        for buffer in (ours, theirs):
            buffer.episode_starts[:, 0] = starts
            buffer.compute_returns_and_advantage(torch.tensor([0.7]), np.array([False]))
        np.testing.assert_allclose(ours.advantages, theirs.advantages, rtol=1e-6)
        np.testing.assert_allclose(ours.returns, theirs.returns, rtol=1e-6)


def test_advantages_do_not_run_across_a_spoiled_transition() -> None:
    quiet = filled([1.0, 0.0, 0.5, 3.0], [0.1, 0.2, 0.3, 0.4], out=(1,))
    loud = filled([1.0, 99.0, 0.5, 3.0], [0.1, 0.2, 0.3, 0.4], out=(1,))
    for buffer in (quiet, loud):
        buffer.compute_returns_and_advantage(torch.tensor([0.7]), np.array([False]))
    np.testing.assert_array_equal(quiet.advantages, loud.advantages)
    assert quiet.advantages[0, 0] == pytest.approx(1.0 + 0.9 * 0.2 - 0.1)
    assert quiet.left_out == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_value_spoils_its_transition_and_the_one_bootstrapped_from_it(value: float) -> None:
    buffer = filled([1.0, 1.0, 1.0, 1.0], [0.1, 0.2, value, 0.4])
    buffer.compute_returns_and_advantage(torch.tensor([value]), np.array([False]))
    assert buffer.usable[:, 0].tolist() == [True, False, False, False]
    assert np.isfinite(buffer.advantages).all()


def test_minibatches_hold_every_usable_transition_once_and_no_other() -> None:
    buffer = filled([1.0, float("nan"), 0.5, 3.0, 1.0], [0.1, 0.2, 0.3, 0.4, 0.5], out=(3,))
    buffer.compute_returns_and_advantage(torch.tensor([0.7]), np.array([True]))
    seen = torch.cat([batch.observations for batch in buffer.get(2)]).flatten().tolist()
    assert sorted(seen) == pytest.approx([0.0, 0.2, 0.4])
    buffer.reset()
    assert buffer.usable.all()


def test_a_rollout_with_nothing_usable_is_an_error() -> None:
    buffer = filled([float("nan")] * 3, [0.1, 0.2, 0.3])
    buffer.compute_returns_and_advantage(torch.tensor([0.7]), np.array([True]))
    with pytest.raises(NumericalError, match="none of the 3 transitions"):
        next(buffer.get(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_optimiser_skips_and_counts_a_broken_gradient(value: float) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimiser = FiniteAdam([weight], lr=0.1)
    weight.grad = torch.tensor([1.0, value, 1.0])
    optimiser.step()
    assert optimiser.skipped == 1
    assert weight.tolist() == [1.0, 1.0, 1.0]
    assert not optimiser.state
    weight.grad = torch.ones(3)
    optimiser.step()
    assert optimiser.skipped == 1
    assert (weight < 1).all()


def learner(env: Callable[[], Any], **settings: Any) -> PPO:
    venv = VecNormalize(VecMonitor(FiniteGuard(DummyVecEnv([env, env]))), norm_obs=False)
    return PPO(
        KnobPolicy, venv, n_steps=40, batch_size=20, rollout_buffer_class=FiniteRolloutBuffer, seed=0, device="cpu",
        **settings,
    )  # fmt: skip


def test_learning_stays_finite_and_counts_reach_tensorboard(
    fake_tuning: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = learner(lambda: fake_tuning({"obs": {3}, "reward": {7, 20}}, np.inf))
    model.set_logger(configure(str(tmp_path), ["tensorboard"]))
    with caplog.at_level(logging.WARNING, "specgym.numerics"):
        model.learn(160, callback=NumericsCallback())
    assert all(torch.isfinite(p).all() for p in model.policy.parameters())
    assert np.isfinite(model.env.ret_rms.var)  # type: ignore[union-attr]
    events = EventAccumulator(str(tmp_path)).Reload()
    last = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.startswith("numerics/")}
    # Two environments, two rollouts of two episodes; a broken observation spoils two transitions.
    assert last["numerics/observations"] == 8
    assert last["numerics/rewards"] == 16
    assert last["numerics/transitions_left_out"] == 32
    assert "kept out of learning" in caplog.text


def test_broken_policy_outputs_reach_no_weight(fake_tuning: Callable[..., Any]) -> None:
    model = learner(fake_tuning, policy_kwargs={"patience": 1000})
    before = [p.detach().clone() for p in model.policy.parameters()]
    calls = iter(range(10_000))
    model.policy.action_net.register_forward_hook(
        lambda layer, options, out: out * (float("nan") if next(calls) >= 40 else 1.0)
    )
    callback = NumericsCallback()
    model.learn(80, callback=callback)
    counts = callback.counts()
    assert counts["policy_outputs"] > 0
    assert counts["optimiser_steps_skipped"] == 10 * 4  # every minibatch of the update
    for old, new in zip(before, model.policy.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach())


def test_an_environment_that_only_gives_nan_stops_with_a_clear_error(fake_tuning: Callable[..., Any]) -> None:
    model = learner(lambda: fake_tuning({"reward": set(range(21))}))
    with pytest.raises(NumericalError, match="reward weights"):
        model.learn(80, callback=NumericsCallback())


def test_marks_without_the_buffer_that_understands_them_are_refused(fake_tuning: Callable[..., Any]) -> None:
    venv = FiniteGuard(DummyVecEnv([lambda: fake_tuning({"reward": {2}})]))
    model = PPO(KnobPolicy, venv, n_steps=20, batch_size=20, device="cpu")
    with pytest.raises(TypeError, match="FiniteRolloutBuffer"):
        model.learn(20, callback=NumericsCallback())
