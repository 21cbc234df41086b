"""V-trace: what past actions were worth under the policy of today (Espeholt et al. 2018, arXiv 1802.01561).

Both truncations are at 1, and the trace is cut by lambda as well (their remark 2). Then with
``rho = min(1, pi(a|x) / mu(a|x))``, for a policy pi of today and a policy mu that acted,

    A_t = r_t + gamma V(x_t+1) - V(x_t) + gamma lambda (v_t+1 - V(x_t+1)),      v_t = V(x_t) + rho_t A_t,

and for pi = mu this is generalised advantage estimation with its lambda-returns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class VTrace(NamedTuple):
    """Results of `vtrace`, each of shape (segments, steps).

    Attributes:
        targets: v, which the value of every state is regressed to.
        advantages: A, not weighted yet: a baseline may be subtracted first, which is unbiased only under the weight.
        weights: rho, 0..1, by which a policy gradient from the advantages is to be weighted; 0 where not usable.
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
    """Value targets and advantages of whole segments; every array has shape (segments, steps).

    Args:
        rewards: of every step, with nothing added for what a time limit cut off.
        values: of the states acted in.
        next_values: of the states arrived in: 0 where the episode terminated, and the value of the final state where
            it was truncated.
        log_ratios: log(pi / mu) of the actions.
        ends: whether the step ended an episode, by termination or truncation.
        usable: whether the step may be learned from. Where not, the advantage is 0, and the step before is
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
