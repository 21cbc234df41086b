"""Timing other batch sizes and contexts than those of live decoding, which decodes one text at a time.

A point of the grid is timed on the models' own passes: a batch of rows over a key/value cache that already holds the
context, then the arithmetic of verification. What a live round takes beyond that (a session's own bookkeeping) is
known at the live point, and is added everywhere, so that the points compare with each other.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ..decoder import synchronise
from ..drafts.drafter import ModelDrafter
from ..drafts.translated import TranslatedModel
from ..errors import ArgumentError, sequence_of, whole_number
from ..loading.pair import Pair
from ..models.kv_cache import BranchingCache, PreallocatedLayer
from ..models.language_model import LanguageModel
from ..sampling import Sampling, accepts, draw, residual, residual_of_token
from .probe import Uncertainty
from .profile import LatencyProfile

_WARM_UP = 2
_FEWEST_REPEATS = 3

Result = TypeVar("Result")
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
        UnsupportedModelError: a model can be read in chains alone.
    """
    sizes = sorted({1, *sequence_of("batch_sizes", batch_sizes, whole_number, fewest=0)})
    lengths = sorted({live_context, *sequence_of("contexts", contexts, whole_number, fewest=0)})
    places = [(size, length) for size in sizes for length in lengths]
    if len(places) > 1:
        models = [pair.target, *([pair.draft.model] if isinstance(pair.draft, ModelDrafter) else [])]
        for model in models:
            model.require_branches("timed in batches")  # whose masks are those of trees
            if lengths[-1] + longest + 1 > model.context_limit:
                raise ArgumentError(
                    f"a context of {lengths[-1]} tokens with a draft of {longest} and the target's own token does not "
                    f"fit in {model.name}, whose context is {model.context_limit}; give shorter contexts (or a shorter "
                    "prompt, whose length is always one of them) or a smaller max_draft_length"
                )
    return sorted(places, key=lambda place: place != (1, live_context))


@torch.inference_mode()
def measure_points(
    pair: Pair,
    live: LatencyProfile,
    places: Sequence[Place],
    lengths: Sequence[int],
    *,
    sampling: Sampling,
    repeats: int,
    time_limit: float,
) -> tuple[LatencyProfile, ...]:
    """A profile for every place but the first, which is the live one. All are timed in turn, each number a median.

    A draft model drafts the whole batch at once. A draft that is no model works on the host, one sequence after the
    other, so it costs its live time once a sequence, whatever the context.

    Args:
        pair: the pair of the live profile.
        live: measured by live rounds.
        places: as `plan_grid` returns them.
        lengths: draft lengths to time, 0 or more, in tokens.
        sampling: drawing tokens costs more than taking the likeliest.
        repeats: how often every number is timed.
        time_limit: seconds after which fewer repeats have to do, but at least 3.
    """
    if len(places) == 1:
        return ()
    times = {place: _Times() for place in places}
    started = time.perf_counter()
    for repeat in range(_WARM_UP + repeats):
        if repeat == _WARM_UP:
            times = {place: _Times() for place in places}
        elif repeat >= _WARM_UP + _FEWEST_REPEATS and time.perf_counter() - started > time_limit:
            break
        first = repeat % len(lengths)
        for place in places:  # the caches of one place at a time, as they may fill the device
            _time_place(pair, place, [*lengths[first:], *lengths[:first]], sampling, times[place])
    return tuple(_profile(live, place, times[place], times[places[0]]) for place in places[1:])


@dataclass
class _Times:
    """Seconds as they were measured at one place: by draft length, by tokens in the target's pass, and plainly."""

    draft: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    target: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    plain: list[float] = field(default_factory=list)


def _time_place(pair: Pair, place: Place, lengths: Sequence[int], sampling: Sampling, times: _Times) -> None:
    batch_size, context = place
    device = pair.target.device
    generator = torch.Generator(device).manual_seed(0)
    target = _BatchedPass(pair.target, batch_size, context, max(lengths) + 1)
    draft = (
        _BatchedPass(pair.draft.model, batch_size, context, max(lengths) + 1)
        if isinstance(pair.draft, ModelDrafter)
        else None
    )
    for length in lengths:
        tokens = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
        probabilities: Tensor | None = None
        if draft is not None:
            drafting = partial(_draft, draft, length, sampling, generator, device)
            seconds, (tokens, probabilities) = _timed(device, drafting)
            times.draft[length].append(seconds)
            draft.rewind()
        seconds, _ = _timed(device, partial(_verify, target, tokens, probabilities, sampling, generator))
        times.target[length + 1].append(seconds)
        target.rewind()
        seconds, _ = _timed(device, partial(_verify, target, tokens[:, :0], None, sampling, generator))
        times.plain.append(seconds)
        target.rewind()


def _timed(device: torch.device, work: Callable[[], Result]) -> tuple[float, Result]:
    synchronise(device)
    started = time.perf_counter()
    result = work()
    synchronise(device)
    return time.perf_counter() - started, result


def _draft(
    model: _BatchedPass, length: int, sampling: Sampling, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Drafted tokens, shape (batch, length), and what they were drawn from, (batch, length, vocabulary)."""
    tokens = [torch.zeros(model.batch_size, 1, dtype=torch.int64, device=device)]
    distributions: list[Tensor] = []
    for _ in range(length):
        scores = model.forward(tokens[-1])[:, -1].to(device)
        if sampling.greedy:
            tokens.append(scores.argmax(-1, keepdim=True))
        else:
            distributions.append(sampling.probabilities(scores))
            tokens.append(draw(distributions[-1], generator).unsqueeze(-1))
    return torch.cat(tokens, -1)[:, 1:], torch.stack(distributions, 1) if distributions else None


def _verify(
    model: _BatchedPass, drafted: Tensor, q: Tensor | None, sampling: Sampling, generator: torch.Generator
) -> list[int]:
    """One target pass over a batch, and the exact acceptance test; with nothing drafted a step of plain decoding.

    Args:
        model: the target.
        drafted: shape (batch, length).
        q: what they were drawn from, shape (batch, length, vocabulary); None for a one-hot draft and when greedy.
        sampling: as for the draft.
        generator: of the target's device.

    Returns:
        For every sequence how many draft tokens stay, then for every sequence the target's own token.
    """
    batch_size, length = drafted.shape
    pending = drafted.new_zeros(batch_size, 1)
    scores = model.forward(torch.cat([pending, drafted], -1))
    if sampling.greedy:
        choices = scores.argmax(-1)
        kept = (choices[:, :-1] == drafted).to(torch.int64).cumprod(-1).sum(-1)
        next_token = choices.gather(-1, kept.unsqueeze(-1)).squeeze(-1)
    else:
        p = sampling.probabilities(scores)
        column = drafted.unsqueeze(-1)
        p_of_token = p[:, :-1].gather(-1, column).squeeze(-1)
        q_of_token = 1.0 if q is None else q.gather(-1, column).squeeze(-1)
        uniform = torch.rand(p_of_token.shape, generator=generator, device=p.device)
        kept = accepts(p_of_token, q_of_token, uniform).to(torch.int64).cumprod(-1).sum(-1)
        rows = torch.arange(batch_size, device=p.device)
        row = p[rows, kept]
        if length:
            rejected = kept.clamp(max=length - 1)
            owed = residual_of_token(row, drafted[rows, rejected]) if q is None else residual(row, q[rows, rejected])
            row = torch.where((kept < length).unsqueeze(-1), owed, row)
        next_token = draw(row, generator)
    return torch.cat([kept, next_token]).tolist()  # the only wait for the device, as in a live round


class _BatchedPass:
    """Passes of one model over a batch of rows that have all read the same number of tokens.

    Args:
        model: its weights; its own cache is left alone.
        batch_size: rows.
        context: tokens that each row has read.
        room: how many more a row may read before `rewind`.
    """

    def __init__(self, model: LanguageModel, batch_size: int, context: int, room: int) -> None:
        self.batch_size = batch_size
        self._model = model
        self._context = context
        self._cache = BranchingCache()
        ahead = torch.arange(context + 2 * room, device=model.device) - (context + room)
        hidden = ahead.unsqueeze(0) > torch.arange(room, device=model.device).unsqueeze(1)
        self._capacity = context + room
        self._mask = torch.zeros(hidden.shape, dtype=model.dtype, device=model.device)
        self._mask.masked_fill_(hidden, torch.finfo(model.dtype).min)
        # What the cache holds does not matter to the clock, so one token's keys and values stand for the whole text.
        self.forward(torch.zeros(batch_size, 1, dtype=torch.int64))
        missing = context + room - 1
        for layer in self._cache.layers:
            assert isinstance(layer, PreallocatedLayer)
            assert layer.keys is not None
            assert layer.values is not None
            first = layer.keys.clone(), layer.values.clone()
            layer.update(*(part.expand(-1, -1, missing, -1) for part in first))
        self.rewind()

    def forward(self, tokens: Tensor) -> Tensor:
        """Read tokens, shape (batch, tokens), and return logits, float32, shape (batch, tokens, vocabulary)."""
        device = self._model.device
        translation = self._model.translation if isinstance(self._model, TranslatedModel) else None
        tokens = tokens if translation is None else translation.one_to_one(tokens)
        start, count = self._cache.length, tokens.shape[1]
        mask = self._mask[:count, self._capacity - start : self._capacity + count].contiguous()
        positions = torch.arange(start, start + count, device=device).expand(self.batch_size, -1)
        output = self._model.model(
            input_ids=tokens.to(device),
            attention_mask=mask[None, None],
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        scores: Tensor = output.logits.float()
        return scores if translation is None else translation.scores(scores)

    def rewind(self) -> None:
        """Forget what was read after the context."""
        self._cache.cut(self._context)


def _profile(live: LatencyProfile, place: Place, times: _Times, live_times: _Times) -> LatencyProfile:
    batch_size, context = place

    def beyond(lived: float, passed: Sequence[float]) -> float:
        return max(0.0, lived - statistics.median(passed))

    if times.draft:
        draft = {
            length: statistics.median(seconds) + beyond(live.draft(length), live_times.draft[length])
            for length, seconds in sorted(times.draft.items())
        }
    else:
        draft = {length: batch_size * seconds for length, seconds in live.draft_seconds.items()}
    return replace(
        live,
        draft_seconds=draft,
        target_seconds={
            tokens: statistics.median(seconds) + beyond(live.target(tokens), live_times.target[tokens])
            for tokens, seconds in sorted(times.target.items())
        },
        autoregressive_seconds=statistics.median(times.plain) + beyond(live.autoregressive_seconds, live_times.plain),
        batch_size=batch_size,
        context=context,
        points=(),
        uncertainty=Uncertainty.of(times.draft, times.target, times.plain),
    )
