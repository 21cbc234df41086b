"""Knob tuning by a backend: what single and vector environments share, from the start of an episode to the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from specgym.decoding import Knob, LatencyProfile

from ..arguments import one_of, whole_number
from ..backends.backend import Backend, Floats, Integers, Metrics, Number
from ..prompt_order import PromptOrder
from ..workloads import Workload
from .knob_space import ACTION_KINDS, ActionKind, KnobMoves
from .reward import RewardSettings, reward_terms

Start = Literal["random", "default"]
OPTIONS = ("knobs", "prompt")
"""Options of a reset."""


class KnobTuning:
    """Tuning of a decoder's knobs, in a single environment or in many.

    Attributes:
        workload_of: workload of every environment in this episode, shape (environments,), int64.
    """

    workload_of: Integers
    _backend: Backend
    _moves: KnobMoves
    _orders: PromptOrder
    np_random: np.random.Generator

    def _check(self, start: str, action: str, split: str | None, prompts_per_step: float) -> None:
        """Check options before anything is loaded."""
        one_of("start", start, ("random", "default"))
        one_of("action", action, ACTION_KINDS)
        if split is not None:
            one_of("split", split, ("train", "test"))
        self._start = start
        self._prompts_per_step = whole_number("prompts_per_step", prompts_per_step)

    def _set_up(
        self,
        backend: Backend,
        ranges: Mapping[str, tuple[float, float]] | None,
        scales: Mapping[str, float] | None,
        action: ActionKind,
        reward: RewardSettings | Mapping[str, Any] | None,
        workload_of: Integers,
    ) -> None:
        """Keep the backend, and what follows from it."""
        self._backend = backend
        self._moves = KnobMoves(backend.knobs, ranges, scales, action)
        backend.check_ranges(self._moves.ranges)
        self._reward = reward if isinstance(reward, RewardSettings) else RewardSettings(**(reward or {}))
        self._orders = PromptOrder(backend.prompts, len(workload_of))
        self.workload_of = workload_of

    @property
    def workloads(self) -> Sequence[Workload]:
        """Workloads that are tuned, in order."""
        return self._backend.workloads

    @property
    def profiles(self) -> Sequence[LatencyProfile]:
        """Latency profiles that charge the time of each workload, at the operating point."""
        return self._backend.profiles

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """Knobs that are tuned, in the order of observations and actions."""
        return self._moves.knobs

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high) of every knob here, by name, in its own units."""
        return dict(self._moves.ranges)

    @property
    def scales(self) -> dict[str, float]:
        """Change that an action of 1 makes to a knob, by name, in its own units; of a logarithmic one in doublings."""
        return dict(self._moves.scales)

    @property
    def reward_settings(self) -> RewardSettings:
        """Weights and ranges of the reward."""
        return self._reward

    def _first_states(self, *environments: int) -> Floats:
        """States at the start of an episode, shape (*environments, knobs)."""
        if self._start == "random":
            return self._moves.drawn(self.np_random, environments)
        return np.tile(self._moves.defaults(), (*environments, 1) if environments else 1)

    def _decode(self, values: Mapping[str, Floats], fixed_prompts: Integers | None) -> Metrics[Floats]:
        """Decode the next prompts of every environment; of several for an environment the metrics are of all together.

        Args:
            values: of every knob, each of shape (environments,).
            fixed_prompts: prompts that users chose, shape (environments,).
        """
        count, workload_of = self._prompts_per_step, self.workload_of
        if fixed_prompts is None:
            prompts = self._orders.take(workload_of, count, self.np_random).ravel()
        else:
            prompts = fixed_prompts.repeat(count)
        if count > 1:
            workload_of = workload_of.repeat(count)
            values = {name: numbers.repeat(count) for name, numbers in values.items()}
        return self._backend.decode(prompts, workload_of, values, self.np_random).pooled(count)

    def _judge(
        self, metrics: Metrics[Number], values: Mapping[str, Number], multiplier: Any, workload: Any
    ) -> tuple[Number, dict[str, Any]]:
        """Return rewards and the entries of `info`; numbers for numbers, arrays for arrays."""
        entries: dict[str, Any] = metrics.entries()
        terms = reward_terms(
            self._reward,
            speedup=entries["speedup"],
            acceptance_rate=entries["draft_acceptance_rate"],
            divergence=entries["divergence"],
            knobs=self._moves.knobs,
            values=values,
            multiplier=multiplier,
        )
        entries["workload"] = workload
        entries |= knob_entries(values)
        entries |= {f"reward/{term}": value for term, value in terms.items()}
        total: Any = sum(terms.values())
        return total, entries


def knob_entries(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of knobs by their names in `info`."""
    return {f"knobs/{name}": value for name, value in values.items()}
