"""Finding the recording that replays a decoder: a trace, or outcomes; given, in a file, or shipped with the package."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from specgym.decoding import Decoder, Pair, Split, decoder_names, traits_of

from ..workloads import Workload, default_workload, workload
from .outcomes import OutcomeError, Outcomes, holds_outcomes, outcomes_name
from .shipped_traces import find_trace, recorded_workload
from .trace import Trace

OUTCOMES = Path(__file__).parents[1] / "data" / "outcomes"
"""The folder of the outcomes that ship with the package."""

Recording = Trace | Outcomes
Recordings = Recording | str | Path | Sequence[Recording | str | Path] | Mapping[str, Recording | str | Path] | None
"""One for each workload in order, or a mapping from their names."""


def find_recording(
    decoder: str | Callable[[Pair], Decoder],
    given: Recording | str | Path | None,
    wanted: str | Workload | None,
    split: Split | None = None,
) -> tuple[Recording, Workload]:
    """What replays a decoder on a workload, and the workload. No model is loaded.

    Args:
        decoder: a name.
        given: a trace or outcomes, or a file of either; None for the one that ships with the package: a trace where it
            can replay the decoder, else outcomes.
        wanted: a workload or its name; None for the one that was recorded, or the decoder's default.
        split: whose prompts; None for those of the recording that is given, or else the workload's own.

    Raises:
        TraceError: there is no such recording, its file is damaged, or it is of another decoder, workload or split than
            asked for; the message says how to make one.
        WorkloadError: the workload's name is not known.
        ValueError: the decoder cannot be replayed.
    """
    traced = traced_decoders()
    known = traced if isinstance(given, Trace) else decoder_names()
    if callable(decoder) or decoder not in known:
        what = "a trace" if isinstance(given, Trace) else "backend='replay'"
        hint = ""
        if isinstance(given, Trace) and not callable(decoder) and decoder in decoder_names():
            hint = f"; record its outcomes: {outcome_command(given.info.workload, decoder)}"
        raise ValueError(f"{what} replays the decoders {', '.join(known)} by name, not {decoder!r}{hint}")
    if isinstance(given, str | Path) and (decoder not in traced or holds_outcomes(given)):
        given = _loaded(Path(given).resolve())
    if isinstance(given, Outcomes):
        info = given.info
        if decoder != info.decoder:
            raise OutcomeError(
                f"given are {info}, and the decoder asked for is {decoder}; give decoder={info.decoder!r}, or record "
                f"others: {outcome_command(info.workload, decoder)}"
            )
        return given, recorded_workload(info, wanted, split, lambda name: outcome_command(name, decoder))
    if decoder in traced:
        return find_trace(given, wanted, split)
    named = workload(wanted or default_workload(decoder))
    named = named if split is None else named.with_split(split)
    return shipped_outcomes(named.name, decoder, named.split), named


def traced_decoders() -> tuple[str, ...]:
    """Return the names of the decoders that a trace can replay."""
    return tuple(name for name in decoder_names() if traits_of(name).recorded_by == "trace")


def shipped_outcomes(name: str, decoder: str, split: str) -> Outcomes:
    """The outcomes of a workload's prompts with a decoder that ship with the package; read once a process.

    Raises:
        OutcomeError: none are shipped for that workload; the message says which there are and how to record some.
    """
    path = OUTCOMES / outcomes_name(name, decoder, split)
    if not path.is_file():
        files = OUTCOMES.glob(f"*.{decoder}.*.npz")
        there = ", ".join(sorted(file.name.removesuffix(".npz") for file in files)) or "none"
        raise OutcomeError(
            f"no {decoder} outcomes of {name} ({split} prompts) ship with specgym (shipped: {there}); record some with "
            f"{outcome_command(name, decoder)}, and give their file as recording="
        )
    return _loaded(path)


def outcome_command(name: str, decoder: str) -> str:
    """The command that records a decoder's outcomes; a pair that is in memory alone has no name to give to it."""
    return (
        f"`python -m specgym.envs.record '{name}' --decoder {decoder} --out outcomes` "
        "(specgym.envs.recordings.outcome_recorder.record_outcomes for a pair in memory)"
    )


@functools.lru_cache(maxsize=64)
def _loaded(path: Path) -> Outcomes:
    return Outcomes.load(path)
