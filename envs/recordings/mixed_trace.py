"""Mixed traces: what several drafts of one target did at every position of the same texts.

They replay the choice between the drafts, round by round and token by token. What the drafts share, the texts among it,
is stored once. ``docs/traces.md`` describes the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import KeepChances, bins_of

from .archive import TraceError, numbers, read_archive, typed, write_archive
from .trace import Trace, TraceInfo, check_info, rounded

FORMAT = "specgym-mixed-trace-1"
_SHARED = ("prompt_lengths", "starts", "ended", "text", "detour_prompts", "detour_knobs", "detour_rows")
"""Arrays that the traces of all drafts have in common; there are no detours."""
_COARSE = ("entropy", "target_entropy", "distance", "top_ten")
"""Columns that nothing is computed from to the last digit."""
_COARSE_MANTISSA = 4  # bits kept of a float16's 10: a relative error of 3 % at most
_OF_DRAFT = ("draft", "draft_sha256")
"""Facts in which the traces of the drafts differ."""


@dataclass(frozen=True)
class MixedTrace:
    """Recorded texts of one workload, and what each of several drafts did along them.

    Attributes:
        info: what was recorded; `draft` and `draft_sha256` are those of all drafts together.
        drafts: names of the drafts, in the order of the pair.
        free: whether the proposals of each draft cost microseconds, so that they may be looked at without being asked
            for.
        traces: one for each draft, all of the same texts, without detours.

    Raises:
        TraceError: there is no draft, the numbers of drafts contradict each other, or the traces are of other texts or
            prompts, were made otherwise, or have detours.
    """

    info: TraceInfo
    drafts: tuple[str, ...]
    free: tuple[bool, ...]
    traces: tuple[Trace, ...]

    def __post_init__(self) -> None:
        if not len(self.drafts) == len(self.free) == len(self.traces) > 0:
            raise TraceError(
                f"a mixed trace has a name, free or not, and a trace for every draft, got {len(self.drafts)} names, "
                f"{len(self.free)} times free or not, and {len(self.traces)} traces"
            )
        for name, trace in zip(self.drafts, self.traces, strict=True):
            differing = [key for key in _SHARED if not np.array_equal(getattr(trace, key), getattr(self.first, key))]
            facts, others = asdict(trace.info), asdict(self.info)
            differing += [key for key in facts if key not in _OF_DRAFT and facts[key] != others[key]]
            if differing:
                raise TraceError(
                    f"the trace of draft {name} is not of the texts of the others (with other {', '.join(differing)}); "
                    "record all drafts together: python -m specgym.envs.record TARGET+DRAFT,DRAFT/PROMPTS"
                )
            if trace.info.detour_tokens or len(trace.detour_prompts):
                raise TraceError(f"the trace of draft {name} has detours, which a choice between drafts has no use for")

    @property
    def first(self) -> Trace:
        """Trace of the first draft; of all of them, for what they share."""
        return self.traces[0]

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return self.first.prompts

    @property
    def chances(self) -> tuple[KeepChances, ...]:
        """Shares of the tokens of each draft that were kept on the training prompts."""
        return tuple(trace.chances for trace in self.traces)

    @property
    def draft_length(self) -> int:
        """K, the most tokens drafted at a row."""
        return self.info.draft_length

    def save(self, path: str | Path) -> None:
        """Write the trace; a reader never sees half of one.

        Probabilities and the draft's confidence keep eight significant bits, entropies, distances and `top_ten` five.
        A reader computes `bins` from the confidence so rounded.
        """
        digests = [trace.info.draft_sha256 for trace in self.traces]
        facts = {**asdict(self.info), "drafts": list(self.drafts), "free": list(self.free), "draft_digests": digests}
        arrays: dict[str, NDArray[Any]] = {}
        for place, trace in enumerate(self.traces):
            columns = trace.arrays()
            del columns["bins"]
            if not columns["entropy"].any():
                del columns["distance"]  # 1 - p
            for name in set(_COARSE) & set(columns):
                columns[name] = rounded(getattr(trace, name), _COARSE_MANTISSA)
            arrays |= {_column(place, name): values for name, values in columns.items() if name not in _SHARED}
            arrays |= {name: columns[name] for name in _SHARED}
        write_archive(path, FORMAT, facts, arrays)

    @classmethod
    def load(cls, path: str | Path) -> MixedTrace:
        """Read a mixed trace.

        Raises:
            TraceError: the file is missing, truncated, damaged, of another kind or version, or contradicts itself.
        """
        return read_archive(path, (FORMAT, FORMAT), "mixed trace", TraceError, _facts, _mixed)


@dataclass(frozen=True)
class _Facts:
    """Facts in a file, the drafts' among them."""

    info: TraceInfo
    drafts: tuple[str, ...]
    free: tuple[bool, ...]
    digests: tuple[str, ...]


def _column(place: int, name: str) -> str:
    return f"draft{place}_{name}"


def _facts(metadata: dict[str, Any]) -> _Facts:
    drafts, free, digests = (metadata.pop(name) for name in ("drafts", "free", "draft_digests"))
    for values, kind in ((drafts, str), (free, bool), (digests, str)):
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ValueError("drafts, free and draft_digests must be lists of texts, truth values and texts")
    if len(drafts) != len(digests):
        raise ValueError(f"there are {len(drafts)} drafts and {len(digests)} draft_digests")
    return _Facts(check_info(typed(TraceInfo, metadata)), tuple(drafts), tuple(free), tuple(digests))


def _mixed(facts: _Facts, content: Mapping[str, NDArray[Any]]) -> MixedTrace:
    traces = []
    for place, (name, digest) in enumerate(zip(facts.drafts, facts.digests, strict=True)):
        prefix = _column(place, "")
        columns = {key.removeprefix(prefix): values for key, values in content.items() if key.startswith(prefix)}
        shape = (len(numbers(content, "text", "iu", (-1,))), facts.info.draft_length)
        p, confidence = (numbers(columns, column, "f", shape) for column in ("p", "confidence"))
        drafted = np.arange(shape[1]) < numbers(columns, "drafted", "iu", shape[:1])[:, None]
        columns["bins"] = np.where(drafted, bins_of(confidence.astype(np.float32)), 0).astype(np.uint8)
        if "distance" not in columns:
            columns["distance"] = np.where(drafted, 1 - p, 0).astype(np.float32)
        info = replace(facts.info, draft=name, draft_sha256=digest)
        traces.append(Trace.of_arrays(info, {**columns, **{key: content[key] for key in _SHARED}}))
    return MixedTrace(facts.info, facts.drafts, facts.free, tuple(traces))
