"""The backend that replays a decoder, by whatever was recorded of it; counts of engines, replayed from traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from specgym.decoding import ENGINE_SETTINGS, ArgumentError, Split, one_of, traits_of, whole_number

from ..profiles import Profiles, profile_of
from ..recordings.archive import TraceError
from ..recordings.find import Recordings, find_recording, outcome_command, record_command
from ..recordings.outcomes import OutcomeError, Outcomes
from ..recordings.trace import Trace
from ..workloads import Workload, per_workload
from .backend import ReplayBackend
from .outcome_replay import OutcomeReplay
from .pipelined_replay import PipelinedReplay
from .replay_table import ReplayTable
from .trace_replay import TraceReplay, TraceWalk

Workloads = str | Workload | Sequence[str | Workload] | None
"""Workloads or their names; None for those of the recordings."""


def replay_backend(
    decoder: str | Callable[..., Any],
    workload: Workloads,
    recording: Recordings,
    *,
    split: Split | None = None,
    profile: Profiles = None,
    max_new_tokens: int = 32,
    max_draft_length: int = 16,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 1,
    context: int | None = None,
) -> ReplayBackend:
    """Find the recordings of some workloads, and return the backend that replays a decoder from them.

    Args:
        decoder: a registered name.
        workload: workloads, by default those of the recordings.
        recording: traces, or outcomes of the decoder; by default those that ship.
        split: of the prompts; by default that of the recordings.
        profile: what time is charged by; by default the pairs' reference profiles.
        max_new_tokens: tokens decoded of each prompt, at most.
        max_draft_length: longest draft, in tokens, of a decoder that drafts chains.
        options: further build options of the decoder.
        batch_size: of the operating point.
        context: of the operating point.

    Raises:
        TraceError: there is no such recording, it has shorter texts or other drafts than asked for, or some are traces
            and some outcomes. Errors of profiles as for `profile_of`.
        ValueError: the decoder cannot be replayed.
    """
    names = asked(workload, recording)
    recordings, workloads = zip(
        *(
            find_recording(decoder, value, name, split)
            for value, name in zip(per_workload("recording", recording, list(map(str, names))), names, strict=True)
        ),
        strict=True,
    )
    assert isinstance(decoder, str)
    profiles = [
        profile_of(named, value, replayed=True, decoder=decoder).at(batch_size=batch_size, context=context)
        for value, named in zip(
            per_workload("profile", profile, [named.name for named in workloads], shared=True), workloads, strict=True
        )
    ]
    traits = traits_of(decoder)
    built = traits.accepted_options(max_draft_length=max_draft_length) | dict(options or {})
    traces = [item for item in recordings if isinstance(item, Trace)]
    outcomes = [item for item in recordings if isinstance(item, Outcomes)]
    if traces and outcomes:
        raise OutcomeError(
            f"recording: got a trace of {traces[0].info.workload}, and {outcomes[0].info}; all recordings must be "
            "traces, or all must be outcomes"
        )
    if traces:
        for trace in traces:
            _check_trace(trace, traits.lossless, max_new_tokens, max_draft_length)
        kind = PipelinedReplay if traits.overlaps else TraceReplay
        return kind(traits, traces, workloads, profiles, max_new_tokens, built)
    if traits.drafts_chains() and not traits.lossless:
        for info in (item.info for item in outcomes):
            # All decoders but exact ones decide otherwise about the beginning of a draft that is longer.
            if max_draft_length != info.draft_length:
                raise OutcomeError(
                    f"max_draft_length is {max_draft_length}, and {info} are of {info.draft_length}; give "
                    f"max_draft_length={info.draft_length}, or record others: "
                    f"{outcome_command(info.workload, decoder)} with --draft-length {max_draft_length}"
                )
    recorded = outcomes[0].info
    highest = {knob.name: knob.high for knob in recorded.knobs}
    try:
        knobs = traits.recorded_knobs(highest, **built)
        missing = sorted(set(highest) ^ {knob.name for knob in knobs})
    except KeyError as error:
        missing = [str(error)]
    if missing:
        raise OutcomeError(
            f"{recorded} have other knobs than the decoder ({missing[0]}); record them again: "
            f"{outcome_command(recorded.workload, decoder)}"
        )
    return OutcomeReplay(outcomes, profiles, max_new_tokens, workloads, knobs)


def asked(workload: Workloads, recordings: Any) -> list[str | Workload | None]:
    """Return the workloads that are meant; None for that of a recording."""
    if workload is None:
        if isinstance(recordings, Mapping):
            return list(recordings)
        several = isinstance(recordings, Sequence) and not isinstance(recordings, str)
        return [None] * (len(recordings) if several else 1)
    return [workload] if isinstance(workload, str | Workload) else list(workload)


def require_single(env: str, **arguments: Any) -> None:
    """Refuse several workloads, or several recordings, for an environment that has a single one.

    Args:
        env: the environment's name, for messages.
        arguments: what was given, by the argument's name.

    Raises:
        ValueError: one of them is a list, a tuple, a mapping or the like; the message says what takes several.
    """
    for name, value in arguments.items():
        if isinstance(value, Sequence | Mapping) and not isinstance(value, str):
            raise ArgumentError(
                f"{name}: {env} is about a single workload, got {len(value)} in a {type(value).__name__}; give one, or "
                f"make several that step together, gymnasium.make_vec(..., num_envs={max(len(value), 1)}, "
                f"{name}=[...])"
            )


def _check_trace(trace: Trace, exact: bool, max_new_tokens: int, max_draft_length: int) -> None:
    info = trace.info
    name, again = f"the trace of {info.workload} ({info.split})", record_command(info.workload)
    detours = not exact and len(trace.detour_prompts) > 0
    recorded = info.detour_tokens if detours else info.tokens
    if max_new_tokens > recorded:
        option = "--detour-tokens" if detours else "--tokens"
        raise TraceError(
            f"max_new_tokens is {max_new_tokens}, and {name} has texts of {recorded} tokens; ask for fewer, or record "
            f"longer ones: {again} with {option} {max_new_tokens}"
        )
    # Where the target is not followed exactly, what follows the draft's end decides about its beginning, so shorter
    # drafts are other drafts.
    if max_draft_length > info.draft_length or (not exact and max_draft_length != info.draft_length):
        raise TraceError(
            f"max_draft_length is {max_draft_length}, and {name} has drafts of {info.draft_length} tokens; give "
            f"max_draft_length={info.draft_length}, or record others: {again} with --draft-length {max_draft_length}"
        )


class EngineCounts(NamedTuple):
    """Counts of a text as an engine tells them (`specgym.decoding.EngineText`)."""

    drafted: int
    """Tokens drafted and verified."""
    accepted: int
    """Drafted tokens among the generated ones."""
    rounds: int
    """Verifications after the first token, and the prompt's where an engine verifies draft tokens with it."""


def engine_counts(trace: Trace, engine: str, knobs: Mapping[str, float], tokens: int) -> list[EngineCounts]:
    """Return what an engine counts in the recorded texts of a trace, by its stop rule and its way to begin and end.

    Args:
        trace: of greedy texts, recorded with the models that the engine runs.
        engine: a name of `specgym.decoding.ENGINE_SETTINGS`.
        knobs: of `SpeculativeDecoder` with the engine's stop rule; ``draft_length`` is at most what was recorded.
        tokens: generated of each text, at most; at most as many as were recorded.

    Raises:
        ArgumentError: there is no such engine, or the trace is of sampled texts or too short.
        TraceError: the trace lacks the column that the engine's rule reads.
    """
    settings = ENGINE_SETTINGS[one_of("engine", engine, tuple(ENGINE_SETTINGS))]
    if not trace.info.sampling.greedy:
        raise ArgumentError(
            f"counts of engines are replayed of greedy texts, and those of {trace.info.workload} are sampled; record "
            "it without a temperature"
        )
    whole_number("tokens", tokens, at_most=trace.info.tokens)
    whole_number("draft_length", knobs["draft_length"], at_least=0, at_most=trace.draft_length)
    traits = traits_of("speculative")
    rule = traits.trace_rule(knobs, options=traits.checked_options(stop=settings.stop))
    table = ReplayTable([trace], detours=False, stop=rule.stop)
    before = rule.stop == "top_ten"
    free = np.zeros((1, (table.draft_length + 2) * (table.draft_length + 1)))  # seconds, which nobody asks for
    walk = TraceWalk(table, free, tokens, before=before)
    rng, first = np.random.default_rng(0), 0 if settings.drafts_first else 1
    counts = []
    for path in table.paths[:, 0, 0].tolist():
        steps = walk.walk(
            path, 0, rule.tolerance, rule.taken_back, int(rule.draft_length), rng, rule.stop_below, int(rule.fewest),
            first,
        )  # fmt: skip
        rounds = [(drafted, accepted) for _, drafted, accepted, _, _ in steps]
        known = rounds if settings.counts_last else rounds[:-1]
        counts.append(EngineCounts(sum(row[0] for row in known), sum(row[1] for row in known), len(rounds)))
    return counts
