"""Traces: what a pair did at every position of recorded texts, enough to replay decoding without the models.

A trace is one ``.npz`` file, of plain arrays and one string of JSON (nothing in it is ever unpickled).
``docs/traces.md`` describes every array; `Trace` is the same in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import BINS, KeepChances, file_name

from .archive import Provenance, TraceError, numbers, read_archive, typed, write_archive

FORMAT = "specgym-trace-3"
_UNSEALED = "specgym-trace-2"  # has no checksum
NUMBERS = ("confidence", "entropy", "q", "p", "target_entropy")
"""Columns of real numbers that only the target's own texts have."""
_SHARES = ("confidence", "q", "p", "distance", "top_ten")
_LARGEST = 2**62
_EARLIER_LONGEST = 3
"""Tokens that drafts without probabilities looked for, at most, by default, while traces had no column `matched`."""
_LONGEST_MATCH = 255
_MANTISSA = 7  # bits kept of a float16's 10: a relative error below 0.5 %, and files a third smaller

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TraceInfo(Provenance):
    """Facts of a trace."""

    vocabulary_size: int
    detour_tokens: int
    """Tokens recorded of each detour, at most; 0 where none was recorded."""


@dataclass(frozen=True)
class Trace:
    """Recorded texts of one workload, in memory.

    A *row* is a position of a text: what a draft that begins there proposes, up to K tokens, and what the target says
    of each, had all before it been kept. The first rows are those of the target's own texts, one text after another.
    After them come the rows of *detours*: texts that threshold decoding led to, where it kept what the target would
    not have said. A detour shares the rows of its beginning with other texts of the same prompt.

    Attributes:
        info: what was recorded.
        prompt_lengths: tokens of each prompt, shape (prompts,).
        starts: row at which the target's text of each prompt begins, and the number of such rows, shape (prompts + 1,).
        ended: whether the target's text ended with an end-of-text token, shape (prompts,).
        text: the target's token at each of its rows, shape (own rows,).
        tokens: what the draft proposes there, shape (own rows, K); 0 beyond `drafted`.
        confidence: the draft's largest probability; for a draft without probabilities, how long a context it
            matched as a share of the longest it looks for. Shape (own rows, K), like the next four.
        entropy: of the draft's distribution, in nats; 0 for a draft without probabilities.
        q: the draft's probability of the token; 1 for a draft without probabilities.
        p: the target's probability of the token.
        target_entropy: of the target's distribution, in nats.
        drafted: tokens the draft proposes at each row, 0 to K, shape (rows,).
        bins: of the draft's confidence (`specgym.decoding.bins_of`); 0 beyond `drafted`. Shape (rows, K).
        match: whether the token is the target's likeliest, shape (rows, K).
        distance: total variation between draft and target, 0 to 1, shape (rows, K).
        jump: the row at which the text goes on when k draft tokens are kept and the target's likeliest token follows,
            shape (rows, K + 1); -1 where that was not recorded, and everywhere when sampling.
        chances: how often drafted tokens are kept, on the target's own texts of the training prompts, whichever split
            this is a trace of. The detours were decoded with them.
        detour_prompts: the prompt of each detour, shape (detours,).
        detour_knobs: `fallback` and `rollback` that led to it, shape (detours, 2).
        detour_rows: its rows, shape (detours, detour tokens); -1 after its end.
        top_ten: the likeliest token's probability among the draft's ten likeliest alone, at temperature 1 and before
            any warping; for a draft without probabilities the confidence. Shape (own rows, K). None in a trace of an
            earlier version.
        matched: tokens of context that decided on a token, up to 255; 0 for a draft that is a model. Shape (own rows,
            K). In a trace of an earlier version, if it is given none, they are estimated from the confidence.

    When greedy, `confidence`, `entropy`, `q`, `p`, `target_entropy` and `distance` are those at temperature 1.
    """

    info: TraceInfo
    prompt_lengths: Integers
    starts: Integers
    ended: NDArray[np.bool_]
    text: Integers
    tokens: Integers
    confidence: Floats
    entropy: Floats
    q: Floats
    p: Floats
    target_entropy: Floats
    drafted: Integers
    bins: NDArray[np.uint8]
    match: NDArray[np.bool_]
    distance: Floats
    jump: Integers
    chances: KeepChances
    detour_prompts: Integers
    detour_knobs: NDArray[np.float64]
    detour_rows: Integers
    top_ten: Floats | None = None
    matched: Integers = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        if not self.matched.size:
            object.__setattr__(self, "matched", self._estimated_matches())

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.starts) - 1

    @property
    def draft_length(self) -> int:
        """K, the most tokens drafted at a row."""
        return self.info.draft_length

    @property
    def certain(self) -> bool:
        """True if the draft has no probabilities."""
        return not self.entropy.any()

    def save(self, path: str | Path) -> None:
        """Write the trace; a reader never sees half of one. Real numbers keep eight significant bits."""
        write_archive(path, FORMAT, asdict(self.info), self.arrays())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the trace's file, by name."""
        small = np.uint16 if self.info.vocabulary_size <= 2**16 else np.uint32
        arrays: dict[str, NDArray[Any]] = {
            "prompt_lengths": self.prompt_lengths.astype(np.uint32),
            "starts": self.starts.astype(np.uint32),
            "ended": self.ended,
            "text": self.text.astype(small),
            "tokens": self.tokens.astype(small),
            "drafted": self.drafted.astype(np.uint8),
            "bins": self.bins,
            "match": np.packbits(self.match, axis=1),
            "distance": rounded(self.distance),
            "jump": _relative(self.jump).astype(np.int32),
            "chances": np.column_stack([self.chances.kept, self.chances.average]).astype(np.float32),
            "detour_prompts": self.detour_prompts.astype(np.uint32),
            "detour_knobs": self.detour_knobs.astype(np.float32),
            "detour_rows": self.detour_rows.astype(np.int32),
            **{name: rounded(getattr(self, name)) for name in NUMBERS},
        }
        if np.array_equal(arrays["q"], arrays["confidence"]):
            del arrays["q"]  # the draft always takes its likeliest token
        if self.top_ten is not None and arrays["entropy"].any():
            arrays["top_ten"] = rounded(self.top_ten)
        if not np.array_equal(self.matched, self._estimated_matches()):
            arrays["matched"] = self.matched.clip(max=_LONGEST_MATCH).astype(np.uint8)
        return arrays

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace.

        Raises:
            TraceError: the file is missing, truncated, damaged, of another kind or version, or contradicts itself.
        """
        return read_archive(
            path,
            (FORMAT, _UNSEALED),
            "trace",
            TraceError,
            lambda metadata: check_info(typed(TraceInfo, metadata)),
            cls.of_arrays,
        )

    @classmethod
    def of_arrays(cls, info: TraceInfo, content: Mapping[str, NDArray[Any]]) -> Trace:
        """Return the trace that `arrays` are of.

        Raises:
            KeyError, ValueError, IndexError: an array is missing, of a wrong type or shape, or contradicts another.
        """
        return _checked(_decoded(cls, info, content))

    def _estimated_matches(self) -> Integers:
        shares = self.confidence if self.certain else np.zeros_like(self.confidence)
        return np.rint(shares * _EARLIER_LONGEST).astype(np.int64)


def trace_name(name: str, split: str) -> str:
    """Return the file name of a workload's trace."""
    return f"{file_name(name)}.{split}.npz"


def tellable_threshold(threshold: float) -> float:
    """Return the nearest number, 0 to 1, of which the rounded probabilities of a trace tell who is below.

    By any other threshold some probabilities within 0.4 % of it are on the other side when they are recorded.
    """
    if threshold <= 0:
        return 0.0
    share, exponent = math.frexp(min(threshold, 1.0 - 2.0**-10))
    steps = 2.0 ** (_MANTISSA + 1)
    # What is as near as this below the middle of two numbers is in the middle as float16, and goes up.
    return math.ldexp((math.floor(share * steps) + 0.5) / steps - 2.0**-12, exponent)


def rounded(values: NDArray[np.floating], mantissa: int = _MANTISSA) -> NDArray[np.float16]:
    """Convert to float16 with so many bits after the leading one, rounded to nearest; the zeros compress well."""
    dropped = 10 - mantissa
    bits = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return ((bits + (1 << (dropped - 1))) >> dropped << dropped).astype(np.uint16).view(np.float16)


def _relative(jump: Integers) -> Integers:
    """Jumps counted from their own row, which compress well: 1 to K + 1 within a text, and 0 where there is none."""
    return np.where(jump < 0, 0, jump - np.arange(len(jump))[:, None])


def _absolute(relative: Integers) -> Integers:
    return np.where(relative == 0, -1, relative + np.arange(len(relative))[:, None])


def check_info(info: TraceInfo) -> TraceInfo:
    """Return the facts of a trace; raises ValueError unless every number is one that can have been recorded."""
    info.check()
    if info.draft_length < 1 or info.vocabulary_size < 1 or info.detour_tokens < 0:
        raise ValueError("draft_length and vocabulary_size must be at least 1, and detour_tokens 0")
    return info


def _decoded(kind: type[Trace], info: TraceInfo, content: Mapping[str, NDArray[Any]]) -> Trace:
    drafts = info.draft_length
    own_rows, rows = (len(numbers(content, name, "iu", (-1,))) for name in ("text", "drafted"))
    prompts = len(numbers(content, "starts", "iu", (-1,))) - 1
    detours = len(numbers(content, "detour_prompts", "iu", (-1,)))

    def integers(name: str, *shape: int) -> Integers:
        values = numbers(content, name, "iu", shape)
        if values.max(initial=0) > _LARGEST:
            raise ValueError(f"{name} has a number beyond all range")
        return values.astype(np.int64)

    def floats(name: str) -> Floats:
        stored = "confidence" if name == "q" and "q" not in content else name
        return numbers(content, stored, "f", (rows if name == "distance" else own_rows, drafts)).astype(np.float32)

    columns = {name: floats(name) for name in NUMBERS}
    likeliest = None if columns["entropy"].any() else columns["confidence"]
    nothing = np.empty(0, np.int64)
    match = numbers(content, "match", "u", (rows, -(-drafts // 8)))
    table = numbers(content, "chances", "f", (-1, -1)).astype(np.float64)
    return kind(
        info,
        prompt_lengths=integers("prompt_lengths", prompts),
        starts=integers("starts", prompts + 1),
        ended=numbers(content, "ended", "b", (prompts,)),
        text=integers("text", own_rows),
        tokens=integers("tokens", own_rows, drafts),
        drafted=integers("drafted", rows),
        bins=numbers(content, "bins", "u", (rows, drafts)),
        match=np.unpackbits(match, axis=1, count=drafts).astype(np.bool_),
        distance=floats("distance"),
        jump=_absolute(integers("jump", rows, drafts + 1)),
        chances=KeepChances(table[:, :-1], table[:, -1]),
        detour_prompts=integers("detour_prompts", detours),
        detour_knobs=numbers(content, "detour_knobs", "f", (detours, 2)).astype(np.float64),
        detour_rows=integers("detour_rows", detours, info.detour_tokens),
        top_ten=floats("top_ten") if "top_ten" in content else likeliest,
        matched=integers("matched", own_rows, drafts) if "matched" in content else nothing,
        **columns,
    )


def _checked(trace: Trace) -> Trace:
    """Return the trace if its arrays fit together.

    Raises:
        ValueError: they do not; the message says which.
    """
    own_rows, rows, drafts = len(trace.text), len(trace.drafted), trace.draft_length
    if trace.prompts < 1 or trace.starts[0] != 0 or trace.starts[-1] != own_rows or (np.diff(trace.starts) < 1).any():
        raise ValueError("starts does not divide the rows into texts")
    if rows < own_rows or trace.drafted.min(initial=0) < 0 or trace.drafted.max(initial=0) > drafts:
        raise ValueError("drafted is out of range")
    if trace.bins.dtype != np.uint8 or trace.bins.max(initial=0) >= BINS:
        raise ValueError("bins is out of range")
    if trace.jump.min(initial=0) < -1 or trace.jump.max(initial=0) >= rows:
        raise ValueError("jump is out of range")
    if len(trace.detour_rows) and not (trace.detour_rows.min() >= -1 and trace.detour_rows.max() < rows):
        raise ValueError("detour_rows is out of range")
    if trace.detour_prompts.min(initial=0) < 0 or trace.detour_prompts.max(initial=0) >= trace.prompts:
        raise ValueError("detour_prompts is out of range")
    if trace.prompt_lengths.min() < 1:
        raise ValueError("prompt_lengths is out of range")
    if trace.matched.min(initial=0) < 0:
        raise ValueError("matched is out of range")
    for values in (trace.text, trace.tokens):
        if values.min(initial=0) < 0 or values.max(initial=0) >= trace.info.vocabulary_size:
            raise ValueError("a token is outside the vocabulary")
    for name in (*NUMBERS, "distance", "detour_knobs", *(["top_ten"] if trace.top_ten is not None else [])):
        values = getattr(trace, name)
        most = 1 if name in _SHARES else np.inf
        if not np.isfinite(values).all() or values.min(initial=0) < 0 or values.max(initial=0) > most:
            raise ValueError(f"{name} has values that are out of range")
    return trace
