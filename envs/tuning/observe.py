"""What a tuner may know of the workload in front of it, beside the knobs: its cost, and what a few settings were worth.

The knobs alone say nothing of the pair they are tuned for, so a policy that sees only them learns one setting for all.
With a short history of measurements it can adapt to a pair that it never saw, and needs no recurrent memory for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from ..arguments import whole_number
from .env import TuningEnv

Array = NDArray[np.float32]
Floats = NDArray[np.float64]

OUTCOMES = ("speedup", "draft_acceptance_rate", "divergence")
"""The metrics of a measurement that are kept, in this order."""
_WORKLOAD_BOUNDS = {"temperature": 2.0, "cost_ratio": 2.0}
_OUTCOME_BOUNDS = {"speedup": 8.0, "draft_acceptance_rate": 1.0, "divergence": 1.0}

Measurement = tuple[Mapping[str, float], float, float, float]
"""One setting that was tried: the knobs by name in their own units, speedup, draft acceptance rate and divergence."""


class ContextLayout:
    """What stands where in an observation with context, for one environment and for many.

    | entries | what | low | high |
    |---------|------|-----|------|
    | knobs | as they stand now, in their own units | their ranges | |
    | `temperature` | of sampling; 0 for greedy decoding | 0 | 2 |
    | `cost_ratio` | what one more drafted token costs, in plain tokens (`LatencyProfile.marginal_cost`) | 0 | 2 |
    | `measurements` | settings tried before in this episode, at most `history` | 0 | history |
    | `last1/<knob>` | a setting tried, the newest first; the low end where there was none | their ranges | |
    | `last1/speedup` | what it was worth; 0 where there was none, like the next two | 0 | 8 |
    | `last1/draft_acceptance_rate` | | 0 | 1 |
    | `last1/divergence` | | 0 | 1 |

    and so on to `last<history>`. Values beyond their bounds are clipped.

    Args:
        ranges: (low, high) of each knob by name, in the order of observations.
        history: how many settings are remembered, at least 1.

    Attributes:
        history: as given.
        names: of the entries, in order.
        low: least values, shape (entries,), float32.
        high: greatest values, likewise.

    Raises:
        ValueError: `history` is not a whole number of at least 1.
    """

    def __init__(self, ranges: Mapping[str, tuple[float, float]], history: int = 4) -> None:
        self.history = whole_number("history", history)
        self._knobs = tuple(ranges)
        tried = {**ranges, **{name: (0.0, high) for name, high in _OUTCOME_BOUNDS.items()}}
        bounds: dict[str, tuple[float, float]] = {
            **ranges,
            **{name: (0.0, high) for name, high in _WORKLOAD_BOUNDS.items()},
            "measurements": (0.0, float(self.history)),
        }
        for age in range(1, self.history + 1):
            bounds |= {f"last{age}/{name}": ends for name, ends in tried.items()}
        self.names = list(bounds)
        self.low: Array = np.array([low for low, _ in bounds.values()], np.float32)
        self.high: Array = np.array([high for _, high in bounds.values()], np.float32)
        self._nothing = np.array([low for low, _ in tried.values()])

    @property
    def space(self) -> spaces.Space[Array]:
        """Of one environment's observations, a Box."""
        return spaces.Box(self.low, self.high)

    def blank(self, environments: int) -> Floats:
        """The past before anything was tried, shape (environments, history, knobs + 3)."""
        return np.tile(self._nothing, (environments, self.history, 1))

    def remembered(self, past: Floats, tried: Mapping[str, Any]) -> Floats:
        """The past after one more setting was tried; the oldest is forgotten.

        Args:
            past: the newest first, shape (environments, history, knobs + 3).
            tried: the entries `knobs/<name>` and `OUTCOMES` of an environment's `info`, numbers or arrays of shape
                (environments,).
        """
        names = [*(f"knobs/{name}" for name in self._knobs), *OUTCOMES]
        newest = np.stack([np.broadcast_to(tried[name], len(past)) for name in names], 1)
        return np.concatenate([newest[:, None], past[:, :-1]], 1)

    def observations(
        self, knobs: Array, temperature: Floats, cost_ratio: Floats, measurements: int, past: Floats
    ) -> Array:
        """The observations of many environments that have taken as many steps.

        Args:
            knobs: in their own units, shape (environments, knobs).
            temperature: of sampling, shape (environments,).
            cost_ratio: what one more drafted token costs, in plain tokens, shape (environments,).
            measurements: settings tried in this episode.
            past: the newest first, shape (environments, history, knobs + 3).

        Returns:
            Shape (environments, entries), float32.
        """
        workload = [temperature, cost_ratio, np.full(len(knobs), float(measurements))]
        whole = np.concatenate([knobs, np.stack(workload, 1), past.reshape(len(knobs), -1)], 1)
        return np.clip(whole, self.low, self.high).astype(np.float32)

    def observation(
        self, knobs: Mapping[str, float], temperature: float, cost_ratio: float, past: Sequence[Measurement]
    ) -> Array:
        """One observation, from what was measured so far.

        Args:
            knobs: by name, in their own units.
            temperature: of sampling; 0 for greedy decoding.
            cost_ratio: what one more drafted token costs, in plain tokens.
            past: settings tried, the newest last.

        Returns:
            Shape (entries,), float32.
        """
        kept = self.blank(1)
        for setting, *outcome in past[-self.history :]:
            tried = {f"knobs/{name}": value for name, value in setting.items()}
            kept = self.remembered(kept, tried | dict(zip(OUTCOMES, outcome, strict=True)))
        now = np.array([[knobs[name] for name in self._knobs]], np.float32)
        return self.observations(now, np.array([temperature]), np.array([cost_ratio]), len(past), kept)[0]


class ObserveContext(gymnasium.Wrapper[Array, Array, Array, Array], RecordConstructorArgs):
    """Shows a tuner what it may know of the workload; `ContextLayout` says how.

    Args:
        env: a `TuningEnv`, wrapped or not.
        history: how many settings tried in this episode are shown, at least 1.

    Attributes:
        layout: what stands where in an observation.

    Raises:
        TypeError: another environment.
        ValueError: `history` is not a whole number of at least 1.
    """

    def __init__(self, env: gymnasium.Env[Array, Array], history: int = 4) -> None:
        RecordConstructorArgs.__init__(self, history=history)
        gymnasium.Wrapper.__init__(self, env)
        inner = env.unwrapped
        if not isinstance(inner, TuningEnv):
            raise TypeError(f"ObserveContext is for a TuningEnv, which measures settings; {env} is none")
        self.layout = ContextLayout(inner.ranges, history)
        self.observation_space = self.layout.space
        self._temperature = np.array([float(inner.workload.sampling.temperature)])
        self._cost_ratio = np.array([inner.profile.marginal_cost()])
        self._past, self._measurements = self.layout.blank(1), 0

    @property
    def state_names(self) -> list[str]:
        """What each entry of an observation is."""
        return list(self.layout.names)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode, in which nothing was tried yet. Arguments and errors as for `TuningEnv.reset`."""
        knobs, info = self.env.reset(seed=seed, options=options)
        self._past, self._measurements = self.layout.blank(1), 0
        return self._observation(knobs), info

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Try a setting, and remember what it was worth. Argument, results and errors as for `TuningEnv.step`."""
        knobs, reward, terminated, truncated, info = self.env.step(action)
        self._past = self.layout.remembered(self._past, info)
        self._measurements += 1
        return self._observation(knobs), float(reward), terminated, truncated, info

    def _observation(self, knobs: Array) -> Array:
        return self.layout.observations(
            knobs[None], self._temperature, self._cost_ratio, self._measurements, self._past
        )[0]
