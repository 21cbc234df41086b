"""A small learner with prioritised replay, and what it learns: to move a point."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from specgym.callbacks.replay.prioritised import PrioritisedReplayCallback
from specgym.callbacks.replay.settings import ReplaySettings

ENVIRONMENTS, STEPS = 4, 16


class Seek(gymnasium.Env[np.ndarray, Any]):
    """A point on a line is to be moved to 0.5; terminated where it falls off, truncated after five steps."""

    def __init__(self, discrete: bool = False) -> None:
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (1,), np.float32)
        self.discrete = discrete

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        self.place = self.np_random.uniform(-1, 1)
        return np.array([self.place], np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.place += 0.3 * (float(2 * action - 1) if self.discrete else float(action[0]))
        fallen = abs(self.place) > 1
        self.place = float(np.clip(self.place, -1, 1))
        return np.array([self.place], np.float32), 1 - abs(self.place - 0.5), fallen, self.steps == 5, {}


def learner(
    callback: PrioritisedReplayCallback, *, normalised: bool = False, discrete: bool = False, **more: Any
) -> PPO:
    """A PPO about to collect its first rollout."""
    environments: Any = DummyVecEnv([lambda: Seek(discrete)] * ENVIRONMENTS)
    if normalised:
        environments = VecNormalize(environments, norm_obs=False)
    arguments: dict[str, Any] = {
        "n_steps": STEPS,
        "batch_size": ENVIRONMENTS * STEPS,
        "n_epochs": 1,
        "seed": 3,
        "device": "cpu",
    }
    model = PPO("MlpPolicy", environments, policy_kwargs={"net_arch": [16]}, **(arguments | more))
    model._setup_learn(1000, callback)
    return model


def collect(model: PPO, callback: PrioritisedReplayCallback, rollouts: int = 1) -> None:
    """Collect rollouts; a phase of replay comes before every one but the first."""
    assert model.env is not None
    for _ in range(rollouts):
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, STEPS)


def parameters(model: PPO) -> torch.Tensor:
    """All of the policy, shape (parameters,)."""
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


def replayed(**settings: Any) -> tuple[PPO, PrioritisedReplayCallback]:
    """A learner with two rollouts stored, and PPO's own update in between."""
    callback = PrioritisedReplayCallback(ReplaySettings(**({"updates": 4, "segments_per_update": 6} | settings)))
    model = learner(callback)
    collect(model, callback)
    model.train()
    collect(model, callback)
    return model, callback
