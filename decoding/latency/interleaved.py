"""Timed rounds of all kinds but chains: live rounds of many sizes and plain decoding, interleaved.

Description of the host: device, threads, types, versions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from ..decoder import Decoder, Session
from ..decoders.autoregressive import AutoregressiveDecoder
from ..drafts.cascade import CascadeDrafter
from ..drafts.eagle.drafter import EagleDrafter
from ..drafts.mixed import draft_models, drafts_of
from ..errors import ArgumentError, sequence_of, whole_number
from ..loading.pair import Pair
from ..models.language_model import LanguageModel
from ..models.linear_layers import HalfWeight, PrepackedLinear
from ..models.supported import decoding_threads
from ..processors import text_settings
from ..rounds import Round
from ..sampling import Sampling
from .probe import CostProbe, Uncertainty
from .profile import LatencyProfile, arithmetic_of


def describe_hardware(pair: Pair) -> dict[str, Any]:
    """Device and software that time a pair: `device`, `name`, `threads`, `dtype`, `prepacked`, `torch`, `version`.

    `halved` is there, and true, where weights of the target are kept in float16.
    """
    device = pair.target.device
    packed = [layer.packed for layer in pair.target.model.modules() if isinstance(layer, PrepackedLinear)]
    halved = any(isinstance(weight, HalfWeight) for weight in packed)
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": decoding_threads(),
        "dtype": str(pair.target.dtype).removeprefix("torch."),
        "prepacked": bool(packed),
        **({"halved": True} if halved else {}),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def fingerprint(pair: Pair) -> str:
    """Twelve hexadecimal digits for a pair on this hardware; another size of model or number of threads has others."""
    draft = pair.draft
    parts: dict[str, Any] = {
        "hardware": describe_hardware(pair),
        "pair": pair.name,
        "target": _shape(pair.target),
        "draft": type(draft).__name__,
        **{name: repr(value) for name, value in text_settings(pair.target.model).items()},  # they take time every pass
    }
    if models := draft_models(draft):
        parts["draft"] = _shape(models[0]) if len(drafts_of(draft)) == 1 else list(map(_shape, models))
    if heads := [part.head for part in drafts_of(draft) if isinstance(part, EagleDrafter)]:
        parts["heads"] = [{**asdict(head.shape), "vocabulary": head.shape.outputs} for head in heads]
    if helpers := [f"{part.inner.name} {part.length}" for part in drafts_of(draft) if isinstance(part, CascadeDrafter)]:
        parts["helpers"] = helpers
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _shape(model: LanguageModel) -> dict[str, Any]:
    config = model.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):  # a copy elsewhere is as fast
        config.pop(name, None)
    captured = model.captured is not None
    return {"config": config, "device": str(model.device), "dtype": str(model.dtype), "captured": captured}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


_LOG = logging.getLogger(__name__)
_WARM_UP = 3
_FEWEST_REPEATS = 3
_TRIES = 8
_SETTLING = 2
"""Untimed rounds of the same kind before a timed one; a round right after a different kind is about 20 % slower."""
_GROWTH = 16
"""Tokens after which a timed text is begun anew."""
_GROWTH_WITH_STATES = 64
"""Tokens likewise where the target restores states; a text that has just begun has little to read again."""

Item = TypeVar("Item")


class EndlessText:
    """Sessions of one decoder on one prompt; a new one begins where a text ends.

    Args:
        decoder: of the rounds.
        prompt: token ids that every session continues.
        sampling: how tokens are chosen.
        growth: tokens after which a text is ended, so that the context stays near the prompt's length; by default it
            goes on to the model's limit.
    """

    def __init__(
        self, decoder: Decoder[Any], prompt: Sequence[int], sampling: Sampling, *, growth: int | None = None
    ) -> None:
        self._decoder = decoder
        self._prompt = list(prompt)
        self._sampling = sampling
        self._growth = growth
        self._seed = 0
        self._session: Session[Any] | None = None

    def restart(self) -> None:
        """Begin a new text with the next round."""
        self._session = None

    def step(self, knobs: Mapping[str, float] | None = None) -> Round:
        """Do one round, with values for the decoder's knobs as `Session.step` takes them."""
        session = self._session
        if session is None or session.finished or (self._growth is not None and len(session.tokens) > self._growth):
            self._seed += 1
            session = self._decoder.start(self._prompt, max_new_tokens=2**20, sampling=self._sampling, seed=self._seed)
            self._session = session
        return session.step(knobs)

    def round_of(self, size: int, knobs: Mapping[str, float]) -> Round | None:
        """Do rounds until one reads this many tokens, as a decoder may have to warm up; None if none does."""
        for _ in range(_TRIES):
            round_ = self.step(knobs)
            if round_.target_tokens == size:
                return round_
        return None


def turns(repeats: int, time_limit: float) -> Iterator[tuple[int, bool]]:
    """Yield the number of every repeat, and whether its times count; a few for warming up come first and do not.

    Args:
        repeats: how many count, if time allows.
        time_limit: seconds after which fewer have to do, but at least 3.
    """
    started = time.perf_counter()
    for turn in range(_WARM_UP + repeats):
        if turn >= _WARM_UP + _FEWEST_REPEATS and time.perf_counter() - started > time_limit:
            return
        yield turn, turn >= _WARM_UP


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """Return the items from another one on in every turn, so that each is now early, now late in a text."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def typical(samples: Mapping[int, list[float]], target: LanguageModel) -> dict[int, float]:
    """Return the median by number of tokens, without the numbers that came up too rarely to trust.

    Where the target restores states, it is the mean: some rounds read again what several rounds before them kept, and
    a median would leave that out.
    """
    middle = statistics.fmean if target.restores_states else statistics.median
    enough = min(_FEWEST_REPEATS, max(len(seconds) for seconds in samples.values()))
    return {tokens: middle(seconds) for tokens, seconds in samples.items() if len(seconds) >= enough}


def growth_of(pair: Pair) -> int:
    """Return the tokens after which a timed text of a pair is begun anew."""
    return _GROWTH_WITH_STATES if pair.target.restores_states else _GROWTH


def repeating_prompt(pair: Pair) -> list[int]:
    """Return token ids that repeat themselves, so that drafts which copy from the text have something to copy."""
    length = max(2, min(48, pair.target.context_limit // 4))
    period = max(1, length // 2)
    return [(7919 * (place % period) + 11) % pair.target.vocabulary_size for place in range(length)]


def time_rounds(
    pair: Pair,
    probe: CostProbe,
    kind: str,
    *,
    max_target_tokens: int | None,
    repeats: int,
    prompt: Sequence[int] | None,
    sampling: Sampling,
    time_limit: float,
    contexts: Sequence[int],
) -> LatencyProfile:
    """Time the rounds of a probe, and plain decoding between them.

    Args:
        pair: what takes part in the rounds.
        probe: the rounds.
        kind: of the profile.
        max_target_tokens: the largest size that was asked for, which is then timed or refused; None for as many of the
            probe's sizes as there is room for.
        repeats: how often every size is timed, 1 or more.
        prompt: token ids to continue; None for some of which nothing is known.
        sampling: drawing tokens costs more than taking the likeliest.
        time_limit: seconds after which fewer repeats have to do, but at least 3.
        contexts: tokens read before, each 1 or more, besides the prompt's own length.

    Raises:
        ValueError: a context is not positive, or there is no room for the rounds behind the longest.
    """
    contexts = sequence_of("contexts", contexts, whole_number, fewest=0)
    first = repeating_prompt(pair) if prompt is None else AutoregressiveDecoder(pair).check_prompt(prompt)
    lengths = [len(first), *sorted({*contexts} - {len(first)})]
    prompts = [(first * (length // len(first) + 1))[:length] for length in lengths]
    sizes = _sizes_with_room(pair, probe, kind, max(lengths), max_target_tokens)
    plain_decoder = AutoregressiveDecoder(pair)
    samples = [_Samples() for _ in prompts]
    texts = [
        tuple(
            EndlessText(decoder, prompt, sampling, growth=growth_of(pair)) for decoder in (probe.decoder, plain_decoder)
        )
        for prompt in prompts
    ]
    for turn, counts in turns(repeats, time_limit):
        for (text, plain), times in zip(texts, samples, strict=True):
            if not pair.target.restores_states:
                text.restart()
                plain.restart()
            for size in rotated(sizes, turn):
                knobs = probe.knobs_for(size)
                for _ in range(_SETTLING):
                    text.step(knobs)
                round_ = text.round_of(size, knobs) if probe.fixed else text.step(knobs)
                for _ in range(_SETTLING):
                    plain.step()
                plain_round = plain.step()
                if counts:
                    times.add(round_, plain_round, probe.drafting)
    profiles = [
        LatencyProfile(
            pair=pair.name,
            draft_seconds=typical(times.draft, pair.target) if times.draft else {0: 0.0},
            target_seconds=typical(times.target, pair.target),
            autoregressive_seconds=statistics.median(times.plain),
            hardware={**describe_hardware(pair), **probe.detail},
            sampling=arithmetic_of(sampling),
            kind=kind,
            batch_size=1,
            context=context,
            overlaps=probe.overlaps,
            uncertainty=Uncertainty.of(times.draft, times.target, times.plain),
        )
        for times, context in zip(samples, lengths, strict=True)
    ]
    return replace(profiles[0], points=tuple(profiles[1:]))


def _sizes_with_room(pair: Pair, probe: CostProbe, kind: str, context: int, asked: int | None) -> list[int]:
    """The probe's sizes that can be read behind a context, ascending.

    Raises:
        ValueError: there are none, or the one that was asked for is not among them.
    """
    shortest = _shortest_context(pair)
    room = shortest.context_limit - context - growth_of(pair)
    fitting = [size for size in probe.sizes if probe.room_for(size) <= room]
    sizes = [size for size in fitting if probe.can_read(size)]
    if not fitting:
        needed = growth_of(pair) + probe.room_for(probe.sizes[0])
        raise ArgumentError(
            f"a context of {context} tokens leaves {shortest.name}, whose context is {shortest.context_limit}, no room "
            f"for {kind} rounds to be timed, which takes {needed} tokens; give a shorter prompt or shorter contexts"
        )
    largest = probe.sizes[-1]
    if fitting[-1] < largest:
        if asked is not None:
            most = next((size for size in range(largest, 0, -1) if probe.room_for(size) <= room), 1)
            raise ArgumentError(
                f"a pass over {largest} tokens behind a context of {context} does not fit in {shortest.name}, whose "
                f"context is {shortest.context_limit}; give a max_target_tokens of at most {most}, a shorter prompt or "
                "shorter contexts"
            )
        _LOG.warning(
            "%s rounds of %s are timed up to %d tokens, not %d, since its context of %d has no room for more behind "
            "%d; larger ones are charged in proportion",
            kind, shortest.name, fitting[-1], largest, shortest.context_limit, context,
        )  # fmt: skip
    if sizes[-1] < fitting[-1]:
        reason = f"{kind} rounds of {pair.target.name} cannot read"
        if asked is not None:
            raise ArgumentError(f"{reason} {fitting[-1]} tokens; give a max_target_tokens of at most {sizes[-1]}")
        _LOG.warning("%s %d tokens; rounds are timed up to %d", reason, fitting[-1], sizes[-1])
    return sizes


def _shortest_context(pair: Pair) -> LanguageModel:
    """The model with the shortest context among those that take part."""
    models = [pair.target, *draft_models(pair.draft)]
    return min(models, key=lambda model: model.context_limit)


class _Samples:
    """Seconds behind one context: of drafting, of passes by the tokens they read, and of plain decoding."""

    def __init__(self) -> None:
        self.draft: defaultdict[int, list[float]] = defaultdict(list)
        self.target: defaultdict[int, list[float]] = defaultdict(list)
        self.plain: list[float] = []

    def add(self, round_: Round | None, plain: Round, drafting: Collection[int] | None) -> None:
        self.plain.append(plain.verify_seconds)
        if round_ is None:
            return
        if drafting is not None and round_.target_tokens in drafting:
            self.draft[round_.draft_steps].append(round_.draft_seconds)
        apart = 0.0 if drafting is not None else round_.draft_seconds
        self.target[round_.target_tokens].append(round_.verify_seconds + apart)
