"""Counts of engines, replayed: what llama.cpp and others say of their drafts, from traces and their stop rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from specgym.decoding import ENGINE_SETTINGS, ArgumentError, one_of, traits_of, whole_number

from ..recordings.trace import Trace
from .replay_table import ReplayTable
from .trace_replay import TraceWalk


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
