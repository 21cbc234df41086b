"""The knobs as an agent sees them: states within ranges, and actions that move them. For one environment or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from specgym.decoding import Knob

from .knobs import default_scales, doublings, env_ranges, from_doublings

Floats = NDArray[np.float64]
ActionKind = Literal["move", "place"]
ACTION_KINDS: tuple[ActionKind, ...] = ("move", "place")


class KnobMoves:
    """The spaces of some knobs, and the arithmetic between them.

    A state holds the knobs in their own units, in order, in its last dimension, so the functions take one state, shape
    (knobs,), or many, shape (environments, knobs).

    Args:
        knobs: a decoder's.
        ranges: (low, high) of some knobs by name; see `knobs.env_ranges`.
        scales: how far an action of 1 moves some knobs, by name; see `knobs.default_scales`.
        action: `"move"` for actions that move the knobs by so much, `"place"` for actions that put them there: -1 is a
            range's low end, 1 its high end. Logarithmic knobs are moved and placed in doublings (`knobs.doublings`).

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
        ranges: Mapping[str, tuple[float, float]] | None,
        scales: Mapping[str, float] | None,
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
        """The decoder's defaults, as far as the ranges allow; shape (knobs,)."""
        return self._clipped(self._defaults)

    def drawn(self, random: np.random.Generator, shape: tuple[int, ...] = ()) -> Floats:
        """States drawn uniformly from the ranges, logarithmic knobs so in doublings; shape (*shape, knobs)."""
        return self._states_at(random.uniform(self._first, self._last, (*shape, len(self.knobs))))

    def moved(self, state: Floats, action: NDArray[np.float32]) -> Floats:
        """States after actions of the same shape; what is beyond [-1, 1] is clipped, and so is the result.

        Raises:
            ValueError: the actions have another shape, or one is not finite.
        """
        moves = np.asarray(action, dtype=np.float64)
        if moves.shape != state.shape:
            raise ValueError(f"an action has shape {state.shape}, one number a knob, got {moves.shape}")
        if not np.isfinite(moves).all():
            *where, number = np.argwhere(~np.isfinite(moves))[0].tolist()
            of = f" of environment {where[0]}" if where else ""
            raise ValueError(
                f"the action for knob {self.knobs[number].name}{of} is {moves[(*where, number)]}; actions must be "
                "finite numbers in [-1, 1]"
            )
        moves = np.minimum(np.maximum(moves, -1.0), 1.0)
        if self._places:
            return self.placed(moves)
        return self._states_at(self._positions_of(state) + moves * self._scale)

    def placed(self, action: Floats) -> Floats:
        """States where actions in [-1, 1] put the knobs, of the same shape: -1 at the low ends, 1 at the high ends."""
        return self._states_at(self._first + (action + 1) / 2 * (self._last - self._first))

    def values(self, state: Floats) -> dict[str, float]:
        """One state's knobs as the decoder gets them, by name."""
        return {
            knob.name: float(round(value) if knob.integer else value)
            for knob, value in zip(self.knobs, state.tolist(), strict=True)
        }

    def values_of_many(self, states: Floats) -> dict[str, Floats]:
        """`values` of many states, each of shape (environments,)."""
        return {
            knob.name: np.rint(column) if knob.integer else column.copy()
            for knob, column in zip(self.knobs, states.T, strict=True)
        }

    def _positions_of(self, state: Floats) -> Floats:
        """Where knobs stand on the scales that moves are added on: their values, of logarithmic ones in doublings."""
        columns = self._logarithmic
        if not columns.size:
            return state
        positions = state.copy()
        positions[..., columns] = doublings(state[..., columns], self._low[columns])
        return positions

    def _states_at(self, positions: Floats) -> Floats:
        """The states at these positions, as far as the ranges allow."""
        columns = self._logarithmic
        if not columns.size:
            return self._clipped(positions)
        states = positions.copy()
        within = np.minimum(positions[..., columns], self._last[columns])
        states[..., columns] = from_doublings(within, self._low[columns])
        return self._clipped(states)

    def _clipped(self, state: Floats) -> Floats:
        return np.minimum(np.maximum(state, self._low), self._high)  # np.clip takes thrice as long for so few


def prompt_orders(random: np.random.Generator, environments: int, prompts: int) -> NDArray[np.int64]:
    """For each environment an order of all prompts, shape (environments, prompts)."""
    return random.random((environments, prompts)).argsort(1)
