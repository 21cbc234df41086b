"""Less and less exploration: the weight of the entropy bonus falls with the progress of learning."""

from __future__ import annotations

import math
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback


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
        for name, value in (("start", start), ("end", end)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        self.start, self.end = start, end

    def _on_training_start(self) -> None:
        self._set()  # what learns at the start of a rollout needs it before the first has ended

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._set()

    def _set(self) -> None:
        # Not `_current_progress_remaining`: it is one rollout late here, and of the old plan if the run was prolonged.
        model: Any = self.model  # every on-policy algorithm has the coefficient, their base class does not
        done = min(model.num_timesteps / max(model._total_timesteps, 1), 1.0)
        model.ent_coef = (1 - done) * self.start + done * self.end
        self.logger.record("entropy/coefficient", model.ent_coef)
