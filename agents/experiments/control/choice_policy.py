"""The policy that chooses who drafts the next token, or that the target verifies: one network scores every draft."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from specgym.decoding import FEATURES, MOST_DRAFTS, SLOT_FEATURES

from ...policy import GuardedPolicy
from .stop_policy import USUAL, USUAL_REMAINING, UncheckedCategorical, UsualScaler, tanh_layers

USUAL_OF_DRAFT = {
    "available": (0.0, 1.0),
    "free": (0.5, 0.5),
    "cost_ratio": (0.25, 0.2),
    "unread": (1.0, 2.0),
    "next_confidence": (0.5, 0.5),
    "next_matched": (1.5, 1.5),
    "agreement": (0.3, 0.4),
    "chance": (0.5, 0.5),
    "recent_acceptance": (0.5, 0.25),
    "recent_hits": (0.5, 0.25),
    "drafting": (0.5, 0.5),
}
"""Usual middle and spread of the features of each draft. Those of `available` leave it as it is, 0 or 1."""
COMMON, OF_DRAFT = len(FEATURES), len(SLOT_FEATURES)
_SEEN = COMMON + MOST_DRAFTS * OF_DRAFT
AVAILABLE = [feature.name for feature in SLOT_FEATURES].index("available")
_NEVER = -1e8  # logit of a draft that cannot go on; finite, since what is not counts as broken


class ChoiceScaler(UsualScaler):
    """Scales features of several drafts, and behind them what remains acceptable of each."""

    usual: ClassVar[Sequence[tuple[float, float]]] = (
        *(USUAL[feature.name] for feature in FEATURES),
        *[USUAL_OF_DRAFT[feature.name] for feature in SLOT_FEATURES] * MOST_DRAFTS,
        *[USUAL_REMAINING] * MOST_DRAFTS,
    )


class DraftScores(nn.Module):
    """Scores of drafts, by one network for all of them.

    A draft is scored by its own features, those that all have in common, and the sum of those of all drafts that can
    go on. So neither the order of the drafts nor their number is learned.

    Args:
        widths: of the tanh layers, at least one.
        more: entries that are given besides the features.
    """

    def __init__(self, widths: Sequence[int], more: int = 0) -> None:
        super().__init__()
        self.common = nn.Linear(COMMON + more, widths[0])
        self.slot = nn.Linear(OF_DRAFT, widths[0], bias=False)
        self.others = nn.Linear(OF_DRAFT, widths[0], bias=False)
        self.hidden = tanh_layers(widths[0], widths[1:])
        self.score = nn.Linear(widths[-1], 1)

    def forward(self, scaled: Tensor, more: Sequence[Tensor] = ()) -> Tensor:
        """Score every draft.

        Args:
            scaled: features, shape (batch, `CHOICE_FEATURES` or more, of which the first count).
            more: further entries, each of shape (batch,).

        Returns:
            Shape (batch, `MOST_DRAFTS`); very low where a draft cannot go on.
        """
        drafts = scaled[:, COMMON:_SEEN].unflatten(1, (MOST_DRAFTS, OF_DRAFT))
        available = drafts[:, :, AVAILABLE] > 0.5
        pooled = (drafts * available.unsqueeze(2)).sum(1) / MOST_DRAFTS
        shared = self.common(torch.column_stack([scaled[:, :COMMON], *more])) + self.others(pooled)
        hidden = self.hidden(torch.tanh(shared.unsqueeze(1) + self.slot(drafts)))
        return torch.where(available, self.score(hidden).squeeze(2), _NEVER)


class ChoiceNetworks(nn.Module):
    """Scores for the actor, and a stack of tanh layers for the critic, which also sees what remains acceptable.

    Args:
        actor, critic: widths of their layers.
    """

    def __init__(self, actor: Sequence[int], critic: Sequence[int]) -> None:
        super().__init__()
        self.scores = DraftScores(actor)
        self.value_net = tanh_layers(_SEEN + MOST_DRAFTS, critic)
        self.latent_dim_pi, self.latent_dim_vf = 1 + MOST_DRAFTS, critic[-1]

    def forward(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits for the actor and features for the critic from scaled observations."""
        return self.forward_actor(scaled), self.forward_critic(scaled)

    def forward_actor(self, scaled: Tensor) -> Tensor:
        """Logits, shape (batch, 1 + `MOST_DRAFTS`); that of verifying is 0."""
        return nn.functional.pad(self.scores(scaled), (1, 0))

    def forward_critic(self, scaled: Tensor) -> Tensor:
        """Shape (batch, `latent_dim_vf`)."""
        result: Tensor = self.value_net(scaled)
        return result


class ScoredDrafts(UncheckedCategorical):
    """A categorical distribution whose logits are the scores as they are."""

    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        """Nothing stands between the scores and the logits."""
        return nn.Identity()


class ChoicePolicy(GuardedPolicy):
    """Choice among drafts, judged in training by a critic that knows what the replay knows (see `StoppingPolicy`).

    A draft that cannot go on is never chosen: the observation says which can.

    Args:
        observation_space: of `RoundEpisodes`.
        action_space: Discrete(1 + `MOST_DRAFTS`): verify, or the draft that proposes the next token.
        lr_schedule: learning rate as a function of the remaining progress.
        kwargs: as for `ActorCriticPolicy`; `net_arch` is a mapping with `pi` and `vf`.
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, lr_schedule: Schedule, **kwargs: Any
    ) -> None:
        kwargs.setdefault("features_extractor_class", ChoiceScaler)
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.action_dist = ScoredDrafts(1 + MOST_DRAFTS)
        super()._build(lr_schedule)
        if self.ortho_init:  # as the last layer of any policy, so that the first rollouts try everything
            self.scores.score.apply(partial(self.init_weights, gain=0.01))

    def _build_mlp_extractor(self) -> None:
        assert isinstance(self.net_arch, dict)
        # Stable-Baselines3 allows any module with these four methods and attributes, and declares one class.
        self.mlp_extractor = ChoiceNetworks(self.net_arch["pi"], self.net_arch["vf"])  # type: ignore[assignment]

    @property
    def scores(self) -> DraftScores:
        """The network that scores drafts."""
        networks: nn.Module = self.mlp_extractor
        assert isinstance(networks, ChoiceNetworks)
        return networks.scores

    @property
    def scaler(self) -> ChoiceScaler:
        """The scaling of observations."""
        assert isinstance(self.features_extractor, ChoiceScaler)
        return self.features_extractor
