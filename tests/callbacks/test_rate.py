"""Prices of time that follow the throughput reached, and go on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.logger import Logger

from specgym.callbacks import RateCallback


class Points:
    """Environments of two operating points, whose totals are set by the test."""

    def __init__(self) -> None:
        points = [
            SimpleNamespace(workload="tiny/prose", batch_size=1),
            SimpleNamespace(workload="tiny/code", batch_size=1),
        ]
        self.attributes: dict[str, Any] = {"points": points, "rates": np.ones(2)}
        self.totals: Any = None

    def get_attr(self, name: str, indices: Any = None) -> list[Any]:
        return [self.attributes[name]]

    def env_method(self, name: str, *arguments: Any) -> list[Any]:
        if name == "totals":
            return [self.totals]
        assert name == "set_rates"
        self.attributes["rates"] = np.array(arguments[0])
        return [None]


def started(callback: RateCallback, env: Points) -> RateCallback:
    model: Any = SimpleNamespace(get_env=lambda: env, logger=Logger(None, []), num_timesteps=0)
    callback.init_callback(model)
    callback.on_training_start({}, {})
    return callback


def rollout(callback: RateCallback, env: Points, throughput: list[float], seconds: list[float]) -> list[float]:
    counts = {name: np.array([8.0, 4.0]) for name in ("drafted", "accepted", "rounds")}
    env.totals = SimpleNamespace(throughput=np.array(throughput), seconds=np.array(seconds), **counts)
    callback.on_rollout_end()
    rates: list[float] = env.attributes["rates"].tolist()
    return rates


def test_rates_take_the_first_throughput_and_move_to_later_ones(tmp_path: Path) -> None:
    env = Points()
    callback = started(RateCallback(0.25), env)
    assert rollout(callback, env, [2.0, 0.0], [1.0, 0.0]) == [2.0, 1.0]  # no text of the second has been decoded yet
    assert rollout(callback, env, [3.0, 1.5], [1.0, 1.0]) == [2.25, 1.5]
    logged = callback.logger.name_to_value
    assert logged["rate/tiny/prose"] == 2.25
    assert logged["throughput/tiny/prose"] == 3.0
    assert logged["draft_length/tiny/code"] == logged["draft_acceptance_rate/tiny/code"] == 1.0

    callback.save_state(tmp_path)
    resumed, fresh = RateCallback(0.25), Points()
    resumed.load_state(tmp_path)
    started(resumed, fresh)
    assert fresh.attributes["rates"].tolist() == [2.25, 1.5]
    assert rollout(resumed, fresh, [3.25, 1.5], [1.0, 1.0]) == [2.5, 1.5]


def test_a_smoothing_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="smoothing"):
        RateCallback(0.0)
