"""Decoding as Gymnasium environments. Importing this registers their ids, and loads nothing heavier than Gymnasium."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from .measuring import measure_setting
    from .rewards import RewardSettings
    from .tuning import TuningEnv
    from .workloads import SHIPPED_WORKLOADS, TokenPrompts, Workload, workload

__all__ = [
    "SHIPPED_WORKLOADS",
    "RewardSettings",
    "TokenPrompts",
    "TuningEnv",
    "Workload",
    "measure_setting",
    "register_environments",
    "workload",
]

_HOMES = {
    "SHIPPED_WORKLOADS": "workloads",
    "RewardSettings": "rewards",
    "TokenPrompts": "workloads",
    "TuningEnv": "tuning",
    "Workload": "workloads",
    "measure_setting": "measuring",
    "workload": "workloads",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, and who only lists or registers environments needs neither.
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_environments() -> None:
    """Add the environments of this package to Gymnasium's registry; those already there are left alone."""
    if "specgym/Thresholds-v0" not in gymnasium.registry:
        gymnasium.register(
            id="specgym/Thresholds-v0",
            entry_point="specgym.envs.tuning:TuningEnv",
            max_episode_steps=20,
            kwargs={"decoder": "threshold", "workload": "tiny/prose"},
        )
