"""Drafts of many recorded texts side by side, in NumPy: what would have been drafted, kept and emitted.

Only the target's own texts are used. When greedy this is exactly what live decoding does: whatever is drafted, the text
is the target's, and the trace holds the draft at each of its positions. When sampling, how many tokens of a recorded
draft are kept is drawn anew every round, and the text goes on at the recorded position with as many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import DraftTracker

from ..control.throughput import DraftCharges
from ..recordings.archive import TraceError
from ..recordings.trace import Trace

Indices = NDArray[np.intp]


class DraftTable:
    """The rows of some traces one after another, prepared for drafts of up to so many tokens.

    Args:
        traces: at least one.
        longest: tokens that a draft may have.
        tokens: of each text that are used, at most.

    Attributes:
        confidence: of every draft's tokens, flat: row * longest + place. `entropy` likewise.
        limit: tokens that can be drafted at each row: what the draft knows and what the text has room for.
        left: tokens of the text from each row on.
        survival: chance that a draft is kept beyond each place, shape (rows, longest).
        first_rows: for each trace the row at which every prompt's text begins.

    Raises:
        TraceError: a trace has shorter drafts or texts than asked for.
    """

    def __init__(self, traces: Sequence[Trace], longest: int, tokens: int) -> None:
        self.longest = longest
        parts = [_prepared(trace, longest, tokens) for trace in traces]
        self.confidence = np.concatenate([part.confidence.ravel() for part in parts])
        self.entropy = np.concatenate([part.entropy.ravel() for part in parts])
        self.survival = np.concatenate([part.survival for part in parts])
        self.limit = np.concatenate([part.limit for part in parts])
        self.left = np.concatenate([part.left for part in parts])
        offsets = np.cumsum([0, *(len(part.left) for part in parts)])
        self.first_rows = [offset + trace.starts[:-1] for offset, trace in zip(offsets, traces, strict=False)]


class Steps(NamedTuple):
    """What a step of every text did; each shape (texts,)."""

    tokens: NDArray[np.int64]
    """Emitted."""
    seconds: NDArray[np.float64]
    """Charged."""
    drafted: NDArray[np.int64]
    """Draft tokens verified."""
    accepted: NDArray[np.int64]
    """Those among them that were emitted."""
    rounds: NDArray[np.int64]
    """Verified."""


class DraftReplay:
    """So many texts being drafted and verified in step.

    A step is `advance` and then `draft`; `begin`, also followed by `draft`, puts another text in a text's place. Before
    that, a text that is over waits: nothing is drafted, and nothing charged.

    Args:
        table: what was recorded.
        charges: of each operating point.
        batch_sizes: of each operating point.
        point_of: the operating point of every text, shape (texts,).

    Attributes:
        tracker: what is known of every text's draft.
    """

    def __init__(
        self, table: DraftTable, charges: Sequence[DraftCharges], batch_sizes: Sequence[int], point_of: Indices
    ) -> None:
        texts = len(point_of)
        self._table = table
        # Texts share few operating points, and a small table stays in the processor's cache.
        self._seconds = np.concatenate([point.seconds.ravel() for point in charges])
        self._seconds_at = point_of * charges[0].seconds.size
        self._empty_round = np.array([point.empty_round for point in charges])[point_of]
        cost_ratios = np.array([point.cost_ratio for point in charges])
        self.tracker = DraftTracker(texts, cost_ratios[point_of], np.array(batch_sizes)[point_of])
        self._row = np.zeros(texts, np.intp)
        self._place = np.zeros(texts, np.intp)  # tokens drafted so far
        self._limit = np.zeros(texts, np.intp)  # tokens that can be drafted; 0 for a text that is over
        self._kept = np.zeros(texts, np.intp)  # tokens of this draft that verification would keep
        self._useful = np.zeros(texts, np.intp)  # the same, without one that the target's own token makes superfluous
        self._over = np.ones(texts, np.bool_)

    @property
    def over(self) -> NDArray[np.bool_]:
        """Which texts have ended and wait, shape (texts,)."""
        return self._over

    @property
    def remaining_acceptable(self) -> NDArray[np.int64]:
        """How many more tokens of each draft would still lengthen what is emitted, shape (texts,).

        Negative where tokens already drafted bring nothing: minus their number. 0 for a text that is over.
        """
        return self._useful - self._place

    def begin(self, which: Indices, first_rows: Indices, generator: np.random.Generator) -> None:
        """Begin other texts, with nothing drafted yet.

        Args:
            which: the texts' numbers, each once.
            first_rows: the row at which each begins.
            generator: decides what verification will keep.
        """
        self.tracker.forget(which)
        self._over[which] = False
        self._start_round(which, first_rows, generator)

    def leave(self, which: Indices) -> None:
        """Let some texts be over."""
        self._over[which] = True
        for state in (self._place, self._limit, self._kept, self._useful):
            state[which] = 0

    def advance(self, stop: NDArray[np.bool_], generator: np.random.Generator) -> tuple[Steps, Indices]:
        """Verify the drafts that shall stop or cannot go on; the others are charged for the token that `draft` adds.

        Args:
            stop: shape (texts,).
            generator: decides what verification of the next drafts will keep.

        Returns:
            What the step did, and the numbers of the texts that it ended.
        """
        table, texts = self._table, len(stop)
        ends = stop | (self._place >= self._limit)
        at = ends * (table.longest + 1)
        at += self._place
        at += self._seconds_at
        seconds = self._seconds.take(at)
        if self._over.any():
            ends &= ~self._over
            seconds[self._over] = 0.0
        which = np.flatnonzero(ends)
        row, drafted = self._row[which], self._place[which]
        kept = np.minimum(self._kept[which], drafted)
        left = table.left[row]
        emitted = np.minimum(kept + 1, left)
        accepted = np.minimum(kept, emitted)
        self.tracker.verified(drafted, accepted, emitted, which)
        steps = Steps(np.zeros(texts, np.int64), seconds, *(np.zeros(texts, np.int64) for _ in range(3)))
        steps.tokens[which] = emitted
        steps.drafted[which] = drafted
        steps.accepted[which] = accepted
        steps.rounds[which] = 1
        goes_on = emitted < left
        ended, fresh, row = which[~goes_on], which[goes_on], (row + emitted)[goes_on]
        fresh, row, ended_too = self._empty_rounds(fresh, row, steps)
        ended = np.concatenate([ended, *ended_too])
        self._start_round(fresh, row, generator)
        self.leave(ended)
        return steps, ended

    def draft(self, among: Indices | None = None) -> None:
        """Draft one more token of every text that can, or of those of some that can."""
        if among is None:
            which = np.flatnonzero(self._place < self._limit)
        else:
            which = among[self._place[among] < self._limit[among]]
        place = self._place[which]
        cell = self._row[which] * self._table.longest + place
        self.tracker.drafted(self._table.confidence.take(cell), self._table.entropy.take(cell), which)
        self._place[which] = place + 1

    def _empty_rounds(self, fresh: Indices, row: Indices, steps: Steps) -> tuple[Indices, Indices, list[Indices]]:
        """Do the rounds of texts at rows where nothing can be drafted, until something can, or the text is over.

        Returns:
            The texts that are not over, their rows, and those that are.
        """
        table = self._table
        ready_texts, ready_rows = [], []
        ended: list[Indices] = []
        while True:
            ready = table.limit[row] > 0
            ready_texts.append(fresh[ready])
            ready_rows.append(row[ready])
            fresh, row = fresh[~ready], row[~ready]
            if not len(fresh):
                return np.concatenate(ready_texts), np.concatenate(ready_rows), ended
            self.tracker.verified(0, 0, 1, fresh)
            steps.tokens[fresh] += 1
            steps.rounds[fresh] += 1
            steps.seconds[fresh] += self._empty_round[fresh]
            goes_on = table.left[row] > 1
            ended.append(fresh[~goes_on])
            fresh, row = fresh[goes_on], row[goes_on] + 1

    def _start_round(self, which: Indices, row: Indices, generator: np.random.Generator) -> None:
        table = self._table
        # One throw decides how far the draft is kept: each token passes its own test with the chance that it has, so
        # the run of those that pass is at least so long with the product of their chances.
        kept = (table.survival[row] > generator.random(len(which))[:, None]).sum(-1)
        limit = table.limit[row]
        self._row[which] = row
        self._place[which] = 0
        self._limit[which] = limit
        self._kept[which] = kept
        self._useful[which] = np.minimum(kept, np.minimum(limit, table.left[row] - 1))


class _Prepared(NamedTuple):
    confidence: NDArray[np.float32]
    entropy: NDArray[np.float32]
    survival: NDArray[np.float32]
    limit: Indices
    left: Indices


def _prepared(trace: Trace, longest: int, tokens: int) -> _Prepared:
    name = f"the trace of {trace.info.workload} ({trace.info.split})"
    if longest > trace.draft_length:
        raise TraceError(
            f"{name} has drafts of {trace.draft_length} tokens, and max_draft_length is {longest}; give at most "
            f"{trace.draft_length}, or record it with --draft-length {longest}"
        )
    if tokens > trace.info.tokens:
        raise TraceError(
            f"{name} has texts of {trace.info.tokens} tokens, and tokens is {tokens}; give at most "
            f"{trace.info.tokens}, or record it with --tokens {tokens}"
        )
    own = len(trace.text)
    lengths = np.diff(trace.starts)
    place = np.arange(own) - np.repeat(trace.starts[:-1], lengths)
    used = np.minimum(lengths, tokens)
    # A draft does not know that an end-of-text token is near, only how many tokens were asked for.
    asked = np.where(trace.ended, tokens, used)
    room = np.maximum(np.repeat(asked, lengths) - place - 1, 0)
    limit = np.minimum(np.minimum(trace.drafted[:own], longest), room)
    chance = _chances(trace, own)[:, :longest]
    return _Prepared(
        np.ascontiguousarray(trace.confidence[:, :longest], np.float32),
        np.ascontiguousarray(trace.entropy[:, :longest], np.float32),
        chance.cumprod(-1).astype(np.float32),
        limit.astype(np.intp),
        (np.repeat(used, lengths) - place).astype(np.intp),
    )


def _chances(trace: Trace, own: int) -> NDArray[np.float64]:
    """With what probability each token of each draft passes its test, all before it having passed."""
    if trace.info.sampling.greedy:
        passes = trace.match[:own].astype(np.float64)
    else:
        p, q = trace.p.astype(np.float64), trace.q.astype(np.float64)
        passes = np.minimum(1.0, np.divide(p, q, out=(p > 0).astype(np.float64), where=q > 0))
    return passes * (np.arange(trace.draft_length) < trace.drafted[:own, None])
