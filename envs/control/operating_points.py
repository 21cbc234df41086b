"""What many environments decode: some workloads, each with some batch sizes, their traces and what time costs there."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from specgym.decoding import LatencyProfile, Split

from ..profiles import profile_of
from ..recordings.shipped_traces import find_trace
from ..recordings.trace import Trace
from ..workload_shares import asked, one_each
from ..workloads import Workload
from .throughput import DraftCharges

Workloads = str | Workload | Sequence[str | Workload] | None
Traces = Trace | str | Path | Sequence[Trace | str | Path] | Mapping[str, Trace | str | Path] | None
Profiles = (
    LatencyProfile
    | str
    | Path
    | Sequence[LatencyProfile | str | Path]
    | Mapping[str, LatencyProfile | str | Path]
    | None
)


class OperatingPoint(NamedTuple):
    """What a group of environments decodes; each has a best throughput, and so a rate, of its own."""

    workload: str
    batch_size: int


@dataclass(frozen=True)
class OperatingPoints:
    """Every workload with every batch size.

    Attributes:
        workloads: names, in order.
        traces: of each workload.
        points: all batch sizes of the first workload, then those of the next.
        charges: what time is charged by at each point.
    """

    workloads: tuple[str, ...]
    traces: tuple[Trace, ...]
    points: tuple[OperatingPoint, ...]
    charges: tuple[DraftCharges, ...]

    @classmethod
    def find(
        cls,
        workload: Workloads,
        split: Split | None,
        trace: Traces,
        profile: Profiles,
        batch_size: int | Sequence[int],
        *,
        context: int | None,
        max_draft_length: int,
        decision_seconds: float,
    ) -> OperatingPoints:
        """Arguments and errors as for `DraftLengthVectorEnv`."""
        wanted = asked(workload, trace)
        given = one_each("trace", trace, [str(one) for one in wanted])
        found = [find_trace(one, name, split) for one, name in zip(given, wanted, strict=True)]
        names = tuple(one.name for _, one in found)
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"workload must name one or more different workloads, got {workload!r}")
        sizes = [operator.index(size) for size in (batch_size if isinstance(batch_size, Sequence) else [batch_size])]
        if len(set(sizes)) < len(sizes) or not sizes:
            raise ValueError(f"batch_size must be one or more different whole numbers, got {batch_size!r}")
        profiles = one_each("profile", profile, names, shared=True)
        return cls(
            workloads=names,
            traces=tuple(one for one, _ in found),
            points=tuple(OperatingPoint(name, size) for name in names for size in sizes),
            charges=tuple(
                DraftCharges.of(
                    own, max_draft_length, batch_size=size, context=context, decision_seconds=decision_seconds
                )
                for own in (
                    profile_of(one, given, replayed=True) for (_, one), given in zip(found, profiles, strict=True)
                )
                for size in sizes
            ),
        )
