"""Price of time of draft-length control: it follows the throughput that the policy reaches."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from .checkpoints import JsonState


class RateCallback(JsonState, BaseCallback):
    """After every rollout, prices time at the throughput reached (the outer half of Dinkelbach's algorithm).

    It needs a `DraftLengthVectorEnv` behind an adaptor. For every operating point (``<workload>``, followed by
    `` x <batch size>`` where there are several) it logs

    ==========================================  ================================================================
    tag                                         meaning, over the rollout
    ==========================================  ================================================================
    ``throughput/<point>``                      tokens over seconds, relative to plain decoding
    ``rate/<point>``                            price of time from now on
    ``draft_length/<point>``                    drafted tokens a round
    ``draft_acceptance_rate/<point>``           accepted over drafted tokens
    ==========================================  ================================================================

    Args:
        smoothing: how far a rate moves to the throughput, above 0, at most 1.

    Attributes:
        rates: by operating point, those that have been reached at least once.

    Raises:
        ValueError: the smoothing is out of range.
    """

    state_name = "rate"

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing must be above 0 and at most 1, got {smoothing}")
        self.smoothing = smoothing
        self.rates: dict[str, float] = {}
        self._names: list[str] = []

    def _on_training_start(self) -> None:
        points = self._env("points")
        several = len({point.batch_size for point in points}) > 1
        self._names = [f"{point.workload} x {point.batch_size}" if several else point.workload for point in points]
        if self.rates:
            self._set_rates()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        totals = self.training_env.env_method("totals")[0]
        reached = totals.throughput
        for place in np.flatnonzero(totals.seconds > 0).tolist():
            name, throughput = self._names[place], float(reached[place])
            # The first throughput is far from the 1 that the rates begin with, so it is taken as it is.
            before = self.rates.get(name, throughput)
            self.rates[name] = before + self.smoothing * (throughput - before)
        rates = self._set_rates()
        for place, name in enumerate(self._names):
            self.logger.record(f"throughput/{name}", float(reached[place]))
            self.logger.record(f"rate/{name}", float(rates[place]))
            self.logger.record(f"draft_length/{name}", float(totals.drafted[place] / max(totals.rounds[place], 1)))
            accepted = float(totals.accepted[place] / max(totals.drafted[place], 1))
            self.logger.record(f"draft_acceptance_rate/{name}", accepted)

    def _set_rates(self) -> list[float]:
        before = self._env("rates")
        rates = [self.rates.get(name, float(rate)) for name, rate in zip(self._names, before, strict=True)]
        self.training_env.env_method("set_rates", rates)
        return rates

    def _env(self, name: str) -> Any:
        return self.training_env.get_attr(name, [0])[0]

    def _state(self) -> dict[str, Any]:
        return {"rates": self.rates}

    def _restore(self, state: dict[str, Any]) -> None:
        self.rates = {str(name): float(rate) for name, rate in state["rates"].items()}
