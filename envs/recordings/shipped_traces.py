"""Finding the trace of a workload: one that is given, in memory or as a file, or one that ships with the package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from specgym.decoding import Split

from ..workloads import Workload, workload
from .archive import TraceError
from .outcomes import OutcomeInfo
from .trace import Trace, TraceInfo, trace_name

TRACES = Path(__file__).parents[1] / "data" / "traces"
"""The folder of the traces that ship with the package."""
DEFAULT_WORKLOAD = "tiny/prose"


def find_trace(
    given: Trace | str | Path | None, wanted: str | Workload | None, split: Split | None = None
) -> tuple[Trace, Workload]:
    """The trace of a workload, and the workload. No model is loaded.

    Args:
        given: a trace, or its file; None for the one that ships with the package.
        wanted: a workload or its name; None for the one the trace was recorded from, or `DEFAULT_WORKLOAD`.
        split: whose prompts; None for those of the trace that is given, or else the workload's own.

    Raises:
        TraceError: there is no such trace, its file is damaged, or it is of another workload or split than asked for;
            the message says how to record one.
        WorkloadError: the workload's name is not known.
    """
    if given is None:
        named = workload(wanted or DEFAULT_WORKLOAD)
        named = named if split is None else named.with_split(split)
        return shipped_trace(named.name, named.split), named
    trace = given if isinstance(given, Trace) else _loaded(Path(given).resolve())
    return trace, recorded_workload(trace.info, wanted, split, record_command)


def trace_in(folder: Path | None, name: str, split: Split) -> Trace:
    """The trace of a workload's prompts in a folder that `python -m specgym.envs.record` wrote; shipped if None.

    Raises:
        TraceError: there is none, or it is damaged.
        WorkloadError: the workload's name is not known.
    """
    given = None if folder is None else folder / trace_name(workload(name).name, split)
    return find_trace(given, name, split)[0]


def shipped_trace(name: str, split: str) -> Trace:
    """The trace of a workload's prompts that ships with the package; read once a process.

    Raises:
        TraceError: none is shipped for that workload; the message says which there are and how to record one.
    """
    path = TRACES / trace_name(name, split)
    if not path.is_file():
        there = ", ".join(sorted(file.name.removesuffix(".npz") for file in TRACES.glob("*.npz"))) or "none"
        raise TraceError(
            f"no trace of {name} ({split} prompts) ships with specgym (shipped: {there}); record one with "
            f"{record_command(name)}, and give its file as recording=, or to specgym/DraftLength-v0 as trace="
        )
    return _loaded(path)


def record_command(name: str) -> str:
    """The command that records the traces of a workload; a pair that is in memory alone has no name to give to it."""
    return f"`python -m specgym.envs.record '{name}' --out traces` (specgym.envs.record.record for a pair in memory)"


def recorded_workload(
    info: TraceInfo | OutcomeInfo, wanted: str | Workload | None, split: Split | None, command: Callable[[str], str]
) -> Workload:
    """The workload of a recording that is given. By its name alone it can be loaded only if the pair is known.

    Args:
        info: of the recording.
        wanted: the workload asked for, or its name; None for that of the recording.
        split: whose prompts are asked for; None for those recorded.
        command: says how to record the workload of a name.

    Raises:
        TraceError: the recording is of another workload or split.
        WorkloadError: the workload's name is not known.
    """
    if wanted is None:
        pair, _, prompts = info.workload.partition("@")[0].rpartition("/")
        named = Workload(pair, prompts, info.sampling, name=info.workload)
    else:
        named = workload(wanted)
    if named.name != info.workload:
        raise TraceError(
            f"the recording given was recorded from {info.workload}, and the workload asked for is {named.name}; leave "
            f"the workload out, or record it: {command(named.name)}"
        )
    if split not in (None, info.split):
        raise TraceError(
            f"the recording given has the {info.split} prompts of {info.workload}, not the {split} prompts; leave the "
            f"split out, or record it: {command(named.name)}"
        )
    return named.with_split("train" if info.split == "train" else "test")


@functools.lru_cache(maxsize=64)
def _loaded(path: Path) -> Trace:
    return Trace.load(path)
