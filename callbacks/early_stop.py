"""The end of learning once the reward no longer rises."""

from __future__ import annotations

from typing import Any

from .improvement import RewardWatcher


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
        threshold: what counts as improvement, relative to the best; at least 0.
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
        if minimum_steps < 0:
            raise ValueError(f"minimum_steps must be at least 0, got {minimum_steps}")
        super().__init__(patience, threshold, smoothing)
        self.minimum_steps = minimum_steps
        self.reason: str | None = None

    def _on_step(self) -> bool:
        if self.reason is not None:
            self.model.num_timesteps -= self.training_env.num_envs
            return False
        return super()._on_step()

    def _on_update(self) -> None:
        seen = self.improvement
        self.logger.record("early_stop/best", seen.best)
        self.logger.record("early_stop/waiting", seen.waiting)
        if seen.exhausted and self.model.num_timesteps >= self.minimum_steps:
            self.reason = (
                f"stopped after {self.model.num_timesteps} steps: the mean reward of a rollout has not risen by "
                f"{self.improvement.threshold:.2%} over its best, {seen.best:.4g}, for {seen.waiting} rollouts"
            )

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "reason": self.reason}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.reason = state["reason"]
