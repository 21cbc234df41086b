"""Tables of traces for replay: arrays in which every round looks up what it needs; and the rule of what is kept."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import EXACT, LEVELS, ExpectedGain, LatencyProfile, Sampling, Sureness

from ..recordings.archive import TraceError
from ..recordings.find import record_command
from ..recordings.trace import Trace

COPIES = 16
"""Draws of acceptance for every row of a sampled trace, when the table is built."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def tolerances_needed(accepted: NDArray[np.bool_], distance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the tolerance that keeps the first j + 1 tokens of a draft, in its last dimension.

    It is the largest distance among those that fail the exact test, or `EXACT` if none does, and so never falls: as
    many tokens are kept as entries are at most the tolerance.

    Args:
        accepted: whether each token passes the exact test.
        distance: between draft and target, of a shape to broadcast with.
    """
    return np.maximum.accumulate(np.where(accepted, np.float32(EXACT), distance), axis=-1)


def exact_chances(
    match: NDArray[np.bool_], p: NDArray[np.float32], q: NDArray[np.float32], sampling: Sampling
) -> Floats:
    """Return the probability of recorded draft tokens to pass the exact test, all before them having been kept.

    Args:
        match: whether each is the target's likeliest.
        p: the target's probability of each.
        q: the draft's.
        sampling: by which tokens are chosen.
    """
    if sampling.greedy:
        return match.astype(np.float64)
    above, below = p.astype(np.float64), q.astype(np.float64)
    return np.minimum(1.0, np.divide(above, below, out=(above > 0).astype(np.float64), where=below > 0))


def tokens_kept(agreed: Integers, drafted: Integers, back: Integers) -> Integers:
    """Return how many draft tokens stay: those agreed on, less what a rejection takes back beyond its own token."""
    return np.maximum(agreed - back * (agreed < drafted), 0)


@dataclass(frozen=True)
class Rounds:
    """Rounds of many texts, the first rounds of all texts first; every array has shape (rounds,).

    Attributes:
        text: number of the text, from 0.
        row: row where it stood.
        drafted: draft tokens that were verified.
        accepted: draft tokens among those emitted.
        taken: tokens emitted.
        cost: place of the round's seconds among those of its trace (`seconds_by_place`).
    """

    text: Integers
    row: Integers
    drafted: Integers
    accepted: Integers
    taken: Integers
    cost: Integers


def seconds_by_place(profile: LatencyProfile, longest: int, unverified: bool = False) -> Floats:
    """Return the seconds of a round with drafts of up to `longest` tokens (K), at the place that `Rounds.cost` has.

    Args:
        profile: what time is charged by.
        longest: K.
        unverified: whether some drafted tokens may not be verified.

    Returns:
        By the number of drafted tokens, shape (K + 1,); with `unverified` they are followed by those of m drafted
        tokens of which n are verified, at (m + 1) * (K + 1) + n, and the shape is ((K + 2) * (K + 1),).
    """
    seconds = profile.round_seconds(longest)
    if unverified:
        draft_steps, verified = np.divmod(np.arange((longest + 1) ** 2), longest + 1)
        seconds = np.concatenate([seconds, profile.rounds_of(draft_steps, verified + 1)])
    return seconds


def true_bytes(flags: NDArray[np.bool_]) -> Integers:
    """Count the true ones in each row, whose length is a multiple of 8; shape (rows, flags) to (rows,)."""
    # Eight flags are a word of bytes that are 0 or 1, and this product has the sum of all eight in its highest byte.
    words = (flags.view(np.uint64) * np.uint64(0x0101010101010101)) >> np.uint64(56)
    count = words[:, 0]
    for column in range(1, words.shape[1]):
        count = count + words[:, column]
    return count.view(np.int64)


def neighbour(known: list[float], value: float, rng: np.random.Generator) -> int:
    """Draw between the two known values, ascending, that a value lies between, by how near it is to them."""
    share = rng.random()
    if len(known) == 1:
        return 0
    above = min(max(bisect_left(known, value), 1), len(known) - 1)
    low, high = known[above - 1], known[above]
    return above - int(share * (high - low) >= value - low)


def neighbours(known: Floats, values: NDArray[np.floating], share: Floats) -> Integers:
    """`neighbour` of many values: known values of each in a row of shape (texts, known)."""
    if known.shape[1] == 1:
        return np.zeros(len(values), np.int64)
    above = np.clip((known < values[:, None]).sum(1), 1, known.shape[1] - 1)
    rows = np.arange(len(values))
    low, high = known[rows, above - 1], known[rows, above]
    return above - (share * (high - low) >= values - low)


@dataclass(frozen=True)
class Doubts:
    """Ends of many drafts by how sure they are of their tokens.

    Attributes:
        doubt: `ReplayTable.doubt`.
        sure: largest doubt of a token that does not end a draft, shape (texts, 1), float32.
        fewest: tokens of a draft, at least, shape (texts,).
        before: as for `TraceWalk`.
    """

    doubt: NDArray[np.float32]
    sure: NDArray[np.float32]
    fewest: Integers
    before: bool

    @classmethod
    def of(
        cls, doubt: NDArray[np.float32], stop_below: Floats | None, fewest: Integers | None, before: bool
    ) -> Doubts | None:
        """Return the ends of these drafts, arguments as for `decode_many`; None where nothing ends one."""
        if stop_below is None or fewest is None or not (stop_below.any() or fewest.any()):
            return None
        return cls(doubt, -stop_below.astype(np.float32)[:, None], fewest, before)

    def end(self, row: Integers, drafted: Integers, room: Integers, columns: int) -> tuple[Integers, Integers]:
        """Return how many of the drafted tokens are verified, and `Rounds.cost`; all of shape (texts,).

        Args:
            row: where each text stands.
            drafted: tokens that each draft has, were it sure of all.
            room: tokens that it may have, at most.
            columns: K + 1.
        """
        certain = true_bytes(self.doubt.take(row, 0) <= self.sure)
        draft_steps = np.where(room < self.fewest, 0, np.minimum(certain + 1, drafted))
        kept = np.minimum(certain, draft_steps) if self.before else draft_steps
        kept = np.where(kept < self.fewest, 0, kept)
        return kept, np.where(draft_steps == kept, kept, (draft_steps + 1) * columns + kept)

    def take(self, which: Integers) -> Doubts:
        """Return those of some texts."""
        return Doubts(self.doubt, self.sure.take(which, 0), self.fewest.take(which), self.before)


class ReplayTable:
    """Traces, ready to be replayed together.

    A *path* is a recorded text of a prompt: the target's own, or a detour. Prompts, paths and rows of all traces are
    numbered one after another.

    Args:
        traces: those with detours have the same numbers of tolerances and of tokens taken back.
        profiles: of each trace, where drafts end by `ExpectedGain`; without chances, those of the trace are taken.
        detours: whether the paths are the detours, too, of prompts that have some. Otherwise, and for a trace that has
            none, they are the target's own texts alone, of all prompts.
        stop: how it is measured whether a draft is sure of a token, for rules by which an unsure one ends it. The paths
            are then the target's own texts.
        seed: of the draws of sampled traces.

    Attributes:
        draft_length: K, the longest draft of any trace.
        prompts: numbers of the prompts that can be replayed, as their own trace counts them, one array a trace.
        first_prompts: number of the first prompt of each trace, shape (traces,).
        needed: `tolerances_needed` by the tokens of a row's draft, infinite beyond it. Shape (places, K rounded up to a
            multiple of 8).
        places: where a row's first copy is in `needed`; more follow for a sampled trace. Shape (rows,).
        copies: of each trace's rows in `needed`, shape (traces,).
        drafted: tokens drafted at each row, shape (rows,).
        ends: how long drafts are by `ExpectedGain`, whatever was recorded, by the level of the tolerance, shape
            (`LEVELS`, rows); of no use without `profiles`.
        doubt: minus the least sureness among the first j + 1 tokens of a row's draft, which never falls: as many tokens
            are sure as entries are at most minus the threshold. Shape (rows, K rounded up to a multiple of 8); (0, 0)
            without `stop`.
        strayed: divergence of each token, were it kept only for the tolerance: the total variation, but 0 for what
            greedy decoding would have chosen anyway. Shape (rows, K).
        jump: `Trace.jump`, flat, shape (rows * (K + 1),).
        routes: the row of each path at every position, -1 beyond its end, shape (paths, width).
        lengths: rows of each path, shape (paths,).
        paths: the path by prompt, tolerance and tokens taken back, shape (prompts, tolerances, numbers taken back); the
            first tolerance is that of the target's own text. -1 where nothing is recorded.
        tolerances: recorded by each trace, ascending, 0 for the target's own text, shape (traces, tolerances).
        log_taken_back: logarithms of the recorded numbers of tokens taken back, shape (traces, numbers taken back).

    Raises:
        TraceError: a detour is missing among those of a prompt, the traces have detours of more or fewer thresholds, or
            one lacks the column that `stop` asks for.
    """

    def __init__(
        self,
        traces: Sequence[Trace],
        *,
        detours: bool,
        profiles: Sequence[LatencyProfile | None] | None = None,
        stop: Sureness = "",
        seed: int = 0,
    ) -> None:
        self.draft_length = max(trace.draft_length for trace in traces)
        self.has_detours = detours and any(len(trace.detour_prompts) for trace in traces)
        self.tolerances, self.log_taken_back = _levels(traces, self.has_detours)
        self.copies = np.array([1 if trace.info.sampling.greedy else COPIES for trace in traces])
        self.sampled = bool((self.copies > 1).any())
        self.prompts = [_usable(trace, self.has_detours) for trace in traces]
        self.first_prompts = _offsets([trace.prompts for trace in traces])[:-1]
        generator = np.random.default_rng(seed)
        width = max(max(trace.info.tokens, trace.info.detour_tokens) for trace in traces)
        charged = profiles or [None] * len(traces)
        columns = 8 * -(-self.draft_length // 8)
        doubts = [_doubt(trace, stop, columns) for trace in traces] if stop else [np.empty((0, 0), np.float32)]
        self.doubt = np.concatenate(doubts)
        parts = [self._part(trace, place, width, generator, charged[place]) for place, trace in enumerate(traces)]
        rows = _offsets([len(part["drafted"]) for part in parts])
        paths = _offsets([len(part["routes"]) for part in parts])
        places = _offsets([len(part["needed"]) for part in parts])
        for number, part in enumerate(parts):
            _shift(part["jump"], rows[number])
            _shift(part["routes"], rows[number])
            _shift(part["paths"], paths[number])
            part["places"] += places[number]
        self.needed, self.places, self.drafted, self.strayed, self.jump, self.routes, self.paths = (
            np.ascontiguousarray(np.concatenate([part[name] for part in parts]))
            for name in ("needed", "places", "drafted", "strayed", "jump", "routes", "paths")
        )
        self.ends = np.ascontiguousarray(np.concatenate([part["ends"] for part in parts], axis=1))
        self.lengths: Integers = (self.routes >= 0).sum(1)

    def _part(
        self, trace: Trace, place: int, width: int, generator: np.random.Generator, profile: LatencyProfile | None
    ) -> dict[str, NDArray[Any]]:
        """One trace's arrays, numbered from 0."""
        rows = len(trace.drafted) if self.has_detours else len(trace.text)
        wider = ((0, 0), (0, self.draft_length - trace.draft_length))
        jump = np.pad(trace.jump[:rows], wider, constant_values=-1)
        copies = int(self.copies[place])
        beyond = ((0, 0), (0, 8 * -(-self.draft_length // 8) - trace.draft_length))
        needed = np.pad(_needed(trace, rows, copies, generator), beyond, constant_values=np.inf)
        routes = [_padded(np.arange(*ends), width) for ends in zip(trace.starts[:-1], trace.starts[1:], strict=True)]
        paths = np.full((trace.prompts, self.tolerances.shape[1], self.log_taken_back.shape[1]), -1)
        paths[:, 0] = np.arange(trace.prompts)[:, None]
        if len(trace.detour_prompts) == 0:
            paths[:] = paths[:, :1, :1]
        elif self.has_detours:
            paths[trace.detour_prompts, *_level_numbers(trace)] = trace.prompts + np.arange(len(trace.detour_prompts))
            routes += [_padded(detour, width) for detour in trace.detour_rows]
        if (paths[self.prompts[place]] < 0).any():
            raise TraceError(
                f"the trace of {trace.info.workload} ({trace.info.split}) lacks detours: every prompt that has any "
                "needs one for every recorded pair of thresholds; record it again"
            )
        return {
            "needed": needed.astype(np.float32),
            "places": np.arange(rows) * copies,
            "drafted": trace.drafted[:rows],
            "ends": _ends(trace, rows, profile),
            "strayed": np.pad(_strayed(trace, rows), wider),
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
        draws = generator.random((rows, copies, trace.draft_length), dtype=np.float32)
        of_target = len(trace.text)
        accepted = np.empty(draws.shape, np.bool_)
        accepted[:of_target] = draws[:of_target] * trace.q[:, None] < trace.p[:, None]
        # Detours do not say p and q of the token. Over the draft's tokens, the chance to be accepted is 1 - distance.
        accepted[of_target:] = draws[of_target:] < 1 - distance[of_target:, None]
    beyond = np.arange(trace.draft_length) >= trace.drafted[:rows, None, None]
    needed = np.where(beyond, np.float32(np.inf), tolerances_needed(accepted, distance[:, None]))
    return needed.reshape(rows * copies, -1)


def _doubt(trace: Trace, stop: Sureness, columns: int) -> NDArray[np.float32]:
    """`ReplayTable.doubt` of one trace; of no use beyond the draft."""
    # A draft without probabilities has q = 1 and is sure as far as its confidence goes; for others q is the smaller.
    sureness = np.minimum(trace.q, trace.confidence) if stop == "drawn" else trace.top_ten
    if sureness is None:
        name = f"the trace of {trace.info.workload} ({trace.info.split})"
        raise TraceError(
            f"{name} was recorded by an earlier version and has no `{stop}`, by which these drafts end; record it "
            f"again: {record_command(trace.info.workload)}"
        )
    doubt = np.maximum.accumulate(-sureness, axis=1)
    return np.pad(doubt, ((0, 0), (0, columns - trace.draft_length))).astype(np.float32)


def _ends(trace: Trace, rows: int, profile: LatencyProfile | None) -> NDArray[np.uint8]:
    if profile is None:
        return np.zeros((LEVELS, rows), np.uint8)
    charged = replace(profile, chances=profile.chances or trace.chances)
    return ExpectedGain.of(charged, trace.draft_length).lengths(trace.bins[:rows])


def _strayed(trace: Trace, rows: int) -> NDArray[np.float32]:
    distance = trace.distance[:rows]
    return np.where(trace.match[:rows], np.float32(0), distance) if trace.info.sampling.greedy else distance


def _levels(traces: Sequence[Trace], detours: bool) -> tuple[Floats, Floats]:
    """Recorded tolerances with 0 before them, and logarithms of recorded tokens taken back, shapes (traces, levels)."""
    if not detours:
        return np.zeros((len(traces), 1)), np.zeros((len(traces), 1))
    recorded = [_recorded_levels(trace) for trace in traces if len(trace.detour_prompts)]
    if len({(len(tolerances), len(taken_back)) for tolerances, taken_back in recorded}) > 1:
        names = ", ".join(f"{trace.info.workload} ({trace.info.split})" for trace in traces)
        raise TraceError(f"the traces of {names} have detours of more or fewer thresholds; record them alike")
    # For a trace without detours any levels do: they all lead to its own texts.
    levels = [_recorded_levels(trace) if len(trace.detour_prompts) else recorded[0] for trace in traces]
    tolerances = [np.concatenate([[0.0], numbers]) for numbers, _ in levels]
    return np.array(tolerances), np.log([taken_back for _, taken_back in levels])


def _recorded_levels(trace: Trace) -> tuple[Floats, Floats]:
    tolerances, taken_back = _detour_knobs(trace)
    return np.unique(tolerances), np.unique(taken_back)


def _detour_knobs(trace: Trace) -> Floats:
    """Tolerances and tokens taken back of the detours, shape (2, detours), rounded as distances are for comparison."""
    return trace.detour_knobs.T.astype(np.float32).astype(np.float64)


def _level_numbers(trace: Trace) -> tuple[Integers, Integers]:
    """Number the levels of every detour: its tolerance (from 1, after the target's own text) and tokens taken back."""
    (tolerances, taken_back), knobs = _recorded_levels(trace), _detour_knobs(trace)
    return np.searchsorted(tolerances, knobs[0]) + 1, np.searchsorted(taken_back, knobs[1])


def _usable(trace: Trace, detours: bool) -> Integers:
    return np.unique(trace.detour_prompts) if detours and len(trace.detour_prompts) else np.arange(trace.prompts)


def _padded(rows: Integers, width: int) -> Integers:
    return np.pad(rows, (0, width - len(rows)), constant_values=-1)


def _offsets(counts: Sequence[int]) -> Integers:
    return np.concatenate([[0], np.cumsum(counts)])


def _shift(numbers: Integers, by: int) -> None:
    """Add to all but the -1s, in place."""
    numbers[numbers >= 0] += by
