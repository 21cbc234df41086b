"""Stable-Baselines3 over a vector environment of Gymnasium's own, which it does not take as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn


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
