"""Spaces of knobs as an agent sees them: states within ranges, and actions that move them.

Knob tuning by a backend: what single and vector environments share, from the start of an episode to the reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from specgym.decoding import (
    ArgumentError,
    Knob,
    KnobError,
    LatencyProfile,
    doublings,
    from_doublings,
    one_of,
    whole_number,
)

from ..backends.backend import Backend, Integers, Metrics, Number
from ..prompt_order import PromptOrder
from ..workloads import Workload
from .reward import DIVERGENCE_BOUND, RewardSettings, reward_terms

Floats = NDArray[np.float64]
ActionKind = Literal["move", "place"]
ACTION_KINDS: tuple[ActionKind, ...] = ("move", "place")


class KnobMoves:
    """Spaces of some knobs, and the arithmetic between them.

    A state holds the knobs in their own units, in order, in its last dimension, so the functions take a single state,
    shape (knobs,), or many, shape (environments, knobs).

    Args:
        knobs: a decoder's.
        ranges: (low, high) of some knobs by name; see `env_ranges`.
        scales: how far an action of 1 moves some knobs, by name; see `default_scales`.
        action: `"move"` for actions that move the knobs, `"place"` for actions that put them somewhere: -1 is a range's
            low end, 1 its high end. Logarithmic knobs are moved and placed in doublings (`doublings`).

    Attributes:
        knobs: as given.
        ranges: of every knob, by name.
        scales: of every knob, by name.
        observation_space: of one environment.
        action_space: of one environment.

    Raises:
        KnobError: a range or a scale that makes no sense; the message names it.
    """

    def __init__(
        self,
        knobs: Sequence[Knob],
        ranges: Mapping[str, tuple[float, float]] | None = None,
        scales: Mapping[str, float] | None = None,
        action: ActionKind = "move",
    ) -> None:
        self._places = action == "place"
        self.knobs = tuple(knobs)
        self.ranges = env_ranges(knobs, ranges)
        self.scales = default_scales(knobs, self.ranges, scales)
        self._low = np.array([low for low, _ in self.ranges.values()])
        self._high = np.array([high for _, high in self.ranges.values()])
        self._scale = np.array([self.scales[name] for name in self.ranges])
        self._defaults = np.array([knob.default for knob in knobs])
        self._logarithmic = np.flatnonzero([knob.logarithmic for knob in knobs])
        self._first, self._last = self._positions_of(self._low), self._positions_of(self._high)
        self.observation_space = spaces.Box(self._low.astype(np.float32), self._high.astype(np.float32))
        self.action_space = spaces.Box(-1.0, 1.0, (len(knobs),), np.float32)

    def defaults(self) -> Floats:
        """Return the decoder's defaults, as far as the ranges allow; shape (knobs,)."""
        return self._clipped(self._defaults)

    def drawn(self, rng: np.random.Generator, shape: tuple[int, ...] = ()) -> Floats:
        """Draw states uniformly from the ranges, logarithmic knobs in doublings; shape (*shape, knobs)."""
        return self._states_at(rng.uniform(self._first, self._last, (*shape, len(self.knobs))))

    def moved(self, state: Floats, action: NDArray[np.float32]) -> Floats:
        """Return the states after actions of the same shape; what is beyond [-1, 1] is clipped, and so is the result.

        Raises:
            ValueError: the actions have another shape, or one is not finite.
        """
        moves = np.asarray(action, dtype=np.float64)
        if moves.shape != state.shape:
            raise ArgumentError(f"an action has shape {state.shape}, one number a knob, got {moves.shape}")
        if not np.isfinite(moves).all():
            *where, number = np.argwhere(~np.isfinite(moves))[0].tolist()
            of = f" of environment {where[0]}" if where else ""
            raise ArgumentError(
                f"the action for knob {self.knobs[number].name}{of} is {moves[(*where, number)]}; actions must be "
                "finite numbers in [-1, 1]"
            )
        moves = np.minimum(np.maximum(moves, -1.0), 1.0)
        if self._places:
            return self.placed(moves)
        return self._states_at(self._positions_of(state) + moves * self._scale)

    def placed(self, action: Floats) -> Floats:
        """Return the states where actions in [-1, 1] put the knobs: -1 at the low ends, 1 at the high ends."""
        return self._states_at(self._first + (action + 1) / 2 * (self._last - self._first))

    def values(self, state: Floats) -> dict[str, Any]:
        """Return the knobs as the decoder gets them, by name: floats, or arrays of shape (environments,) of many."""
        if state.ndim > 1:
            return {
                knob.name: np.rint(column) if knob.integer else column.copy()
                for knob, column in zip(self.knobs, state.T, strict=True)
            }
        return {
            knob.name: float(round(value) if knob.integer else value)
            for knob, value in zip(self.knobs, state.tolist(), strict=True)
        }

    def checked(self, values: Any, environments: int | None = None) -> dict[str, Any]:
        """Check values of some knobs that a user sets, and return them by name.

        Args:
            values: a mapping from names to numbers, or with many environments to arrays with a number for each.
            environments: how many; None for a single one.

        Returns:
            Numbers; with many environments arrays of shape (environments,).

        Raises:
            KnobError: not a mapping, an unknown knob, a value that is out of range or not finite, or of another shape.
        """
        if not isinstance(values, Mapping):
            raise KnobError(f"reset option knobs must map names to values, got {values!r}")
        _refuse_unknown("reset option knobs", values, list(self.ranges))
        checked = {}
        for name, value in values.items():
            low, high = self.ranges[name]
            try:
                numbers = np.asarray(value, np.float64)
            except (TypeError, ValueError):
                numbers = np.array(np.nan)
            if not ((low <= numbers) & (numbers <= high)).all():  # also where one is NaN
                raise KnobError(f"reset option knobs: {name} must be between {low:g} and {high:g}, got {value!r}")
            checked[name] = per_environment(f"knobs: {name}", numbers, environments)
        return checked

    def _positions_of(self, state: Floats) -> Floats:
        """Values of knobs on the scales that moves are added on: in doublings for logarithmic ones."""
        columns = self._logarithmic
        if not columns.size:
            return state
        positions = state.copy()
        positions[..., columns] = doublings(state[..., columns], self._low[columns])
        return positions

    def _states_at(self, positions: Floats) -> Floats:
        """States at these positions, as far as the ranges allow."""
        columns = self._logarithmic
        if not columns.size:
            return self._clipped(positions)
        states = positions.copy()
        within = np.minimum(positions[..., columns], self._last[columns])
        states[..., columns] = from_doublings(within, self._low[columns])
        return self._clipped(states)

    def _clipped(self, state: Floats) -> Floats:
        return np.minimum(np.maximum(state, self._low), self._high)  # np.clip takes thrice as long for so few


def env_ranges(
    knobs: Sequence[Knob], ranges: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, tuple[float, float]]:
    """Return (low, high) of every knob, in the decoder's order: as given, else the knob's search range.

    Raises:
        KnobError: an unknown knob, or a range that is upside down or goes beyond the decoder's.
    """
    ranges = ranges or {}
    _refuse_unknown("ranges", ranges, [knob.name for knob in knobs])
    checked = {}
    for knob in knobs:
        low, high = ranges.get(knob.name) or knob.sought
        if not knob.low <= low < high <= knob.high:
            raise KnobError(
                f"ranges: {knob.name} must go from low to high within {knob.low:g} and {knob.high:g}, got "
                f"({low:g}, {high:g})"
            )
        checked[knob.name] = (float(low), float(high))
    return checked


def default_scales(
    knobs: Sequence[Knob], ranges: Mapping[str, tuple[float, float]], scales: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return how far an action of 1 moves every knob: as given, else the knob's step, else a tenth of its range.

    In the knob's own units, of a logarithmic one in `doublings`.

    Args:
        knobs: of the decoder, in order.
        ranges: (low, high) of all of them, by name.
        scales: of some of them, by name.

    Raises:
        KnobError: an unknown knob, or a scale that is not positive and finite.
    """
    scales = scales or {}
    _refuse_unknown("scales", scales, list(ranges))
    checked = {}
    for knob in knobs:
        low, high = ranges[knob.name]
        span = doublings(high, low) if knob.logarithmic else high - low
        scale = float(scales.get(knob.name, span / 10 if knob.step is None else knob.step))
        if not (math.isfinite(scale) and scale > 0):
            raise KnobError(f"scales: {knob.name} must be positive and finite, got {scale}")
        checked[knob.name] = scale
    return checked


def per_environment(option: str, values: NDArray[Any], environments: int | None) -> Any:
    """Return a reset option's values: a number, or for many environments an array of shape (environments,).

    Raises:
        KnobError: the values have another shape.
    """
    shapes: list[tuple[int, ...]] = [()] if environments is None else [(), (environments,)]
    if values.shape not in shapes:
        many = "" if environments is None else f", or one for each of the {environments} environments"
        raise KnobError(f"reset option {option} takes one value{many}, got shape {values.shape}")
    return values.item() if environments is None else np.broadcast_to(values, (environments,))


def _refuse_unknown(where: str, names: Mapping[str, object], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise KnobError(f"{where}: there is no knob {name!r}; the decoder has: {', '.join(known)}")


Start = Literal["random", "default"]
OPTIONS = ("knobs", "prompt")
"""Options of a reset."""


class MovesKnobs:
    """Knobs of an environment whose actions move them."""

    _moves: KnobMoves

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """Knobs that actions move, in the order of actions."""
        return self._moves.knobs

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high) of every knob here, by name, in its own units."""
        return dict(self._moves.ranges)

    @property
    def scales(self) -> dict[str, float]:
        """Change that an action of 1 makes to a knob, by name, in its own units; of a logarithmic one in doublings."""
        return dict(self._moves.scales)


class KnobTuning(MovesKnobs):
    """Tuning of a decoder's knobs, in a single environment or in many.

    Attributes:
        workload_of: workload of every environment in this episode, shape (environments,), int64.
    """

    workload_of: Integers
    _backend: Backend
    _orders: PromptOrder
    np_random: np.random.Generator
    _began = False

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
        if not isinstance(reward, RewardSettings):
            reward = RewardSettings(**{"max_divergence": DIVERGENCE_BOUND, **(reward or {})})
        self._reward = reward
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
    def reward_settings(self) -> RewardSettings:
        """Weights and ranges of the reward."""
        return self._reward

    def _values(self, state: Floats) -> dict[str, Any]:
        """Knobs as the decoder gets them; arguments and result as for `KnobMoves.values`."""
        return self._moves.values(state)

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

    def _unmeasured(self, values: Mapping[str, Number], workload: Any) -> dict[str, Any]:
        """Return the entries of `info` at an episode's start: those of a step, with 0 for what a step measures."""

        def zero() -> Any:
            return 0.0 * next(iter(values.values()))  # an array of its own if the values are arrays

        _, entries = self._judge(Metrics(*(zero() + 1.0 for _ in Metrics._fields)), values, 0.0, workload)
        return {name: zero() for name in entries} | {"workload": workload} | knob_entries(values)

    def _require_reset(self) -> None:
        if not self._began:
            raise gymnasium.error.ResetNeeded("call reset before the first step")


def knob_entries(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of knobs by their names in `info`."""
    return {f"knobs/{name}": value for name, value in values.items()}
