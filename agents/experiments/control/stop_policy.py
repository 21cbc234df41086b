"""The policy that stops drafts, and what it is trained on: rounds, with a critic that knows how they will end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from torch import Tensor, nn
from torch.distributions import Categorical

from specgym.decoding import FEATURES
from specgym.envs import LONGEST

from ...policy import GuardedPolicy
from ...training.sb3_vec_env import VectorEnvAdaptor

USUAL = {
    "confidence": (0.5, 0.3),
    "entropy": (2.0, 2.0),
    "product": (0.3, 0.3),
    "place": (3.0, 3.0),
    "recent_acceptance": (0.5, 0.25),
    "mean_acceptance_length": (2.5, 1.0),
    "cost_ratio": (0.25, 0.2),
    "batch_size": (2.0, 2.0),
    "matched": (3.0, 4.0),
    "drawn_probability": (0.5, 0.3),
    "temperature": (0.5, 0.5),
}
"""Usual middle and spread of the features. The bounds are too wide to scale by: a pair's
cost ratio is seldom above 0.5, of at most 4."""
USUAL_REMAINING = (0.0, 4.0)
"""Likewise of what remains acceptable."""


class UsualScaler(BaseFeaturesExtractor):
    """Scales features, and behind them what remains acceptable, by where they usually lie.

    Args:
        observation_space: of `RoundEpisodes`.

    Attributes:
        usual: middle and spread of every entry of an observation, in order.
    """

    usual: ClassVar[Sequence[tuple[float, float]]] = (*(USUAL[feature.name] for feature in FEATURES), USUAL_REMAINING)
    middle: Tensor
    spread: Tensor

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, len(self.usual))
        middle, spread = torch.tensor(self.usual, dtype=torch.float32).T.contiguous()
        self.register_buffer("middle", middle)
        self.register_buffer("spread", spread)

    def forward(self, observations: Tensor) -> Tensor:
        """Observations of shape (batch, entries), scaled."""
        return (observations - self.middle) / self.spread


class OneSidedNetworks(nn.Module):
    """Two stacks of tanh layers: the actor's sees the features alone, the critic's also what remains acceptable.

    Args:
        actor, critic: widths of their layers.
    """

    def __init__(self, actor: list[int], critic: list[int]) -> None:
        super().__init__()
        self.policy_net = tanh_layers(len(FEATURES), actor)
        self.value_net = tanh_layers(len(FEATURES) + 1, critic)
        self.latent_dim_pi, self.latent_dim_vf = actor[-1], critic[-1]

    def forward(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features for the actor and the critic from scaled observations, shape (batch, 12)."""
        return self.forward_actor(scaled), self.forward_critic(scaled)

    def forward_actor(self, scaled: Tensor) -> Tensor:
        """Shape (batch, `latent_dim_pi`)."""
        result: Tensor = self.policy_net(scaled[:, : len(FEATURES)])
        return result

    def forward_critic(self, scaled: Tensor) -> Tensor:
        """Shape (batch, `latent_dim_vf`)."""
        result: Tensor = self.value_net(scaled)
        return result


class UncheckedCategorical(CategoricalDistribution):
    """A categorical distribution that gives broken rows a NaN log-probability, where torch's own would raise."""

    def proba_distribution(self, action_logits: Tensor) -> UncheckedCategorical:
        """The distribution for a batch of logits, shape (batch, actions)."""
        self.logits, self.broken = action_logits, ~action_logits.isfinite().all(1)
        logits = torch.where(self.broken.unsqueeze(1), 0.0, action_logits)
        self.distribution = Categorical(logits=logits, validate_args=False)
        return self

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability of actions, shape (batch,)."""
        # The sum is not finite there, and unlike a constant it takes the loss's NaN on to the gradient.
        return torch.where(self.broken, self.logits.sum(1) + torch.nan, super().log_prob(actions))


class StoppingPolicy(GuardedPolicy):
    """Stop or go on, judged in training by a critic that knows what the replay knows.

    How many drafted tokens the target will accept is settled before the policy decides. A critic that is told removes
    that luck from the advantages, and the gradient stays right, since a baseline may depend on anything that the
    action does not change (Pinto et al., "Asymmetric Actor Critic for Image-Based Robot Learning", arXiv 1710.06542).
    The policy itself is not told, and so can be used live.

    Args:
        observation_space: of `RoundEpisodes`.
        action_space: Discrete(2): go on, stop.
        lr_schedule: learning rate as a function of the remaining progress.
        kwargs: as for `ActorCriticPolicy`; `net_arch` is a mapping with `pi` and `vf`.
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, lr_schedule: Schedule, **kwargs: Any
    ) -> None:
        kwargs.setdefault("features_extractor_class", UsualScaler)
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.action_dist = UncheckedCategorical(2)
        super()._build(lr_schedule)

    def _build_mlp_extractor(self) -> None:
        assert isinstance(self.net_arch, dict)
        # Stable-Baselines3 allows any module with these four methods and attributes, and declares one class.
        self.mlp_extractor = OneSidedNetworks(self.net_arch["pi"], self.net_arch["vf"])  # type: ignore[assignment]


class RoundEpisodes(VecEnvWrapper):
    """Makes an episode of every round, and appends to the observation what remains acceptable, for the critic.

    At the rate of the best throughput, tokens minus the price of time are worth 0 a round on average, whatever round
    follows (the renewal-reward argument behind Dinkelbach's form). So what comes after a round need not be credited to
    its decisions, and the noise of later rounds stays out of their advantages.

    Where drafts go on while the target verifies, a round leaves drafted tokens to the next one, and what they are worth
    shows there. So an episode ends with the first round that leaves none.

    Args:
        venv: of an environment that controls drafts.
    """

    def __init__(self, venv: VectorEnvAdaptor) -> None:
        features, actions = venv.observation_space, venv.action_space
        assert isinstance(features, spaces.Box)
        assert isinstance(actions, spaces.Discrete)
        bounds = np.full(actions.n - 1, LONGEST, np.float32)  # every action but that of verifying drafts a token
        observed = spaces.Box(np.append(features.low, -bounds), np.append(features.high, bounds))
        super().__init__(venv, observation_space=observed)
        self._adaptor = venv

    def reset(self) -> NDArray[np.float32]:
        """Begin a text in every environment."""
        observations = self._adaptor.reset()
        assert isinstance(observations, np.ndarray)
        return self._told(observations)

    def step_wait(self) -> VecEnvStepReturn:
        """A step; an episode ends where a round was verified."""
        observations, rewards, _, infos = self._adaptor.step_wait()
        assert isinstance(observations, np.ndarray)
        shown = self._adaptor.vector_infos
        ends = shown["rounds"] > 0
        return self._told(observations), rewards, ends & (shown["ready"] == 0) if "ready" in shown else ends, infos

    def _told(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        remaining = self._adaptor.vector_infos["remaining_acceptable"]
        return np.column_stack([features, remaining.astype(np.float32)])


def tanh_layers(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    """Stack of linear layers, each followed by a tanh.

    Args:
        inputs: entries of what goes in.
        widths: of the layers.
    """
    layers: list[nn.Module] = []
    for before, width in pairwise([inputs, *widths]):
        layers += [nn.Linear(before, width), nn.Tanh()]
    return nn.Sequential(*layers)
