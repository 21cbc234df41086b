"""The learned tuner: from what a few settings gave on a workload to the setting to try next, and to recommend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from specgym.envs import ContextLayout

from ..evaluation.measurements import Measurement
from ..evaluation.replayed import Problem
from ..export.knob_policy import ExportedPolicy
from ..training.run_folder import RunFileError


class LearnedTuner:
    """An exported policy that has learned to tune; one object tunes any workload.

    It recommends what it would try next. The setting with the best measurement would often be one that was lucky.

    Args:
        policy: its state must be that of a `ContextLayout`.

    Attributes:
        policy: that it follows.
        layout: what the policy sees.
        ranges: (low, high) of every knob that it sets, by name.
        defaults: of every knob, by name.

    Raises:
        RunFileError: the policy has another state: it was not learned with `train.py --tuner`.
    """

    def __init__(self, policy: ExportedPolicy) -> None:
        self.policy = policy
        self.ranges = {knob.name: (knob.low, knob.high) for knob in policy.knobs}
        self.defaults = {knob.name: knob.default for knob in policy.knobs}
        remembered = sum(name.endswith("/divergence") for name in policy.state)
        self.layout = ContextLayout(self.ranges, max(remembered, 1))
        if list(policy.state) != self.layout.names:
            raise RunFileError("the policy sees no measurements, so it cannot tune; learn one with train.py --tuner")

    @classmethod
    def load(cls, folder: str | Path) -> LearnedTuner:
        """The tuner of a run's folder. Raises as `ExportedPolicy.load`, and RunFileError for another kind of policy."""
        return cls(ExportedPolicy.load(folder))

    def next(self, temperature: float, cost_ratio: float, history: Sequence[Measurement]) -> dict[str, float]:
        """The setting to try next, or to recommend.

        Args:
            temperature: of sampling; 0 for greedy decoding.
            cost_ratio: what one more drafted token costs, in plain tokens.
            history: what was measured so far, the newest last.

        Returns:
            The knobs by name, in their own units.
        """
        now: Mapping[str, float] = history[-1].knobs if history else self.defaults
        past = [
            (
                each.knobs,
                each.values["speedup"],
                each.values["draft_acceptance_rate"],
                each.values["divergence"],
            )
            for each in history
        ]
        action = self.policy(self.layout.observation(now, temperature, cost_ratio, past))
        knobs = {}
        for knob, place in zip(self.policy.knobs, action.tolist(), strict=True):
            value = knob.low + (min(max(place, -1.0), 1.0) + 1) / 2 * (knob.high - knob.low)
            knobs[knob.name] = float(round(value) if knob.integer else value)
        return knobs


class LearnedSearcher:
    """A learned tuner at work on one workload, in the form of the other methods (`searchers.Searcher`).

    Args:
        tuner: the tuner.
        problem: what it tunes.
    """

    name = "learned"

    def __init__(self, tuner: LearnedTuner, problem: Problem) -> None:
        self._tuner, self._problem = tuner, problem

    def propose(self, history: Sequence[Measurement]) -> dict[str, float]:
        """The setting to measure next."""
        return self._tuner.next(self._problem.temperature, self._problem.cost_ratio, history)

    def recommend(self, history: Sequence[Measurement]) -> dict[str, float]:
        """The setting to use, as far as is known; with an empty history, without any measurement."""
        return self.propose(history)
