"""Where the drafts of `DraftLengthEnv` come from: the models, or a trace."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import SpeculativeDecoder, SpeculativeSession

from ..control.throughput import DraftCharges
from ..recordings.trace import Trace
from ..workloads import Workload
from .chain_replay import DraftReplay, DraftTable

Array = NDArray[np.float32]

UNKNOWN = -1000
"""`remaining_acceptable` where nobody knows it, in live decoding; no draft is that long."""

Counts = tuple[int, float, int, int, int]
"""Of a step: tokens emitted, seconds charged, draft tokens verified, accepted, and rounds."""


class Drafting(ABC):
    """One text at a time being drafted and verified.

    Attributes:
        prompts: how many there are.
    """

    prompts: int

    @property
    @abstractmethod
    def features(self) -> Array:
        """What is known of the draft, shape (8,); changed in place."""

    @property
    @abstractmethod
    def over(self) -> bool:
        """Whether there is no text, or it has ended."""

    @property
    @abstractmethod
    def remaining_acceptable(self) -> int:
        """As `info` has it."""

    @abstractmethod
    def begin(self, prompt: int, generator: np.random.Generator) -> None:
        """Begin the text of a prompt, and draft."""

    @abstractmethod
    def step(self, stop: bool, generator: np.random.Generator) -> Counts:
        """Verify and draft the next, or draft one more."""


class ReplayedDrafting(Drafting):
    """From a trace.

    Args:
        trace: whose texts.
        charges: what time is charged by.
        max_draft_length: tokens that a draft may have.
        tokens: of each text, at most.
        batch_size: sequences decoded together.

    Raises:
        TraceError: the trace has shorter drafts or texts than asked for.
    """

    def __init__(
        self, trace: Trace, charges: DraftCharges, max_draft_length: int, tokens: int, batch_size: int
    ) -> None:
        table = DraftTable([trace], max_draft_length, tokens)
        self._first_rows = table.first_rows[0]
        self._replay = DraftReplay(table, [charges], [batch_size], np.zeros(1, np.intp))
        self._whole = np.zeros(1, np.intp)
        self.prompts = trace.prompts

    @property
    def features(self) -> Array:
        return self._replay.tracker.features[0]

    @property
    def over(self) -> bool:
        return bool(self._replay.over[0])

    @property
    def remaining_acceptable(self) -> int:
        return int(self._replay.remaining_acceptable[0])

    def begin(self, prompt: int, generator: np.random.Generator) -> None:
        self._replay.begin(self._whole, self._first_rows[[prompt]], generator)
        self._replay.draft()

    def step(self, stop: bool, generator: np.random.Generator) -> Counts:
        steps, _ = self._replay.advance(np.array([stop]), generator)
        self._replay.draft()
        return (
            int(steps.tokens[0]),
            float(steps.seconds[0]),
            int(steps.drafted[0]),
            int(steps.accepted[0]),
            int(steps.rounds[0]),
        )


class LiveDrafting(Drafting):
    """With the models; arguments as for `ReplayedDrafting`. Loading errors as for `load_pair` and `load_prompts`."""

    def __init__(
        self, workload: Workload, charges: DraftCharges, max_draft_length: int, tokens: int, batch_size: int
    ) -> None:
        self._decoder = SpeculativeDecoder(
            workload.load(), max_draft_length, cost_ratio=charges.cost_ratio, batch_size=batch_size
        )
        self._charges = charges
        self._prompts = workload.prompt_ids()
        self._sampling = workload.sampling
        self._tokens = tokens
        self._session: SpeculativeSession | None = None
        self._place = 0  # tokens drafted so far
        self.prompts = len(self._prompts)

    @property
    def features(self) -> Array:
        assert self._session is not None
        return self._session.tracker.features[0]

    @property
    def over(self) -> bool:
        return self._session is None or self._session.finished

    @property
    def remaining_acceptable(self) -> int:
        return UNKNOWN

    def begin(self, prompt: int, generator: np.random.Generator) -> None:
        session = self._decoder.start(
            self._prompts[prompt],
            max_new_tokens=self._tokens,
            sampling=self._sampling,
            seed=int(generator.integers(2**31)),
        )
        assert isinstance(session, SpeculativeSession)
        self._session = session
        self._place = int(session.draft_one() is not None)

    def step(self, stop: bool, generator: np.random.Generator) -> Counts:
        session, charges = self._session, self._charges
        assert session is not None
        if not stop and session.draft_one() is not None:
            self._place += 1
            return 0, float(charges.seconds[0, self._place - 1]), 0, 0, 0
        cycle = session.verify()
        tokens, rounds, seconds = len(cycle.tokens), 1, float(charges.seconds[1, self._place])
        self._place = 0
        while not session.finished:
            if session.draft_one() is not None:
                self._place = 1
                break
            tokens += len(session.verify().tokens)
            rounds += 1
            seconds += charges.empty_round
        return tokens, seconds, cycle.drafted, cycle.accepted, rounds
