"""The policy: what to change about the knobs, as a Gaussian whose spread depends on where the knobs are.

Everything a state needs before it enters the networks travels with the policy: observations come in their own units
and are scaled here, by the bounds of their space, to [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn
from torch.distributions import Normal

from specgym.decoding import NumericalError

from .training.sb3_vec_env import FiniteAdam


class BoundsScaler(BaseFeaturesExtractor):
    """Scales every entry of an observation from the bounds of its Box to [-1, 1].

    Args:
        observation_space: a Box with finite bounds, low below high.

    Raises:
        ValueError: a bound is missing or infinite.
    """

    low: Tensor
    high: Tensor

    def __init__(self, observation_space: spaces.Space) -> None:
        if not isinstance(observation_space, spaces.Box) or not np.isfinite(observation_space.high).all():
            raise ValueError(
                f"the policy scales observations by their bounds; it needs a bounded Box, got {observation_space}"
            )
        low, high = observation_space.low.reshape(-1), observation_space.high.reshape(-1)
        if not (np.isfinite(low).all() and (low < high).all()):
            raise ValueError(f"the bounds of {observation_space} must be finite, and low below high")
        super().__init__(observation_space, len(low))
        self.register_buffer("low", torch.as_tensor(low, dtype=torch.float32))
        self.register_buffer("high", torch.as_tensor(high, dtype=torch.float32))

    def forward(self, observations: Tensor) -> Tensor:
        """Observations of shape (batch, ...) as features of shape (batch, entries)."""
        return 2 * (observations.flatten(1) - self.low) / (self.high - self.low) - 1


class UncheckedGaussian(DiagGaussianDistribution):
    """Independent Gaussians that let NaN through, where torch's own check would end the training with an exception."""

    def proba_distribution(self, mean_actions: Tensor, log_std: Tensor) -> UncheckedGaussian:
        """The distribution for a batch of means and log standard deviations of the same shape."""
        self.distribution = Normal(mean_actions, log_std.exp(), validate_args=False)
        return self


class GuardedPolicy(ActorCriticPolicy):
    """An actor-critic whose non-finite outputs are counted and not trained on.

    While acting, a broken row becomes the action 0 with a NaN log-probability, by which `FiniteRolloutBuffer`
    recognises the transition; while training, the NaN reaches the gradient and `FiniteAdam` skips the step.

    Args:
        observation_space: of the environments.
        action_space: whose 0 is an action that changes nothing.
        lr_schedule: learning rate as a function of the remaining progress.
        patience: broken passes in a row after which the policy gives up.
        kwargs: as for `ActorCriticPolicy`.

    Attributes:
        broken_outputs: rows with a non-finite output so far.

    Raises:
        NumericalError: (when called) more than `patience` passes in a row were broken.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        *,
        patience: int = 50,
        **kwargs: Any,
    ) -> None:
        self.patience = patience
        self.broken_outputs = 0
        self._broken_in_a_row = 0
        kwargs.setdefault("optimizer_class", FiniteAdam)
        kwargs.setdefault("optimizer_kwargs", {"eps": 1e-5})  # as Stable-Baselines3 does for plain Adam
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"patience": self.patience}

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Action, value and log-probability for a batch of observations; a broken row acts with 0."""
        actions, values, log_prob = super().forward(obs, deterministic)
        broken = ~_finite_rows(actions) | ~log_prob.isfinite()
        self._note(broken | ~values.flatten().isfinite())
        return _at_rest(actions, broken), values, torch.where(broken, torch.nan, log_prob)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value, log-probability and entropy of given actions; NaN from a broken network goes on into the loss."""
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        self._note(~(values.flatten().isfinite() & log_prob.isfinite()))
        return values, log_prob, entropy

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Values of a batch of observations."""
        values = super().predict_values(obs)
        self._note(~values.flatten().isfinite(), whole=False)
        return values

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        actions = super()._predict(observation, deterministic)
        broken = ~_finite_rows(actions)
        self._note(broken)
        return _at_rest(actions, broken)

    def _note(self, broken: Tensor, whole: bool = True) -> None:
        """Count broken rows of a pass; one that looked at only a part of the networks does not clear the series."""
        rows = int(broken.sum())
        self.broken_outputs += rows
        if rows:
            self._broken_in_a_row += 1
        elif whole:
            self._broken_in_a_row = 0
        if self._broken_in_a_row > self.patience:
            raise NumericalError(
                f"the policy gave NaN or infinities in {self._broken_in_a_row} passes in a row ({self.broken_outputs} "
                "rows in all). Its weights are beyond repair: go back to an earlier checkpoint, or train anew with a "
                "lower learning rate."
            )


def _finite_rows(actions: Tensor) -> Tensor:
    return actions.isfinite().reshape(len(actions), -1).all(1)


def _at_rest(actions: Tensor, broken: Tensor) -> Tensor:
    rows = broken.reshape(-1, *(1 for _ in actions.shape[1:]))
    return torch.where(rows, torch.zeros_like(actions), actions)


class KnobPolicy(GuardedPolicy):
    """An actor-critic with separate two-layer networks of 64 tanh units for policy and value.

    For every knob the policy network gives a mean in (-1, 1) and a standard deviation between `std_low` and
    `std_high`, both depending on the state. The action is the change of each knob in units of the environment's own
    step, clipped to [-1, 1] by Stable-Baselines3 like any Gaussian action.

    Args:
        observation_space: a bounded Box.
        action_space: a Box(-1, 1) with one entry a knob.
        lr_schedule: learning rate as a function of the remaining progress.
        knob_names: one name for each entry of the action; by default ``knob0``, ``knob1``, ...
        std_low, std_high: bounds of the standard deviation, 0 < low < high.
        std_start: standard deviation before any learning, strictly between the bounds.
        patience: after so many broken passes in a row the policy gives up.
        kwargs: as for `ActorCriticPolicy`; a different `net_arch` for instance.

    Attributes:
        broken_outputs: rows of non-finite means, deviations, or values so far.

    Raises:
        ValueError: an argument is out of its range.
        NumericalError: (when called) more than `patience` passes in a row were broken.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        *,
        knob_names: Sequence[str] | None = None,
        std_low: float = 0.05,
        std_high: float = 1.0,
        std_start: float = 0.5,
        patience: int = 50,
        **kwargs: Any,
    ) -> None:
        if not isinstance(action_space, spaces.Box) or len(action_space.shape) != 1:
            raise ValueError(f"KnobPolicy acts on a flat Box, one entry a knob, got {action_space}")
        if not 0 < std_low < std_start < std_high:
            raise ValueError(
                "standard deviations must satisfy 0 < std_low < std_start < std_high, got "
                f"{std_low}, {std_start}, {std_high}"
            )
        names = tuple(knob_names or (f"knob{number}" for number in range(action_space.shape[0])))
        if len(names) != action_space.shape[0]:
            raise ValueError(f"{len(names)} knob names ({', '.join(names)}) for {action_space.shape[0]} actions")
        self.knob_names = names
        self.std_low, self.std_high, self.std_start = std_low, std_high, std_start
        kwargs.setdefault("features_extractor_class", BoundsScaler)
        super().__init__(observation_space, action_space, lr_schedule, patience=patience, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.action_dist = UncheckedGaussian(len(self.knob_names))
        super()._build(lr_schedule)
        del self.log_std  # one number a knob, whatever the state; also what PPO would log
        self.spread_net = nn.Linear(self.mlp_extractor.latent_dim_pi, len(self.knob_names))
        if self.ortho_init:
            self.spread_net.apply(partial(self.init_weights, gain=0.01))
        share = math.log(self.std_start / self.std_low) / math.log(self.std_high / self.std_low)
        nn.init.constant_(self.spread_net.bias, math.log(share / (1 - share)))
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {
            "knob_names": self.knob_names,
            "std_low": self.std_low,
            "std_high": self.std_high,
            "std_start": self.std_start,
        }

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Distribution:
        mean, log_std = self._mean_and_log_std(latent_pi)
        assert isinstance(self.action_dist, UncheckedGaussian)
        return self.action_dist.proba_distribution(mean, log_std)

    def _mean_and_log_std(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation; NaN where the network's output is not finite, since tanh(inf) looks well."""
        raw_mean, raw_spread = self.action_net(latent), self.spread_net(latent)
        low, high = math.log(self.std_low), math.log(self.std_high)
        mean = torch.where(raw_mean.isfinite(), raw_mean.tanh(), torch.nan)
        log_std = torch.where(raw_spread.isfinite(), low + (high - low) * raw_spread.sigmoid(), torch.nan)
        return mean, log_std

    def distribution_parameters(self, obs: Tensor) -> dict[str, Tensor]:
        """``<knob>_mean`` and ``<knob>_std`` for every knob, each of shape (batch,), in units of the action."""
        with torch.no_grad():
            latent = self.mlp_extractor.forward_actor(self.pi_features_extractor(obs))
            mean, log_std = self._mean_and_log_std(latent)
        parameters: dict[str, Tensor] = {}
        for place, name in enumerate(self.knob_names):
            parameters[f"{name}_mean"] = mean[:, place]
            parameters[f"{name}_std"] = log_std[:, place].exp()
        return parameters
