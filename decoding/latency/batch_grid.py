"""Timing rounds that draft chains, at one operating point or several: batch sizes and contexts.

Texts are decoded as always, those of a batch together (`decoders/batch.py`), so that whatever a round takes is timed:
passes over several texts, drafts that are made one after another, and every text's own bookkeeping.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..decoder import Decoder, synchronise
from ..decoders.autoregressive import AutoregressiveDecoder
from ..decoders.batch import Batch
from ..decoders.threshold import ThresholdDecoder
from ..drafts.drafter import Drafter, DraftSession, DraftStep, ModelDrafter, OneHotStep, Proposal, beside
from ..errors import ArgumentError, sequence_of, whole_number
from ..loading.pair import Pair, require_draft
from ..models.language_model import LanguageModel
from ..sampling import Sampling
from .interleaved import describe_hardware, growth_of, rotated, turns, typical
from .probe import Uncertainty
from .profile import LatencyProfile, arithmetic_of

_GROWTH_OF_CONTEXT = 8
"""Part of its context by which a text grows, at most, before it is begun anew."""
Place = tuple[int, int]
"""Batch size and context."""


def plan_grid(
    pair: Pair, live_context: int, longest: int, batch_sizes: Sequence[int], contexts: Sequence[int]
) -> list[Place]:
    """Every batch size with every context, the live ones included, the live point first.

    Args:
        pair: a target with a draft.
        live_context: of the live rounds, whose batch size is 1.
        longest: the longest draft that has to fit behind a context, in tokens.
        batch_sizes: each 1 or more.
        contexts: each 1 or more.

    Raises:
        ValueError: a number is not positive, or a model has no room for the longest draft behind a context.
    """
    sizes = sorted({1, *sequence_of("batch_sizes", batch_sizes, whole_number, fewest=0)})
    lengths = sorted({live_context, *sequence_of("contexts", contexts, whole_number, fewest=0)})
    places = [(size, length) for size in sizes for length in lengths]
    if len(places) > 1:
        models = [pair.target, *([pair.draft.model] if isinstance(pair.draft, ModelDrafter) else [])]
        for model in models:
            if lengths[-1] + longest + 1 > model.context_limit:
                raise ArgumentError(
                    f"a context of {lengths[-1]} tokens with a draft of {longest} and the target's own token does not "
                    f"fit in {model.name}, whose context is {model.context_limit}; give shorter contexts (or a shorter "
                    "prompt, whose length is always one of them) or a smaller max_draft_length"
                )
    return sorted(places, key=lambda place: place != (1, live_context))


def time_places(
    pair: Pair,
    places: Sequence[Place],
    prompt: Sequence[int],
    lengths: Sequence[int],
    *,
    sampling: Sampling,
    repeats: int,
    time_limit: float,
) -> list[LatencyProfile]:
    """Time drafts, passes and plain decoding at some places, all in turn.

    Args:
        pair: a target with a draft.
        places: as `plan_grid` returns them.
        prompt: token ids that all texts continue, repeated or cut to the context.
        lengths: draft lengths to time, 0 or more, in tokens.
        sampling: drawing tokens costs more than taking the likeliest.
        repeats: how often every number is timed.
        time_limit: seconds after which fewer repeats have to do, but at least 3.

    Returns:
        A profile for every place; its numbers are medians, in seconds of the whole batch.
    """
    watch = StopwatchDrafter(require_draft(pair, "a latency profile of chains"))
    timed = Pair(pair.target, watch, pair.tokenizer, name=pair.name)
    chains, plain = ThresholdDecoder(timed, max(lengths), "never"), AutoregressiveDecoder(pair)
    times = {place: _Times() for place in places}
    # The texts of one place at a time, as they may fill the device; they begin anew in every turn if there are several.
    texts: dict[Place, tuple[_Texts, _Texts]] = {}
    for turn, counts in turns(repeats, time_limit) if places else ():
        for place in places:
            if place not in texts or len(places) > 1:
                texts = {place: (_Texts(chains, prompt, place, sampling), _Texts(plain, prompt, place, sampling))}
            drafted, undrafted = texts[place]
            if not pair.target.restores_states:
                drafted.renew()
                undrafted.renew()
            for length in rotated(lengths, turn):
                watch.length, watch.drafted = length, 0
                started, ended = drafted.step()
                plain_started, plain_ended = undrafted.step()
                if counts:
                    times[place].draft[watch.drafted].append(watch.ended - started)
                    times[place].target[length + 1].append(ended - watch.ended)
                    times[place].plain.append(plain_ended - plain_started)
    return [
        LatencyProfile(
            pair=pair.name,
            draft_seconds=typical(times[place].draft, pair.target),
            target_seconds=typical(times[place].target, pair.target),
            autoregressive_seconds=statistics.median(times[place].plain),
            hardware=describe_hardware(pair),
            sampling=arithmetic_of(sampling),
            batch_size=place[0],
            context=place[1],
            uncertainty=Uncertainty.of(times[place].draft, times[place].target, times[place].plain),
        )
        for place in places
    ]


@dataclass
class _Times:
    """Seconds as they were measured at one place: by draft length, by tokens of a text in the pass, and plainly."""

    draft: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    target: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    plain: list[float] = field(default_factory=list)


class _Texts:
    """Texts of one decoder at one place, a batch that is always full.

    Args:
        decoder: of the texts.
        prompt: that each continues, repeated or cut to the context.
        place: how many texts, and of what context.
        sampling: of the texts.
    """

    def __init__(self, decoder: Decoder[Any], prompt: Sequence[int], place: Place, sampling: Sampling) -> None:
        self._decoder, self._sampling = decoder, sampling
        self._size, context = place
        self._prompt = (list(prompt) * (context // len(prompt) + 1))[:context]
        self._growth = max(growth_of(decoder.pair), context // _GROWTH_OF_CONTEXT)
        self._batch, self._begun = Batch(self._size), 0

    def renew(self) -> None:
        """Let texts begin anew that have grown much."""
        for session in list(self._batch.sessions):
            if len(session.tokens) > self._growth:
                self._batch.leave(session)

    def step(self) -> tuple[float, float]:
        """Do a round of all texts; return when it began and ended, by `time.perf_counter`."""
        if self._decoder.pair.target.restores_states:
            self.renew()
        while len(self._batch) < self._size:
            self._begun += 1
            self._batch.add(
                self._decoder, self._prompt, max_new_tokens=2**20, sampling=self._sampling, seed=self._begun
            )
        device = self._decoder.pair.target.device
        synchronise(device)
        started = time.perf_counter()
        if self._size > 1:
            self._batch.step()
        else:  # as a text is decoded by itself
            self._batch.sessions[0].step()
        synchronise(device)
        ended = time.perf_counter()
        for session in [session for session in self._batch.sessions if session.finished]:
            self._batch.leave(session)
        return started, ended


class StopwatchDrafter:
    """A drafter that times another one's drafts, and fills them up to the length that is asked of the target.

    Only one-hot drafts fall short (a table without an entry, a text without a match), so filling up with any token
    leaves the arithmetic of verification as it is.

    Attributes:
        length: how many tokens the next drafts have, at most what the decoder asks for.
        drafted: how many tokens the longest draft of a round really had.
        ended: when the last draft was ready, by `time.perf_counter`, the accelerator's work included.
    """

    def __init__(self, inner: Drafter) -> None:
        self.inner = self._near = inner
        self.name = inner.name
        self.vocabulary_size = inner.vocabulary_size
        self.length = 0
        self.drafted = 0
        self.ended = 0.0

    def beside(self, target: LanguageModel) -> StopwatchDrafter:
        """Let the next text be begun by the inner drafter as it works beside a target."""
        self._near = beside(self.inner, target)
        return self

    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        """Begin a text with the inner drafter."""
        return _StopwatchSession(self, self._near.start(prompt, sampling, generator, device), device)


class _StopwatchSession:
    def __init__(self, watch: StopwatchDrafter, inner: DraftSession, device: torch.device) -> None:
        self._watch = watch
        self._inner = inner
        self._device = device

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        count = min(count, self._watch.length)
        steps = list(self._inner.steps(context, count))
        Proposal.of(steps, self._device)  # the decoder does it again, but it belongs to a draft's time
        synchronise(self._device)
        self._watch.ended = time.perf_counter()
        self._watch.drafted = max(self._watch.drafted, len(steps))
        if not steps or steps[0].logits is None:
            steps += [OneHotStep(0)] * (count - len(steps))
        return iter(steps)

    def truncate(self, length: int) -> None:
        self._inner.truncate(length)
