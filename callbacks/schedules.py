"""Schedules of learning: a lower rate on a plateau, the end of learning, and a falling entropy bonus."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from specgym.decoding import ArgumentError, number, whole_number

from .checkpoints import JsonState
from .metrics import original_rewards


class Improvement:
    """Follows a noisy number that should rise, and counts for how long it has not.

    Args:
        patience: updates without improvement after which `exhausted` is True; at least 1.
        threshold: by how much the smoothed number must exceed the best so far, relative to its size; at least 0.
        smoothing: weight of the past in the exponential mean, 0 (none) to below 1. A mean over few prompts is noisy,
            and the best of many noisy numbers is out of reach for those after it.

    Attributes:
        best: highest smoothed number; None before the first update.
        waiting: updates since then.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, patience: int, threshold: float, smoothing: float) -> None:
        self.patience = whole_number("patience", patience)
        self.threshold = number("threshold", threshold, at_least=0)
        self.smoothing = number("smoothing", smoothing, at_least=0, below=1)
        self.best: float | None = None
        self.waiting = 0
        self._mean, self._weight = 0.0, 0.0

    @property
    def smoothed(self) -> float | None:
        """Exponential mean, free of the bias of its start; None before the first update."""
        return self._mean / self._weight if self._weight else None

    @property
    def exhausted(self) -> bool:
        """True when the patience is at its end."""
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
        """Return the state as plain JSON values."""
        return {"best": self.best, "waiting": self.waiting, "mean": self._mean, "weight": self._weight}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back a result of `state`."""
        self.best = None if state["best"] is None else float(state["best"])
        self.waiting = int(state["waiting"])
        self._mean, self._weight = float(state["mean"]), float(state["weight"])


class RewardWatcher(JsonState, BaseCallback):
    """Updates an `Improvement` with the mean reward of every rollout, before any normalisation.

    Rewards that a guard has marked and non-finite ones are left out; a rollout with no other changes nothing. Rewards
    of different rollouts are taken to be worth the same. Where their terms are weighed anew along the way, as by
    `DivergenceBoundCallback`, or workloads are drawn in changing shares, raise the patience.

    (Stable-Baselines3's own `StopTrainingOnNoModelImprovement` counts evaluations of an `EvalCallback`. Here
    evaluations are rare and cost live decoding, and every rollout has a reward anyway.)

    Args:
        patience: as for `Improvement`, in rollouts.
        threshold: as for `Improvement`.
        smoothing: as for `Improvement`.

    Attributes:
        improvement: the rewards' history so far.
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
            self.logger.record(f"{self.state_name}/best", self.improvement.best)
            self._on_update()
            self.logger.record(f"{self.state_name}/waiting", self.improvement.waiting)

    def _on_update(self) -> None:
        """React to an update."""

    def _state(self) -> dict[str, Any]:
        return self.improvement.state()

    def _restore(self, state: dict[str, Any]) -> None:
        self.improvement.restore(state)


class PlateauCallback(RewardWatcher):
    """Multiplies the learning rate by `factor` when the smoothed reward of the rollouts has stopped improving.

    The lower rate holds from the update that follows the rollout. It is written into the model as its own learning
    rate, so that a saved model keeps it; the rewards' history is in the callback's state.

    ==========================  ====================================================
    tag                         meaning
    ==========================  ====================================================
    ``plateau/learning_rate``   learning rate of the update that follows
    ``plateau/best``            highest smoothed mean reward of a rollout
    ``plateau/waiting``         rollouts since then, or since the rate was lowered
    ==========================  ====================================================

    Args:
        patience: rollouts without improvement before the rate is lowered; at least 1.
        factor: above 0 and below 1.
        minimum_rate: the rate never falls below it; above 0. A rate that starts lower is left as it is.
        threshold: least improvement that counts, relative to the best; at least 0.
        smoothing: weight of the past in the exponential mean, 0 to below 1.

    Raises:
        ValueError: an argument is out of range; or, when learning starts, the model's rate is a schedule already.
    """

    state_name = "plateau"

    def __init__(
        self,
        patience: int = 10,
        factor: float = 0.5,
        minimum_rate: float = 1e-5,
        threshold: float = 0.005,
        smoothing: float = 0.8,
    ) -> None:
        super().__init__(patience, threshold, smoothing)
        self.factor = number("factor", factor, above=0, below=1)
        self.minimum_rate = number("minimum_rate", minimum_rate, above=0)

    def _init_callback(self) -> None:
        if callable(self.model.learning_rate):
            raise ArgumentError(
                "the model's learning_rate is a schedule, which PlateauCallback would overrule; give a number, or "
                "leave the callback out"
            )

    def _on_update(self) -> None:
        rate = self.model.lr_schedule(1.0)
        if self.improvement.exhausted:
            self.improvement.waiting = 0
            rate = min(rate, max(rate * self.factor, self.minimum_rate))
            # A loaded model makes its schedule anew from `learning_rate`; a schedule set alone would be lost.
            self.model.learning_rate = rate
            self.model._setup_lr_schedule()
        self.logger.record("plateau/learning_rate", rate)


class EarlyStopCallback(RewardWatcher):
    """Stops learning when the smoothed reward of the rollouts has not improved for a while.

    The rollout that decides it is still learned from: Stable-Baselines3 can only be stopped at a step, so the first
    step of the next rollout stops it. Nothing is learned from that step, and it is not counted. The reason is part of
    the state: a run that was stopped stays stopped when it is resumed.

    ======================  =============================================
    tag                     meaning
    ======================  =============================================
    ``early_stop/best``     highest smoothed mean reward of a rollout
    ``early_stop/waiting``  rollouts since then
    ======================  =============================================

    Args:
        patience: rollouts without improvement before learning stops; at least 1.
        minimum_steps: environment steps, over all environments, before which it never stops; at least 0.
        threshold: least improvement that counts, relative to the best; at least 0.
        smoothing: weight of the past in the exponential mean, 0 to below 1.

    Attributes:
        reason: why learning stopped, in words; None as long as it goes on.

    Raises:
        ValueError: an argument is out of range.
    """

    state_name = "early_stop"

    def __init__(
        self, patience: int = 30, minimum_steps: int = 0, threshold: float = 0.005, smoothing: float = 0.8
    ) -> None:
        super().__init__(patience, threshold, smoothing)
        self.minimum_steps = whole_number("minimum_steps", minimum_steps, at_least=0)
        self.reason: str | None = None

    def _on_step(self) -> bool:
        if self.reason is not None:
            self.model.num_timesteps -= self.training_env.num_envs
            return False
        return super()._on_step()

    def _on_update(self) -> None:
        history = self.improvement
        if history.exhausted and self.model.num_timesteps >= self.minimum_steps:
            self.reason = (
                f"stopped after {self.model.num_timesteps} steps: the mean reward of a rollout has not risen by "
                f"{history.threshold:.2%} over its best, {history.best:.4g}, for {history.waiting} rollouts"
            )

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "reason": self.reason}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.reason = state["reason"]


class EntropyScheduleCallback(BaseCallback):
    """Moves PPO's entropy coefficient linearly from `start`, at step 0, to `end`, at the last update.

    It follows from the steps done and the steps planned alone, and so resumes by itself. Logged as
    ``entropy/coefficient``.

    Args:
        start: coefficient at the beginning, at least 0.
        end: coefficient at the end, at least 0.

    Raises:
        ValueError: a coefficient is negative or not finite.
    """

    def __init__(self, start: float, end: float) -> None:
        super().__init__()
        start, end = number("start", start, at_least=0), number("end", end, at_least=0)
        self._schedule = LinearSchedule(start, end, 1.0)

    def _on_training_start(self) -> None:
        self._set()  # callbacks that learn at the start of a rollout need it before the first has ended

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._set()

    def _set(self) -> None:
        # Not `_current_progress_remaining`: it is late by a rollout here, and of the old plan if the run was prolonged.
        model: Any = self.model  # every on-policy algorithm has the coefficient, their base class does not
        model.ent_coef = self._schedule(1 - min(model.num_timesteps / max(model._total_timesteps, 1), 1.0))
        self.logger.record("entropy/coefficient", model.ent_coef)
