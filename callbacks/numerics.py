"""NaN and infinities during learning: marked transitions go to the rollout buffer, counts to the logger."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from .metrics import LEFT_OUT

_log = logging.getLogger("specgym.numerics")


class NumericsCallback(BaseCallback):
    """Hands marks to the rollout buffer and counts to the logger, under ``numerics/``; warns when a count has grown.

    A guard around the environments marks transitions with ``info["numerics/left_out"]`` and counts them in its
    dictionary `caught`; the buffer leaves out the rows that its method `leave_out` is called with. Every model that
    trains behind such a guard needs this callback: without it marked transitions would be learned from.
    """

    def _init_callback(self) -> None:
        self._before = self.counts()

    def _on_step(self) -> bool:
        marked = np.array([bool(info.get(LEFT_OUT)) for info in self.locals["infos"]])
        buffer: Any = self.locals.get("rollout_buffer")
        if hasattr(buffer, "leave_out"):
            buffer.leave_out(marked)
        elif marked.any():
            raise TypeError(
                f"{type(buffer).__name__} cannot leave a spoiled transition out; build PPO with "
                "rollout_buffer_class=FiniteRolloutBuffer"
            )
        return True

    def _on_rollout_end(self) -> None:
        self._report()

    def _on_training_end(self) -> None:
        self._report()

    def counts(self) -> dict[str, int]:
        """Non-finite values caught so far, by place."""
        caught = getattr(self.training_env, "caught", {})  # wrappers above the guard hand it through
        policy = self.model.policy
        buffer = getattr(self.model, "rollout_buffer", None)
        return {
            "observations": caught.get("observations", 0),
            "rewards": caught.get("rewards", 0),
            "policy_outputs": getattr(policy, "broken_outputs", 0),
            "transitions_left_out": getattr(buffer, "left_out", 0),
            "optimiser_steps_skipped": getattr(policy.optimizer, "skipped", 0),
        }

    def _report(self) -> None:
        counts = self.counts()
        for name, count in counts.items():
            self.logger.record(f"numerics/{name}", count)
        grown = [f"{count - self._before[name]} {name}" for name, count in counts.items() if count > self._before[name]]
        if grown:
            _log.warning(
                "NaN or infinity caught before step %d, and kept out of learning: %s",
                self.num_timesteps,
                ", ".join(grown).replace("_", " "),
            )
        self._before = counts
