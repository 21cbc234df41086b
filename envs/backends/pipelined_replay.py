"""Replay of decoding in which the draft goes on while the target verifies, from traces of decoding in turns.

What a draft proposes at a position of the target's text depends on that text alone, and a token that is verified there
comes after accepted ones. So the first token of every recorded draft is all that is needed: when greedy the replay is
what live decoding does, round by round. When sampling, whether it passes is drawn anew every time, and the text goes on
at the recorded position. A rule that ends drafts also looks at tokens behind one that will be rejected: those are the
recorded draft that begins with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import DecoderTraits, DraftTracker, LatencyProfile, number

from ..recordings.trace import Trace
from ..workloads import Workload
from .backend import DraftSteps, Floats, Integers, ReplayBackend
from .chain_replay import DraftTable, Indices, TraceColumns


@dataclass(frozen=True)
class OverlappedCharges:
    """Seconds of rounds in which the draft goes on while the target verifies, at one operating point.

    Attributes:
        awaited: of a draft that the target waits for, by its tokens, shape (longest draft + 1,).
        rounds: of the pass and what is drafted meanwhile, shape (longest draft + 1, longest draft + 1), by the tokens
            drafted and by the drafted tokens that the target reads.
        autoregressive_seconds: of a token of plain decoding.
        cost_ratio: what one more drafted token costs on average (`LatencyProfile.marginal_cost`).
    """

    awaited: Floats
    rounds: Floats
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
    ) -> OverlappedCharges:
        """Compute the charges by a latency profile of rounds that overlap.

        A decision makes the drafting of its token longer, and so costs nothing where that is hidden by the pass.
        Arguments and errors as for `DraftCharges.of`.
        """
        deciding = number("decision_seconds", decision_seconds, at_least=0)
        point = profile.at(batch_size=batch_size, context=context)
        ratio = point.marginal_cost()
        if deciding:
            drafting = {tokens: seconds + tokens * deciding for tokens, seconds in point.draft_seconds.items()}
            point = replace(point, draft_seconds=drafting)
        sizes = range(max_draft_length + 1)
        awaited = np.array([point.draft(steps) if steps else 0.0 for steps in sizes])
        rounds = np.array([[point.round_of(steps, read + 1) for read in sizes] for steps in sizes])
        return cls(awaited, rounds, point.autoregressive_seconds, ratio)


class PipelinedReplay(ReplayBackend):
    """Traces replayed by the knobs of a pipelined decoder (`DecoderTraits.overlaps`). See `Backend`.

    A round that loses its bet before the target's pass is over takes as long as that pass; one that wins it, as long as
    the pass or the draft. Of a token under way when a bet is lost the draft is not charged the rest.

    Args: as for `TraceReplay`; the profiles are of rounds that overlap.
    """

    def __init__(
        self,
        decoder: type[DecoderTraits],
        traces: Sequence[Trace],
        workloads: Sequence[Workload],
        profiles: Sequence[LatencyProfile],
        max_new_tokens: int,
        options: Mapping[str, Any],
    ) -> None:
        knobs = decoder.knobs_without_pair(**options)
        self._rule = partial(decoder.trace_rule, options=decoder.checked_options(**options))
        first_prompts = np.cumsum([0, *(trace.prompts for trace in traces[:-1])])
        super().__init__(workloads, profiles, knobs, [np.arange(trace.prompts) for trace in traces], first_prompts)
        longest = int(max(knob.high for knob in knobs))
        self._chance = np.zeros((sum(trace.prompts for trace in traces), max_new_tokens))
        lengths = [np.minimum(np.diff(trace.starts), max_new_tokens) for trace in traces]
        self._length = np.concatenate(lengths).astype(np.int64)
        ended = np.concatenate([trace.ended for trace in traces])
        self._asked = np.where(ended, max_new_tokens, self._length)  # no draft knows that a text is about to end
        for trace, first, used in zip(traces, first_prompts, lengths, strict=True):
            chance = TraceColumns.of(trace, 1, max_new_tokens).chance[:, 0]
            for prompt, (start, length) in enumerate(zip(trace.starts[:-1], used, strict=True), first):
                self._chance[prompt, :length] = chance[start : start + length]
        charges = [OverlappedCharges.of(profile, longest) for profile in profiles]
        self._awaited = np.stack([point.awaited for point in charges])
        self._round_seconds = np.stack([point.rounds for point in charges])

    def sums(
        self, prompts: Integers, workloads: Integers, knobs: Mapping[str, Floats], rng: np.random.Generator
    ) -> dict[str, Floats]:
        """Return the sums of `Metrics` but `plain_seconds`, by name."""
        texts, rule = np.arange(len(prompts)), self._rule(knobs)
        window = np.broadcast_to(rule.draft_length, texts.shape).astype(np.int64)
        waits = np.broadcast_to(rule.pre_verify, texts.shape) == 0
        length, asked = self._length[prompts], self._asked[prompts]
        places = np.arange(self._chance.shape[1])
        # Each position is verified once at most, so one draw a position decides all bets.
        lost = np.where(rng.random((len(texts), len(places))) < self._chance[prompts], len(places), places)
        next_lost = np.minimum.accumulate(lost[:, ::-1], axis=1)[:, ::-1]
        sums = {name: np.zeros(len(texts)) for name in ("tokens", "rounds", "drafted", "accepted", "seconds")}
        sums["total_variation"] = np.zeros(len(texts))
        at, ready = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
        while len(texts):
            left = asked - at
            first = np.where(waits & (ready == 0), np.minimum(window, left - 1), 0)
            ready = ready + first
            read = np.minimum(ready, left - 1)
            ahead = np.where(ready == read, np.minimum(window, left - read), 0)
            passed = next_lost[np.arange(len(texts)), at] - at
            tested = (passed >= read) & ((ahead > 0) | (ready > read))
            won = tested & (passed > read)
            taken = np.minimum(np.minimum(passed, read) + 1, length - at)
            # Whoever ends the text waits for no more of the draft.
            drafted_ahead = np.where(won & (at + taken < length), ahead, np.minimum(ahead, tested))
            for name, values in {
                "tokens": taken,
                "rounds": 1,
                "drafted": read + tested,
                "accepted": np.minimum(np.minimum(passed, read) + won, taken),
                "seconds": self._awaited[workloads, first] + self._round_seconds[workloads, drafted_ahead, read],
            }.items():
                sums[name][texts] += values
            ready = np.where(won, ready - read + ahead - 1, 0)
            at = at + taken
            going = at < length
            if not going.all():
                texts, workloads, window, waits, length, asked, next_lost, at, ready = (
                    values[going] for values in (texts, workloads, window, waits, length, asked, next_lost, at, ready)
                )
        return sums


class PipelinedDrafts:
    """Recorded texts whose draft goes on while the target verifies, stopped token by token. See `DraftBackend`.

    Somebody decides after every drafted token that the target waits for: those of a bet that is won, the first of one
    that is lost by it, and those of a draft for which the target does nothing meanwhile. A bet that is lost before, or
    by the last token of the text, is over before a decision could matter. As of a live rule, each decision is about a
    draft of its own, which begins when the target does.

    Args:
        table: what was recorded.
        charges: of each operating point.
        batch_sizes: of each operating point.
        point_of: the operating point of every text, shape (texts,); each trace has as many, one trace after another.
        pre_verify: whether the target reads on at once after a rejection, or waits for a draft.

    Attributes:
        prompts: numbers of every trace's prompts.
    """

    def __init__(
        self,
        table: DraftTable,
        charges: Sequence[OverlappedCharges],
        batch_sizes: Sequence[int],
        point_of: Indices,
        pre_verify: bool,
    ) -> None:
        texts = len(point_of)
        self._table, self._point, self._pre_verify = table, point_of, pre_verify
        self._awaited = np.stack([point.awaited for point in charges])
        self._rounds = np.stack([point.rounds for point in charges])
        self.prompts: Sequence[Integers] = table.prompts
        cost_ratios = np.array([point.cost_ratio for point in charges])
        temperatures = table.temperatures[point_of * len(table.prompts) // len(charges)]
        self._tracker = DraftTracker(texts, cost_ratios[point_of], np.array(batch_sizes)[point_of], temperatures)
        self._next_lost = np.zeros((texts, int(table.left.max()) + 1), np.int16)  # by position: the next one rejected
        self._first = np.zeros(texts, np.intp)  # row of the text's first token
        self._length = np.zeros(texts, np.intp)  # tokens of the text
        self._asked = np.zeros(texts, np.intp)  # the same, as far as the draft knows
        self._at = np.zeros(texts, np.intp)  # tokens emitted
        self._ready = np.zeros(texts, np.intp)  # tokens drafted and not verified, before the draft under way
        self._place = np.zeros(texts, np.intp)  # tokens of that draft so far
        self._limit = np.zeros(texts, np.intp)  # tokens that it can have
        self._waits = np.zeros(texts, np.bool_)  # whether the target waits for it
        self._over = np.ones(texts, np.bool_)

    @property
    def features(self) -> NDArray[np.float32]:
        """Features of every text's draft, shape (texts, 11); changed in place."""
        return self._tracker.features

    @property
    def over(self) -> NDArray[np.bool_]:
        """Texts that have ended and wait, shape (texts,)."""
        return self._over

    @property
    def ready(self) -> Integers:
        """Tokens that were drafted before the draft under way and await their verification, shape (texts,)."""
        return self._ready

    @property
    def remaining_acceptable(self) -> NDArray[np.int64]:
        """Number of further tokens of each draft that would pass; negative where drafted ones will not."""
        everyone = np.arange(len(self._over))
        passing = self._lost(everyone) - self._begun(everyone)
        return np.where(self._place > 0, np.minimum(passing, self._limit) - self._place, 0)

    def begin(self, which: Integers, workloads: Integers, prompts: Integers, rng: np.random.Generator) -> None:
        """Begin other texts, and draft their first tokens."""
        table = self._table
        first = np.empty(len(which), np.intp)
        for place, first_rows in enumerate(table.first_rows):
            members = workloads == place
            first[members] = first_rows[prompts[members]]
        length = table.left[first]
        self._first[which], self._length[which], self._asked[which] = first, length, table.room[first] + 1
        # Each position is verified once at most, so one draw a position decides all bets.
        places = np.arange(self._next_lost.shape[1])
        chance = table.survival[np.minimum(first[:, None] + places, len(table.left) - 1), 0]
        lost = (rng.random(chance.shape) >= chance) | (places >= length[:, None])
        lost_at = np.where(lost, places, places[-1])
        self._next_lost[which] = np.minimum.accumulate(lost_at[:, ::-1], axis=1)[:, ::-1]
        for state in (self._at, self._ready, self._place):
            state[which] = 0
        self._over[which] = False
        self._tracker.forget(which)
        self._open(which)

    def step(self, actions: Integers, rng: np.random.Generator) -> tuple[DraftSteps, Integers]:
        """Verify the drafts that shall stop (1) or cannot go on, and draft one more token of every text."""
        texts, everyone = len(actions), np.arange(len(actions))
        steps = DraftSteps(np.zeros(texts, np.int64), np.zeros(texts), *(np.zeros(texts, np.int64) for _ in range(3)))
        matters = self._waits | (self._lost(everyone) > self._begun(everyone))
        goes_on = (actions == 0) & (self._place > 0) & (self._place < self._limit) & matters & ~self._over
        further = np.flatnonzero(goes_on)
        at, place, waits = self._point[further], self._place[further], self._waits[further]
        read = self._ready[further]
        meanwhile = self._rounds[at, place + 1, read] - self._rounds[at, place, read]
        steps.seconds[further] = np.where(waits, self._awaited[at, place + 1] - self._awaited[at, place], meanwhile)
        under_way = np.flatnonzero(~goes_on & ~self._over)
        going = under_way
        while len(going):
            self._close(going, steps)
            going = self._open(going[~self._over[going]])
        self._draft(further)
        return steps, under_way[self._over[under_way]]

    def clear(self) -> None:
        """Let all texts be over, with nothing known of them."""
        self.leave(np.arange(len(self._over)))
        self._tracker.forget()

    def leave(self, which: Indices) -> None:
        """Let some texts be over."""
        self._over[which], self._waits[which] = True, False
        for state in (self._place, self._limit, self._ready):
            state[which] = 0

    def _lost(self, which: Indices) -> Indices:
        """The next position whose token is rejected."""
        return self._next_lost[which, self._at[which]].astype(np.intp)

    def _begun(self, which: Indices) -> Indices:
        """The position of the first token of the draft under way."""
        return self._at[which] + self._ready[which]

    def _open(self, which: Indices) -> Indices:
        """Begin the drafts of rounds that somebody decides about.

        Returns:
            The texts whose next round needs no decision.
        """
        at, ready = self._at[which], self._ready[which]
        left = self._asked[which] - at
        waits = (ready == 0) & (left > 1) & (not self._pre_verify)
        read = np.minimum(ready, left - 1)
        passes = self._lost(which) - at >= read
        asked = waits | (passes & (ready == read) & (at + ready < self._length[which] - 1))
        opened = which[asked]
        self._waits[opened] = waits[asked]
        self._limit[opened] = np.minimum(self._table.max_draft_length, left - np.where(waits, 1, read))[asked]
        self._draft(opened)
        return which[~asked]

    def _close(self, which: Indices, steps: DraftSteps) -> None:
        """End drafts: what the target waited for is ready, and what was drafted meanwhile is bet on."""
        waits = self._waits[which]
        awaited, which = which[waits], which[~waits]
        steps.seconds[awaited] += self._awaited[self._point[awaited], 1]
        self._ready[awaited], self._place[awaited], self._waits[awaited] = self._place[awaited], 0, False
        self._tracker.begin_draft(awaited)
        at, ready, place, length = self._at[which], self._ready[which], self._place[which], self._length[which]
        read = np.minimum(ready, self._asked[which] - at - 1)
        passed = self._lost(which) - at
        tested, won = passed >= read, passed > read
        taken = np.minimum(np.minimum(passed, read) + 1, length - at)
        drafted, accepted = read + tested, np.minimum(np.minimum(passed, read) + won, taken)
        steps.tokens[which] += taken
        steps.drafted[which] += drafted
        steps.accepted[which] += accepted
        steps.rounds[which] += 1
        steps.seconds[which] += self._rounds[self._point[which], (tested & (ready == read)).astype(np.intp), read]
        self._tracker.verified(drafted, accepted, taken, which)
        self._at[which] += taken
        self._ready[which] = np.where(won, np.maximum(place - 1, 0), 0)
        self._place[which] = 0
        self.leave(which[at + taken >= length])

    def _draft(self, which: Indices) -> None:
        """Draft one more token of some texts."""
        table, place = self._table, self._place[which]
        at = self._begun(which) + place
        # Behind a token that is rejected the draft goes on by itself, and what it says there is of no text.
        known = np.minimum(at, np.minimum(self._lost(which), self._length[which] - 1))
        cell = (self._first[which] + known) * table.max_draft_length + at - known
        confidence, entropy, matched, drawn = (
            column.take(cell) for column in (table.confidence, table.entropy, table.matched, table.drawn_probability)
        )
        self._tracker.drafted(confidence, entropy, matched, drawn, which)
        self._place[which] = place + 1
