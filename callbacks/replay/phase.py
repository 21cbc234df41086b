"""One phase of replay: past segments evaluated under the policy of this moment, and gradient steps around it."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import Tensor

from .segments import Segments, SegmentStore
from .vtrace import vtrace

_ROWS_AT_ONCE = 16384
"""Of a forward pass without gradients; bounds its memory."""


class ReplayPhase:
    """The policy at the start of a phase, by what it says of stored segments; steps are clipped around it.

    Args:
        model: whose policy learns, with its own optimiser, clip ranges, coefficients and norm of the gradient.
        store: the segments.

    Attributes:
        evaluated: which segments `recentre` has been called for, shape (capacity,).
        drift: mean |log(pi / mu)| of each over its usable steps; infinite where the policy's output is not finite.
        log_ratios: log(pi / mu) of every step, 0 where not usable; shape (capacity, steps), like the next ones.
        log_probs: of the actions, under pi.
        values: of the states.
        targets, advantages, weights: as in `VTrace`.
    """

    def __init__(self, model: PPO, store: SegmentStore) -> None:
        self._model, self._store = model, store
        self.evaluated = np.zeros(store.layout.capacity, bool)
        self.drift = np.zeros(store.layout.capacity)
        self.log_ratios, self.log_probs, self.values, self.targets, self.advantages, self.weights = (
            np.zeros((store.layout.capacity, store.layout.steps), np.float32) for _ in range(6)
        )

    def recentre(self, places: np.ndarray) -> None:
        """Evaluate segments, shape (segments,): log-probabilities, values, and V-trace with them."""
        at_once = max(_ROWS_AT_ONCE // self._store.layout.steps, 1)
        for start in range(0, len(places), at_once):
            part = places[start : start + at_once]
            self._recentre(part, self._store.take(part))

    def _recentre(self, places: np.ndarray, segments: Segments) -> None:
        model, usable = self._model, segments.usable
        cut = segments.truncated.copy()  # valued by the state in `after`
        cut[:, -1] |= ~segments.ends[:, -1]
        with torch.no_grad():
            valued, likely, _ = self._evaluate(segments, np.ones(usable.shape, bool))
            ahead = model.policy.predict_values(self._tensor(segments.after[cut])) if cut.any() else valued[:0]
        values, log_probs = (found.cpu().numpy().reshape(usable.shape) for found in (valued, likely))
        next_values = np.where(segments.ends, 0, np.roll(values, -1, axis=1))
        next_values[cut] = ahead.flatten().cpu().numpy()
        normaliser = model.get_vec_normalize_env()
        log_ratios = np.where(usable, log_probs - segments.log_probs, 0)
        traced = vtrace(
            rewards=segments.rewards if normaliser is None else normaliser.normalize_reward(segments.rewards),
            values=values,
            next_values=next_values,
            log_ratios=log_ratios,
            ends=segments.ends,
            usable=usable,
            gamma=model.gamma,
            gae_lambda=model.gae_lambda,
        )
        self.log_ratios[places], self.log_probs[places], self.values[places] = log_ratios, log_probs, values
        self.targets[places], self.advantages[places], self.weights[places] = traced
        drift = np.abs(log_ratios).sum(axis=1) / np.maximum(usable.sum(axis=1), 1)
        finite = np.isfinite(traced.targets).all(axis=1) & np.isfinite(drift)
        self.drift[places] = np.where(finite, drift, np.inf)
        self.evaluated[places] = True

    def step(self, places: np.ndarray, importance: np.ndarray) -> tuple[bool, dict[str, float]]:
        """One gradient step on a minibatch of evaluated segments.

        Only usable steps enter the networks. The surrogate is PPO's, weighted by V-trace and by `importance`; the
        latter also weighs the value loss and the entropy, so that their proportions stay as the model has them.

        Args:
            places: the segments, shape (segments,).
            importance: importance-sampling weight of each.

        Returns:
            Whether the policy is still within the model's `target_kl` (if not, no step was taken), and
            ``policy_loss``, ``value_loss``, ``clip_fraction``, ``effective_sample_size``.
        """
        model, segments = self._model, self._store.take(places)
        usable = segments.usable

        def flat(array: np.ndarray) -> Tensor:
            return self._tensor(np.broadcast_to(array, usable.shape)[usable].astype(np.float32))

        clip = model.clip_range(model._current_progress_remaining)  # type: ignore[operator]
        values, log_probs, entropy = self._evaluate(segments, usable)
        advantages = flat(self.advantages[places])
        if model.normalize_advantage and len(advantages) > 1:
            # Before any weight: a baseline is unbiased only if it is weighted, too.
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        sampled = flat(importance[:, None])
        weights = sampled * flat(self.weights[places])
        log_ratio = log_probs - flat(self.log_probs[places])
        ratio = log_ratio.exp()
        surrogate = torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip))
        policy_loss = -(weights * surrogate).mean()
        if model.clip_range_vf is not None:
            reach = model.clip_range_vf(model._current_progress_remaining)  # type: ignore[operator]
            before = flat(self.values[places])
            values = before + (values - before).clamp(-reach, reach)
        value_loss = (sampled * (flat(self.targets[places]) - values) ** 2).mean()
        entropy_loss = -(sampled * (-log_probs if entropy is None else entropy)).mean()
        measured = {
            "policy_loss": policy_loss.item(),
            "value_loss": value_loss.item(),
            "clip_fraction": ((ratio - 1).abs() > clip).float().mean().item(),
            "effective_sample_size": (weights.sum() ** 2 / (len(weights) * (weights**2).sum())).item(),
        }
        divergence = ((ratio - 1) - log_ratio).mean().item()
        if model.target_kl is not None and divergence > 1.5 * model.target_kl:
            return False, measured
        model.policy.optimizer.zero_grad()
        (policy_loss + model.ent_coef * entropy_loss + model.vf_coef * value_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.policy.parameters(), model.max_grad_norm)
        model.policy.optimizer.step()
        return True, measured

    def _evaluate(self, segments: Segments, which: np.ndarray) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, log-probabilities and entropies of the steps where `which` is True, each of shape (steps,)."""
        actions = self._tensor(segments.actions[which])
        if isinstance(self._model.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        observations = self._tensor(segments.observations[which])
        values, log_probs, entropy = self._model.policy.evaluate_actions(observations, actions)
        return values.flatten(), log_probs, entropy

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, device=self._model.device)
