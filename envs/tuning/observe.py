"""Wrappers that show a policy more than the knobs: the workload, its cost, and what the last settings were worth.

The knobs alone say nothing of the pair they are tuned for, so a policy that sees only them learns one setting for all.
With a short history of measurements it can adapt to a pair that it never saw, and needs no recurrent memory for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from specgym.decoding import whole_number

from .knob_space import KnobTuning

Flags = NDArray[np.bool_]
Array = NDArray[np.float32]
Floats = NDArray[np.float64]

OUTCOMES = ("speedup", "draft_acceptance_rate", "divergence")
"""Metrics of a measurement that are kept, in this order."""
_WORKLOAD_BOUNDS = {"temperature": 2.0, "cost_ratio": 2.0}
_OUTCOME_BOUNDS = {"speedup": 8.0, "draft_acceptance_rate": 1.0, "divergence": 1.0}

Measurement = tuple[Mapping[str, float], float, float, float]
"""A setting that was tried: the knobs by name in their own units, speedup, draft acceptance rate and divergence."""


class ContextLayout:
    """Layout of observations with context, for one environment and for many.

    | entries | meaning | low | high |
    |---------|------|-----|------|
    | knobs | as they stand now, in their own units | their ranges | |
    | `temperature` | of sampling; 0 for greedy decoding | 0 | 2 |
    | `cost_ratio` | plain tokens that one drafted token more costs (`LatencyProfile.marginal_cost`), or 0 | 0 | 2 |
    | `measurements` | settings tried before in this episode, at most `history` | 0 | history |
    | `last1/<knob>` | a setting tried, the newest first; the low end where there was none | their ranges | |
    | `last1/speedup` | its speedup; 0 where there was none, like the next two | 0 | 8 |
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
        """Space of one environment's observations, a Box."""
        return spaces.Box(self.low, self.high)

    def blank(self, environments: int) -> Floats:
        """Return the past before anything was tried, shape (environments, history, knobs + 3)."""
        return np.tile(self._nothing, (environments, self.history, 1))

    def remembered(self, past: Floats, tried: Mapping[str, Any]) -> Floats:
        """Return the past after one more setting was tried; the oldest is forgotten.

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
        """Return the observations of many environments that have taken as many steps.

        Args:
            knobs: in their own units, shape (environments, knobs).
            temperature: of sampling, shape (environments,).
            cost_ratio: cost of one more drafted token, in plain tokens, shape (environments,).
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
        """Return an observation, from what was measured so far.

        Args:
            knobs: by name, in their own units.
            temperature: of sampling; 0 for greedy decoding.
            cost_ratio: cost of one more drafted token, in plain tokens.
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


class _Extension(ABC):
    """Entries that extend the observations of environments that step together, or of a single one.

    Attributes:
        space: of an extended observation.
    """

    space: spaces.Space[Array]

    @abstractmethod
    def begin(self) -> None:
        """Begin an episode, whose workloads need not be those of the last one."""

    def remember(self, tried: Mapping[str, Any]) -> None:  # noqa: B027  # not every extension depends on steps
        """Take notice of a step, by the entries of its info."""

    @abstractmethod
    def extended(self, observations: Array) -> Array:
        """Return observations with the entries; (environments, knobs) to (environments, entries)."""


class _Context(_Extension):
    """Context of the workload and the settings tried in this episode, as `ContextLayout` has it."""

    def __init__(self, env: KnobTuning, history: int) -> None:
        self._env = env
        self.layout = ContextLayout(env.ranges, history)
        self.space = self.layout.space
        self._temperature = np.array([float(named.sampling.temperature) for named in env.workloads])
        # An engine has no latency profile: what its drafts cost shows in what it measures.
        costs = [profile.marginal_cost() for profile in env.profiles]
        self._cost_ratio = np.array(costs or [0.0] * len(env.workloads))
        self.begin()

    def begin(self) -> None:
        self._workload_of = self._env.workload_of
        self._past, self._measurements = self.layout.blank(len(self._workload_of)), 0

    def remember(self, tried: Mapping[str, Any]) -> None:
        self._past = self.layout.remembered(self._past, tried)
        self._measurements += 1

    def extended(self, observations: Array) -> Array:
        temperature, cost_ratio = self._temperature[self._workload_of], self._cost_ratio[self._workload_of]
        return self.layout.observations(observations, temperature, cost_ratio, self._measurements, self._past)


class _Mark(_Extension):
    """Marks of the workload: 1 for the one that is tuned, 0 for the others."""

    def __init__(self, space: spaces.Space[Any], workloads: int, workload_of: Callable[[], NDArray[np.int64]]) -> None:
        assert isinstance(space, spaces.Box)
        self._marks = np.eye(workloads, dtype=np.float32)
        self._workload_of = workload_of
        self.space = spaces.Box(
            np.concatenate([space.low, np.zeros(workloads, np.float32)]),
            np.concatenate([space.high, np.ones(workloads, np.float32)]),
        )
        self.begin()

    def begin(self) -> None:
        self._shown = self._marks[self._workload_of()]

    def extended(self, observations: Array) -> Array:
        return np.concatenate([observations, self._shown], axis=1)


class _Extended(gymnasium.Wrapper[Array, Array, Array, Array], RecordConstructorArgs):
    """Environment whose observations are extended."""

    def __init__(self, env: gymnasium.Env[Array, Array], extension: _Extension) -> None:
        gymnasium.Wrapper.__init__(self, env)
        self._extension = extension
        self.observation_space = extension.space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode. Arguments and errors as for the environment within."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._extension.begin()
        return self._extension.extended(observation[None])[0], info

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Take a step. Argument, results and errors as for the environment within."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._extension.remember(info)
        return self._extension.extended(observation[None])[0], float(reward), terminated, truncated, info


class _VectorExtended(gymnasium.vector.VectorWrapper[Array, Array, Array, Array, NDArray[Any]]):
    """Environments that step together, whose observations are extended."""

    def __init__(self, env: gymnasium.vector.VectorEnv[Array, Array, NDArray[Any]], extension: _Extension) -> None:
        super().__init__(env)
        self.autoreset_mode = env.metadata.get("autoreset_mode")
        self._extension = extension
        self.single_observation_space = extension.space
        self.observation_space = batch_space(extension.space, env.num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode of every environment. Arguments and errors as for the environment within."""
        observations, infos = self.env.reset(seed=seed, options=options)
        self._extension.begin()
        return self._extension.extended(observations), infos

    def step(self, actions: Array) -> tuple[Array, NDArray[Any], Flags, Flags, dict[str, Any]]:
        """Step all environments. Results and errors as for the environment within."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        self._extension.remember(infos.get("final_info", infos))
        if "final_obs" in infos:  # of all, since all environments end together
            last = self._extension.extended(np.stack(infos["final_obs"]))
            infos["final_obs"] = np.empty(len(last), object)
            infos["final_obs"][:] = list(last)
            self._extension.begin()
        return self._extension.extended(observations), rewards, terminated, truncated, infos


class ObserveContext(_Extended):
    """Wrapper that shows a tuner what it may know of the workload; `ContextLayout` says how.

    Args:
        env: a `TuningEnv`, wrapped or not.
        history: how many settings tried in this episode are shown, at least 1.

    Attributes:
        layout: of an observation.

    Raises:
        TypeError: another environment.
        ValueError: `history` is not a whole number of at least 1.
    """

    def __init__(self, env: gymnasium.Env[Array, Array], history: int = 4) -> None:
        RecordConstructorArgs.__init__(self, history=history)
        context = _Context(_tuning(env, type(self).__name__), history)
        super().__init__(env, context)
        self.layout = context.layout

    @property
    def state_names(self) -> list[str]:
        """Names of an observation's entries."""
        return list(self.layout.names)


class VectorObserveContext(_VectorExtended):
    """`ObserveContext` for a `TuningVectorEnv`, with the same numbers. Arguments and errors as there."""

    def __init__(self, env: gymnasium.vector.VectorEnv[Array, Array, NDArray[Any]], history: int = 4) -> None:
        context = _Context(_tuning(env, type(self).__name__), history)
        super().__init__(env, context)
        self.layout = context.layout

    @property
    def state_names(self) -> list[str]:
        """Names of an observation's entries."""
        return list(self.layout.names)


class WorkloadMark(_Extended):
    """Wrapper that appends to the knobs which of several workloads they are tuned for: 1 for this one, else 0.

    Without marks the differences between workloads are noise to the agent, and it can only learn one setting for all.

    Args:
        env: an environment with a flat Box of observations.
        place: place of its workload, from 0.
        workloads: how many there are.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], place: int, workloads: int) -> None:
        RecordConstructorArgs.__init__(self, place=place, workloads=workloads)
        super().__init__(env, _Mark(env.observation_space, workloads, partial(np.array, [place])))


class VectorWorkloadMark(_VectorExtended):
    """`WorkloadMark` for environments that step together.

    Args:
        env: a `TuningVectorEnv`, or another whose attributes `workload_names` and `workload_of` say which workloads
            there are, and which of them each environment tunes in this episode.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv[Array, Array, NDArray[Any]]) -> None:
        inner: Any = env.unwrapped
        marks = _Mark(env.single_observation_space, len(inner.workload_names), partial(getattr, inner, "workload_of"))
        super().__init__(env, marks)


def _tuning(env: Any, wrapper: str) -> KnobTuning:
    inner = env.unwrapped
    if not isinstance(inner, KnobTuning):
        kind = "TuningVectorEnv" if isinstance(env, gymnasium.vector.VectorEnv) else "TuningEnv"
        raise TypeError(f"{wrapper} is for a {kind}, which measures settings; {env} is none")
    return inner
