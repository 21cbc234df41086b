"""Measuring a latency profile: live rounds at one operating point, and passes over batches for the others.

The profile is measured through the same rounds that decode text, once, and kept in specgym's cache folder.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .autoregressive import AutoregressiveDecoder
from .decoder import GREEDY, Decoder, Round, Session
from .hardware import describe_hardware, fingerprint
from .latency import LatencyProfile, LatencyProfileError
from .latency_grid import measure_points, plan_grid
from .pairs import Pair
from .sampling import Sampling
from .smollm2 import cache_folder
from .speculative import require_draft, require_positive
from .stopwatch import StopwatchDrafter
from .threshold import ThresholdDecoder

_LOG = logging.getLogger(__name__)
_WARM_UP = 3
_FEWEST_REPEATS = 3
_known: dict[Path, LatencyProfile] = {}


def measure(
    pair: Pair,
    *,
    max_draft_length: int = 16,
    repeats: int = 40,
    prompt: Sequence[int] | None = None,
    sampling: Sampling = GREEDY,
    time_limit: float = 40.0,
    batch_sizes: Sequence[int] = (1,),
    contexts: Sequence[int] | None = None,
) -> LatencyProfile:
    """Time live rounds of threshold decoding at several draft lengths, and plain decoding, all interleaved.

    Each number is a median over the repeats, and a slow spell of the machine hits all numbers alike. The warm-up is
    left out, and an accelerator is synchronised. The rounds are threshold decoding's because its verification contains
    that of speculative sampling; the two differ by the distance between the models, a small part of a target pass.

    Live rounds are timed at batch size 1 and the prompt's length as the context. Other batch sizes and contexts become
    the profile's `points`, timed as `latency_grid.measure_points` tells; the grid always contains the live point.

    Args:
        pair: a target with a draft.
        max_draft_length: the longest draft timed, in tokens.
        repeats: how often every length is timed.
        prompt: token ids to continue; by default ids that repeat themselves, so that prompt lookup has matches.
        sampling: drawing tokens costs more than taking the likeliest.
        time_limit: seconds after which fewer repeats have to do, but at least 3; for the live rounds, and once more
            for the other points together.
        batch_sizes: sequences decoded together, each 1 or more.
        contexts: tokens of each sequence that were read before, each 1 or more; by default the prompt's length alone.

    Raises:
        ValueError: the pair has no draft, a number is not positive, or a context does not leave the models room for
            the longest draft.
    """
    require_draft(pair, "a latency profile")
    assert pair.draft is not None
    require_positive("max_draft_length", max_draft_length)
    require_positive("repeats", repeats)
    prompt = list(prompt) if prompt is not None else _repeating_prompt(pair)
    stopwatch = StopwatchDrafter(pair.draft)
    timed = Pair(pair.target, stopwatch, pair.tokenizer, name=pair.name)
    rounds = _Endless(ThresholdDecoder(timed, max_draft_length), prompt, sampling)
    plain = _Endless(AutoregressiveDecoder(pair), prompt, sampling)
    lengths = [0, *(2**power for power in range(max_draft_length.bit_length()) if 2**power < max_draft_length)]
    lengths.append(max_draft_length)
    places = plan_grid(pair, len(prompt), max_draft_length, batch_sizes, contexts or ())
    draft: defaultdict[int, list[float]] = defaultdict(list)
    target: defaultdict[int, list[float]] = defaultdict(list)
    autoregressive: list[float] = []
    started = time.perf_counter()
    for repeat in range(_WARM_UP + repeats):
        if repeat == _WARM_UP:
            for table in (draft, target):
                table.clear()
            autoregressive.clear()
        elif repeat >= _WARM_UP + _FEWEST_REPEATS and time.perf_counter() - started > time_limit:
            break
        rounds.restart()
        plain.restart()
        first = repeat % len(lengths)  # every length is now early, now late in a text
        for length in lengths[first:] + lengths[:first]:
            stopwatch.length = length
            cycle = rounds.step()
            draft[stopwatch.found].append(stopwatch.seconds)
            target[cycle.drafted + 1].append(cycle.verify_seconds)
            autoregressive.append(plain.step().verify_seconds)
    profile = LatencyProfile(
        pair=pair.name,
        draft_seconds=_medians(draft),
        target_seconds=_medians(target),
        autoregressive_seconds=statistics.median(autoregressive),
        hardware=describe_hardware(pair),
        sampling=arithmetic_of(sampling),
        batch_size=1,
        context=len(prompt),
    )
    points = measure_points(pair, profile, places, lengths, sampling=sampling, repeats=repeats, time_limit=time_limit)
    return replace(profile, points=points)


def measured(pair: Pair, refresh: bool = False, *, sampling: Sampling = GREEDY) -> LatencyProfile:
    """The profile of a pair on this hardware: measured at the first call, then read from specgym's cache folder.

    Args:
        pair: a target with a draft.
        refresh: measure again, for instance because the machine was busy the last time.
        sampling: greedy decoding, sampling, and sampling with top-k or top-p each have their own profile.

    Raises:
        ValueError: the pair has no draft.
    """
    require_draft(pair, "a latency profile")
    arithmetic = arithmetic_of(sampling)
    plain_name = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in pair.name)[-60:]
    path = cache_folder() / "latency" / f"{plain_name}-{arithmetic}-{fingerprint(pair)}.json"
    if not refresh and path in _known:
        return _known[path]
    if not refresh and path.exists():
        try:
            _known[path] = LatencyProfile.load(path)
            return _known[path]
        except LatencyProfileError as error:
            _LOG.warning("%s; doing so now", error)
    _LOG.info("measuring the latency of %s (%s), once for this hardware", pair.name, arithmetic)
    profile = measure(pair, sampling=sampling)
    try:
        profile.save(path)
        _LOG.info("latency profile of %s kept in %s", pair.name, path)
    except OSError as error:
        _LOG.warning("cannot keep the latency profile in %s (%s); set SPECGYM_CACHE to a folder you own", path, error)
    _known[path] = profile
    return profile


class _Endless:
    """Sessions of one decoder on one prompt; a new one begins where a text ends."""

    def __init__(self, decoder: Decoder, prompt: list[int], sampling: Sampling) -> None:
        self._decoder = decoder
        self._prompt = prompt
        self._sampling = sampling
        self._seed = 0
        self._session: Session | None = None

    def restart(self) -> None:
        self._session = None

    def step(self) -> Round:
        if self._session is None or self._session.finished:
            self._seed += 1
            self._session = self._decoder.start(
                self._prompt, max_new_tokens=2**20, sampling=self._sampling, seed=self._seed
            )
        return self._session.step()


def _repeating_prompt(pair: Pair) -> list[int]:
    length = max(2, min(48, pair.target.context_limit // 4))
    period = max(1, length // 2)
    return [(7919 * (place % period) + 11) % pair.target.vocabulary_size for place in range(length)]


def _medians(samples: Mapping[int, list[float]]) -> dict[int, float]:
    """Median by number of tokens, without the numbers that came up too rarely to trust."""
    enough = min(_FEWEST_REPEATS, max(len(seconds) for seconds in samples.values()))
    return {tokens: statistics.median(seconds) for tokens, seconds in samples.items() if len(seconds) >= enough}


def arithmetic_of(sampling: Sampling) -> str:
    """Which sampling settings take the same time: `greedy`, or `sampled` with `-top-k` and `-top-p` where used."""
    if sampling.greedy:
        return "greedy"
    return "sampled" + ("-top-k" if sampling.top_k else "") + ("-top-p" if sampling.top_p < 1 else "")
