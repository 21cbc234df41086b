"""Decoding as Gymnasium environments. Importing this registers their ids, and loads nothing heavier than Gymnasium."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from .context import ContextLayout, ObserveContext
    from .draft_length import DraftLengthEnv
    from .measuring import measure_setting
    from .outcomes import Outcomes
    from .rewards import RewardSettings
    from .traces import Trace
    from .tuning import TuningEnv
    from .vector_context import VectorObserveContext
    from .workloads import SHIPPED_WORKLOADS, TokenPrompts, Workload, workload

__all__ = [
    "SHIPPED_WORKLOADS",
    "ContextLayout",
    "DraftLengthEnv",
    "ObserveContext",
    "Outcomes",
    "RewardSettings",
    "TokenPrompts",
    "Trace",
    "TuningEnv",
    "VectorObserveContext",
    "Workload",
    "measure_setting",
    "register_environments",
    "workload",
]

_HOMES = {
    "ContextLayout": "context",
    "DraftLengthEnv": "draft_length",
    "ObserveContext": "context",
    "Outcomes": "outcomes",
    "SHIPPED_WORKLOADS": "workloads",
    "RewardSettings": "rewards",
    "TokenPrompts": "workloads",
    "Trace": "traces",
    "TuningEnv": "tuning",
    "VectorObserveContext": "vector_context",
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
    tuned = {"Thresholds": "threshold", "Lookahead": "lookahead", "Medusa": "medusa", "DraftTree": "draft-tree"}
    for name, decoder in tuned.items():
        if f"specgym/{name}-v0" not in gymnasium.registry:
            gymnasium.register(
                id=f"specgym/{name}-v0",
                entry_point="specgym.envs.tuning:TuningEnv",
                vector_entry_point="specgym.envs.vector_tuning:TuningVectorEnv",
                max_episode_steps=20,
                kwargs={"decoder": decoder},
            )
    if "specgym/DraftLength-v0" not in gymnasium.registry:
        gymnasium.register(
            id="specgym/DraftLength-v0",
            entry_point="specgym.envs.draft_length:DraftLengthEnv",
            vector_entry_point="specgym.envs.vector_draft_length:DraftLengthVectorEnv",
        )
