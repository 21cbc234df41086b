"""A phase of replay: on-policy it is PPO's own update; off-policy it corrects, and learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from specgym.agents.policy import KnobPolicy
from specgym.callbacks.replay.phase import ReplayPhase
from specgym.callbacks.replay.prioritised import PrioritisedReplayCallback
from specgym.callbacks.replay.settings import ReplaySettings
from tests.helpers.replaying_learner import ENVIRONMENTS, STEPS, Seek, collect, learner, parameters, replayed


@pytest.mark.parametrize("discrete", [False, True])
def test_the_first_step_on_a_fresh_rollout_is_the_one_of_ppo(discrete: bool) -> None:
    # Uniform and stratified, a minibatch of as many segments as there are has each of them once.
    settings = ReplaySettings(
        priority="uniform", updates=1, segments_per_update=ENVIRONMENTS, capacity=ENVIRONMENTS, warm_up=1
    )
    callback = PrioritisedReplayCallback(settings)
    model = learner(callback, discrete=discrete, ent_coef=0.01, clip_range_vf=0.1, gamma=0.9, max_grad_norm=1e9)
    collect(model, callback)
    assert callback._stored.data.truncated.any()
    assert (callback._stored.data.ends & ~callback._stored.data.truncated).any()
    model.policy.optimizer = torch.optim.SGD(model.policy.parameters(), lr=0.1)
    model.lr_schedule = lambda _: 0.1
    start, saved = parameters(model), copy.deepcopy(model.policy.state_dict())
    callback.on_rollout_start()
    ours = parameters(model) - start
    model.policy.load_state_dict(saved)
    model.train()
    theirs = parameters(model) - start
    assert callback.updates == 1
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_truncated_state_is_valued_by_the_policy_of_today() -> None:
    model, callback = replayed()
    store, steps = callback._stored, callback._stored.data
    np.testing.assert_array_equal(store.born[: 2 * ENVIRONMENTS], [1] * ENVIRONMENTS + [2] * ENVIRONMENTS)
    reward = 1 - np.abs(steps.after - 0.5)[..., 0]  # of the state arrived in, without any value
    np.testing.assert_allclose(steps.rewards[steps.truncated], reward[steps.truncated], atol=1e-6)
    phase = ReplayPhase(model, store)
    with torch.no_grad():
        model.policy.value_net.bias.add_(5)
    places = np.arange(2 * ENVIRONMENTS)
    phase.recentre(places)
    row, step = (int(result[0]) for result in np.nonzero(steps.truncated))
    expected = model.policy.predict_values(torch.as_tensor(steps.after[row, step])[None]).item()
    assert expected > 3
    surprise = steps.rewards[row, step] + model.gamma * expected - phase.values[row, step]
    np.testing.assert_allclose(phase.advantages[row, step], surprise, rtol=1e-4, atol=1e-5)


def test_rewards_are_normalised_by_the_statistics_of_today() -> None:
    callback = PrioritisedReplayCallback(ReplaySettings(warm_up=1))
    model = learner(callback, normalised=True, gae_lambda=0.0)
    collect(model, callback)
    steps = callback._stored.data
    normaliser = model.get_vec_normalize_env()
    assert normaliser is not None
    places = np.arange(ENVIRONMENTS)
    phase = ReplayPhase(model, callback._stored)
    phase.recentre(places)
    before = phase.advantages[places].copy()
    normaliser.ret_rms.var *= 4
    phase.recentre(places)
    scale = np.sqrt(normaliser.ret_rms.var / 4 + normaliser.epsilon)
    assert np.abs(before - phase.advantages[places]).max() > 0.01
    np.testing.assert_allclose(before - phase.advantages[places], steps.rewards[places] / scale / 2, rtol=1e-2)


def test_importance_weighs_every_segment_in_all_losses() -> None:
    moved = []
    for importance in ([1.0, 1.0], [1.0, 0.0], [0.0, 0.5]):
        model, callback = replayed()
        model.normalize_advantage, model.max_grad_norm, model.ent_coef = False, 1e9, 0.1
        phase = ReplayPhase(model, callback._stored)
        phase.recentre(np.array([1, 6]))
        model.policy.optimizer = torch.optim.SGD(model.policy.parameters(), lr=0.1)
        start = parameters(model)
        assert phase.step(np.array([1, 6]), np.array(importance))[0]
        moved.append(parameters(model) - start)
    assert moved[1].abs().max() > 1e-3
    torch.testing.assert_close(moved[0], moved[1] + 2 * moved[2], rtol=1e-3, atol=1e-6)


def test_unlikely_actions_count_less_by_their_ratio() -> None:
    # One step of SGD without normalised advantages is linear in the weights.
    moved = []
    for ratio in (1.0, 0.6):
        callback = PrioritisedReplayCallback(ReplaySettings(updates=1, segments_per_update=4, warm_up=1))
        model = learner(callback, normalize_advantage=False, vf_coef=0.0, max_grad_norm=1e9, gae_lambda=0.0)
        collect(model, callback)
        callback._stored.data.log_probs[:] -= np.log(ratio)
        model.policy.optimizer = torch.optim.SGD(model.policy.parameters(), lr=0.1)
        start = parameters(model)
        callback.on_rollout_start()
        moved.append(parameters(model) - start)
    assert moved[0].abs().max() > 1e-4
    torch.testing.assert_close(moved[1], moved[0] * 0.6, rtol=1e-3, atol=1e-7)


def test_unusable_transitions_have_no_influence() -> None:
    def after(spoil: Callable[[Any], None]) -> torch.Tensor:
        model, callback = replayed(priority="uniform")
        callback._stored.data.usable[:, 5:7] = False
        spoil(callback._stored.data)
        callback.on_rollout_start()
        assert callback.updates == 4
        return parameters(model)

    def spoil_unusable(steps: Any) -> None:
        for array in (steps.rewards, steps.actions, steps.log_probs):
            array[:, 5:7] += 100
        steps.observations[:, 6] = -3  # the state in step 5 values the one before

    def spoil_usable(steps: Any) -> None:
        steps.rewards[:, 7] += 100

    untouched = after(lambda steps: None)
    torch.testing.assert_close(after(spoil_unusable), untouched, rtol=0, atol=0)
    assert (after(spoil_usable) - untouched).abs().max() > 1e-4


def test_a_phase_ends_where_the_policy_has_moved_by_the_models_target() -> None:
    callback = PrioritisedReplayCallback(ReplaySettings(updates=50, warm_up=1))
    model = learner(callback, target_kl=0.001, learning_rate=0.01)
    collect(model, callback)
    callback.on_rollout_start()
    assert 0 < callback.updates < 50


def test_no_updates_means_no_replay() -> None:
    model, callback = replayed(updates=0)
    before = parameters(model)
    callback.on_rollout_start()
    assert callback.updates == 0
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)


def test_replay_alone_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = PrioritisedReplayCallback(ReplaySettings(updates=10, segments_per_update=8, warm_up=1))
    environments = DummyVecEnv([Seek] * ENVIRONMENTS)
    model = PPO(KnobPolicy, environments, n_steps=STEPS, learning_rate=3e-3, gamma=0.9, seed=0, device="cpu")
    monkeypatch.setattr(model, "train", lambda: None)
    model.learn(60 * ENVIRONMENTS * STEPS, callback=callback)
    rewards = callback._stored.data.rewards
    early, late = rewards[: 8 * ENVIRONMENTS].mean(), rewards[52 * ENVIRONMENTS : 60 * ENVIRONMENTS].mean()
    assert late > early + 0.1, f"{early} to {late}"
