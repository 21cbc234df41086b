"""A lower learning rate once the reward no longer rises."""

from __future__ import annotations

import math

from .improvement import RewardWatcher


class PlateauCallback(RewardWatcher):
    """Multiplies the learning rate by `factor` when the smoothed reward of the rollouts has not improved for a while.

    The lower rate holds from the update on that the rollout is for. It is written into the model as its own learning
    rate, so that a saved model keeps it; what has been seen of the reward is in the callback's own state.

    ==========================  ====================================================
    tag                         meaning
    ==========================  ====================================================
    ``plateau/learning_rate``   of the update that follows
    ``plateau/best``            highest smoothed mean reward of a rollout
    ``plateau/waiting``         rollouts since then, or since the rate was lowered
    ==========================  ====================================================

    Args:
        patience: rollouts without improvement before the rate is lowered; at least 1.
        factor: above 0 and below 1.
        minimum_rate: the rate never falls below it; above 0. One that starts lower is left as it is.
        threshold: what counts as improvement, relative to the best; at least 0.
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
        if not 0 < factor < 1:
            raise ValueError(f"factor must be above 0 and below 1, got {factor}")
        if not 0 < minimum_rate < math.inf:
            raise ValueError(f"minimum_rate must be a finite number above 0, got {minimum_rate}")
        super().__init__(patience, threshold, smoothing)
        self.factor, self.minimum_rate = factor, minimum_rate

    def _init_callback(self) -> None:
        if callable(self.model.learning_rate):
            raise ValueError(
                "the model's learning_rate is a schedule, which PlateauCallback would overrule; give a number, or "
                "leave the callback out"
            )

    def _on_update(self) -> None:
        rate = self.model.lr_schedule(1.0)
        if self.improvement.exhausted:
            self.improvement.waiting = 0
            rate = min(rate, max(rate * self.factor, self.minimum_rate))
            # Loading a model makes its schedule anew from `learning_rate`; a schedule set alone would be lost.
            self.model.learning_rate = rate
            self.model._setup_lr_schedule()
        self.logger.record("plateau/learning_rate", rate)
        self.logger.record("plateau/best", self.improvement.best)
        self.logger.record("plateau/waiting", self.improvement.waiting)
