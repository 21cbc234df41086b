"""Callbacks that adapt each workload's environments: divergence multipliers, prices of time, priorities.

Bound on divergence: a Lagrange multiplier per workload, learned along with the policy.

The environments' reward has the term ``-multiplier * max(divergence - bound, 0)``; here the multiplier of a workload
rises while its mean divergence is over the bound and falls while it is under it (dual ascent). The scale of rewards
changes along the way: a `PlateauCallback` or `EarlyStopCallback` beside it needs a long patience.

Price of time of draft-length control: it follows the throughput that the policy reaches.

Workload priorities: practise where there is most to learn.

After Jiang, Grefenstette and Rocktäschel, "Prioritized Level Replay" (arXiv 2010.03934), with workloads for levels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback

from specgym.decoding import ArgumentError, number

from .checkpoints import JsonState
from .metrics import Floats, WorkloadMeans, innermost, step_infos, vector_source

HIGHEST = 1000.0
"""Upper limit of multipliers: a reward that the penalty swamps, and `VecNormalize` clips, teaches nothing."""
_MOST_OVER = 2.0
_FALL = 0.2


def next_multiplier(multiplier: float, divergence: float, bound: float, rate: float, lowest: float) -> float:
    """The multiplier after a rollout, between `lowest` and `HIGHEST`.

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

    A rollout's divergence is the mean of ``info["divergence"]`` weighted by ``info["tokens"]``, over the second half of
    its steps. The environments are either single environments, with a method `set_divergence_multiplier`, or a vector
    environment behind an adaptor, with `set_divergence_multipliers` and the attribute `workload_names`.

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
        start: every multiplier at first, and the least it falls back to; above 0, at most 1000. A policy that has
            settled far over the bound is slow to come back: better too high than too low.

    Attributes:
        multipliers: multiplier by workload.

    Raises:
        ValueError: an argument is out of range; or, when learning starts, the environments lack something.
    """

    state_name = "divergence_bound"

    def __init__(self, bound: float, rate: float = 0.3, start: float = 30.0) -> None:
        super().__init__()
        self.bound = number("bound", bound, above=0, at_most=1, hint="for 0 use a lossless decoder")
        self.rate = number("rate", rate, above=0)
        self.start = number("start", start, above=0, at_most=HIGHEST)
        self.multipliers: dict[str, float] = {}
        self._rows: list[str] = []  # the workload of each single environment; empty for a vector environment

    def _on_training_start(self) -> None:
        source = vector_source(self.training_env)
        if source is None:
            infos = innermost(self.training_env).reset_infos
            self._rows = [info["workload"] for info in infos if "workload" in info]
            names = list(dict.fromkeys(self._rows))
            if len(self._rows) < len(infos):
                raise ArgumentError(
                    "these environments do not name their workload in their info; DivergenceBoundCallback "
                    "is for tuning environments such as specgym/Thresholds-v0"
                )
        else:
            names = list(source.get_attr("workload_names", [0])[0])
        self.multipliers = {name: self.multipliers.get(name, self.start) for name in names}
        try:
            self._set()
        except AttributeError as error:
            raise ArgumentError(
                f"these environments take no multiplier for a divergence bound ({error}); DivergenceBoundCallback is "
                "for tuning environments such as specgym/Thresholds-v0"
            ) from error

    def _on_rollout_start(self) -> None:
        self._means = WorkloadMeans()
        self._steps = 0

    def _on_step(self) -> bool:
        step = step_infos(self)
        self._steps += 1
        # Episodes begin at random settings, many of them far beyond the bound, which say nothing of where the policy
        # goes; and a rollout is as long as an episode.
        late = 2 * self._steps > self.model.rollout_buffer.buffer_size  # type: ignore[attr-defined]
        if late and "divergence" in step.entries:
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
        self.smoothing = number("smoothing", smoothing, above=0, at_most=1)
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


def workload_probabilities(
    scores: Floats, staleness: Floats, *, temperature: float = 1.0, staleness_weight: float = 0.1
) -> Floats:
    """Probabilities with which workloads are practised next.

    Args:
        scores: learning potential, shape (workloads,); NaN for a workload never seen. As long as there are such
            workloads, only they are drawn, all alike.
        staleness: rollouts since a workload was last seen, shape (workloads,), at least 0.
        temperature: above 0; the workload of rank r among the scores has priority (1/r)^(1/temperature).
        staleness_weight: share of the probability given in proportion to staleness, 0 to 1. If nothing is stale, the
            scores have all of it.

    Returns:
        Shape (workloads,), at least 0, with sum 1.
    """
    unseen = np.isnan(scores)
    if unseen.any():
        return unseen / unseen.sum()
    ranks = np.empty(len(scores))
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    by_score = ranks ** (-1 / temperature)
    by_score /= by_score.sum()
    if not staleness.any():
        return by_score
    return (1 - staleness_weight) * by_score + staleness_weight * staleness / staleness.sum()


class WorkloadPriorities(JsonState, BaseCallback):
    """Sets, after every rollout, how often the environments draw each workload from the next episodes on.

    A workload's score is the mean absolute advantage of its transitions in the last rollout that had any: how wrong
    the value network was, in either direction, which is what is left to learn. Transitions that the rollout buffer
    marks as not usable count for nothing.

    It needs a vector environment behind an adaptor (a `VecEnv` with `vector_infos`), with the attributes
    `workload_names` and `workload_of` (shape (environments,)) and the method `set_workload_weights`.

    ==========================================  =============================================
    tag                                         meaning
    ==========================================  =============================================
    ``workload_priority/probability/<name>``    probability of being drawn for the next episode
    ``workload_priority/score/<name>``          mean absolute advantage
    ==========================================  =============================================

    Args:
        temperature: as for `workload_probabilities`: towards 0 only the first rank counts, towards infinity all alike.
        staleness_weight: as for `workload_probabilities`.

    Attributes:
        scores: learning potential by workload; workloads never seen are left out.
        last_seen: last rollout, counted from 1, that had transitions of a workload.
        rollouts: rollouts seen so far.

    Raises:
        ValueError: an argument is out of range; or, when learning starts, the environments cannot redraw workloads.
    """

    state_name = "workload_priorities"

    def __init__(self, temperature: float = 1.0, staleness_weight: float = 0.1) -> None:
        super().__init__()
        self.temperature = number("temperature", temperature, above=0)
        self.staleness_weight = number("staleness_weight", staleness_weight, at_least=0, at_most=1)
        self.scores: dict[str, float] = {}
        self.last_seen: dict[str, int] = {}
        self.rollouts = 0
        self._names: list[str] = []

    def probabilities(self) -> dict[str, float]:
        """Current probabilities of the workloads of the environments being trained on."""
        scores = np.array([self.scores.get(name, np.nan) for name in self._names])
        staleness = np.array([self.rollouts - self.last_seen.get(name, 0) for name in self._names], np.float64)
        values = workload_probabilities(
            scores, staleness, temperature=self.temperature, staleness_weight=self.staleness_weight
        )
        return dict(zip(self._names, values.tolist(), strict=True))

    def _on_training_start(self) -> None:
        source = vector_source(self.training_env)
        needed = ("workload_names", "workload_of", "set_workload_weights")
        lacking = [name for name in needed if source is None or not _has(source, name)]
        if lacking:
            raise ArgumentError(
                f"these environments cannot redraw their workloads (they have no {lacking[0]}), so that priorities "
                "would change nothing; practise on recorded traces, as train.py --tuner does, or leave "
                "WorkloadPriorities out"
            )
        self._names = list(source.get_attr("workload_names", [0])[0])
        if self.scores:
            self._set_weights()

    def _on_rollout_start(self) -> None:
        self._collected: list[NDArray[np.int64]] = []
        self._current = self._workload_of()

    def _on_step(self) -> bool:
        # When an episode ends, its environment has moved on to another workload before this is called.
        self._collected.append(self._current)
        self._current = self._workload_of()
        return True

    def _on_rollout_end(self) -> None:
        buffer: Any = self.model.rollout_buffer  # type: ignore[attr-defined]  # on-policy algorithms have it
        workloads = np.stack(self._collected)
        usable = np.asarray(getattr(buffer, "usable", np.ones(workloads.shape, bool)))
        members = workloads[usable]
        counts = np.bincount(members, minlength=len(self._names))
        sums = np.bincount(members, weights=np.abs(buffer.advantages[usable]), minlength=len(self._names))
        self.rollouts += 1
        for place in np.flatnonzero(counts):
            self.scores[self._names[place]] = float(sums[place] / counts[place])
            self.last_seen[self._names[place]] = self.rollouts
        self._set_weights()
        for name, probability in self.probabilities().items():
            self.logger.record(f"workload_priority/probability/{name}", probability)
            if name in self.scores:
                self.logger.record(f"workload_priority/score/{name}", self.scores[name])

    def _workload_of(self) -> NDArray[np.int64]:
        return np.array(self.training_env.get_attr("workload_of", [0])[0])  # a copy: it is changed in place

    def _set_weights(self) -> None:
        self.training_env.env_method("set_workload_weights", list(self.probabilities().values()))

    def _state(self) -> dict[str, Any]:
        return {"scores": self.scores, "last_seen": self.last_seen, "rollouts": self.rollouts}

    def _restore(self, state: dict[str, Any]) -> None:
        scores = {str(name): float(score) for name, score in state["scores"].items()}
        last_seen = {str(name): int(state["last_seen"][name]) for name in scores}
        self.rollouts, self.scores, self.last_seen = int(state["rollouts"]), scores, last_seen


def _has(source: Any, name: str) -> bool:
    try:
        source.get_attr(name, [0])
    except AttributeError:
        return False
    return True
