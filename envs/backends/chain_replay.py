"""Drafts of many recorded texts side by side, in NumPy: what would have been drafted, kept and emitted.

Only the target's own texts are used. When greedy this is exactly what live decoding does: whatever is drafted, the text
is the target's, and the trace holds the draft at each of its positions. When sampling, how many tokens of a recorded
draft are kept is drawn anew every round, and the text goes on at the recorded position with as many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import DraftTracker, LatencyProfile, number

from ..recordings.archive import TraceError
from ..recordings.trace import Trace
from .backend import DraftSteps, Floats, Integers
from .replay_table import exact_chances

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class DraftCharges:
    """Seconds of the steps of drafting and verifying, at one operating point.

    Attributes:
        seconds: of a step, shape (2, longest draft + 1), by whether it verified (0 or 1) and the number of tokens
            drafted before it. A step that goes on is charged what one more token adds to a round; one that verifies is
            charged a round of one drafted token, or of none. Over the steps of a round that makes the seconds of the
            round. Every decision about a drafted token is charged besides.
        empty_round: seconds of a round that drafts nothing and that nobody decided on.
        autoregressive_seconds: of a token of plain decoding.
        cost_ratio: what one more drafted token costs on average (`LatencyProfile.marginal_cost`).
    """

    seconds: Floats
    empty_round: float
    autoregressive_seconds: float
    cost_ratio: float

    @classmethod
    def of(
        cls,
        profile: LatencyProfile,
        max_draft_length: int,
        *,
        batch_size: int = 1,
        context: int | None = None,
        decision_seconds: float = 0.0,
    ) -> DraftCharges:
        """Compute the charges by a latency profile.

        Args:
            profile: of the pair and the hardware.
            max_draft_length: longest draft, in tokens, at least 1.
            batch_size: sequences decoded together, all drafting as many tokens; seconds are those of the whole batch.
            context: tokens read before; by default the profile's own.
            decision_seconds: time that deciding takes, at least 0.

        Raises:
            LatencyProfileError: the profile does not cover the batch size and the context.
            ValueError: `decision_seconds` is negative or not finite.
        """
        decision_seconds = number("decision_seconds", decision_seconds, at_least=0)
        point = profile.at(batch_size=batch_size, context=context)
        rounds = point.round_seconds(max_draft_length)
        seconds = np.empty((2, max_draft_length + 1))
        seconds[0, :-1] = np.diff(rounds)
        seconds[0, -1] = np.inf  # nobody goes on from the longest draft; a mistake would show at once
        seconds[1] = rounds[np.minimum(np.arange(max_draft_length + 1), 1)]
        seconds[:, 1:] += decision_seconds
        return cls(seconds, float(rounds[0]), point.autoregressive_seconds, point.marginal_cost())


class DraftTable:
    """Rows of some traces one after another, prepared for drafts of limited length.

    Args:
        traces: at least one.
        max_draft_length: longest draft, in tokens.
        max_new_tokens: tokens of each text that are used, at most.

    Attributes:
        prompts: numbers of every trace's prompts.
        confidence: of every draft's tokens, flat: row * max_draft_length + place; `entropy`, `matched` and
            `drawn_probability` likewise.
        limit: tokens that can be drafted at each row: what the draft knows and what the text has room for.
        room: tokens that can be emitted behind each row, as far as a draft knows.
        left: tokens of the text from each row on.
        survival: chance that a draft is kept beyond each place, shape (rows, max_draft_length).
        first_rows: for each trace the row at which every prompt's text begins.
        temperatures: of every trace's sampling.

    Raises:
        TraceError: a trace has shorter drafts or texts than asked for.
    """

    def __init__(self, traces: Sequence[Trace], max_draft_length: int, max_new_tokens: int) -> None:
        self.max_draft_length = max_draft_length
        self.prompts = [np.arange(trace.prompts) for trace in traces]
        parts = [TraceColumns.of(trace, max_draft_length, max_new_tokens) for trace in traces]
        self.confidence = np.concatenate([part.confidence.ravel() for part in parts])
        self.entropy = np.concatenate([part.entropy.ravel() for part in parts])
        self.matched = np.concatenate([part.matched.ravel() for part in parts])
        self.drawn_probability = np.concatenate([part.drawn_probability.ravel() for part in parts])
        self.survival = np.concatenate([part.chance.cumprod(-1).astype(np.float32) for part in parts])
        self.limit = np.concatenate([part.limit for part in parts])
        self.room = np.concatenate([part.room for part in parts])
        self.left = np.concatenate([part.left for part in parts])
        offsets = np.cumsum([0, *(len(part.left) for part in parts)])
        self.first_rows = [offset + trace.starts[:-1] for offset, trace in zip(offsets, traces, strict=False)]
        self.temperatures = np.array([trace.info.sampling.temperature for trace in traces])


class DraftReplay:
    """Recorded texts drafted and verified in step. See `DraftBackend`.

    `begin` puts another text in a text's place. Until then, a text that is over waits: nothing is drafted, and nothing
    charged.

    Args:
        table: what was recorded.
        charges: of each operating point.
        batch_sizes: of each operating point.
        point_of: the operating point of every text, shape (texts,); each trace has as many, one trace after another.

    Attributes:
        prompts: numbers of every trace's prompts.
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
        self.prompts: Sequence[Integers] = table.prompts
        temperatures = table.temperatures[point_of * len(table.prompts) // len(charges)]
        self._tracker = DraftTracker(texts, cost_ratios[point_of], np.array(batch_sizes)[point_of], temperatures)
        self._row = np.zeros(texts, np.intp)
        self._place = np.zeros(texts, np.intp)  # tokens drafted so far
        self._limit = np.zeros(texts, np.intp)  # tokens that can be drafted; 0 for a text that is over
        self._kept = np.zeros(texts, np.intp)  # tokens of this draft that verification would keep
        self._useful = np.zeros(texts, np.intp)  # the same, less one that the target's token makes superfluous
        self._over = np.ones(texts, np.bool_)

    @property
    def features(self) -> NDArray[np.float32]:
        """Features of every text's draft, shape (texts, 8); changed in place."""
        return self._tracker.features

    @property
    def over(self) -> NDArray[np.bool_]:
        """Texts that have ended and wait, shape (texts,)."""
        return self._over

    @property
    def remaining_acceptable(self) -> NDArray[np.int64]:
        """Number of further tokens of each draft that would lengthen what is emitted, shape (texts,).

        Negative where tokens already drafted bring nothing: minus their number. 0 for a text that is over.
        """
        return self._useful - self._place

    def begin(self, which: Integers, workloads: Integers, prompts: Integers, rng: np.random.Generator) -> None:
        """Begin other texts, and draft their first tokens."""
        rows = np.empty(len(which), np.intp)
        for place, first_rows in enumerate(self._table.first_rows):
            members = workloads == place
            rows[members] = first_rows[prompts[members]]
        self._tracker.forget(which)
        self._over[which] = False
        self._start_round(which, rows, rng)
        self._draft(which[self._place[which] < self._limit[which]])

    def step(self, actions: Integers, rng: np.random.Generator) -> tuple[DraftSteps, Integers]:
        """Verify the drafts that shall stop (1) or cannot go on, and draft one more token of every text."""
        steps, ended = self._advance(actions == 1, rng)
        self._draft(np.flatnonzero(self._place < self._limit))
        return steps, ended

    def clear(self) -> None:
        """Let all texts be over, with nothing known of them."""
        self.leave(np.arange(len(self._over)))
        self._tracker.forget()

    def leave(self, which: Indices) -> None:
        """Let some texts be over."""
        self._over[which] = True
        for state in (self._place, self._limit, self._kept, self._useful):
            state[which] = 0

    def _advance(self, stop: NDArray[np.bool_], rng: np.random.Generator) -> tuple[DraftSteps, Integers]:
        """Verify; drafts that go on are charged for the token that is drafted next."""
        table, texts = self._table, len(stop)
        ends = stop | (self._place >= self._limit)
        at = ends * (table.max_draft_length + 1)
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
        self._tracker.verified(drafted, accepted, emitted, which)
        steps = DraftSteps(np.zeros(texts, np.int64), seconds, *(np.zeros(texts, np.int64) for _ in range(3)))
        steps.tokens[which] = emitted
        steps.drafted[which] = drafted
        steps.accepted[which] = accepted
        steps.rounds[which] = 1
        goes_on = emitted < left
        ended, fresh, row = which[~goes_on], which[goes_on], (row + emitted)[goes_on]
        fresh, row, ended_too = self._empty_rounds(fresh, row, steps)
        ended = np.concatenate([ended, *ended_too])
        self._start_round(fresh, row, rng)
        self.leave(ended)
        return steps, ended

    def _draft(self, which: Indices) -> None:
        """Draft one more token of texts that can."""
        place = self._place[which]
        cell = self._row[which] * self._table.max_draft_length + place
        table = self._table
        confidence, entropy, matched, drawn = (
            column.take(cell) for column in (table.confidence, table.entropy, table.matched, table.drawn_probability)
        )
        self._tracker.drafted(confidence, entropy, matched, drawn, which)
        self._place[which] = place + 1

    def _empty_rounds(self, fresh: Indices, row: Indices, steps: DraftSteps) -> tuple[Indices, Indices, list[Indices]]:
        """Do the rounds of texts at rows where nothing can be drafted, until something can or the text is over.

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
            self._tracker.verified(0, 0, 1, fresh)
            steps.tokens[fresh] += 1
            steps.rounds[fresh] += 1
            steps.seconds[fresh] += self._empty_round[fresh]
            goes_on = table.left[row] > 1
            ended.append(fresh[~goes_on])
            fresh, row = fresh[goes_on], row[goes_on] + 1

    def _start_round(self, which: Indices, row: Indices, rng: np.random.Generator) -> None:
        table = self._table
        # One draw decides how far the draft is kept: each token passes its own test with the chance that it has, so
        # the run of those that pass is at least so long with the product of their chances.
        kept = (table.survival[row] > rng.random(len(which))[:, None]).sum(-1)
        limit = table.limit[row]
        self._row[which] = row
        self._place[which] = 0
        self._limit[which] = limit
        self._kept[which] = kept
        self._useful[which] = np.minimum(kept, np.minimum(limit, table.left[row] - 1))


class TraceColumns(NamedTuple):
    """Columns of a trace for drafts of limited length.

    The first five have shape (rows, longest draft), the others (rows,).
    """

    confidence: NDArray[np.float32]
    entropy: NDArray[np.float32]
    matched: NDArray[np.float32]
    drawn_probability: NDArray[np.float32]
    chance: Floats
    """Probability of the token to pass its test, all before it having passed."""
    limit: Indices
    """Tokens that can be drafted: what the draft knows and what the text has room for."""
    room: Indices
    """Tokens that can be emitted behind the row's, as far as a draft knows: not that a text is about to end."""
    left: Indices
    """Tokens of the text from the row on."""

    @classmethod
    def of(cls, trace: Trace, max_draft_length: int, max_new_tokens: int) -> TraceColumns:
        """Return the columns of the target's own texts.

        Raises:
            TraceError: the trace has shorter drafts or texts.
        """
        name = f"the trace of {trace.info.workload} ({trace.info.split})"
        if max_draft_length > trace.draft_length:
            raise TraceError(
                f"{name} has drafts of {trace.draft_length} tokens, and max_draft_length is {max_draft_length}; give "
                f"at most {trace.draft_length}, or record it with --draft-length {max_draft_length}"
            )
        if max_new_tokens > trace.info.tokens:
            raise TraceError(
                f"{name} has texts of {trace.info.tokens} tokens, and max_new_tokens is {max_new_tokens}; give at most "
                f"{trace.info.tokens}, or record it with --tokens {max_new_tokens}"
            )
        rows = len(trace.text)
        lengths = np.diff(trace.starts)
        place = np.arange(rows) - np.repeat(trace.starts[:-1], lengths)
        used = np.minimum(lengths, max_new_tokens)
        # A draft does not know that an end-of-text token is near, only how many tokens were asked for.
        asked = np.where(trace.ended, max_new_tokens, used)
        room = np.maximum(np.repeat(asked, lengths) - place - 1, 0)
        limit = np.minimum(np.minimum(trace.drafted[:rows], max_draft_length), room)
        chance = _chances(trace, rows)[:, :max_draft_length]
        confidence, entropy, matched, drawn = (
            np.ascontiguousarray(column[:, :max_draft_length], np.float32)
            for column in (trace.confidence, trace.entropy, trace.matched, trace.q)
        )
        return cls(
            confidence,
            entropy,
            matched,
            drawn,
            chance,
            limit.astype(np.intp),
            room.astype(np.intp),
            (np.repeat(used, lengths) - place).astype(np.intp),
        )


def _chances(trace: Trace, rows: int) -> NDArray[np.float64]:
    """Return the probability of every draft token to pass its test, all before it having passed."""
    passes = exact_chances(trace.match[:rows], trace.p, trace.q, trace.info.sampling)
    return passes * (np.arange(trace.draft_length) < trace.drafted[:rows, None])
