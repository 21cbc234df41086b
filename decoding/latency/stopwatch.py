"""A drafter that times another one, for measuring what a draft of a given length costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from ..decoder import synchronise
from ..drafts.drafter import Drafter, DraftSession, DraftStep, OneHotStep, Proposal
from ..sampling import Sampling


class StopwatchDrafter:
    """A drafter that times another one's drafts, and fills them up to the length that is asked of the target.

    Only one-hot drafts fall short (a table without an entry, a text without a match), so filling up with any token
    leaves the arithmetic of verification as it is.

    Attributes:
        length: how many tokens the next draft has, at most what the decoder asks for.
        found: how many tokens the last draft really had.
        seconds: how long those took, the accelerator's work included.
    """

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.name = inner.name
        self.vocabulary_size = inner.vocabulary_size
        self.length = 0
        self.found = 0
        self.seconds = 0.0

    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        """Begin a text with the inner drafter."""
        return _StopwatchSession(self, self.inner.start(prompt, sampling, generator, device), device)


class _StopwatchSession:
    def __init__(self, watch: StopwatchDrafter, inner: DraftSession, device: torch.device) -> None:
        self._watch = watch
        self._inner = inner
        self._device = device

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        count = min(count, self._watch.length)
        started = time.perf_counter()
        steps = list(self._inner.steps(context, count))
        Proposal.of(steps, self._device)  # the decoder does it again, off this clock: it belongs to a draft's time
        synchronise(self._device)
        self._watch.seconds = time.perf_counter() - started
        self._watch.found = len(steps)
        if not steps or steps[0].logits is None:
            steps += [OneHotStep(0)] * (count - len(steps))
        return iter(steps)

    def truncate(self, length: int) -> None:
        self._inner.truncate(length)
