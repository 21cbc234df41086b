"""Whether the reward of the rollouts still rises: what the learning rate and the end of learning are decided by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from .resumable import JsonState
from .step_infos import original_rewards


class Improvement:
    """Follows a noisy number that should rise, and counts how long it has not.

    Args:
        patience: updates without improvement after which `exhausted` is True; at least 1.
        threshold: by how much the smoothed number must exceed the best one, relative to its size; at least 0.
        smoothing: weight of the past in the exponential mean, 0 (none) to below 1. A mean over few prompts is noisy,
            and the best of many noisy numbers is one that no later one reaches.

    Attributes:
        smoothed: the exponential mean, free of the bias of its start; None before the first update.
        best: the highest smoothed number; None before the first update.
        waiting: updates since then.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, patience: int, threshold: float, smoothing: float) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if not 0 <= threshold < math.inf:
            raise ValueError(f"threshold must be a finite number of at least 0, got {threshold}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, got {smoothing}")
        self.patience, self.threshold, self.smoothing = patience, threshold, smoothing
        self.best: float | None = None
        self.waiting = 0
        self._mean, self._weight = 0.0, 0.0

    @property
    def smoothed(self) -> float | None:
        """The exponential mean."""
        return self._mean / self._weight if self._weight else None

    @property
    def exhausted(self) -> bool:
        """Whether the patience is at its end."""
        return self.waiting >= self.patience

    def update(self, value: float) -> None:
        """Take the next number."""
        self._mean = self.smoothing * self._mean + (1 - self.smoothing) * value
        self._weight = self.smoothing * self._weight + (1 - self.smoothing)
        smoothed = self._mean / self._weight
        if self.best is None or smoothed > self.best + self.threshold * abs(self.best):
            self.best, self.waiting = smoothed, 0
        else:
            self.waiting += 1

    def state(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"best": self.best, "waiting": self.waiting, "mean": self._mean, "weight": self._weight}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.best = None if state["best"] is None else float(state["best"])
        self.waiting = int(state["waiting"])
        self._mean, self._weight = float(state["mean"]), float(state["weight"])


class RewardWatcher(JsonState, BaseCallback):
    """Updates an `Improvement` with the mean reward of every rollout, as the environments gave it.

    Rewards that a guard has marked or that are not finite count for nothing; a rollout with no other changes nothing.
    It takes rewards of different rollouts to be worth the same. Where their terms are weighed anew along the way, as by
    `DivergenceBoundCallback`, or workloads are drawn in changing shares, give it patience.

    Args:
        patience: as for `Improvement`, in rollouts.
        threshold: as for `Improvement`.
        smoothing: as for `Improvement`.

    Attributes:
        improvement: what has been seen so far.
    """

    def __init__(self, patience: int, threshold: float, smoothing: float) -> None:
        super().__init__()
        self.improvement = Improvement(patience, threshold, smoothing)
        self._sum, self._count = 0.0, 0

    def _on_rollout_start(self) -> None:
        self._sum, self._count = 0.0, 0

    def _on_step(self) -> bool:
        rewards = original_rewards(self)
        finite = np.isfinite(rewards)
        self._sum += float(rewards[finite].sum())
        self._count += int(np.count_nonzero(finite))
        return True

    def _on_rollout_end(self) -> None:
        if self._count:
            self.improvement.update(self._sum / self._count)
            self._on_update()

    def _on_update(self) -> None:
        """Called after every update."""

    def _state(self) -> dict[str, Any]:
        return self.improvement.state()

    def _restore(self, state: dict[str, Any]) -> None:
        self.improvement.restore(state)
