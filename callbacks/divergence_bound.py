"""Bound on divergence: a Lagrange multiplier per workload, learned along with the policy.

The environments' reward has the term ``-multiplier * max(divergence - bound, 0)``; here the multiplier of a workload
rises while its mean divergence is over the bound and falls while it is under it (dual ascent). The scale of rewards
changes along the way: a `PlateauCallback` or `EarlyStopCallback` beside it needs a long patience.
"""

from __future__ import annotations

import math
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from .checkpoints import JsonState
from .metrics import WorkloadMeans, innermost, step_infos, vector_source

HIGHEST = 100.0
"""Upper limit of multipliers: a reward that the penalty swamps, and `VecNormalize` clips, teaches nothing."""
_MOST_OVER = 2.0
_FALL = 0.2


def next_multiplier(multiplier: float, divergence: float, bound: float, rate: float, lowest: float) -> float:
    """The multiplier after a rollout, between `lowest` and 100.

    Args:
        multiplier: multiplier of the rollout, above 0.
        divergence: mean divergence of the rollout, 0 to 1.
        bound: bound on that mean, above 0.
        rate: rate of ascent, above 0.
        lowest: lower limit, above 0.
    """
    # A step in proportion to the multiplier, not a fixed step: what a workload needs lies anywhere between 0.5 and 50
    # (speedups from 0.5 to 5, gained over divergences from a tenth to a half). In a toy trial over concave, linear,
    # convex and steep frontiers with bounds from 0.02 to 0.1, small fixed steps left steep ones over the bound most of
    # the time, and large ones cycled on convex ones.
    over = min((divergence - bound) / bound, _MOST_OVER)
    # It falls more slowly than it rises, and never far. Where speed is a convex function of divergence, less is needed
    # to stay at the bound than to come back to it; a multiplier that falls as fast as it rises lets go each time and
    # cycles. Since the penalty is 0 below the bound, too high a multiplier costs little. (In the trial the bound was
    # exceeded by a fifth in up to a third of the late rollouts with an equal fall, and in 8 % at worst like this.)
    step = rate * (over if over > 0 else _FALL * over)
    return min(max(multiplier * math.exp(step), lowest), HIGHEST)


class DivergenceBoundCallback(JsonState, BaseCallback):
    """Learns a multiplier per workload, and sets it on the environments before learning and after every rollout.

    A rollout's divergence is the mean of ``info["divergence"]`` weighted by ``info["tokens"]``. The environments are
    either single environments, with a method `set_divergence_multiplier`, or a vector environment behind an adaptor,
    with `set_divergence_multipliers` and the attribute `workload_names`.

    ============================  =======================================================
    tag                           meaning
    ============================  =======================================================
    ``bound/multiplier/<name>``   multiplier of the next rollout
    ``bound/divergence/<name>``   mean of the rollout, 0 to 1
    ``bound/kept``                share of the rollout's workloads that kept the bound
    ============================  =======================================================

    Args:
        bound: bound on the mean divergence, above 0, at most 1. For the target's exact text use a lossless decoder.
        rate: rate of ascent, above 0: a multiplier whose workload has twice the divergence allowed grows by the factor
            exp(rate) a rollout.
        start: every multiplier at first, and the least it falls back to; above 0, at most 100. A policy that has
            settled far over the bound is slow to come back: better too high than too low.

    Attributes:
        multipliers: multiplier by workload.

    Raises:
        ValueError: an argument is out of range; or, when learning starts, the environments lack something.
    """

    state_name = "divergence_bound"

    def __init__(self, bound: float, rate: float = 0.1, start: float = 10.0) -> None:
        super().__init__()
        if not 0 < bound <= 1:
            raise ValueError(f"bound must be above 0 and at most 1, got {bound}; for 0 use a lossless decoder")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be a finite number above 0, got {rate}")
        if not 0 < start <= HIGHEST:
            raise ValueError(f"start must be above 0 and at most {HIGHEST:g}, got {start}")
        self.bound, self.rate, self.start = bound, rate, start
        self.multipliers: dict[str, float] = {}
        self._rows: list[str] = []  # the workload of each single environment; empty for a vector environment

    def _on_training_start(self) -> None:
        source = vector_source(self.training_env)
        if source is None:
            infos = innermost(self.training_env).reset_infos
            self._rows = [info["workload"] for info in infos if "workload" in info]
            names = list(dict.fromkeys(self._rows))
            if len(self._rows) < len(infos):
                raise ValueError(
                    "these environments do not name their workload in their info; DivergenceBoundCallback "
                    "is for tuning environments such as specgym/Thresholds-v0"
                )
        else:
            names = list(source.get_attr("workload_names", [0])[0])
        self.multipliers = {name: self.multipliers.get(name, self.start) for name in names}
        try:
            self._set()
        except AttributeError as error:
            raise ValueError(
                f"these environments take no multiplier for a divergence bound ({error}); DivergenceBoundCallback is "
                "for tuning environments such as specgym/Thresholds-v0"
            ) from error

    def _on_rollout_start(self) -> None:
        self._means = WorkloadMeans()

    def _on_step(self) -> bool:
        step = step_infos(self)
        if "divergence" in step.entries:
            self._means.add(step, {"divergence": step.entries["divergence"]}, step.entries.get("tokens"))
        return True

    def _on_rollout_end(self) -> None:
        divergences = {name: means["divergence"] for name, means in self._means.by_workload().items()}
        for name, divergence in divergences.items():
            before = self.multipliers.get(name, self.start)
            self.multipliers[name] = next_multiplier(before, divergence, self.bound, self.rate, self.start)
            self.logger.record(f"bound/multiplier/{name}", self.multipliers[name])
            self.logger.record(f"bound/divergence/{name}", divergence)
        if divergences:
            kept = [divergence <= self.bound for divergence in divergences.values()]
            self.logger.record("bound/kept", sum(kept) / len(kept))
        self._set()

    def _set(self) -> None:
        if not self._rows:
            self.training_env.env_method("set_divergence_multipliers", dict(self.multipliers))
        for name in dict.fromkeys(self._rows):
            rows = [row for row, workload in enumerate(self._rows) if workload == name]
            self.training_env.env_method("set_divergence_multiplier", self.multipliers[name], indices=rows)

    def _state(self) -> dict[str, Any]:
        return {"multipliers": self.multipliers}

    def _restore(self, state: dict[str, Any]) -> None:
        self.multipliers = {str(name): float(value) for name, value in state["multipliers"].items()}
