"""Vector environment that tunes knobs: thousands of replayed environments at once, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from specgym.decoding import ArgumentError, Split, one_of, whole_number

from ..backends.backend import Backend, BackendName, backend_of
from ..backends.replay import Workloads, replay_backend
from ..profiles import Profiles
from ..prompt_order import shared_seed
from ..recordings.find import Recordings
from ..workloads import constructor, per_workload, probabilities, reset_options, shared_out
from .knob_space import OPTIONS, ActionKind, KnobTuning, Start, per_environment
from .reward import MULTIPLIER, RewardSettings, checked_multiplier

Array = NDArray[np.float32]
Flags = NDArray[np.bool_]


class BackendVectorEnv(KnobTuning, gymnasium.vector.VectorEnv[Array, Array, NDArray[Any]]):
    """Tuning of knobs on any backend in many environments that step together; a subclass opens the backend."""

    # Gymnasium's own vector environments have it as an attribute, too, and torchrl 0.14 (envs/libs/gym.py) reads that.
    autoreset_mode: ClassVar = AutoresetMode.SAME_STEP
    metadata = {"autoreset_mode": autoreset_mode, "render_modes": []}  # noqa: RUF012  # as gymnasium has it

    def _check_counts(self, num_envs: int, max_episode_steps: int) -> None:
        self.num_envs = whole_number("num_envs", num_envs)
        self.max_episode_steps = whole_number("max_episode_steps", max_episode_steps)

    def _set_up_together(
        self,
        backend: Backend,
        weights: Sequence[float] | None,
        ranges: Mapping[str, tuple[float, float]] | None,
        scales: Mapping[str, float] | None,
        action: ActionKind,
        reward: RewardSettings | Mapping[str, Any] | None,
    ) -> None:
        """Keep the backend, and what follows from it; arguments as for `TuningVectorEnv`."""
        self.workload_names = [named.name for named in backend.workloads]
        self._shares = shared_out(self.num_envs, weights, len(self.workload_names))
        self._probabilities: NDArray[np.float64] | None = None
        self._set_up(backend, ranges, scales, action, reward, self._shares)
        self._multipliers = np.full(len(self.workload_names), MULTIPLIER)
        self.single_observation_space = self._moves.observation_space
        self.single_action_space = self._moves.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._state = np.tile(self._moves.defaults(), (self.num_envs, 1))
        self._elapsed = 0
        self._fixed_prompts: NDArray[np.int64] | None = None
        self._belong(self._shares)

    @property
    def divergence_multipliers(self) -> dict[str, float]:
        """Price of an excess over `RewardSettings.max_divergence`, by workload; at first 30."""
        return dict(zip(self.workload_names, self._multipliers.tolist(), strict=True))

    def set_divergence_multipliers(self, multipliers: Mapping[str, float]) -> None:
        """Set the price of an excess over the bound, from the next step on.

        Args:
            multipliers: of some workloads or all, by name, each finite and at least 0.

        Raises:
            ValueError: one is not, or there is no such workload.
        """
        changed = self._multipliers.copy()
        for place, value in enumerate(per_workload("divergence multipliers", dict(multipliers), self.workload_names)):
            if value is not None:
                changed[place] = checked_multiplier(self.workload_names[place], value)
        self._multipliers = changed

    def set_workload_weights(self, weights: Sequence[float] | Mapping[str, float] | None) -> None:
        """Draw the workload of each environment that starts an episode, from the next one on.

        Args:
            weights: in proportion to what each workload is drawn, in order or by name, at least 0; None for the fixed
                shares that the environments were made with.

        Raises:
            ValueError: they are not one finite number a workload, one is negative, or all are 0.
        """
        self._probabilities = None if weights is None else probabilities(weights, self.workload_names)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode of every environment.

        Args:
            seed: fixes the knobs to start from, the order of the prompts and all draws, of all environments together; a
                number, or one for each environment (`shared_seed`).
            options: `knobs`, a mapping from names to values, each one number or an array of shape (num_envs,); and
                `prompt`, an index or an array of them, for this episode.

        Raises:
            ValueError: an unknown option, a knob that does not exist or is out of range, a prompt that was not
                recorded, an array of another shape, or too many or too few seeds.
        """
        seed = shared_seed(seed, self.num_envs)
        super().reset(seed=seed)
        options = reset_options(options, OPTIONS)
        chosen = self._moves.checked(options.get("knobs") or {}, self.num_envs)
        if seed is not None:
            self._orders.restart()
        self._begin()
        prompt = options.get("prompt")
        self._fixed_prompts = None if prompt is None else self._chosen_prompts(prompt)
        for place, name in enumerate(self._moves.ranges):
            if name in chosen:
                self._state[:, place] = chosen[name]
        self._began = True
        return self._observation(), self._start_info()

    def step(self, actions: Array) -> tuple[Array, NDArray[Any], Flags, Flags, dict[str, Any]]:
        """Move the knobs of all environments, and decode each one's next prompt or prompts.

        Args:
            actions: shape (num_envs, knobs), in [-1, 1]; what is beyond is clipped.

        Returns:
            Observations, rewards, terminations (never), truncations and infos.

        Raises:
            ValueError: the actions have another shape, or one is not finite.
            gymnasium.error.ResetNeeded: before the first `reset`.
        """
        self._require_reset()
        self._state = self._moves.moved(self._state, actions)
        values = self._values(self._state)
        metrics = self._decode(values, self._fixed_prompts)
        multiplier = self._multipliers[self.workload_of]
        reward, entries = self._judge(metrics, values, multiplier, self._names.copy())
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
        return self._observation(), reward, never, np.full(self.num_envs, ended, np.bool_), infos

    def _begin(self) -> None:
        """Set all environments to the start of an episode."""
        if self._probabilities is not None:
            self._belong(self.np_random.choice(len(self.workloads), self.num_envs, p=self._probabilities))
        elif self.workload_of is not self._shares:
            self._belong(self._shares)
        self._state = self._first_states(self.num_envs)
        self._elapsed = 0
        self._fixed_prompts = None

    def _observation(self) -> Array:
        return self._state.astype(np.float32)

    def _start_info(self) -> dict[str, Any]:
        return self._masked(self._unmeasured(self._values(self._state), self._names.copy()))

    def _masked(self, entries: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Add the masks that say for which environments an entry holds: for all, so a single mask will do."""
        mask = np.ones(self.num_envs, np.bool_)
        infos: dict[str, Any] = {}
        for name, entry in entries.items():
            infos[name], infos[f"_{name}"] = entry, mask
        return infos

    def _belong(self, workload_of: NDArray[np.int64]) -> None:
        """Let each environment belong to a workload; one that changes begins a new order of its prompts."""
        self._orders.restart(self.workload_of != workload_of)
        self.workload_of = workload_of
        self._names = np.array([*self.workload_names, None], object)[workload_of]

    def _chosen_prompts(self, prompt: Any) -> NDArray[np.int64]:
        indices = per_environment("prompt", np.asarray(prompt), self.num_envs)
        pairs = list(zip(indices.tolist(), self.workload_of.tolist(), strict=True))
        numbers = {pair: self._backend.choose(*pair) for pair in set(pairs)}
        return np.array([numbers[pair] for pair in pairs])


class TuningVectorEnv(BackendVectorEnv):
    """Many environments of `specgym.envs.TuningEnv`, of one or several workloads, that step together.

    Spaces, rewards and infos are those of the single environment, by default with `backend="replay"`; with one
    environment and one workload, steps are the same to the last digit but for rounding. Pickles and copies of replayed
    ones go on where the original stands. All environments run in step and are cut off after `max_episode_steps`; then
    `AutoresetMode.SAME_STEP` holds: the observation is that of the next episode, and `infos` has the last one's as
    `final_obs` and `final_info`, in the form of `gymnasium.vector.SyncVectorEnv`.

    Args:
        num_envs: how many environments.
        decoder: a registered name.
        workload: a name, a `Workload`, or several; by default that of the recordings given, or the one of `TuningEnv`.
        weights: how many environments each workload gets, in proportion; by default as many as any other.
        max_new_tokens: as in `TuningEnv`, like `ranges`, `scales`, `reward`, `start`, `max_draft_length`, `batch_size`,
            `context`, `prompts_per_step`, `action` and `decoder_options`.
        profile: a single one for all workloads, one for each in order, or a mapping from their names; by default the
            pairs' reference profiles (`specgym.envs.profiles`), live those measured on this hardware.
        split: of the prompts.
        recording: traces, or outcomes of the decoder: one for each workload in order, or a mapping from their names; by
            default those that ship.
        backend: `"replay"`, the default, looks up recordings. `"live"` runs the models, all texts of a step in one
            batch, so that their passes are joined; time is charged by the profile, as if each text were alone.
        max_episode_steps: length of an episode.
        source: a second name of `backend`, for libraries that take a `backend` for themselves.
        render_mode: there is nothing to see; `"rgb_array"`, which some tools always ask for, shows nothing.

    Attributes:
        workload_names: of the workloads, in order.
        autoreset_mode: `AutoresetMode.SAME_STEP`, as in `metadata`.

    Raises:
        ValueError: as for `TuningEnv`; or the numbers of workloads, recordings, profiles and weights do not agree.
    """

    @constructor(tokens_per_step="max_new_tokens", draft_length="max_draft_length")
    def __init__(
        self,
        num_envs: int = 1,
        decoder: str = "threshold",
        workload: Workloads = None,
        weights: Sequence[float] | None = None,
        max_new_tokens: int = 32,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        scales: Mapping[str, float] | None = None,
        reward: RewardSettings | Mapping[str, Any] | None = None,
        profile: Profiles = None,
        start: Start = "random",
        split: Split | None = None,
        backend: BackendName | None = None,
        max_draft_length: int = 16,
        recording: Recordings = None,
        batch_size: int = 1,
        context: int | None = None,
        max_episode_steps: int = 20,
        prompts_per_step: int = 1,
        action: ActionKind = "move",
        decoder_options: Mapping[str, Any] | None = None,
        source: BackendName | None = None,
        render_mode: Literal["rgb_array"] | None = None,
    ) -> None:
        one_of("render_mode", render_mode, (None, "rgb_array"))
        backend = backend_of(backend, source, "replay")
        self._check(start, action, split, prompts_per_step)
        self._check_counts(num_envs, max_episode_steps)
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
        max_draft_length = whole_number("max_draft_length", max_draft_length)
        decoding: Backend
        if backend == "live":
            if recording is not None:
                raise ArgumentError("a recording is for backend='replay'; backend='live' runs the models")
            from ..backends.live import LiveBackend  # which imports torch; a replay needs none

            decoding = LiveBackend(
                decoder,
                workload,
                split,
                max_new_tokens,
                decoder_options,
                max_draft_length,
                profile,
                batch_size,
                context,
                wall=False,
            )
        else:
            decoding = replay_backend(
                decoder,
                workload,
                recording,
                split=split,
                profile=profile,
                max_new_tokens=max_new_tokens,
                max_draft_length=max_draft_length,
                options=decoder_options,
                batch_size=batch_size,
                context=context,
            )
        self._set_up_together(decoding, weights, ranges, scales, action, reward)
