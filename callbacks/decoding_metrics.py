"""What decoding did during every rollout, to the logger: for all environments together and for each workload."""

from __future__ import annotations

import math

import torch
from stable_baselines3.common.callbacks import BaseCallback

from .step_infos import original_rewards, step_infos
from .workload_means import WorkloadMeans

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
    ``knobs/<knob>``                those in use, in their own units
    ``policy/<knob>_std``           the policy's standard deviation in the states visited, in units of the action
    ``workload/<name>/<tag>``       any of the first four, for one workload alone
    ==============================  ============================================================================

    Steps that a guard has marked (``info["numerics/left_out"]``) and values that are not finite count in no mean.
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
        found = parameters(torch.as_tensor(visited, device=self.model.device))
        spreads = {name: float(values.nanmean()) for name, values in found.items() if name.endswith("_std")}
        return {name: value for name, value in spreads.items() if math.isfinite(value)}
