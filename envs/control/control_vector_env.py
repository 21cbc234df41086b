"""Base of the vector environments that control many texts at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from specgym.decoding import ArgumentError, Feature, number, one_of, whole_number

from ..backends.backend import BackendName, DraftBackend, DraftSteps, backend_of
from ..prompt_order import PromptOrder, shared_seed
from ..workloads import reset_options
from .control_env import observation_space
from .throughput import ControlTotals, OperatingPoints, checked_rate, linear_reward

Floats = NDArray[np.float32]
Rewards = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]

_OPTIONS = ("prompt",)


class ControlVectorEnv(VectorEnv[Floats, Any, NDArray[Any]]):
    """Base of the vector environments that control many texts, recorded or live.

    Attributes:
        autoreset_mode: `AutoresetMode.SAME_STEP`, as in `metadata`.
        meaning: of the actions, for messages.
        workload_names: names, in order.
        workload_of: each environment's workload, an index into them, shape (num_envs,).
        points: the operating points.
        point_of: each environment's operating point, an index into them, shape (num_envs,).
        prompt_counts: how many prompts each workload has, in order.
    """

    # Gymnasium's own vector environments have it as an attribute, too, and torchrl 0.14 (envs/libs/gym.py) reads that.
    autoreset_mode: ClassVar = AutoresetMode.SAME_STEP
    metadata = {"autoreset_mode": autoreset_mode, "render_modes": []}  # noqa: RUF012  # declared so there

    meaning: ClassVar[str]

    def _check(
        self,
        num_envs: int,
        backend: BackendName | None,
        source: BackendName | None,
        max_episode_steps: int | None,
        render_mode: Literal["rgb_array"] | None,
        rate: float,
        decision_seconds: float,
    ) -> BackendName:
        """Check and keep arguments of a constructor, and return the backend that they ask for.

        Raises:
            ValueError: one is out of range.
        """
        one_of("render_mode", render_mode, (None, "rgb_array"))
        backend = backend_of(backend, source, "replay")
        self.num_envs = whole_number("num_envs", num_envs)
        if max_episode_steps is not None:
            max_episode_steps = whole_number("max_episode_steps", max_episode_steps)
        self._max_episode_steps = max_episode_steps
        self._first_rate = checked_rate(rate)
        number("decision_seconds", decision_seconds, at_least=0)
        return backend

    def _set_up(
        self,
        places: OperatingPoints[Any, Any],
        drafts: Callable[[Indices], DraftBackend],
        features: Sequence[Feature],
        actions: int | spaces.Box,
    ) -> None:
        """Finish a constructor.

        Args:
            places: where the environments are.
            drafts: returns the texts, by each environment's operating point.
            features: that are observed.
            actions: how many there are, or their space.

        Raises:
            ValueError: there are fewer environments than operating points.
        """
        num_envs, self.points = self.num_envs, places.points
        self.workload_names = tuple(named.name for named in places.workloads)
        if num_envs < len(self.points):
            raise ArgumentError(
                f"num_envs must be at least {len(self.points)}, one for each workload with each batch size, got "
                f"{num_envs}"
            )
        self.single_observation_space = observation_space(features)
        self.single_action_space = spaces.Discrete(actions) if isinstance(actions, int) else actions
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.point_of = np.arange(num_envs) % len(self.points)
        self.workload_of = self.point_of * len(self.workload_names) // len(self.points)
        self._drafts = drafts(self.point_of)
        self.prompt_counts = tuple(map(len, self._drafts.prompts))
        self._autoregressive = np.array([charges.autoregressive_seconds for charges in places.charges])
        self._autoregressive_of = self._autoregressive[self.point_of]
        self._orders = PromptOrder(self._drafts.prompts)
        self._rates = np.full(len(self.points), self._first_rate)
        self._rate_of = self._rates[self.point_of]
        self._age = np.zeros(num_envs, np.int64)
        self._text_tokens = np.zeros(num_envs, np.int64)
        self._text_seconds = np.zeros(num_envs)
        self._sums = np.zeros((len(ControlTotals._fields), num_envs))
        self._once = False
        self._started = False

    @property
    def rates(self) -> Rewards:
        """Price of time, relative to plain decoding, shape (points,); a copy."""
        return self._rates.copy()

    def set_rates(self, rates: Mapping[str, float] | ArrayLike) -> None:
        """Price time anew, from the next step on.

        Args:
            rates: one for each operating point, shape (points,), or a number for all, or a mapping from names of
                workloads, whose other operating points and workloads stay as they are.

        Raises:
            ValueError: a rate is negative or not finite, a workload is not here, or the shape is another.
        """
        changed = self._rates.copy()
        if isinstance(rates, Mapping):
            for name, rate in rates.items():
                if name not in self.workload_names:
                    raise ArgumentError(f"set_rates: there is no workload {name!r}; there are: {self._known()}")
                changed[[point.workload == name for point in self.points]] = checked_rate(rate)
        else:
            numbers = np.asarray(rates, np.float64)
            if numbers.shape not in ((), changed.shape):
                raise ArgumentError(f"set_rates takes shape {changed.shape}, one for each operating point, or a number")
            changed[:] = numbers
            for rate in changed.tolist():
                checked_rate(rate)
        self._rates = changed
        self._rate_of = changed[self.point_of]

    def totals(self) -> ControlTotals:
        """Return what was emitted and charged since the last call, or the last `reset`, by operating point."""
        count = len(self.points)
        sums = ControlTotals(*(np.bincount(self.point_of, row, count).astype(np.float64) for row in self._sums))
        self._sums[:] = 0.0
        return sums._replace(seconds=sums.seconds / self._autoregressive)

    @property
    def resting(self) -> Flags:
        """Environments that have decoded their chosen prompt and wait for a `reset`, shape (num_envs,)."""
        return self._drafts.over.copy()

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats, dict[str, NDArray[Any]]]:
        """Begin a text in every environment.

        Args:
            seed: fixes the order of the prompts and what is kept of sampled drafts, of all environments together; a
                number, or one for each environment (`shared_seed`).
            options: `prompt`, shape (num_envs,), to decode these once; see the class.

        Raises:
            ValueError: an unknown option, prompts that do not exist, or too many or too few seeds.
        """
        seed = shared_seed(seed, self.num_envs)
        super().reset(seed=seed)
        options = reset_options(options, _OPTIONS, {"prompts": "prompt"})
        everyone = np.arange(self.num_envs)
        prompt = options.get("prompt")
        self._once = prompt is not None
        if seed is not None:
            self._orders.restart()
        self._sums[:] = 0.0
        self._drafts.clear()
        if prompt is None:
            self._begin(everyone)
        else:
            chosen = self._checked_prompts(prompt)
            used = np.flatnonzero(chosen >= 0)
            self._begin(used, chosen[used])
        self._started = True
        zeros = np.zeros(self.num_envs, np.int64)
        nothing = DraftSteps(zeros, np.zeros(self.num_envs), *(zeros.copy() for _ in range(3)))
        return self._drafts.features.copy(), self._info(nothing)

    def step(self, actions: ArrayLike) -> tuple[Floats, Rewards, Flags, Flags, dict[str, Any]]:
        """Let every environment do as its action says.

        Args:
            actions: shape (num_envs,), or (num_envs, knobs) where an action moves knobs.

        Returns:
            Observations, shape (num_envs, features); rewards; whose text has ended; who was cut by the time limit;
            info.

        Raises:
            ValueError: there is no such action, or there are too many or too few.
            gymnasium.error.ResetNeeded: before the first `reset`.
            NumericalError: the target gave NaN logits for a text, which is over; `reset` begins others.
        """
        if not self._started:
            raise gymnasium.error.ResetNeeded("call reset before the first step")
        steps, ended = self._drafts.step(self._checked_actions(actions), self.np_random)
        rewards = linear_reward(steps.tokens, steps.seconds, self._rate_of, self._autoregressive_of)
        for total, part in zip(self._sums, steps, strict=True):
            np.add(total, part, out=total)
        self._text_tokens += steps.tokens
        self._text_seconds += steps.seconds
        terminated, truncated = np.zeros((2, self.num_envs), np.bool_)
        terminated[ended] = True
        if self._max_episode_steps is not None:
            self._age += 1
            truncated = (self._age >= self._max_episode_steps) & ~self._drafts.over
        done = np.flatnonzero(terminated | truncated) if self._max_episode_steps is not None else np.sort(ended)
        last = self._final(steps, done) if len(done) else {}
        if self._once:
            self._drafts.leave(done)
        elif len(done):
            self._begin(done)
        return self._drafts.features.copy(), rewards, terminated, truncated, self._info(steps) | last

    def _begin(self, which: Indices, prompts: Indices | None = None) -> None:
        """Put another text into some environments; by default the next ones of their workloads' prompts."""
        workloads = self.workload_of[which]
        if prompts is None:
            prompts = self._orders.take_shared(workloads, self.np_random)
        self._age[which] = 0
        self._text_tokens[which] = 0
        self._text_seconds[which] = 0.0
        self._drafts.begin(which, workloads, prompts, self.np_random)

    def _info(self, steps: DraftSteps) -> dict[str, NDArray[Any]]:
        values = {**steps._asdict(), **self._further_info(steps)}
        return values | dict.fromkeys((f"_{name}" for name in values), np.ones(self.num_envs, np.bool_))

    def _further_info(self, steps: DraftSteps) -> dict[str, NDArray[Any]]:
        """Entries of `infos` that not all environments have."""
        return {"remaining_acceptable": self._drafts.remaining_acceptable}

    def _final(self, steps: DraftSteps, done: Indices) -> dict[str, Any]:
        """Return `final_obs` and `final_info` as `gymnasium.vector.SyncVectorEnv` has them."""
        mask = np.zeros(self.num_envs, np.bool_)
        mask[done] = True
        observations = np.full(self.num_envs, None, object)
        for place, observation in zip(done.tolist(), self._drafts.features[done], strict=True):
            observations[place] = observation
        seconds = self._text_seconds / self._autoregressive_of
        values = {
            **steps._asdict(),
            **self._further_info(steps),
            "total_tokens": self._text_tokens.copy(),
            "total_seconds": self._text_seconds.copy(),
            "throughput": np.divide(self._text_tokens, seconds, out=np.zeros(self.num_envs), where=mask),
        }
        info = values | dict.fromkeys((f"_{name}" for name in values), mask)
        return {"final_obs": observations, "_final_obs": mask, "final_info": info, "_final_info": mask}

    def _checked_actions(self, actions: ArrayLike) -> NDArray[Any]:
        numbers = np.asarray(actions)
        if numbers.shape != (self.num_envs,):
            raise ArgumentError(f"actions have shape ({self.num_envs},), one for each environment, got {numbers.shape}")
        assert isinstance(self.single_action_space, spaces.Discrete)
        whole = np.where(np.isfinite(numbers), numbers, -1).astype(np.intp)
        wrong = (whole != numbers) | (whole < 0) | (whole >= self.single_action_space.n)
        if wrong.any():
            raise ArgumentError(f"an action is {self.meaning}, got {numbers[wrong][0]}")
        return whole

    def _checked_prompts(self, prompts: ArrayLike) -> Indices:
        chosen = np.asarray(prompts)
        if chosen.shape != (self.num_envs,) or not np.issubdtype(chosen.dtype, np.integer):
            raise ArgumentError(f"reset option prompt has shape ({self.num_envs},), an index for each environment")
        wrong = np.flatnonzero((chosen < -1) | (chosen >= np.array(self.prompt_counts)[self.workload_of]))
        if len(wrong):
            place = self.workload_of[wrong[0]]
            raise ArgumentError(
                f"reset option prompt: {self.workload_names[place]} has prompts 0 to "
                f"{self.prompt_counts[place] - 1} (-1 for none), got {chosen[wrong[0]]}"
            )
        return chosen.astype(np.intp)

    def _known(self) -> str:
        return ", ".join(self.workload_names)
