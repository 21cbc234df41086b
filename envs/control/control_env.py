"""Base of the environments that control one text at a time: prompts, rewards, totals and `info`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from specgym.decoding import ArgumentError, Feature, Split, number, one_of, whole_number

from ..backends.backend import BackendName, DraftBackend, DraftSteps, backend_of
from ..backends.replay import require_single
from ..prompt_order import PromptOrder
from ..workloads import DEFAULT_WORKLOAD, Workload, reset_options
from ..workloads import workload as named_workload
from .throughput import checked_rate, linear_reward, relative_throughput

Array = NDArray[np.float32]

LONGEST = 32
"""Longest draft, in tokens; observations do not tell longer ones apart."""

FIRST = np.zeros(1, np.int64)
"""The only text, workload or operating point."""

_OPTIONS = ("prompt",)


class ControlEnv(gymnasium.Env[Array, Any], EzPickle):
    """Base of the environments that control one text at a time.

    Attributes:
        default_workload: name of the workload of one that is given none.
        meaning: of the actions, for messages.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  # gymnasium declares it so
    default_workload: ClassVar[str] = DEFAULT_WORKLOAD
    meaning: ClassVar[str]

    def _check(
        self,
        workload: str | Workload | None,
        recording: Any,
        backend: BackendName | None,
        source: BackendName | None,
        split: Split | None,
        render_mode: Literal["rgb_array"] | None,
        rate: float,
        decision_seconds: float,
    ) -> BackendName:
        """Return the backend that a constructor's arguments ask for.

        Raises:
            ValueError: they contradict each other, or one is out of range.
        """
        backend = backend_of(backend, source, "live")
        require_single(type(self).__name__, workload=workload, recording=recording)
        one_of("split", split, (None, "train", "test"))
        self._rate = checked_rate(rate)
        number("decision_seconds", decision_seconds, at_least=0)
        one_of("render_mode", render_mode, (None, "rgb_array"))
        return backend

    def _set_up(
        self,
        workload: Workload,
        drafts: DraftBackend,
        autoregressive_seconds: float,
        features: Sequence[Feature],
        actions: int | spaces.Box,
    ) -> None:
        """Finish a constructor.

        Args:
            workload: pair, prompts and sampling.
            drafts: texts of it, one at a time.
            autoregressive_seconds: of a token of plain decoding.
            features: that are observed.
            actions: how many there are, or their space.
        """
        self._workload = workload
        self._drafts = drafts
        self._autoregressive_seconds = autoregressive_seconds
        self.observation_space = observation_space(features)
        self.action_space = spaces.Discrete(actions) if isinstance(actions, int) else actions
        self._orders = PromptOrder(drafts.prompts)
        self._total_tokens = 0
        self._total_seconds = 0.0

    @property
    def workload(self) -> Workload:
        """Pair, prompts and sampling; its split is the one in use."""
        return self._workload

    @property
    def rate(self) -> float:
        """Price of time, relative to plain decoding."""
        return self._rate

    def set_rate(self, rate: float) -> None:
        """Price time anew, from the next step on.

        Raises:
            ValueError: the rate is negative or not finite.
        """
        self._rate = checked_rate(rate)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin a text.

        Args:
            seed: fixes the order of the prompts and all sampling.
            options: `prompt`, the index of one.

        Raises:
            ValueError: an unknown option, or a prompt that does not exist.
        """
        super().reset(seed=seed)
        options = reset_options(options, _OPTIONS)
        if seed is not None:
            self._orders.restart()
        if options.get("prompt") is not None:
            prompt = np.array([self._checked_prompt(options["prompt"])])
        else:
            prompt = self._orders.take_shared(FIRST, self.np_random)
        self._total_tokens, self._total_seconds = 0, 0.0
        self._drafts.begin(FIRST, FIRST, prompt, self.np_random)
        return self._drafts.features[0].copy(), self._info(DraftSteps(0, 0.0, 0, 0, 0))

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Do as the action says.

        Returns:
            Observation, reward, whether the text has ended, False, info.

        Raises:
            ValueError: there is no such action.
            gymnasium.error.ResetNeeded: no text has begun, or it has ended.
            NumericalError: the target gave NaN logits.
        """
        actions = self._checked_action(action)
        if self._drafts.over[0]:
            raise gymnasium.error.ResetNeeded("there is no text, or it has ended; call reset before the next step")
        steps, _ = self._drafts.step(actions, self.np_random)
        single = DraftSteps(*(values.item() for values in steps))
        self._total_tokens += single.tokens
        self._total_seconds += single.seconds
        reward = linear_reward(float(single.tokens), single.seconds, self._rate, self._autoregressive_seconds)
        return self._drafts.features[0].copy(), reward, bool(self._drafts.over[0]), False, self._info(single)

    def _info(self, steps: DraftSteps) -> dict[str, Any]:
        throughput = relative_throughput(self._total_tokens, self._total_seconds, self._autoregressive_seconds)
        return {
            **steps._asdict(),
            **self._further_info(steps),
            "total_tokens": self._total_tokens,
            "total_seconds": self._total_seconds,
            "throughput": throughput,
            "workload": self._workload.name,
        }

    def _further_info(self, steps: DraftSteps) -> dict[str, Any]:
        """Entries of `info` that not all environments have."""
        remaining = self._drafts.remaining_acceptable[0]
        return {"remaining_acceptable": remaining if remaining.ndim else int(remaining)}

    def _checked_action(self, action: Any) -> NDArray[Any]:
        """The action as the backend takes those of its texts, of which there is one."""
        assert isinstance(self.action_space, spaces.Discrete)
        if np.shape(action) != () or action not in range(int(self.action_space.n)):
            raise ArgumentError(f"an action is {self.meaning}, got {action!r}")
        return np.array([int(action)])

    def _checked_prompt(self, prompt: Any) -> int:
        count = len(self._drafts.prompts[0])
        if not isinstance(prompt, int | np.integer) or not 0 <= prompt < count:
            raise ArgumentError(
                f"reset option prompt is an index: {self._workload} has {self._workload.split} prompts 0 to "
                f"{count - 1}, got {prompt!r}"
            )
        return int(prompt)


def observation_space(features: Sequence[Feature]) -> spaces.Box[np.float32]:
    """Return the space of some features, float32, shape (features,)."""
    low, high = (np.array([getattr(feature, end) for feature in features], np.float32) for end in ("low", "high"))
    return spaces.Box(low, high)


def find_live(recording: Any, name: str | Workload | None, split: Split | None = None) -> tuple[None, Workload]:
    """Find a workload to be decoded live; the arguments are those of `find_trace`, and no trace is returned.

    Raises:
        ValueError: a recording is given.
        WorkloadError: the workload's name is not known.
    """
    if recording is not None:
        raise ArgumentError("recording is for backend='replay'; the backend is 'live'")
    named = named_workload(name or DEFAULT_WORKLOAD)
    return None, named if split is None else named.with_split(split)


def checked_lengths(max_draft_length: int, max_new_tokens: int) -> tuple[int, int]:
    """Return both as whole numbers; raises ArgumentError unless they are in range."""
    return (
        whole_number("max_draft_length", max_draft_length, at_most=LONGEST),
        whole_number("max_new_tokens", max_new_tokens),
    )
