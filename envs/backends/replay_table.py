"""Traces made ready for replay: what every round looks up, in arrays where one look-up answers one question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..recordings.archive import TraceError
from ..recordings.trace import Trace

COPIES = 16
"""How often the dice are thrown for every row of a sampled trace, when the table is made."""
ACCEPTED = -1.0
"""Stands in `ReplayTable.needed` for a token that passed the exact test: below every fallback there is."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class ReplayTable:
    """One or several traces, ready to be replayed together.

    A *path* is a recorded text of a prompt: the target's own, or a detour. Prompts, paths and rows of all traces are
    numbered one after another.

    Args:
        traces: those with detours have the same numbers of fallbacks and of rollbacks.
        detours: whether the paths are the detours, too, of prompts that have some. Otherwise, and for a trace that has
            none, they are the target's own texts alone, of all prompts.
        seed: of the dice of sampled traces.

    Attributes:
        draft_length: K, the longest draft of any trace.
        prompts: numbers of the prompts that can be replayed, as their own trace counts them, one array a trace.
        first_prompts: number of the first prompt of each trace, shape (traces,).
        needed: the fallback that keeps the first j + 1 tokens of a row's draft: the largest distance among those that
            fail the exact test, or `ACCEPTED` if none does; infinite beyond the draft. It never falls along a row, so
            that as many tokens are kept as entries are at most the fallback. Shape (places, K rounded up to a multiple
            of 8).
        places: where a row's first copy is in `needed`; more follow if the dice were thrown. Shape (rows,).
        copies: of each trace's rows in `needed`, shape (traces,).
        drafted: tokens drafted at each row, shape (rows,).
        distance: total variation, shape (rows, K).
        jump: `Trace.jump`, flat, shape (rows * (K + 1),).
        routes: the row of each path at every position, -1 beyond its end, shape (paths, width).
        lengths: rows of each path, shape (paths,).
        paths: the path by prompt, fallback and rollback, shape (prompts, fallbacks, rollbacks); the first fallback
            is that of the target's own text. -1 where nothing is recorded.
        fallbacks: recorded by each trace, ascending, 0 for the target's own text, shape (traces, fallbacks).
        log_rollbacks: logarithms of the recorded rollbacks, shape (traces, rollbacks).

    Raises:
        TraceError: a detour is missing among those of a prompt, or the traces have detours of more or fewer thresholds.
    """

    def __init__(self, traces: Sequence[Trace], *, detours: bool, seed: int = 0) -> None:
        self.draft_length = max(trace.draft_length for trace in traces)
        self.has_detours = detours and any(len(trace.detour_prompts) for trace in traces)
        self.fallbacks, self.log_rollbacks = _levels(traces, self.has_detours)
        self.copies = np.array([1 if trace.info.sampling.greedy else COPIES for trace in traces])
        self.sampled = bool((self.copies > 1).any())
        self.prompts = [_usable(trace, self.has_detours) for trace in traces]
        self.first_prompts = _offsets([trace.prompts for trace in traces])[:-1]
        generator = np.random.default_rng(seed)
        width = max(max(trace.info.tokens, trace.info.detour_tokens) for trace in traces)
        parts = [self._part(trace, place, width, generator) for place, trace in enumerate(traces)]
        rows = _offsets([len(part["drafted"]) for part in parts])
        paths = _offsets([len(part["routes"]) for part in parts])
        places = _offsets([len(part["needed"]) for part in parts])
        for number, part in enumerate(parts):
            _shift(part["jump"], rows[number])
            _shift(part["routes"], rows[number])
            _shift(part["paths"], paths[number])
            part["places"] += places[number]
        self.needed, self.places, self.drafted, self.distance, self.jump, self.routes, self.paths = (
            np.ascontiguousarray(np.concatenate([part[name] for part in parts]))
            for name in ("needed", "places", "drafted", "distance", "jump", "routes", "paths")
        )
        self.lengths: Integers = (self.routes >= 0).sum(1)

    def _part(self, trace: Trace, place: int, width: int, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
        """One trace's arrays, numbered from 0."""
        rows = len(trace.drafted) if self.has_detours else len(trace.text)
        wider = ((0, 0), (0, self.draft_length - trace.draft_length))
        jump = np.pad(trace.jump[:rows], wider, constant_values=-1)
        copies = int(self.copies[place])
        words = -(-self.draft_length // 8)
        beyond = ((0, 0), (0, 8 * words - trace.draft_length))
        needed = np.pad(_needed(trace, rows, copies, generator), beyond, constant_values=np.inf)
        routes = [_padded(np.arange(*ends), width) for ends in zip(trace.starts[:-1], trace.starts[1:], strict=True)]
        paths = np.full((trace.prompts, self.fallbacks.shape[1], self.log_rollbacks.shape[1]), -1)
        paths[:, 0] = np.arange(trace.prompts)[:, None]
        if len(trace.detour_prompts) == 0:
            paths[:] = paths[:, :1, :1]
        elif self.has_detours:
            paths[trace.detour_prompts, *_level_numbers(trace)] = trace.prompts + np.arange(len(trace.detour_prompts))
            routes += [_padded(detour, width) for detour in trace.detour_rows]
        if (paths[self.prompts[place]] < 0).any():
            raise TraceError(
                f"the trace of {trace.info.workload} ({trace.info.split}) lacks detours: every prompt that has any "
                "needs one for every recorded fallback with every recorded rollback; record it again"
            )
        return {
            "needed": needed.astype(np.float32),
            "places": np.arange(rows) * copies,
            "drafted": trace.drafted[:rows],
            "distance": np.pad(trace.distance[:rows], wider),
            "jump": np.where(jump < rows, jump, -1).ravel(),
            "routes": np.array(routes),
            "paths": paths,
        }


def _needed(trace: Trace, rows: int, copies: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """`ReplayTable.needed` of one trace, shape (rows * copies, K), a row's copies side by side."""
    distance = trace.distance[:rows]
    if trace.info.sampling.greedy:
        accepted = trace.match[:rows, None]
    else:
        dice = generator.random((rows, copies, trace.draft_length), dtype=np.float32)
        own = len(trace.text)
        accepted = np.empty(dice.shape, np.bool_)
        accepted[:own] = dice[:own] * trace.q[:, None] < trace.p[:, None]
        # Detours do not say p and q of the token. Over the draft's tokens, the chance to be accepted is 1 - distance.
        accepted[own:] = dice[own:] < 1 - distance[own:, None]
    needed = np.where(accepted, np.float32(ACCEPTED), distance[:, None])
    beyond = np.arange(trace.draft_length) >= trace.drafted[:rows, None, None]
    needed = np.maximum.accumulate(np.where(beyond, np.float32(np.inf), needed), axis=-1)
    return needed.reshape(rows * copies, -1)


def _levels(traces: Sequence[Trace], detours: bool) -> tuple[Floats, Floats]:
    """Recorded fallbacks with 0 before them, and logarithms of the recorded rollbacks, shapes (traces, levels)."""
    if not detours:
        return np.zeros((len(traces), 1)), np.zeros((len(traces), 1))
    found = [_recorded_levels(trace) for trace in traces if len(trace.detour_prompts)]
    if len({(len(fallbacks), len(rollbacks)) for fallbacks, rollbacks in found}) > 1:
        names = ", ".join(f"{trace.info.workload} ({trace.info.split})" for trace in traces)
        raise TraceError(f"the traces of {names} have detours of more or fewer thresholds; record them alike")
    # For a trace without detours any levels do: they all lead to its own texts.
    each = [_recorded_levels(trace) if len(trace.detour_prompts) else found[0] for trace in traces]
    fallbacks = [np.concatenate([[0.0], levels]) for levels, _ in each]
    return np.array(fallbacks), np.log([rollbacks for _, rollbacks in each])


def _recorded_levels(trace: Trace) -> tuple[Floats, Floats]:
    fallbacks, rollbacks = _detour_knobs(trace)
    return np.unique(fallbacks), np.unique(rollbacks)


def _detour_knobs(trace: Trace) -> Floats:
    """Fallbacks and rollbacks of the detours, shape (2, detours), rounded as distances are before a comparison."""
    return trace.detour_knobs.T.astype(np.float32).astype(np.float64)


def _level_numbers(trace: Trace) -> tuple[Integers, Integers]:
    """Of each detour, which fallback (from 1, after the target's own text) and which rollback (from 0) it has."""
    (fallbacks, rollbacks), knobs = _recorded_levels(trace), _detour_knobs(trace)
    return np.searchsorted(fallbacks, knobs[0]) + 1, np.searchsorted(rollbacks, knobs[1])


def _usable(trace: Trace, detours: bool) -> Integers:
    return np.unique(trace.detour_prompts) if detours and len(trace.detour_prompts) else np.arange(trace.prompts)


def _padded(rows: Integers, width: int) -> Integers:
    return np.pad(rows, (0, width - len(rows)), constant_values=-1)


def _offsets(counts: Sequence[int]) -> Integers:
    return np.concatenate([[0], np.cumsum(counts)])


def _shift(numbers: Integers, by: int) -> None:
    """Add to all but the -1s, in place."""
    numbers[numbers >= 0] += by
