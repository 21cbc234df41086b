"""How long drafting and verifying take: a table for one pair on one machine, by number of tokens.

A clock read while an agent learns is noisy and never the same twice. The profile is measured once, through the same
rounds that decode text, and then charges every round the same time for the same work. Reading the prompt is outside
all rounds, and is not charged.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .autoregressive import AutoregressiveDecoder
from .decoder import GREEDY, Decoder, Round, Session
from .errors import SpecgymError
from .files import write_json
from .hardware import describe_hardware, fingerprint
from .pairs import Pair
from .sampling import Sampling
from .smollm2 import cache_folder
from .speculative import require_draft, require_positive
from .stopwatch import StopwatchDrafter
from .threshold import ThresholdDecoder

_LOG = logging.getLogger(__name__)
_FORMAT = "specgym-latency-1"
_WARM_UP = 3
_FEWEST_REPEATS = 3
_known: dict[Path, LatencyProfile] = {}


class LatencyProfileError(SpecgymError, ValueError):
    """A profile that makes no sense, or a file that holds none; the message names it and the way out."""


@dataclass(frozen=True)
class LatencyProfile:
    """Seconds per draft and per target pass, by number of tokens.

    Attributes:
        pair: name of the pair.
        draft_seconds: seconds to draft so many tokens (0 or more), by number.
        target_seconds: seconds of a target pass over so many tokens (1 or more) and its verification, by number.
        autoregressive_seconds: seconds per token of plain decoding with the target.
        hardware: what it was measured on: device, its name, threads, dtype, torch version, prepacked layers.
        sampling: which arithmetic was measured: `greedy` or `sampled`, with `top-k` and `top-p` where used.

    Raises:
        LatencyProfileError: an empty table, or seconds that are negative, infinite or NaN (0 is for drafting alone).
    """

    pair: str
    draft_seconds: Mapping[int, float]
    target_seconds: Mapping[int, float]
    autoregressive_seconds: float
    hardware: Mapping[str, Any]
    sampling: str = "greedy"

    def __post_init__(self) -> None:
        for name, table, fewest in (("draft", self.draft_seconds, 0), ("target", self.target_seconds, 1)):
            ordered = dict(sorted((int(tokens), float(seconds)) for tokens, seconds in table.items()))
            if not ordered or min(ordered) < fewest:
                raise LatencyProfileError(f"{name}_seconds must have an entry, and none below {fewest} tokens")
            for tokens, seconds in ordered.items():
                if not (math.isfinite(seconds) and (seconds > 0 or (seconds == 0 and fewest == 0))):
                    raise LatencyProfileError(f"{name}_seconds[{tokens}] is {seconds}; seconds are finite and positive")
            object.__setattr__(self, f"{name}_seconds", ordered)
        if not (math.isfinite(self.autoregressive_seconds) and self.autoregressive_seconds > 0):
            raise LatencyProfileError(f"autoregressive_seconds is {self.autoregressive_seconds}; it must be positive")

    def draft(self, tokens: int) -> float:
        """Seconds to draft so many tokens, 0 or more: linear between measured numbers, and beyond the last two."""
        return _interpolate(self.draft_seconds, tokens, 0)

    def target(self, tokens: int) -> float:
        """Seconds of a target pass over so many tokens, 1 or more, verification included; linear as in `draft`."""
        return _interpolate(self.target_seconds, tokens, 1)

    def round(self, drafted: int) -> float:
        """Seconds of a round that drafts so many tokens, 0 or more."""
        return self.draft(drafted) + self.target(drafted + 1)

    def charge(self, rounds: Iterable[Round]) -> float:
        """Seconds of some draft-then-verify rounds together."""
        return sum(self.round(cycle.drafted) for cycle in rounds)

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON; a reader never sees half a file."""
        content = {"format": _FORMAT, **asdict(self)}
        for table in ("draft_seconds", "target_seconds"):  # JSON would make strings of the numbers of tokens
            content[table] = sorted(content[table].items())
        write_json(Path(path), content)

    @classmethod
    def load(cls, path: str | Path) -> LatencyProfile:
        """Read a profile.

        Raises:
            LatencyProfileError: the file is missing, damaged, or not one of `save`.
        """
        way_out = "measure it again with specgym.decoding.latency.measured(pair, refresh=True)"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LatencyProfileError(f"there is no latency profile {path}; {way_out}") from None
        except (OSError, ValueError) as error:
            raise LatencyProfileError(f"latency profile {path} cannot be read ({error}); {way_out}") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise LatencyProfileError(f"{path} is not a latency profile of this version ({_FORMAT}); {way_out}")
        try:
            for table in ("draft_seconds", "target_seconds"):
                content[table] = dict(content[table])
            return cls(**content)
        except (KeyError, TypeError, ValueError) as error:
            raise LatencyProfileError(f"latency profile {path} is damaged ({error}); {way_out}") from error


def measure(
    pair: Pair,
    *,
    max_draft_length: int = 16,
    repeats: int = 40,
    prompt: Sequence[int] | None = None,
    sampling: Sampling = GREEDY,
    time_limit: float = 40.0,
) -> LatencyProfile:
    """Time live rounds of threshold decoding at several draft lengths, and plain decoding, all interleaved.

    Each number is a median over the repeats, and a slow spell of the machine hits all numbers alike. The warm-up is
    left out, and an accelerator is synchronised. The rounds are threshold decoding's because its verification contains
    that of speculative sampling; the two differ by the distance between the models, a small part of a target pass.

    Args:
        pair: a target with a draft.
        max_draft_length: the longest draft timed, in tokens.
        repeats: how often every length is timed.
        prompt: token ids to continue; by default ids that repeat themselves, so that prompt lookup has matches.
        sampling: drawing tokens costs more than taking the likeliest.
        time_limit: seconds after which fewer repeats have to do, but at least 3.

    Raises:
        ValueError: the pair has no draft, or a number is not positive.
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
    return LatencyProfile(
        pair=pair.name,
        draft_seconds=_medians(draft),
        target_seconds=_medians(target),
        autoregressive_seconds=statistics.median(autoregressive),
        hardware=describe_hardware(pair),
        sampling=_arithmetic(sampling),
    )


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
    arithmetic = _arithmetic(sampling)
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


def _interpolate(table: Mapping[int, float], tokens: int, fewest: int) -> float:
    if tokens < fewest:
        raise ValueError(f"a latency is asked for at least {fewest} tokens, got {tokens}")
    known = list(table)
    if len(known) == 1:
        return table[known[0]]
    if tokens in table:
        return table[tokens]
    right = min(max(bisect_right(known, tokens), 1), len(known) - 1)
    low, high = known[right - 1], known[right]
    slope = (table[high] - table[low]) / (high - low)
    return max(0.0, table[low] + slope * (tokens - low))


def _arithmetic(sampling: Sampling) -> str:
    if sampling.greedy:
        return "greedy"
    return "sampled" + ("-top-k" if sampling.top_k else "") + ("-top-p" if sampling.top_p < 1 else "")
