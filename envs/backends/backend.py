"""Backend protocols: decoding for environments, always of n texts; and the metrics that it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import ArgumentError, Knob, LatencyProfile, one_of

from ..workloads import Workload

if TYPE_CHECKING:
    from specgym.decoding import Decoder, Round

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Number = TypeVar("Number", float, NDArray[np.float64])
"""A float, or an array with a number a text or environment."""
Values = TypeVar("Values", bound=Any)
"""Stand-in for `Number`: mypy takes no constrained variable in a generic `NamedTuple`."""
BackendName = Literal["live", "replay"]
BACKENDS: tuple[BackendName, ...] = ("live", "replay")


def backend_of(backend: BackendName | None, source: BackendName | None, default: BackendName) -> BackendName:
    """Return the backend that a constructor's arguments ask for, by either of its names.

    Args:
        backend: as given, or None.
        source: the same by its second name. Wrappers of other libraries take arguments for themselves that are called
            `backend` (`torchrl.envs.GymEnv` of torchrl 0.14 does), and hand on those that they do not know.
        default: of an environment that is asked for neither.

    Raises:
        ValueError: the two contradict each other, or there is no such backend.
    """
    for name, value in (("backend", backend), ("source", source)):
        if value is not None:
            one_of(name, value, BACKENDS)
    if backend is not None and source is not None and backend != source:
        raise ArgumentError(
            f"backend is {backend!r} and source {source!r}, which are two names of the same argument; give one of them"
        )
    return backend or source or default


class Metrics(NamedTuple, Generic[Values]):
    """Sums over the rounds of n texts, arrays of shape (n,); or of a single text, floats. Rates are properties."""

    tokens: Values
    """Tokens emitted."""
    rounds: Values
    """Rounds of drafting and verifying."""
    drafted: Values
    """Draft tokens that were verified."""
    accepted: Values
    """Draft tokens among those emitted."""
    total_variation: Values
    """Sum of `Round.divergence`."""
    seconds: Values
    """Time charged for the rounds."""
    plain_seconds: Values
    """Time charged for as many tokens of the target's own autoregressive decoding."""

    @property
    def speedup(self) -> Values:
        """Charged time of plain decoding over this one's."""
        return self.plain_seconds / self.seconds

    @property
    def ms_per_token(self) -> Values:
        """Milliseconds charged per token."""
        return self.seconds * 1000 / self.tokens

    @property
    def draft_acceptance_rate(self) -> Values:
        """Accepted draft tokens over verified ones, 0 to 1; 0 where nothing was drafted."""
        rate: Any = self.accepted / (self.drafted + (self.drafted == 0))
        return rate

    @property
    def mean_acceptance_length(self) -> Values:
        """Tokens emitted per round."""
        return self.tokens / self.rounds

    @property
    def divergence(self) -> Values:
        """Mean total variation from the target per emitted token, 0 to 1."""
        return self.total_variation / self.tokens

    def pooled(self, count: int) -> Metrics[Values]:
        """Return the metrics of every `count` texts together, shape (n / count,); a long text counts for more."""
        if count == 1:
            return self
        return Metrics(*(np.reshape(values, (-1, count)).sum(1) for values in self))

    def single(self) -> Metrics[float]:
        """Return the metrics of the only text, as floats, which are several times faster than arrays of one number."""
        return Metrics(*(values.item() for values in self))

    def entries(self) -> dict[str, Values]:
        """Return what environments put into `info`: the rates, then the sums."""
        return {
            "speedup": self.speedup,
            "ms_per_token": self.ms_per_token,
            "draft_acceptance_rate": self.draft_acceptance_rate,
            "mean_acceptance_length": self.mean_acceptance_length,
            "divergence": self.divergence,
            "tokens": self.tokens,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "seconds": self.seconds,
        }


class Backend(Protocol):
    """Decodes prompts of one or several workloads with values of a decoder's knobs, live or by replay.

    Attributes:
        workloads: the pairs, prompts and sampling; each with the split in use.
        profiles: what the time of every workload is charged by, at the operating point.
        knobs: what can be set.
        prompts: numbers of the prompts of every workload, one array a workload.
        decoder: at work; None in a replay.
    """

    @property
    def workloads(self) -> Sequence[Workload]: ...

    @property
    def profiles(self) -> Sequence[LatencyProfile]: ...

    @property
    def knobs(self) -> tuple[Knob, ...]: ...

    @property
    def prompts(self) -> Sequence[Integers]: ...

    @property
    def decoder(self) -> Decoder[Any] | None: ...

    def choose(self, prompt: Any, workload: int = 0) -> int:
        """Return the number of a prompt that a user chose for a workload.

        Raises:
            ValueError: it cannot be used; the message says why.
        """
        ...

    def decode(
        self, prompts: Integers, workloads: Integers, knobs: Mapping[str, Floats], rng: np.random.Generator
    ) -> Metrics[Floats]:
        """Decode n texts.

        Args:
            prompts: their numbers, shape (n,).
            workloads: place of every text's workload, shape (n,).
            knobs: values of every knob by name, in its units and within its range, each of shape (n,).
            rng: draws whatever is drawn.

        Returns:
            Arrays of shape (n,).
        """
        ...

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Raise an error, with the way out, unless knobs in these (low, high) can be decoded with."""
        ...

    def last_text(self) -> tuple[Sequence[int], list[Round]]:
        """Return prompt and rounds of the text decoded last; empty where the backend does not know them."""
        ...


class ReplayBackend(ABC):
    """Base of the backends that look up recordings. See `Backend`.

    Prompts of all workloads are numbered one after another.

    Args:
        workloads: what was recorded.
        profiles: what every workload's time is charged by, at the operating point.
        knobs: what can be set.
        recorded: numbers of the prompts that can be replayed, as their recording counts them, one array a workload.
        first_prompts: number of the first prompt of every workload, shape (workloads,).
    """

    decoder = None

    def __init__(
        self,
        workloads: Sequence[Workload],
        profiles: Sequence[LatencyProfile],
        knobs: tuple[Knob, ...],
        recorded: Sequence[Integers],
        first_prompts: Integers,
    ) -> None:
        self.workloads = workloads
        self.profiles = profiles
        self.knobs = knobs
        self.first_prompts = first_prompts
        self.prompts: Sequence[Integers] = [
            numbers + first for numbers, first in zip(recorded, first_prompts, strict=True)
        ]
        self._plain_seconds = np.array([profile.autoregressive_seconds for profile in profiles])

    @abstractmethod
    def sums(
        self, prompts: Integers, workloads: Integers, knobs: Mapping[str, Floats], rng: np.random.Generator
    ) -> dict[str, Floats]:
        """Return the sums of `Metrics` but `plain_seconds`, by name; arguments as for `decode`."""

    def choose(self, prompt: Any, workload: int = 0) -> int:
        """Return the number of a recorded prompt, chosen by its index."""
        if not isinstance(prompt, int | np.integer):
            raise ArgumentError(
                "reset option prompt: a recording knows its own prompts only, so backend='replay' takes an index, not "
                f"a {type(prompt).__name__}; decode others with backend='live'"
            )
        first, recorded = self.first_prompts[workload], self.prompts[workload]
        if prompt + first not in recorded:
            named = self.workloads[workload]
            raise ArgumentError(
                f"reset option prompt={prompt}: the recording of {named} can replay the {named.split} prompts "
                f"{', '.join(map(str, (recorded - first).tolist()))}"
            )
        return int(prompt + first)

    def decode(
        self, prompts: Integers, workloads: Integers, knobs: Mapping[str, Floats], rng: np.random.Generator
    ) -> Metrics[Floats]:
        """Decode n texts."""
        sums = self.sums(prompts, workloads, knobs, rng)
        return Metrics(**sums, plain_seconds=self._plain_seconds[workloads] * sums["tokens"])

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:  # noqa: B027  # as it says
        """Accept all; a backend whose recording covers less refuses."""

    def last_text(self) -> tuple[Sequence[int], list[Round]]:
        """Return nothing: a recording does not hold the tokens of every text."""
        return (), []


class DraftSteps(NamedTuple):
    """Results of a control step of n texts, each of shape (n,); or of a single text, numbers."""

    tokens: Any
    """Tokens emitted."""
    seconds: Any
    """Time charged."""
    drafted: Any
    """Draft tokens verified."""
    accepted: Any
    """Draft tokens among those emitted."""
    rounds: Any
    """Verifications."""


class DraftBackend(Protocol):
    """Texts drafted side by side, token by token, for environments that decide how.

    Attributes:
        prompts: numbers of the prompts of every workload, one array a workload.
    """

    prompts: Sequence[Integers]

    @property
    def features(self) -> NDArray[np.float32]:
        """Features of every draft, shape (n, features); changed in place."""
        ...

    @property
    def over(self) -> NDArray[np.bool_]:
        """Texts that have ended, or not begun, and wait, shape (n,)."""
        ...

    @property
    def remaining_acceptable(self) -> Integers:
        """Number of further tokens that would lengthen what is emitted; negative if in vain.

        Shape (n,), or (n, drafts) where several drafts are to choose from.
        """
        ...

    def begin(self, which: Integers, workloads: Integers, prompts: Integers, rng: np.random.Generator) -> None:
        """Begin other texts.

        Args:
            which: places of the texts, each once.
            workloads: place of each one's workload.
            prompts: each one's prompt.
            rng: draws whatever is drawn.
        """
        ...

    def step(self, actions: NDArray[Any], rng: np.random.Generator) -> tuple[DraftSteps, Integers]:
        """Draft or verify, as the actions of the environment say.

        Args:
            actions: shape (n,), or (n, knobs) where an action moves knobs.
            rng: draws whatever is drawn.

        Returns:
            Results of the step, and places of the texts that it ended.
        """
        ...

    def leave(self, which: Integers) -> None:
        """Let some texts be over."""
        ...

    def clear(self) -> None:
        """Let all texts be over, with nothing known of them."""
        ...
