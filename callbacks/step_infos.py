"""What the environments said of a step, as arrays, wherever they said it.

Environments one by one say it in dictionaries, one an environment. A vector environment behind an adaptor (a `VecEnv`
with an attribute `vector_infos`) has arrays already, and making dictionaries of them would cost more than the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

LEFT_OUT = "numerics/left_out"
"""Entry of a step's info by which a guard marks a transition that is not learned from."""

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Names = NDArray[np.object_]
_ABOUT_THE_END = ("final_obs", "final_info")


@dataclass(frozen=True)
class StepInfos:
    """One step of all environments; every array has shape (environments,).

    Attributes:
        kept: False where a guard has marked the transition.
        workloads: the workload of the transition by name, None where an environment does not say.
        entries: numbers by their names, NaN where an environment does not give one. Where an episode has ended, they
            are those of its last step, not of the next one's start.
    """

    kept: Flags
    workloads: Names
    entries: Mapping[str, Floats]


def step_infos(callback: BaseCallback) -> StepInfos:
    """Read the step that a callback is being told of."""
    infos = callback.locals["infos"]
    source = vector_source(callback.training_env)
    workloads, entries = _of_dictionaries(infos) if source is None else _of_arrays(source.vector_infos, len(infos))
    return StepInfos(_kept(infos), workloads, entries)


def original_rewards(callback: BaseCallback) -> Floats:
    """Rewards of a step as the environments gave them, before any normalisation; NaN for marked transitions.

    Returns:
        Shape (environments,).
    """
    normaliser = callback.model.get_vec_normalize_env()
    rewards = callback.locals["rewards"] if normaliser is None else normaliser.get_original_reward()
    return np.where(_kept(callback.locals["infos"]), np.asarray(rewards, np.float64), np.nan)


def vector_source(venv: VecEnv) -> Any:
    """The adaptor of a vector environment under all wrappers; None if there are single environments there."""
    inside = innermost(venv)
    return inside if hasattr(inside, "vector_infos") else None


def innermost(venv: VecEnv) -> VecEnv:
    """What is under all wrappers."""
    while isinstance(venv, VecEnvWrapper):
        venv = venv.venv
    return venv


def _kept(infos: Sequence[Mapping[str, Any]]) -> Flags:
    return np.array([not info.get(LEFT_OUT) for info in infos])


def _of_dictionaries(infos: Sequence[Mapping[str, Any]]) -> tuple[Names, dict[str, Floats]]:
    workloads = np.array([info.get("workload") for info in infos], object)
    entries: dict[str, Floats] = {}
    for row, info in enumerate(infos):
        for name, value in info.items():
            if isinstance(value, int | float | np.number):
                if name not in entries:
                    entries[name] = np.full(len(infos), np.nan)
                entries[name][row] = value
    return workloads, entries


def _of_arrays(infos: Mapping[str, Any], environments: int) -> tuple[Names, dict[str, Floats]]:
    """Gymnasium's form: an array for each name, beside it a mask `_name` of those that gave it."""
    final = infos.get("final_info", {})
    ended = np.asarray(infos["_final_info"], bool) if final else np.zeros(environments, bool)
    parts = [(infos, ~ended), (final, ended)] if final else [(infos, ~ended)]
    workloads = np.full(environments, None, object)
    entries: dict[str, Floats] = {}
    for part, wanted in parts:
        for name in _entry_names(part):
            values, rows = np.asarray(part[name]), wanted & part.get(f"_{name}", True)
            if name == "workload":
                workloads[rows] = values[rows]
            elif values.ndim == 1 and values.dtype.kind in "buif" and rows.any():
                entries.setdefault(name, np.full(environments, np.nan))[rows] = values[rows]
    return workloads, entries


def _entry_names(infos: Mapping[str, Any]) -> Iterable[str]:
    return (name for name in infos if not name.startswith("_") and name not in _ABOUT_THE_END)
