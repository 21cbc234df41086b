"""Stable-Baselines3 over a vector environment of Gymnasium's own, which it does not take as it is.

NaN and infinities on their way into PPO: caught, counted and logged, and never trained on.

Four places can produce them, and each has a guard that Stable-Baselines3 lets one plug in:

==============================  =====================================================================
environment                     `FiniteGuard` puts a finite stand-in and marks the transition
policy and value network        `KnobPolicy` counts, acts with "no change", and gives up after too many
advantages and minibatches      `FiniteRolloutBuffer` leaves marked transitions out of both
loss and gradients              `FiniteAdam` skips the optimiser step
==============================  =====================================================================

`specgym.callbacks.NumericsCallback` connects them: it hands the marks to the buffer and the counts to the logger, under
``numerics/``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from specgym.callbacks import LEFT_OUT
from specgym.decoding import NumericalError


class VectorEnvAdaptor(VecEnv):
    """A Gymnasium vector environment as a `VecEnv`. Put `VecMonitor` and `VecNormalize` on top, in this order.

    Making thousands of dictionaries costs more than a step of a replayed environment. So by default `infos` says only
    what learning needs, and only where an episode ended: `terminal_observation` and `TimeLimit.truncated`. Everything
    that the environment said is in `vector_infos`, as arrays.

    Args:
        env: with same-step autoreset, `metadata["autoreset_mode"] == AutoresetMode.SAME_STEP`.
        infos: give every environment's own entries at every step, too.

    Attributes:
        env: as given.
        vector_infos: the infos of the last reset or step, in Gymnasium's form.

    Raises:
        ValueError: the environment resets itself in another way.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], infos: bool = False) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"{env} has autoreset mode {mode}, and Stable-Baselines3 needs AutoresetMode.SAME_STEP; make it with "
                "vector_kwargs={'autoreset_mode': AutoresetMode.SAME_STEP}"
            )
        self.env = env
        self.vector_infos: dict[str, Any] = {}
        self._infos = infos
        self._actions: NDArray[Any] | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> VecEnvObs:
        """Reset all environments, with the seed and the options given before; they count once.

        Raises:
            ValueError: options were given that differ between environments.
        """
        options = self._options[0]
        if any(other != options for other in self._options):
            raise ValueError("a vector environment takes one set of options; give arrays where environments differ")
        observations, self.vector_infos = self.env.reset(seed=self._seeds[0], options=options or None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = self._dictionaries(self.vector_infos, range(self.num_envs))
        return observations

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed the next reset. A vector environment has one seed for all; it is given for each."""
        first = super().seed(seed)[0]
        self._seeds = [first] * self.num_envs
        return self._seeds

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step; returns observations, rewards (float32), ends of episodes and infos."""
        observations, rewards, terminated, truncated, self.vector_infos = self.env.step(self._actions)
        dones = terminated | truncated
        ended = dones.nonzero()[0].tolist()
        infos = self._dictionaries(self.vector_infos, range(self.num_envs))
        if ended:
            final = self.vector_infos["final_obs"]
            for row, last in zip(ended, self._dictionaries(self.vector_infos["final_info"], ended), strict=True):
                infos[row] |= last
                infos[row]["terminal_observation"] = final[row]
                infos[row]["TimeLimit.truncated"] = bool(truncated[row] and not terminated[row])
        return observations, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The vector environment's attribute, once for each index: what is inside is not a list of environments.

        Of an environment in wrappers the outermost that has the attribute answers.
        """
        return [getattr(self._owner(attr_name), attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the vector environment.

        Raises:
            ValueError: it is asked for some environments alone.
        """
        self._require_all(indices, f"set {attr_name}")
        setattr(self._owner(attr_name), attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> Any:
        """Call a method of the vector environment once; the result, once for each environment.

        Raises:
            ValueError: it is asked for some environments alone.
        """
        self._require_all(indices, f"call {method_name}")
        return [getattr(self._owner(method_name), method_name)(*method_args, **method_kwargs)] * self.num_envs

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """False: there are no single environments that could be wrapped."""
        return [False] * len(self._rows(indices))

    def _dictionaries(self, infos: dict[str, Any], rows: Iterable[int]) -> list[dict[str, Any]]:
        """One dictionary a row, which the caller may write to."""
        dictionaries: list[dict[str, Any]] = [{} for _ in rows]
        if not self._infos:
            return dictionaries
        for name, values in infos.items():
            held = infos.get(f"_{name}")
            if held is None or name in ("final_obs", "final_info"):  # a mask itself, or what is put in elsewhere
                continue
            listed, holds = np.asarray(values).tolist(), held.tolist()
            for dictionary, row in zip(dictionaries, rows, strict=True):
                if holds[row]:
                    dictionary[name] = listed[row]
        return dictionaries

    def _owner(self, name: str) -> VectorEnv[Any, Any, Any]:
        """Wrappers of Gymnasium's vector environments hand nothing through, so look for who has it."""
        env = self.env
        while not hasattr(env, name) and isinstance(env, VectorWrapper):
            env = env.env
        return env

    def _rows(self, indices: VecEnvIndices) -> list[int]:
        return list(self._get_indices(indices))

    def _require_all(self, indices: VecEnvIndices, what: str) -> None:
        if sorted(self._rows(indices)) != list(range(self.num_envs)):
            raise ValueError(f"cannot {what} for some environments alone: {self.env} is one object")


class FiniteGuard(VecEnvWrapper):
    """Replaces non-finite observations and rewards, and marks the transitions they spoil.

    It belongs directly on the environments, below `VecMonitor` and `VecNormalize`, whose running statistics a single
    NaN would ruin. An observation is replaced entry by entry by the last finite one of the same environment (at first
    by the middle of the space), a reward by the last finite reward (at first by 0).

    Attributes:
        caught: counts so far: ``observations`` with a non-finite entry, final ones of an episode included, and
            non-finite ``rewards``.
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        space = venv.observation_space
        if not isinstance(space, spaces.Box):
            raise TypeError(f"FiniteGuard watches Box observations, got {space}; flatten them first")
        self.caught = {"observations": 0, "rewards": 0}
        with np.errstate(over="ignore", invalid="ignore"):
            middle = (space.low + space.high) / 2
        middle = np.where(np.isfinite(middle), middle, 0).astype(space.dtype)
        self._last = np.repeat(middle[None], self.num_envs, axis=0)
        self._last_reward = np.zeros(self.num_envs, dtype=np.float32)
        self._replaced = np.zeros(self.num_envs, dtype=bool)

    def reset(self) -> VecEnvObs:
        """Reset all environments; a non-finite first observation marks the first transition."""
        observations, self._replaced = self._mend(np.asarray(self.venv.reset()))
        return observations

    def step_wait(self) -> VecEnvStepReturn:
        """Finish a step; spoiled transitions carry ``info["numerics/left_out"] = True``."""
        raw, rewards, dones, infos = self.venv.step_wait()
        spoiled = self._replaced.copy()  # the state acted in was a stand-in
        observations, self._replaced = self._mend(np.asarray(raw))
        spoiled |= self._replaced & ~dones  # the state arrived in is one; after `done` it belongs to the next episode
        for row, info in enumerate(infos):
            final = info.get("terminal_observation")
            if final is not None and not np.isfinite(final).all():
                self.caught["observations"] += 1
                info["terminal_observation"] = np.where(np.isfinite(final), final, self._last[row])
                spoiled[row] = True
        broken = ~np.isfinite(rewards)
        self.caught["rewards"] += int(np.count_nonzero(broken))
        self._last_reward = np.where(broken, self._last_reward, rewards)
        for spoiled_row in np.flatnonzero(spoiled | broken):
            infos[spoiled_row][LEFT_OUT] = True
        return observations, self._last_reward.copy(), dones, infos

    def _mend(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        finite = np.isfinite(raw)
        broken = ~finite.reshape(len(raw), -1).all(axis=1)
        self.caught["observations"] += int(np.count_nonzero(broken))
        self._last = np.where(finite, raw, self._last)
        return self._last.copy(), broken


class FiniteRolloutBuffer(RolloutBuffer):
    """A rollout buffer whose minibatches and advantages leave spoiled transitions out.

    A transition is spoiled when `leave_out` says so, or when its reward, value, log-probability, action or observation
    is not finite, or when the value it would be bootstrapped from is not. Advantages are not accumulated across one:
    the transition before it is bootstrapped from its value alone.

    Attributes:
        left_out: transitions left out so far, over all rollouts.
        usable: which transitions of the current rollout may be learned from, shape (steps, environments).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.left_out = 0
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        """Forget the rollout, not the count."""
        super().reset()
        self.usable = np.ones((self.buffer_size, self.n_envs), dtype=bool)
        self._valued = np.ones((self.buffer_size, self.n_envs), dtype=bool)

    def leave_out(self, rows: np.ndarray) -> None:
        """Mark the transition that is added next in the environments where `rows` is True, shape (environments,)."""
        self.usable[self.pos] &= ~rows

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: torch.Tensor,
        log_prob: torch.Tensor,
    ) -> None:
        """Store one step of every environment, non-finite entries as 0 and marked."""
        place = self.pos
        super().add(obs, action, reward, episode_start, value, log_prob)
        self._valued[place] = np.isfinite(self.values[place])
        for stored in (self.observations, self.actions, self.rewards, self.values, self.log_probs):
            finite = np.isfinite(stored[place])
            self.usable[place] &= finite.reshape(self.n_envs, -1).all(axis=1)
            stored[place] = np.where(finite, stored[place], 0)

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: np.ndarray) -> None:
        """Generalised advantage estimation within each stretch of usable transitions.

        Args:
            last_values: values of the states after the last step, one for each environment.
            dones: whether the last step ended an episode.
        """
        after = last_values.detach().cpu().numpy().flatten()
        next_valued, next_values = np.isfinite(after), np.where(np.isfinite(after), after, 0)
        goes_on = ~np.asarray(dones, dtype=bool)
        carried = np.zeros(self.n_envs)
        for step in reversed(range(self.buffer_size)):
            self.usable[step] &= next_valued | ~goes_on
            ahead = np.where(goes_on, self.gamma * (next_values + self.gae_lambda * carried), 0)
            surprise = self.rewards[step] + ahead - self.values[step]
            carried = np.where(self.usable[step], surprise, 0)
            self.advantages[step] = carried
            next_valued, next_values = self._valued[step], self.values[step]
            goes_on = self.episode_starts[step] == 0
        self.returns = self.advantages + self.values
        self.left_out += int(np.count_nonzero(~self.usable))

    def get(self, batch_size: int | None = None) -> Generator[RolloutBufferSamples, None, None]:
        """Minibatches of usable transitions, in random order.

        Raises:
            NumericalError: the rollout has no usable transition.
        """
        assert self.full, "the rollout is not complete"
        usable = np.flatnonzero(self.usable.swapaxes(0, 1).reshape(-1))  # in the order that flattening gives
        if not len(usable):
            raise NumericalError(
                f"none of the {self.usable.size} transitions of this rollout can be learned from: all had NaN or "
                "infinities in observation, reward or policy. Check the environment's reward weights and the learning "
                "rate; the counts are in TensorBoard under numerics/."
            )
        if not self.generator_ready:
            for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
                setattr(self, name, self.swap_and_flatten(getattr(self, name)))
            self.generator_ready = True
        order = np.random.permutation(usable)  # noqa: NPY002 - the generator that SB3 seeds
        size = batch_size or len(order)
        for start in range(0, len(order), size):
            yield self._get_samples(order[start : start + size])


class FiniteAdam(torch.optim.Adam):
    """Adam that skips a step whose gradients are not all finite, moments included.

    Attributes:
        skipped: steps skipped so far.
    """

    skipped = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, or none; the loss if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            super().step()
        else:
            self.skipped += 1
        return loss
