"""Environments of sessions that tune exact decoding in unknown worlds: a few measurements, then a recommendation."""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from specgym.decoding import ArgumentError, one_of, seed_number, whole_number

from ..prompt_order import shared_seed
from ..workloads import constructor, reset_options
from .acceptance import Integers, length_of, threshold_of
from .beliefs import MOST_MEASUREMENTS, Beliefs, Facts, observation_bounds, observation_names
from .catalogue import training_sampler
from .worlds import Worlds, WorldSampler

Array = NDArray[np.float32]
Flags = NDArray[np.bool_]
BUDGETS: Final = (0, 1, 2, 4, 4, 8)
"""Measurements of a session, to draw from, where their number is not fixed."""
RETICENT: Final = 0.25
"""Share of sessions in which the engine does not tell its draft's probabilities, so that nothing is known by level."""
MEASUREMENT_COST: Final = 0.001
"""Price of a measurement, beside a part of what was lost while decoding for it."""
_REGRET_SHARE: Final = 0.001
SLOWER_COST: Final = 0.25
"""Price of a recommendation that is slower than plain decoding."""
_INFO: Final = ("speedup", "share_of_best", "measured_speedup", "measurements", "draft_length", "stop_threshold")


def observation_space() -> spaces.Box:
    """Return the space of one session's observations."""
    return spaces.Box(*observation_bounds(), (len(observation_names()),), np.float32)


def action_space() -> spaces.Box:
    """Return the space of one session's actions."""
    return spaces.Box(-1.0, 1.0, (3,), np.float32)


class WorldsVectorEnv(gymnasium.vector.VectorEnv[Array, Array, NDArray[Any]]):
    """Sessions in which unknown worlds are tuned, thousands side by side, in NumPy.

    ## Description
    A *world* is a tuning problem of exact decoding: an engine whose draft length and stop threshold can be set
    (`ENGINES`), a pair's acceptance, and what rounds cost on some hardware at some batch size. Every session draws
    another one (`WorldSampler`). The agent measures settings, each on 12 of the world's training texts with noise, and
    recommends the one to use; it is judged on the world's held-out texts, against the best of 187 settings there.

    ## Action space
    `Box(-1, 1, (3,), float32)`, moves away from the setting that `Beliefs.predicted` says is best:

    | index | action | meaning |
    |---|---|---|
    | 0 | length | doublings of 1 + the draft length, 2.5 for 1 |
    | 1 | threshold | move of the stop threshold, 1 for 1; it stays within 0 (none) and 0.9 |
    | 2 | stop | above 0.5: recommend this setting now, if anything has been measured |

    Settings are those of a grid, lengths 0 to 16 (0 is plain decoding) and thresholds 0, 0.05, 0.1, 0.2 to 0.9. Engines
    with fixed lengths take no threshold.

    ## Observation space
    `Box(-1, 1, (78,), float32)`: `Beliefs.observations`, whose entries `observation_names()` names: engine,
    temperature, batch size, the times of two rounds, measurements so far and left, acceptance by place and by the level
    of the draft's probability, entropy, what a closed form predicts, the best measurement, and the newest four. In a
    quarter of the sessions the engine does not tell the draft's probabilities.

    ## Rewards
    For a measurement -0.001 (1 + loss), and for a recommendation -loss, less another 0.25 if it is slower than plain
    decoding; the loss is 1 - the setting's speedup over the best one's.

    ## Episode end
    With the recommendation: when the agent stops, or with the action after the last measurement. Then
    `AutoresetMode.SAME_STEP` holds: the observation is that of the next session, and `infos` has the last one's as
    `final_obs` and `final_info`.

    `info` has the same keys at every step and after `reset`: `speedup` and `share_of_best` of the setting on held-out
    texts, `measured_speedup` (0 for a recommendation), `measurements`, `draft_length` and `stop_threshold`.

    Args:
        num_envs: sessions side by side.
        sampler: draws the worlds; by default those to learn in, from `acceptance_worlds`.
        measurements: of a session, 0 to 8; None to draw each one's from 0, 1, 2, 4 and 8.
        acceptance_worlds: that the default sampler draws from, warped from the recorded workloads when the environment
            is made, in a few hundredths of a second each.
        seed: fixes those.
        render_mode: there is nothing to see; `"rgb_array"`, which some tools always ask for, shows nothing.

    Attributes:
        worlds: that the sessions tune.
        beliefs: of what was measured.

    Raises:
        ValueError: an argument is out of range, or there is nothing to draw.

    ## Version history
    * v0: first version.
    """

    autoreset_mode: ClassVar = AutoresetMode.SAME_STEP
    metadata = {"autoreset_mode": autoreset_mode, "render_modes": []}  # noqa: RUF012  # as gymnasium has it

    @constructor()
    def __init__(
        self,
        num_envs: int = 1,
        sampler: WorldSampler | None = None,
        measurements: int | None = 4,
        acceptance_worlds: int = 64,
        seed: int = 0,
        render_mode: Literal["rgb_array"] | None = None,
    ) -> None:
        one_of("render_mode", render_mode, (None, "rgb_array"))
        self.num_envs = whole_number("num_envs", num_envs)
        seed = seed_number("seed", seed)
        if measurements is not None:
            measurements = whole_number("measurements", measurements, at_least=0, at_most=MOST_MEASUREMENTS)
        if sampler is None:
            sampler = training_sampler(whole_number("acceptance_worlds", acceptance_worlds), seed)
        self._sampler, self._measurements = sampler, measurements
        self.single_observation_space, self.single_action_space = observation_space(), action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.beliefs = Beliefs(num_envs)
        self.worlds: Worlds = sampler.draw(num_envs, np.random.default_rng(seed))
        self._speedups = self.worlds.speedups()
        self._best = self._speedups.max(1)
        self._reticent = np.zeros(num_envs, np.bool_)  # whose engine does not tell the draft's probabilities
        self._started = False

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin a session in every world that is drawn.

        Args:
            seed: fixes the worlds, the measured texts and the noise of all sessions together.
            options: there are none.

        Raises:
            ValueError: an option is given, or too many or too few seeds.
        """
        super().reset(seed=shared_seed(seed, self.num_envs))
        reset_options(options, ())
        self._begin(np.arange(self.num_envs))
        self._started = True
        return self.beliefs.observations(), _info({name: np.zeros(self.num_envs) for name in _INFO})

    def step(self, actions: Array) -> tuple[Array, NDArray[Any], Flags, Flags, dict[str, Any]]:
        """Measure a setting in every session, or recommend it.

        Args:
            actions: shape (num_envs, 3).

        Raises:
            ValueError: actions of another shape, or not finite.
            gymnasium.error.ResetNeeded: before the first `reset`.
        """
        if not self._started:
            raise gymnasium.error.ResetNeeded("call reset before the first step")
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs, 3) or not np.isfinite(actions).all():
            raise ArgumentError(f"actions are finite and have shape ({self.num_envs}, 3), got shape {actions.shape}")
        every = np.arange(self.num_envs)
        settings = self.beliefs.settings(actions)
        speedups = self._speedups[every, settings]
        loss = 1 - speedups / self._best
        over = self.beliefs.over(actions)
        slower = over & (speedups < 1) & (length_of(settings) > 0)
        rewards = np.where(over, -loss - SLOWER_COST * slower, -MEASUREMENT_COST - _REGRET_SHARE * loss)
        measured = np.zeros(self.num_envs)
        going = np.flatnonzero(~over)
        if len(going):
            readings = self.worlds.measure(going, settings[going], self.np_random)
            readings = readings.without_probabilities(self._reticent[going])
            self.beliefs.add(going, settings[going], readings)
            measured[going] = readings.speedup
        info = {
            "speedup": speedups.astype(np.float64),
            "share_of_best": 1 - loss.astype(np.float64),
            "measured_speedup": measured,
            "measurements": self.beliefs.done.astype(np.float64),
            "draft_length": length_of(settings).astype(np.float64),
            "stop_threshold": threshold_of(settings),
        }
        last: dict[str, Any] = {}
        ended = np.flatnonzero(over)
        if len(ended):
            last = self._final(info, over)
            self._begin(ended)
        never = np.zeros(self.num_envs, np.bool_)
        return self.beliefs.observations(), rewards.astype(np.float64), over, never, _info(info) | last

    def _begin(self, rows: Integers) -> None:
        """Draw another world for some sessions."""
        drawn = self._sampler.draw(len(rows), self.np_random)
        self.worlds.put(rows, drawn)
        self._speedups[rows] = drawn.speedups()
        self._best[rows] = self._speedups[rows].max(1)
        self._reticent[rows] = self.np_random.random(len(rows)) < RETICENT
        budget = self.np_random.choice(BUDGETS, len(rows)) if self._measurements is None else self._measurements
        self.beliefs.begin(rows, Facts.of(drawn, self.np_random), budget)

    def _final(self, info: dict[str, NDArray[Any]], over: Flags) -> dict[str, Any]:
        """`final_obs` and `final_info` as `gymnasium.vector.SyncVectorEnv` has them."""
        observations = np.full(self.num_envs, None, object)
        shown = self.beliefs.observations()
        for place in np.flatnonzero(over).tolist():
            observations[place] = shown[place]
        ended = info | {f"_{name}": over for name in info}
        return {"final_obs": observations, "_final_obs": over, "final_info": ended, "_final_info": over}


class WorldsEnv(gymnasium.Env[Array, Array], EzPickle):
    """A session in which an unknown world is tuned, as `WorldsVectorEnv` describes it.

    Args:
        sampler, measurements, acceptance_worlds, seed, render_mode: as there.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  # as gymnasium has it

    @constructor()
    def __init__(
        self,
        sampler: WorldSampler | None = None,
        measurements: int | None = 4,
        acceptance_worlds: int = 64,
        seed: int = 0,
        render_mode: Literal["rgb_array"] | None = None,
    ) -> None:
        self.render_mode = None
        self._sessions = WorldsVectorEnv(1, sampler, measurements, acceptance_worlds, seed, render_mode)
        self.observation_space: spaces.Space[Any] = observation_space()
        self.action_space: spaces.Space[Any] = action_space()

    @property
    def worlds(self) -> Worlds:
        """The world that is tuned, alone."""
        return self._sessions.worlds

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Draw a world and begin a session. Arguments and errors as for `WorldsVectorEnv.reset`."""
        super().reset(seed=seed)
        observations, info = self._sessions.reset(seed=seed, options=options)
        return observations[0], _single(info)

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Measure a setting, or recommend it. Errors as for `WorldsVectorEnv.step`."""
        observations, rewards, over, _, info = self._sessions.step(np.asarray(action)[None])
        last = info["final_obs"][0] if over[0] else observations[0]
        return last, float(rewards[0]), bool(over[0]), False, _single(info)


def _info(values: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Entries with their masks, as Gymnasium's vector environments give them."""
    return values | {f"_{name}": np.ones(len(column), np.bool_) for name, column in values.items()}


def _single(info: dict[str, Any]) -> dict[str, Any]:
    return {name: float(info[name][0]) for name in _INFO}
