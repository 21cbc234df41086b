"""Decoding metrics of every rollout: read from the environments' infos, averaged by workload, sent to the logger.

NaN and infinities during learning: marked transitions go to the rollout buffer, counts to the logger.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

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


LEFT_OUT = "numerics/left_out"
"""Key of a step's info by which a guard marks a transition that must not be learned from."""
DECODING = ("speedup", "ms_per_token", "draft_acceptance_rate", "mean_acceptance_length", "divergence")
"""Entries of a step's info that are logged under ``decoding/``."""
FOLDERS = ("knobs/", "reward/")
"""Prefixes of further entries that are logged, under their own names."""

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Names = NDArray[np.object_]
_END_OF_EPISODE = ("final_obs", "final_info")


@dataclass(frozen=True)
class StepInfos:
    """Infos of one step of all environments; every array has shape (environments,).

    Attributes:
        kept: False where a guard has marked the transition.
        workloads: workload of the transition by name, None where an environment does not name it.
        entries: numbers by name, NaN where an environment has no such entry. Where an episode has ended, they are
            those of its last step, not of the next episode's start.
    """

    kept: Flags
    workloads: Names
    entries: Mapping[str, Floats]


def step_infos(callback: BaseCallback) -> StepInfos:
    """Collect the infos of the current step as arrays.

    Single environments have a dictionary each. A vector environment behind an adaptor (a `VecEnv` with an attribute
    `vector_infos`) has arrays already, and making dictionaries of them would cost more than the step.
    """
    infos = callback.locals["infos"]
    source = vector_source(callback.training_env)
    read = _read_dictionaries(infos) if source is None else _read_arrays(source.vector_infos, len(infos))
    return StepInfos(_kept(infos), *read)


def original_rewards(callback: BaseCallback) -> Floats:
    """Rewards of the current step before any normalisation; NaN for marked transitions.

    Returns:
        Shape (environments,).
    """
    normaliser = callback.model.get_vec_normalize_env()
    rewards = callback.locals["rewards"] if normaliser is None else normaliser.get_original_reward()
    return np.where(_kept(callback.locals["infos"]), np.asarray(rewards, np.float64), np.nan)


def vector_source(venv: VecEnv) -> Any:
    """Adaptor of a vector environment below all wrappers; None for single environments."""
    inside = innermost(venv)
    return inside if hasattr(inside, "vector_infos") else None


def innermost(venv: VecEnv) -> VecEnv:
    """Environments below all wrappers."""
    while isinstance(venv, VecEnvWrapper):
        venv = venv.venv
    return venv


def _kept(infos: Sequence[Mapping[str, Any]]) -> Flags:
    return np.array([not info.get(LEFT_OUT) for info in infos])


def _read_dictionaries(infos: Sequence[Mapping[str, Any]]) -> tuple[Names, dict[str, Floats]]:
    workloads = np.array([info.get("workload") for info in infos], object)
    entries: dict[str, Floats] = {}
    for row, info in enumerate(infos):
        for name, value in info.items():
            if isinstance(value, int | float | np.number):
                if name not in entries:
                    entries[name] = np.full(len(infos), np.nan)
                entries[name][row] = value
    return workloads, entries


def _read_arrays(infos: Mapping[str, Any], environments: int) -> tuple[Names, dict[str, Floats]]:
    """Read Gymnasium's form: an array for every name, and a mask `_name` of the environments that have the entry."""
    final = infos.get("final_info", {})
    ended = np.asarray(infos["_final_info"], bool) if final else np.zeros(environments, bool)
    parts = [(infos, ~ended), (final, ended)] if final else [(infos, ~ended)]
    workloads = np.full(environments, None, object)
    entries: dict[str, Floats] = {}
    for part, members in parts:
        for name in _entry_names(part):
            values, rows = np.asarray(part[name]), members & part.get(f"_{name}", True)
            if name == "workload":
                workloads[rows] = values[rows]
            elif values.ndim == 1 and values.dtype.kind in "buif" and rows.any():
                entries.setdefault(name, np.full(environments, np.nan))[rows] = values[rows]
    return workloads, entries


def _entry_names(infos: Mapping[str, Any]) -> Iterable[str]:
    return (name for name in infos if not name.startswith("_") and name not in _END_OF_EPISODE)


class WorkloadMeans:
    """Running means by name and workload; marked transitions and non-finite values count in no mean."""

    def __init__(self) -> None:
        self._rows: dict[str | None, int] = {}
        self._sums: dict[str, Floats] = {}  # by name: sum of weighted values and sum of weights, by workload

    def add(self, step: StepInfos, values: Mapping[str, Floats], weights: Floats | None = None) -> None:
        """Count a step.

        Args:
            step: workload of every environment, and whether its transition counts.
            values: by name, each of shape (environments,).
            weights: weight of every environment, at least 0, shape (environments,); a non-finite weight counts as 0.
                By default all weigh 1.
        """
        if not values:
            return
        rows = [self._rows.setdefault(name, len(self._rows)) for name in step.workloads.tolist()]
        weighed = step.kept if weights is None else np.where(step.kept & np.isfinite(weights), weights, 0.0)
        member = (np.array(rows)[:, None] == np.arange(len(self._rows))) * weighed[:, None].astype(np.float64)
        table = np.stack(list(values.values()))
        finite = np.isfinite(table)
        added = np.stack([np.where(finite, table, 0.0) @ member, finite @ member], axis=1)
        for name, sums in zip(values, added, strict=True):
            before = self._sums.get(name)
            if before is not None:
                sums[:, : before.shape[1]] += before
            self._sums[name] = sums

    def overall(self) -> dict[str, float]:
        """Means over all workloads, by name; names without a value are left out."""
        totals = {name: sums.sum(axis=1) for name, sums in self._sums.items()}
        return {name: float(value / weight) for name, (value, weight) in totals.items() if weight > 0}

    def by_workload(self) -> dict[str, dict[str, float]]:
        """Means by workload and name; transitions that name no workload are left out."""
        means: dict[str, dict[str, float]] = {}
        for name, sums in self._sums.items():
            for workload, row in self._rows.items():
                if workload is not None and row < sums.shape[1] and sums[1, row] > 0:
                    means.setdefault(workload, {})[name] = float(sums[0, row] / sums[1, row])
        return means


class DecodingMetricsCallback(BaseCallback):
    """Logs means over the steps of each rollout.

    ==============================  ============================================================================
    tag                             mean over the rollout's steps of
    ==============================  ============================================================================
    ``reward/total``                the environments' reward, before any normalisation
    ``reward/<term>``               its terms: speed, acceptance, range, divergence
    ``decoding/<metric>``           ``ms_per_token`` (ms), ``speedup`` (a ratio), ``draft_acceptance_rate`` (0..1),
                                    ``mean_acceptance_length`` (tokens per round), ``divergence`` (0..1)
    ``knobs/<knob>``                the knobs in use, in their own units
    ``policy/<knob>_std``           the policy's standard deviation in the states visited, in units of the action
    ``workload/<name>/<tag>``       any of the first four, for a single workload
    ==============================  ============================================================================

    Steps that a guard has marked (``info["numerics/left_out"]``) and non-finite values count in no mean.
    """

    def _on_rollout_start(self) -> None:
        self._means = WorkloadMeans()

    def _on_step(self) -> bool:
        step = step_infos(self)
        measured = {"reward/total": original_rewards(self)}
        measured |= {f"decoding/{name}": step.entries[name] for name in DECODING if name in step.entries}
        measured |= {tag: values for tag, values in step.entries.items() if tag.startswith(FOLDERS)}
        self._means.add(step, measured)
        return True

    def _on_rollout_end(self) -> None:
        for tag, mean in self._means.overall().items():
            self.logger.record(tag, mean)
        for workload, means in self._means.by_workload().items():
            for tag, mean in means.items():
                self.logger.record(f"workload/{workload}/{tag}", mean)
        for tag, spread in self._spreads().items():
            self.logger.record(f"policy/{tag}", spread)

    def _spreads(self) -> dict[str, float]:
        parameters = getattr(self.model.policy, "distribution_parameters", None)
        buffer = getattr(self.model, "rollout_buffer", None)
        if parameters is None or buffer is None:
            return {}
        visited = buffer.observations.reshape(-1, *buffer.obs_shape)
        named = parameters(torch.as_tensor(visited, device=self.model.device))
        spreads = {name: float(values.nanmean()) for name, values in named.items() if name.endswith("_std")}
        return {name: value for name, value in spreads.items() if math.isfinite(value)}
