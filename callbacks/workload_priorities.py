"""Workload priorities: practise where there is most to learn.

After Jiang, Grefenstette and Rocktäschel, "Prioritized Level Replay" (arXiv 2010.03934), with workloads for levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback

from .checkpoints import JsonState
from .metrics import Floats, vector_source


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
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if not 0 <= staleness_weight <= 1:
            raise ValueError(f"staleness_weight must be between 0 and 1, got {staleness_weight}")
        self.temperature, self.staleness_weight = temperature, staleness_weight
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
            raise ValueError(
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
