"""What decoding did during every rollout, to the logger: for all environments together and for each workload."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

DECODING = ("speedup", "ms_per_token", "draft_acceptance_rate", "mean_acceptance_length", "divergence")
"""Entries of a step's `info` that are logged under ``decoding/``; those that name their own folder keep it."""
FOLDERS = ("knobs/", "reward/")


class DecodingMetricsCallback(BaseCallback):
    """Logs means over the steps of each rollout.

    ==============================  ============================================================================
    tag                             mean over the rollout's steps of
    ==============================  ============================================================================
    ``reward/total``                the environments' reward, before any normalisation
    ``reward/<term>``               its terms: speed, acceptance, range, divergence
    ``decoding/<metric>``           ``ms_per_token`` (ms), ``speedup`` (a ratio), ``draft_acceptance_rate`` (0..1),
                                    ``mean_acceptance_length`` (tokens per round), ``divergence`` (0..1)
    ``knobs/<knob>``                the thresholds in use, in their own units
    ``policy/<knob>_std``           the policy's standard deviation in the states visited, in units of the action
    ``workload/<name>/<tag>``       any of the first four, for one workload alone
    ==============================  ============================================================================

    Steps that a guard has marked (``info["numerics/left_out"]``) and values that are not finite count in no mean.
    """

    def _on_rollout_start(self) -> None:
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def _on_step(self) -> bool:
        normaliser = self.model.get_vec_normalize_env()
        rewards = self.locals["rewards"] if normaliser is None else normaliser.get_original_reward()
        for reward, info in zip(rewards, self.locals["infos"], strict=True):
            if info.get("numerics/left_out"):
                continue
            measured = {"reward/total": float(reward), **_measurements(info)}
            for tag, value in measured.items():
                if math.isfinite(value):
                    self._values[tag].append(value)
                    if "workload" in info:
                        self._values[f"workload/{info['workload']}/{tag}"].append(value)
        return True

    def _on_rollout_end(self) -> None:
        for tag, values in self._values.items():
            self.logger.record(tag, float(np.mean(values)))
        for tag, spread in self._spreads().items():
            self.logger.record(f"policy/{tag}", spread)

    def _spreads(self) -> dict[str, float]:
        parameters = getattr(self.model.policy, "distribution_parameters", None)
        buffer = getattr(self.model, "rollout_buffer", None)
        if parameters is None or buffer is None:
            return {}
        visited = buffer.observations.reshape(-1, *buffer.obs_shape)
        found = parameters(torch.as_tensor(visited, device=self.model.device))
        spreads = {name: float(values.nanmean()) for name, values in found.items() if name.endswith("_std")}
        return {name: value for name, value in spreads.items() if math.isfinite(value)}


def _measurements(info: dict[str, Any]) -> dict[str, float]:
    found = {f"decoding/{name}": float(info[name]) for name in DECODING if name in info}
    return found | {tag: float(value) for tag, value in info.items() if tag.startswith(FOLDERS)}
