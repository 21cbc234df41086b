"""Thousands of replayed tuning environments at once, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from specgym.decoding import Split

from ..arguments import one_of, whole_number
from ..backends.metrics import metrics
from ..backends.sources import check_prompt, replay_of
from ..control.operating_points import Profiles
from ..profiles import profile_of
from ..prompt_queues import PromptQueues
from ..recordings.shipped_outcomes import Recordings, find_recording
from ..workload_shares import asked, one_each, probabilities, shared_out
from ..workloads import Workload
from .env import METRICS
from .knob_space import ACTION_KINDS, ActionKind, KnobMoves
from .reward import TERMS, RewardSettings, checked_multiplier, reward_terms
from .tuned_knobs import TunedKnobs

Array = NDArray[np.float32]
Flags = NDArray[np.bool_]
_OPTIONS = ("knobs", "prompt")


class TuningVectorEnv(TunedKnobs, gymnasium.vector.VectorEnv[Array, Array, NDArray[Any]]):
    """`specgym.envs.TuningEnv` with recordings, many times over, and of several workloads at once.

    Spaces, rewards and infos are those of the single environment, with `backend="replay"`; with one environment and one
    workload, steps are the same to the last digit but for rounding. All environments run in step and are cut off after
    `max_episode_steps`; then `AutoresetMode.SAME_STEP` holds: the observation is that of the next episode, and `infos`
    has the last one's as `final_obs` and `final_info`, in the form of `gymnasium.vector.SyncVectorEnv`.

    Args:
        num_envs: how many environments.
        decoder: a name that `TuningEnv` takes.
        workload: a name, a `Workload`, or several; by default that of the recordings given, or the one of `TuningEnv`.
        weights: how many environments each workload gets, in proportion; by default as many as any other.
        tokens_per_step: as in `TuningEnv`, like `ranges`, `scales`, `reward`, `start`, `draft_length`, `batch_size` and
            `context`.
        profile: one for all workloads, one for each in order, or a mapping from their names; by default the pairs'
            reference profiles (`specgym.envs.profiles`).
        split: whose prompts.
        recording: traces, or outcomes of the decoder: one for each workload in order, or a mapping from their names; by
            default those that ship.
        backend: only `"replay"`. Use `vectorization_mode="sync"` for several live environments.
        max_episode_steps: length of an episode.
        prompts_per_step: as in `TuningEnv`, like `action`.

    Attributes:
        workloads: in order.
        workload_names: of the workloads, in order.
        workload_of: which of them each environment belongs to in this episode, shape (num_envs,), int64.
        profiles: what the time of each workload is charged by, at the operating point, in order.

    Raises:
        ValueError: as for `TuningEnv`; or the numbers of workloads, recordings, profiles and weights do not agree.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012  # as gymnasium has it

    def __init__(
        self,
        num_envs: int = 1,
        decoder: str = "threshold",
        workload: str | Workload | Sequence[str | Workload] | None = None,
        weights: Sequence[float] | None = None,
        tokens_per_step: int = 32,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        scales: Mapping[str, float] | None = None,
        reward: RewardSettings | Mapping[str, Any] | None = None,
        profile: Profiles = None,
        start: Literal["random", "default"] = "random",
        split: Split | None = None,
        backend: Literal["replay"] = "replay",
        draft_length: int = 16,
        recording: Recordings = None,
        batch_size: int = 1,
        context: int | None = None,
        max_episode_steps: int = 20,
        prompts_per_step: int = 1,
        action: ActionKind = "move",
    ) -> None:
        if backend != "replay":
            raise ValueError(
                f"backend must be 'replay' for environments that step together, got {backend!r}; for several live ones "
                "use gymnasium.make_vec(..., vectorization_mode='sync', backend='live')"
            )
        one_of("start", start, ("random", "default"))
        one_of("action", action, ACTION_KINDS)
        if split is not None:
            one_of("split", split, ("train", "test"))
        for name, number in (("num_envs", num_envs), ("max_episode_steps", max_episode_steps)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        tokens = whole_number("tokens_per_step", tokens_per_step)
        self._prompts_per_step = whole_number("prompts_per_step", prompts_per_step)
        wanted = asked(workload, recording)
        given = one_each("recording", recording, [str(one) for one in wanted])
        found = [find_recording(decoder, one, name, split) for one, name in zip(given, wanted, strict=True)]
        self.workloads = [each for _, each in found]
        self.workload_names = [each.name for each in self.workloads]
        self._shares = shared_out(num_envs, weights, len(found))
        self._probabilities: NDArray[np.float64] | None = None
        self.profiles = [
            profile_of(each, one, replayed=True, decoder=decoder).at(batch_size=batch_size, context=context)
            for one, each in zip(
                one_each("profile", profile, self.workload_names, shared=True), self.workloads, strict=True
            )
        ]
        recordings = [each for each, _ in found]
        knobs, self._replay = replay_of(decoder, recordings, self.profiles, tokens, draft_length)
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self._moves = KnobMoves(knobs, ranges, scales, action)
        self._replay.check_ranges(self._moves.ranges)
        self._settings = reward if isinstance(reward, RewardSettings) else RewardSettings(**(reward or {}))
        self._start = start
        self._first_prompts = self._replay.first_prompts
        self._prompts = [own + first for own, first in zip(self._replay.prompts, self._first_prompts, strict=True)]
        self._multipliers = np.ones(len(found))
        self._queues = PromptQueues(self._prompts, num_envs)
        self.single_observation_space = self._moves.observation_space
        self.single_action_space = self._moves.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self._state = np.tile(self._moves.defaults(), (num_envs, 1))
        self._elapsed = 0
        self._fixed_prompts: NDArray[np.int64] | None = None
        self.workload_of = self._shares
        self._belong(self._shares)

    @property
    def divergence_multipliers(self) -> dict[str, float]:
        """What an excess over `RewardSettings.max_divergence` costs, by workload; at first 1."""
        return dict(zip(self.workload_names, self._multipliers.tolist(), strict=True))

    def set_divergence_multipliers(self, multipliers: Mapping[str, float]) -> None:
        """Let an excess over the bound cost this much from the next step on.

        Args:
            multipliers: of some workloads or all, by name, each finite and at least 0.

        Raises:
            ValueError: one is not, or there is no such workload.
        """
        changed = self._multipliers.copy()
        for place, value in enumerate(one_each("divergence multipliers", dict(multipliers), self.workload_names)):
            if value is not None:
                changed[place] = checked_multiplier(self.workload_names[place], value)
        self._multipliers = changed

    def set_workload_weights(self, weights: Sequence[float] | Mapping[str, float] | None) -> None:
        """From the next episode on, draw the workload of each environment that starts one.

        Args:
            weights: in proportion to what each workload is drawn, in order or by name, at least 0; None for the fixed
                shares that the environments were made with.

        Raises:
            ValueError: they are not one finite number a workload, one is negative, or all are 0.
        """
        self._probabilities = None if weights is None else probabilities(weights, self.workload_names)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode of every environment.

        Args:
            seed: fixes the knobs to start from, the order of the prompts and all draws, of all environments together.
            options: `knobs`, a mapping from names to values, each one number or an array of shape (num_envs,); and
                `prompt`, an index or an array of them, for this episode.

        Raises:
            ValueError: an unknown option, a knob that does not exist or is out of range, a prompt that was not
                recorded, or an array of another shape.
        """
        super().reset(seed=seed)
        options = options or {}
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"unknown reset option {unknown[0]!r}; there are: {', '.join(_OPTIONS)}")
        given = self._given_knobs(options.get("knobs") or {})
        if seed is not None:
            self._queues.forget()
        self._begin()
        prompts = options.get("prompt")
        self._fixed_prompts = None if prompts is None else self._given_prompts(prompts)
        for place, name in enumerate(self._moves.ranges):
            if name in given:
                self._state[:, place] = given[name]
        return self._observation(), self._start_info()

    def step(self, actions: Array) -> tuple[Array, NDArray[Any], Flags, Flags, dict[str, Any]]:
        """Move the knobs of all environments, and decode each one's next prompt or prompts.

        Args:
            actions: shape (num_envs, knobs), in [-1, 1]; what is beyond is clipped.

        Returns:
            Observations, rewards, terminations (never), truncations and infos.

        Raises:
            ValueError: the actions have another shape, or one is not finite.
        """
        self._state = self._moves.moved(self._state, actions)
        values = self._moves.values_of_many(self._state)
        found = metrics(**self._decoded(values), autoregressive_seconds=self._autoregressive)
        terms = reward_terms(
            self._settings,
            speedup=found["speedup"],
            acceptance_rate=found["draft_acceptance_rate"],
            divergence=found["divergence"],
            knobs=self.knobs,
            values=values,
            multiplier=self._multipliers[self.workload_of],
        )
        entries: dict[str, NDArray[Any]] = {name: found[name] for name in METRICS}
        entries["workload"] = self._names.copy()
        entries |= {f"knobs/{name}": value for name, value in values.items()}
        entries |= {f"reward/{term}": terms[term] for term in TERMS}
        infos = self._masked(entries)
        self._elapsed += 1
        ended = self._elapsed >= self.max_episode_steps
        if ended:
            final = np.empty(self.num_envs, object)
            final[:] = list(self._observation())
            every = np.ones(self.num_envs, np.bool_)
            infos = {"final_obs": final, "_final_obs": every, "final_info": infos, "_final_info": every.copy()}
            self._begin()
            infos |= self._start_info()
        never = np.zeros(self.num_envs, np.bool_)
        reward = np.sum(list(terms.values()), axis=0)
        return self._observation(), reward, never, np.full(self.num_envs, ended, np.bool_), infos

    def _begin(self) -> None:
        """Set all environments to the start of an episode."""
        if self._probabilities is not None:
            self._belong(self.np_random.choice(len(self.workloads), self.num_envs, p=self._probabilities))
        elif self.workload_of is not self._shares:
            self._belong(self._shares)
        if self._start == "random":
            self._state = self._moves.drawn(self.np_random, (self.num_envs,))
        else:
            self._state = np.tile(self._moves.defaults(), (self.num_envs, 1))
        self._elapsed = 0
        self._fixed_prompts = None

    def _observation(self) -> Array:
        return self._state.astype(np.float32)

    def _start_info(self) -> dict[str, Any]:
        knobs = {f"knobs/{name}": value for name, value in self._moves.values_of_many(self._state).items()}
        return self._masked({"workload": self._names.copy(), **knobs})

    def _masked(self, entries: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """With the masks that tell for which environments an entry holds: here for all, so one mask will do."""
        mask = np.ones(self.num_envs, np.bool_)
        infos: dict[str, Any] = {}
        for name, entry in entries.items():
            infos[name], infos[f"_{name}"] = entry, mask
        return infos

    def _belong(self, workload_of: NDArray[np.int64]) -> None:
        """Let each environment belong to a workload; one that changes begins a new order of its prompts."""
        self._queues.forget(self.workload_of != workload_of)
        self.workload_of = workload_of
        self._names = np.array([*self.workload_names, None], object)[workload_of]
        self._autoregressive = np.array([each.autoregressive_seconds for each in self.profiles])[workload_of]

    def _decoded(self, values: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """Sums over the rounds of each environment's next prompts, as `metrics` takes them."""
        count = self._prompts_per_step
        if self._fixed_prompts is None:
            prompts = self._queues.take(self.workload_of, count, self.np_random)
        else:
            prompts = np.repeat(self._fixed_prompts[:, None], count, 1)
        if count == 1:
            return self._replay.decode_many(prompts[:, 0], self.workload_of, values, self.np_random)
        repeated = {name: each.repeat(count) for name, each in values.items()}
        sums = self._replay.decode_many(prompts.ravel(), self.workload_of.repeat(count), repeated, self.np_random)
        return {name: each.reshape(self.num_envs, count).sum(1) for name, each in sums.items()}

    def _given_knobs(self, given: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
        if not isinstance(given, Mapping):
            raise ValueError(f"reset option knobs must map names to values, got {given!r}")
        found = {}
        for name, value in given.items():
            if name not in self.ranges:
                raise ValueError(
                    f"reset option knobs: there is no knob {name!r}; the decoder has: {', '.join(self.ranges)}"
                )
            low, high = self.ranges[name]
            values = self._for_each(f"knobs: {name}", value, np.float64)
            if not ((low <= values) & (values <= high)).all():
                raise ValueError(f"reset option knobs: {name} must be between {low:g} and {high:g}, got {value!r}")
            found[name] = values
        return found

    def _given_prompts(self, given: Any) -> NDArray[np.int64]:
        numbers = self._for_each("prompt", given, None)
        for prompt, place in {*zip(numbers.tolist(), self.workload_of.tolist(), strict=True)}:
            known = (self._prompts[place] - self._first_prompts[place]).tolist()
            check_prompt(prompt, known, self.workloads[place])
        return numbers.astype(np.int64) + self._first_prompts[self.workload_of]

    def _for_each(self, option: str, value: Any, dtype: type[np.float64] | None) -> NDArray[Any]:
        values = np.asarray(value, dtype)
        if values.shape not in ((), (self.num_envs,)):
            raise ValueError(
                f"reset option {option} takes one value, or one for each of the {self.num_envs} environments, got "
                f"shape {values.shape}"
            )
        return np.broadcast_to(values, (self.num_envs,))
