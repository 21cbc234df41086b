"""What every replay does, whatever was recorded: decode prompts with values of the knobs, one text or many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .trace_replay import LOSSLESS, Replay

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class KnobReplay(Protocol):
    """Decodes recorded prompts of one or several workloads by a decoder's knobs.

    Prompts of all workloads are numbered one after another.

    Attributes:
        prompts: numbers of the prompts that can be replayed, as their own recording counts them, one array a workload.
        first_prompts: number of the first prompt of each workload, shape (workloads,).
    """

    prompts: Sequence[Integers]
    first_prompts: Integers

    def decode(self, prompt: int, values: Mapping[str, float], random: np.random.Generator) -> dict[str, float]:
        """Decode one text of the first workload, and sum over its rounds.

        Args:
            prompt: its number.
            values: of every knob, by name, in its own units and within what was recorded.
            random: draws whatever is drawn.

        Returns:
            `tokens`, `rounds`, `drafted`, `accepted`, `divergence` and `seconds`, as `measuring.metrics` takes them.
        """
        ...

    def decode_many(
        self, prompts: Integers, workloads: Integers, values: Mapping[str, Floats], random: np.random.Generator
    ) -> dict[str, Floats]:
        """Decode many texts; as `decode`, with and of arrays of shape (texts,).

        Args:
            prompts: their numbers.
            workloads: the workload that each belongs to.
            values: of every knob, by name.
            random: draws whatever is drawn.
        """
        ...

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Raise an error, with the way out, if knobs between these values cannot be replayed; (low, high) by name."""
        ...


class TraceReplay:
    """Traces replayed by the knobs of threshold decoding, `fallback` and `rollback`, or of exact decoding,
    `draft_length`.

    Args:
        replay: of the traces.
        longest: K of threshold decoding, tokens drafted at most.
    """

    def __init__(self, replay: Replay, longest: int) -> None:
        self._replay = replay
        self._longest = longest
        self.prompts: Sequence[Integers] = replay.table.prompts
        self.first_prompts: Integers = replay.table.first_prompts

    def decode(self, prompt: int, values: Mapping[str, float], random: np.random.Generator) -> dict[str, float]:
        """As `KnobReplay.decode`."""
        setting = LOSSLESS, 1.0, int(values.get("draft_length", self._longest))
        if "fallback" in values:
            setting = values["fallback"], values["rollback"], self._longest
        return self._replay.decode(prompt, *setting, random)

    def decode_many(
        self, prompts: Integers, workloads: Integers, values: Mapping[str, Floats], random: np.random.Generator
    ) -> dict[str, Floats]:
        """As `KnobReplay.decode_many`."""
        texts = len(prompts)
        if "fallback" in values:
            setting = values["fallback"], values["rollback"], np.full(texts, self._longest)
        else:
            setting = np.full(texts, LOSSLESS), np.ones(texts), values["draft_length"].astype(np.int64)
        return self._replay.decode_many(prompts, workloads, *setting, random)

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """A trace knows what any thresholds would do, and any draft length up to its own."""
