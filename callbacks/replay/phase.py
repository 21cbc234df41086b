"""A phase of replay: past segments evaluated under the current policy by V-trace, and gradient steps around it.

V-trace (Espeholt et al. 2018, arXiv 1802.01561) says how much past actions were worth under the current policy. Both
truncations are at 1, and the trace is cut by lambda as well (their remark 2). Then with
``rho = min(1, pi(a|x) / mu(a|x))``, for the current policy pi and a policy mu that acted,

    A_t = r_t + gamma V(x_t+1) - V(x_t) + gamma lambda (v_t+1 - V(x_t+1)),      v_t = V(x_t) + rho_t A_t,

and for pi = mu this is generalised advantage estimation with its lambda-returns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import Tensor

from .segments import Segments, SegmentStore

_ROWS_AT_ONCE = 16384
"""Most rows of a forward pass without gradients; bounds its memory."""


class VTrace(NamedTuple):
    """Results of `vtrace`, each of shape (segments, steps).

    Attributes:
        targets: v, the regression targets of the value network.
        advantages: A, not weighted yet: a baseline may be subtracted first, which is unbiased only under the weight.
        weights: rho, 0..1, the weights of a policy gradient from the advantages; 0 where not usable.
    """

    targets: np.ndarray
    advantages: np.ndarray
    weights: np.ndarray


def vtrace(
    *,
    rewards: np.ndarray,
    values: np.ndarray,
    next_values: np.ndarray,
    log_ratios: np.ndarray,
    ends: np.ndarray,
    usable: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> VTrace:
    """Compute value targets and advantages of whole segments; every array has shape (segments, steps).

    Args:
        rewards: rewards, with nothing added for what a time limit cut off.
        values: values of the states acted in.
        next_values: values of the states arrived in: 0 where the episode terminated, and the value of the final state
            where it was truncated.
        log_ratios: log(pi / mu) of the actions.
        ends: True for steps that ended an episode, by termination or truncation.
        usable: True for steps that may be learned from. Elsewhere the advantage is 0, and the step before is
            bootstrapped from the value alone.
        gamma: discount, 0..1.
        gae_lambda: 0 trusts the values, 1 the rewards.

    Raises:
        ValueError: two arrays differ in shape.
    """
    arrays = {"values": values, "next_values": next_values, "log_ratios": log_ratios, "ends": ends, "usable": usable}
    for name, array in arrays.items():
        if array.shape != rewards.shape:
            raise ValueError(f"{name} must have the shape of rewards, {rewards.shape}, got {array.shape}")
    weights = np.where(usable, np.exp(np.minimum(log_ratios, 0)), 0)
    surprises = rewards + gamma * next_values - values
    goes_on = gamma * gae_lambda * ~ends
    advantages = np.zeros(rewards.shape)
    carried = np.zeros(rewards.shape[0])
    for step in reversed(range(rewards.shape[1])):
        advantages[:, step] = np.where(usable[:, step], surprises[:, step] + goes_on[:, step] * carried, 0)
        carried = weights[:, step] * advantages[:, step]
    return VTrace(values + weights * advantages, advantages, weights)


class ReplayPhase:
    """Outputs of the policy at the start of a phase for stored segments; gradient steps are clipped around them.

    Args:
        model: its policy learns, with its own optimiser, clip ranges, coefficients and norm of the gradient.
        store: segments.

    Attributes:
        evaluated: True for segments that `recentre` has been called for, shape (capacity,).
        drift: mean |log(pi / mu)| of a segment over its usable steps; infinite where the policy's output is not finite.
        log_ratios: log(pi / mu) of every step, 0 where not usable; shape (capacity, steps), like the next ones.
        log_probs: log-probabilities of the actions under pi.
        values: values of the states.
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
        values, log_probs = (output.cpu().numpy().reshape(usable.shape) for output in (valued, likely))
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
        """Take a gradient step on a minibatch of evaluated segments.

        Only usable steps enter the networks. The surrogate is PPO's, weighted by V-trace and by `importance`; the
        latter also weighs the value loss and the entropy, so that their proportions stay as the model has them.

        Args:
            places: segments, shape (segments,).
            importance: importance-sampling weights, shape (segments,).

        Returns:
            True if the policy is still within the model's `target_kl` (if not, no step was taken), and
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
