"""Drafts of pipelined decoding that work in line with their target, so that random choices come in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from specgym.decoding.decoders.pipelined.decoder import PipelinedDecoder, PipelinedThresholdDecoder
from specgym.decoding.decoders.pipelined.worker import Drafted, DraftedText, Verified, _Request, _Text
from specgym.decoding.drafts.drafter import ModelDrafter


class InlineWorker:
    """A draft that works when it is asked for a token, so that random choices come in a fixed order.

    Its rule is asked about every token that is taken, as soon as it is.
    """

    alive = True

    def __init__(self, decoder: PipelinedDecoder | PipelinedThresholdDecoder) -> None:
        self._decoder, self._number = decoder, 0

    def begin(self, text: DraftedText) -> None:
        drafter = self._decoder.pair.draft
        assert isinstance(drafter, ModelDrafter)
        self._text = _Text(self._decoder.pair, drafter, text, self._decoder.stop)

    def ask(self, kept: int, tokens: Sequence[int], count: int, verified: Sequence[Verified] = ()) -> None:
        self._number += 1
        self._steps = self._text.steps(_Request(self._number, kept, tokens, count, verified))
        self._drawn = None if self._decoder.stop is None else next(self._steps, None)

    def take(self) -> Drafted | None:
        step = next(self._steps, None) if self._decoder.stop is None else self._drawn
        if step is None:
            return None
        self._text.context.append(int(step.token))
        if self._decoder.stop is not None:
            self._drawn = next(self._steps, None)
        return Drafted(int(step.token), step.logits if step.probabilities is None else step.probabilities, 0.0)


def work_in_line(patch: pytest.MonkeyPatch) -> None:
    """Let drafts work in line."""
    for kind in (PipelinedDecoder, PipelinedThresholdDecoder):
        patch.setattr(kind, "worker", lambda decoder: InlineWorker(decoder))
