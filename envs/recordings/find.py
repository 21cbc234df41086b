"""Finding the recording that replays a decoder: in memory, in a file, or shipped with the package."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specgym.decoding import (
    PRESETS,
    KeepChances,
    MixedProfile,
    PromptSet,
    Split,
    decoder_names,
    load_prompts,
    shipped_prompts,
    traits_of,
)

from ..workloads import (
    DEFAULT_WORKLOAD,
    SHIPPED_WORKLOADS,
    Workload,
    default_workload,
    divided,
    suffix_of,
    workload,
)
from .archive import EARLIER_LIMIT, TraceError
from .mixed_trace import MixedTrace
from .outcomes import OutcomeError, OutcomeInfo, Outcomes, holds_outcomes, outcomes_name
from .trace import Trace, TraceInfo, trace_name

TRACES, MIXED, OUTCOMES = (Path(__file__).parents[1] / "data" / folder for folder in ("traces", "mixed", "outcomes"))
"""Folders of the recordings that ship with the package."""

Recording = Trace | Outcomes
Recordings = Recording | str | Path | Sequence[Recording | str | Path] | Mapping[str, Recording | str | Path] | None
"""Recordings for every workload in order, or a mapping from their names."""


def find_recording(
    decoder: str | Callable[..., Any],
    recording: Recording | str | Path | None,
    name: str | Workload | None,
    split: Split | None = None,
) -> tuple[Recording, Workload]:
    """Find what replays a decoder on a workload, and the workload. No model is loaded.

    Args:
        decoder: a registered name.
        recording: a trace or outcomes, or a file of either; None for the one that ships with the package: a trace where
            it can replay the decoder, else outcomes.
        name: a workload or its name; None for the one that was recorded, or the decoder's default.
        split: of the prompts; None for that of the recording, or else the workload's own.

    Raises:
        TraceError: there is no such recording, its file is damaged, or it is of another decoder, workload or split than
            asked for; the message says how to make one.
        WorkloadError: the workload's name is not known.
        ValueError: the decoder cannot be replayed.
    """
    by_trace = isinstance(recording, Trace)
    names = tuple(filter(is_traced, decoder_names())) if by_trace else decoder_names()
    if not isinstance(decoder, str) or decoder not in names:
        subject, hint = "a trace" if by_trace else "backend='replay'", ""
        if isinstance(recording, Trace) and decoder in decoder_names():
            hint = f"; record its outcomes: {outcome_command(recording.info.workload, str(decoder))}"
        raise ValueError(f"{subject} replays the decoders {', '.join(names)} by name, not {decoder!r}{hint}")
    traced = is_traced(decoder)
    if isinstance(recording, str | Path) and (not traced or holds_outcomes(recording)):
        recording = _loaded(Outcomes, Path(recording).resolve())
    if isinstance(recording, Outcomes):
        info = recording.info
        if decoder != info.decoder:
            raise OutcomeError(
                f"given are {info}, and the decoder asked for is {decoder}; give decoder={info.decoder!r}, or record "
                f"others: {outcome_command(info.workload, decoder)}"
            )
        return recording, _recorded_workload(recording, name, split, lambda named: outcome_command(named, decoder))
    if traced:
        return find_trace(recording, name, split)
    named = workload(name or default_workload(decoder))
    named = named if split is None else named.with_split(split)
    outcomes = shipped_outcomes(named.name, decoder, named.split)
    return outcomes, _recorded_workload(outcomes, named, named.split, lambda name: outcome_command(name, decoder))


def find_trace(
    recording: Trace | str | Path | None, name: str | Workload | None, split: Split | None = None
) -> tuple[Trace, Workload]:
    """Find the trace of a workload, and the workload. Arguments and errors as for `find_recording`."""
    if recording is None:
        named = workload(name or DEFAULT_WORKLOAD)
        named = named if split is None else named.with_split(split)
        recording = shipped_trace(named.name, named.split)
        name, split = named, named.split
    trace = recording if isinstance(recording, Trace) else _loaded(Trace, Path(recording).resolve())
    return trace, _recorded_workload(trace, name, split, record_command)


def find_mixed_trace(
    recording: MixedTrace | str | Path | None, name: str | Workload | None = None, split: Split | None = None
) -> tuple[MixedTrace, Workload]:
    """Find the mixed trace of a workload whose pair has several drafts, and the workload. No model is loaded.

    Args:
        recording: a mixed trace or its file; None for the one that ships with the package.
        name: a workload or its name; None for the one that was recorded. It is needed where `recording` is None.
        split: of the prompts; None for that of the recording, or else the workload's own.

    Raises:
        TraceError: there is no such recording, its file is damaged, or it is of another workload or split than asked
            for; the message says how to make one.
        WorkloadError: the workload's name is not known.
    """
    if recording is None:
        if name is None:
            raise TraceError(f"name a workload or give a recording; shipped are: {', '.join(mixed_workloads())}")
        named = workload(name)
        named = named if split is None else named.with_split(split)
        name, split, recording = named, named.split, MIXED / trace_name(named.name, named.split)
        if not recording.is_file():
            raise TraceError(
                f"no mixed trace of {named.name} ({split} prompts) ships with specgym (shipped: "
                f"{', '.join(mixed_workloads()) or 'none'}); record one with {record_command(named.name)}, and give "
                "its file as recording="
            )
    trace = recording if isinstance(recording, MixedTrace) else _loaded(MixedTrace, Path(recording).resolve())
    return trace, _recorded_workload(trace, name, split, record_command)


def counted_chances(named: Workload, profile: MixedProfile) -> Sequence[KeepChances | None]:
    """Return how often tokens of each draft of a profile were kept, as counted where a mixed trace ships; else None.

    Args:
        named: the workload.
        profile: of the drafts, in order.
    """
    file = MIXED / trace_name(named.name, "train")
    if isinstance(named.pair, str) and file.is_file():
        trace = _loaded(MixedTrace, file)
        if trace.drafts == tuple(draft.name for draft in profile.drafts):
            return trace.chances
    return [None] * len(profile.drafts)


def mixed_workloads() -> tuple[str, ...]:
    """Return the workloads that ship with mixed traces, greedy ones first, in the order of the presets."""
    return _workloads_in(MIXED, ".train.npz")


def is_traced(decoder: str) -> bool:
    """Return whether traces replay a registered decoder; others are replayed by their outcomes."""
    return traits_of(decoder).recorded_by == "trace"


def trace_in(folder: Path | None, name: str, split: Split) -> Trace:
    """Find the trace of a workload's prompts in a folder that `python -m specgym.envs.record` wrote; shipped if None.

    Raises:
        TraceError: there is none, or it is damaged.
        WorkloadError: the workload's name is not known.
    """
    recording = None if folder is None else folder / trace_name(workload(name).name, split)
    return find_trace(recording, name, split)[0]


def mixed_trace_in(folder: Path | None, name: str, split: Split) -> MixedTrace:
    """Find the mixed trace of a workload's prompts, likewise.

    Raises:
        TraceError: there is none, or it is damaged.
        WorkloadError: the workload's name is not known.
    """
    recording = None if folder is None else folder / trace_name(workload(name).name, split)
    return find_mixed_trace(recording, name, split)[0]


def shipped_trace(name: str, split: str) -> Trace:
    """Read the trace of a workload's prompts that ships with the package; once a process.

    Raises:
        TraceError: none is shipped for that workload; the message says which there are and how to record one.
    """
    path = TRACES / trace_name(name, split)
    if not path.is_file():
        raise TraceError(
            f"no trace of {name} ({split} prompts) ships with specgym (shipped: {_shipped(TRACES, '*.npz')}); record "
            f"one with {record_command(name)}, and give its file as recording="
        )
    return _loaded(Trace, path)


def shipped_outcomes(name: str, decoder: str, split: str) -> Outcomes:
    """Read the outcomes of a workload's prompts with a decoder that ship with the package; once a process.

    Raises:
        OutcomeError: none are shipped for that workload; the message says which there are and how to record some.
    """
    path = OUTCOMES / outcomes_name(name, decoder, split)
    if not path.is_file():
        raise OutcomeError(
            f"no {decoder} outcomes of {name} ({split} prompts) ship with specgym (shipped: "
            f"{_shipped(OUTCOMES, f'*.{decoder}.*.npz')}); record some with {outcome_command(name, decoder)}, and give "
            "their file as recording="
        )
    return _loaded(Outcomes, path)


def recorded_workloads(decoder: str) -> tuple[str, ...]:
    """Return the workloads that ship with recordings of a decoder, greedy ones first, in the order of the presets.

    Of those prompt sets alone that all pairs of causal models share: what ships was learned with these.
    """
    return _workloads_in(*((TRACES, ".train.npz") if is_traced(decoder) else (OUTCOMES, f".{decoder}.train.npz")))


def _workloads_in(folder: Path, end: str) -> tuple[str, ...]:
    names = [path.name.removesuffix(end).replace("_", "/", 1) for path in folder.glob(f"*{end}")]
    pairs, sets = list(PRESETS), [name.partition("/")[2] for name in SHIPPED_WORKLOADS]

    def parts(name: str) -> tuple[str, str, str]:
        pair, _, rest = name.partition("/")
        prompts, _, temperature = rest.partition("@")
        return pair, prompts, temperature

    def place(name: str) -> tuple[bool, int, int]:
        pair, prompts, temperature = parts(name)
        return bool(temperature), pairs.index(pair), sets.index(prompts)

    return tuple(sorted((name for name in names if parts(name)[1] in sets), key=place))


def practised_workloads(decoder: str) -> tuple[str, ...]:
    """Return the recorded workloads that are practised on by default.

    Those are the greedy ones, and sampled ones among the decoder's own: most shipped traces of sampled texts hold no
    detours, without which a lossy decoder is replayed roughly.
    """
    return tuple(
        name for name in recorded_workloads(decoder) if "@" not in name or name in traits_of(decoder).workloads
    )


def record_command(name: str) -> str:
    """Return the command that records the traces of a workload; a pair in memory has no name to give to it."""
    return f"`python -m specgym.envs.record '{name}' --out traces` (specgym.envs.record.record for a pair in memory)"


def outcome_command(name: str, decoder: str) -> str:
    """Return the command that records a decoder's outcomes; a pair in memory has no name to give to it."""
    return (
        f"`python -m specgym.envs.record '{name}' --decoder {decoder} --out outcomes` "
        "(specgym.envs.recordings.outcome_recorder.record_outcomes for a pair in memory)"
    )


def recording_name(name: str, decoder: str, split: str) -> str:
    """Return the file name of what replays a decoder on a workload."""
    return trace_name(name, split) if is_traced(decoder) else outcomes_name(name, decoder, split)


def _recorded_workload(
    recording: Recording | MixedTrace,
    name: str | Workload | None,
    split: Split | None,
    command: Callable[[str], str],
) -> Workload:
    """The workload of a recording. By its name alone it can be loaded only if the pair is known.

    Args:
        recording: a trace or outcomes.
        name: a workload or its name; None for that of the recording.
        split: of the prompts; None for those recorded.
        command: says how to record the workload of a name.

    Raises:
        TraceError: the recording is of another workload or split, or of other prompts or some cut in another way.
        WorkloadError: the workload's name is not known.
    """
    info = recording.info
    if name is None:
        body = info.workload.removesuffix(suffix_of(info.sampling))
        pair, prompts = divided(body) or body.rpartition("/")[::2]
        named = Workload(pair, prompts, info.sampling, info.workload, max_prompt_tokens=info.max_prompt_tokens)
    else:
        named = workload(name)
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
    _require_length(recording, named, command)
    if name is not None:
        _require_texts(info, named, command)
    return named.with_split("train" if info.split == "train" else "test")


def _require_length(recording: Recording | MixedTrace, named: Workload, command: Callable[[str], str]) -> None:
    """Raise TraceError where prompts were recorded that are cut in another way than those of the workload."""
    recorded, asked = recording.info.max_prompt_tokens, named.prompt_limit
    longest = _longest_prompt(recording)
    if recorded == asked or all(limit is None or longest <= limit for limit in (recorded, asked)):
        return
    if recorded is None or longest <= recorded:
        kind, way_out = "whole", "leave out max_prompt_tokens (--max-prompt-tokens)"
    else:
        kind = f"of at most {recorded} tokens"
        way_out = f"give max_prompt_tokens={recorded} (--max-prompt-tokens {recorded})"
    raise TraceError(
        f"the recording of {named.name} has prompts {kind}, and asked for are prompts "
        f"{'whole' if asked is None else f'of at most {asked} tokens'}; {way_out}, or record it with that length: "
        f"{command(named.name)}"
    )


def _require_texts(info: TraceInfo | OutcomeInfo, named: Workload, command: Callable[[str], str]) -> None:
    """Raise TraceError where other texts were recorded than a workload has here, as far as they are at hand."""
    prompts = named.prompts
    if isinstance(prompts, str) and (prompts in shipped_prompts() or Path(prompts).expanduser().is_file()):
        prompts = load_prompts(prompts)
    if isinstance(prompts, PromptSet) and prompts.digest != info.prompts_sha256:
        raise TraceError(
            f"the recording of {named.name} has other prompts than {prompts.name} has now: the set has changed, or an "
            f"earlier version has read it otherwise; record it again: {command(named.name)}"
        )


def _longest_prompt(recording: Recording | MixedTrace) -> float:
    """Tokens of the longest recorded prompt before it was cut, or the most that it can have had."""
    info = recording.info
    if info.longest_prompt is not None:
        return info.longest_prompt
    # An earlier version has recorded it, and cut what was longer without a note of it.
    if isinstance(recording, Trace):
        longest = int(recording.prompt_lengths.max())
        return longest if longest < EARLIER_LIMIT else math.inf
    parts = divided(info.workload.removesuffix(suffix_of(info.sampling)))
    shipped = parts is not None and parts[0] in PRESETS and parts[1] in shipped_prompts()
    return EARLIER_LIMIT if shipped else math.inf  # tests hold the shipped prompts to that


def _shipped(folder: Path, pattern: str) -> str:
    return ", ".join(sorted(file.name.removesuffix(".npz") for file in folder.glob(pattern))) or "none"


def _loaded(kind: Any, path: Path) -> Any:
    """Read a recording, once in this process unless its file is written anew."""
    return _read(kind, path, path.stat().st_mtime_ns if path.is_file() else 0)


@functools.lru_cache(maxsize=64)
def _read(kind: Any, path: Path, written: int) -> Any:
    return kind.load(path)
