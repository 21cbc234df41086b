"""Texts of many recordings decoded side by side, each with several drafts of which a token each is asked for.

Who proposes what was recorded for each draft alone, at every position of the target's texts. What a free draft proposes
in a round is its chain from the round's start, of which it stays in play as long as all that was drafted is in it. As
long as all that was drafted is right, the position where a model takes over is one of the text, and its recorded chain
begins there. After a wrong token it is in no recording: tokens, acceptance and seconds stay exact, since nothing
drafted then is kept, and of what the model drafts nothing is seen, right or wrong, as in live decoding
(`specgym.decoding.drafts.mixed.DraftChoice`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import BINS, MOST_DRAFTS, ChoiceCharges, ChoiceTracker, number

from ..recordings.mixed_trace import MixedTrace
from .backend import DraftBackend, DraftSteps, Integers
from .chain_replay import Indices, TraceColumns

Flags = NDArray[np.bool_]

MISSING = 0.3
"""Chance of each draft to be missing in a text that does without some."""


class ChoiceTable:
    """Rows of some recordings one after another, with the columns of every draft, for drafts of limited length.

    Args:
        traces: at least one.
        max_draft_length: longest draft, in tokens.
        max_new_tokens: tokens of each text that are used, at most.

    Attributes:
        prompts: numbers of every trace's prompts.
        longest: tokens that a draft may have in each trace, as many as it holds if those are fewer.
        drafts: D, the most drafts that a trace has; of those that another lacks nothing is ever drafted.
        rows: of all traces together.
        chance: of every token to be right, flat: (draft * rows + row) * max_draft_length + depth; `confidence`,
            `entropy`, `matched`, `drawn_probability` and `tokens` likewise.
        certain: number of tokens from each on that are right whatever is drawn, flat likewise.
        limit: tokens that each draft's chain has at each row, flat: draft * rows + row.
        left: tokens of the text from each row on.
        first_rows: for each trace the row at which every prompt's text begins.
        temperatures: of every trace's sampling.

    Raises:
        TraceError: all traces have shorter drafts or texts than asked for.
    """

    def __init__(self, traces: Sequence[MixedTrace], max_draft_length: int, max_new_tokens: int) -> None:
        self.max_draft_length = max_draft_length
        self.prompts = [np.arange(trace.traces[0].prompts) for trace in traces]
        self.drafts = max(len(trace.drafts) for trace in traces)
        # Recordings may be of other lengths; one of them has what is asked for, or the error says what there is.
        longest = max(trace.draft_length for trace in traces)
        most = max(trace.info.tokens for trace in traces)
        self.longest = np.array([min(max_draft_length, trace.draft_length) for trace in traces])
        parts = [
            [
                TraceColumns.of(
                    draft,
                    min(max_draft_length, trace.draft_length) if max_draft_length <= longest else max_draft_length,
                    min(max_new_tokens, trace.info.tokens) if max_new_tokens <= most else max_new_tokens,
                )
                for draft in trace.traces
            ]
            for trace in traces
        ]
        lengths = [len(columns[0].left) for columns in parts]
        offsets = np.cumsum([0, *lengths])
        self.rows = int(offsets[-1])
        shape = self.drafts, self.rows, max_draft_length
        chance, *columns = (np.zeros(shape, np.float32) for _ in range(5))
        tokens, limit = np.zeros(shape, np.int32), np.zeros(shape[:2], np.intp)
        for first, length, trace, drafts in zip(offsets, lengths, traces, parts, strict=False):
            for place, draft in enumerate(drafts):
                rows, width = slice(first, first + length), draft.chance.shape[1]
                limit[place, rows] = draft.limit
                chance[place, rows, :width] = draft.chance
                for column, values in zip(columns, draft[:4], strict=True):
                    column[place, rows, :width] = values
                tokens[place, rows, :width] = trace.traces[place].tokens[:, :width]
        certain = np.zeros((*shape[:2], max_draft_length + 1), np.intp)
        for depth in range(max_draft_length - 1, -1, -1):
            certain[..., depth] = (chance[..., depth] >= 1) * (certain[..., depth + 1] + 1)
        self.certain = certain[..., :-1].ravel()
        self.chance, self.tokens, self.limit = chance.ravel(), tokens.ravel(), limit.ravel()
        self.confidence, self.entropy, self.matched, self.drawn_probability = (column.ravel() for column in columns)
        self.left = np.concatenate([drafts[0].left for drafts in parts])
        self.first_rows = [first + trace.traces[0].starts[:-1] for first, trace in zip(offsets, traces, strict=False)]
        self.temperatures = np.array([trace.info.sampling.temperature for trace in traces])


class ChoiceBackend(DraftBackend, Protocol):
    """Texts drafted side by side, each with several drafts, for environments that choose between them."""

    @property
    def available(self) -> Flags:
        """Drafts that can propose the next token of each text, shape (n, `MOST_DRAFTS`)."""
        ...


class ChoiceReplay:
    """Recorded texts with several drafts, drafted and verified in step. See `DraftBackend`.

    `begin` puts another text in a text's place. Until then, a text that is over waits: nothing is drafted, and nothing
    charged.

    Args:
        table: what was recorded.
        charges: of each of its traces.
        trace_of: the trace of every text, shape (texts,).
        missing_drafts: share of texts that do without some of the drafts, 0 to 1: each of theirs is missing with a
            chance of `MISSING`. Whoever learns on such texts leans less on what the recordings happen to hold.

    Raises:
        ValueError: `missing_drafts` is out of range.

    Attributes:
        prompts: numbers of every trace's prompts.
    """

    def __init__(
        self, table: ChoiceTable, charges: Sequence[ChoiceCharges], trace_of: Indices, missing_drafts: float = 0.0
    ) -> None:
        self._missing = number("missing_drafts", missing_drafts, at_least=0, at_most=1)
        texts, drafts = len(trace_of), table.drafts
        self.prompts: Sequence[Integers] = table.prompts
        self._table = table
        self._drafting = np.zeros((len(charges), drafts, charges[0].drafting.shape[1]))
        free, present = np.zeros((2, len(charges), drafts), np.bool_)
        ratios = np.zeros((len(charges), drafts))
        chances = np.zeros((len(charges), drafts, BINS + 1))
        for place, of_trace in enumerate(charges):
            known = len(of_trace.drafting)
            self._drafting[place, :known] = of_trace.drafting
            free[place, :known] = [draft.free for draft in of_trace.profile.drafts]
            present[place, :known] = True
            ratios[place, :known] = of_trace.profile.cost_ratios
            chances[place, :known] = of_trace.profile.chances
        self._verifying = np.array([of_trace.verifying for of_trace in charges])
        self._decision = np.array([of_trace.decision_seconds for of_trace in charges])[trace_of]
        self._trace_of = trace_of
        self._present = present[trace_of]
        self._sampled = table.temperatures[trace_of] > 0
        self._tracker = ChoiceTracker(
            texts,
            free[trace_of],
            ratios[trace_of],
            np.array([of_trace.profile.target_cost_ratio for of_trace in charges])[trace_of],
            table.temperatures[trace_of],
            self._present,
            chances[trace_of],
        )
        self._row = np.zeros(texts, np.intp)  # where the round began
        self._right = np.zeros(texts, np.intp)  # tokens of this draft that verification would keep
        self._who = np.full(texts, -1, np.intp)  # draft that proposed the last token
        self._since = np.zeros(texts, np.intp)  # place in the draft where the chain began that it follows
        self._looked_at = np.ones(texts, np.bool_)  # whether it may be seen how sure it was
        self._free = free[trace_of]
        self._in_play = self._free.copy()  # free drafts that propose all that was drafted
        self._luck = np.ones((texts, table.max_draft_length))  # a token is right if this is less than its chance
        self._over = np.ones(texts, np.bool_)
        self._at_hand = np.ones((texts, drafts), np.bool_)  # drafts that are not missing
        self._available = np.zeros((texts, drafts), np.bool_)
        self._remaining = np.zeros((texts, drafts), np.int64)
        self._blocks = np.arange(drafts) * table.rows
        self._places = np.arange(table.max_draft_length)

    @property
    def features(self) -> NDArray[np.float32]:
        """Features of every text (`specgym.decoding.CHOICE_FEATURES`), shape (texts, features); changed in place."""
        return self._tracker.features

    @property
    def over(self) -> Flags:
        """Texts that have ended and wait, shape (texts,)."""
        return self._over

    @property
    def available(self) -> Flags:
        """Drafts that can propose the next token of each text, shape (texts, `MOST_DRAFTS`)."""
        result = np.zeros((len(self._over), MOST_DRAFTS), np.bool_)
        result[:, : self._table.drafts] = self._available
        return result

    @property
    def remaining_acceptable(self) -> Integers:
        """Number of further tokens of each draft alone that would lengthen what is emitted, shape (texts, MOST_DRAFTS).

        Negative where tokens already drafted bring nothing: minus their number. 0 for a text that is over and for a
        draft that cannot go on.
        """
        result = np.zeros((len(self._over), MOST_DRAFTS), np.int64)
        result[:, : self._table.drafts] = self._remaining
        return result

    def begin(self, which: Integers, workloads: Integers, prompts: Integers, rng: np.random.Generator) -> None:
        """Begin other texts."""
        rows = np.empty(len(which), np.intp)
        for place, first_rows in enumerate(self._table.first_rows):
            members = workloads == place
            rows[members] = first_rows[prompts[members]]
        self._tracker.forget(which)
        if self._missing:
            without = rng.random((len(which), 1)) < self._missing
            self._at_hand[which] = ~(without & (rng.random((len(which), self._table.drafts)) < MISSING))
        self._over[which] = False
        self._start_round(which, rows, rng)
        self._look(which)

    def step(self, actions: Integers, rng: np.random.Generator) -> tuple[DraftSteps, Integers]:
        """Draft a token of every text with the draft that its action names (from 1), or verify."""
        texts = len(actions)
        steps = DraftSteps(np.zeros(texts, np.int64), np.zeros(texts), *(np.zeros(texts, np.int64) for _ in range(3)))
        steps.seconds[:] = self._decision * self._available.any(1)
        chosen = np.minimum(actions - 1, self._table.drafts - 1)
        goes_on = (actions > 0) & (actions <= self._table.drafts) & self._available[np.arange(texts), chosen]
        drafts = np.flatnonzero(goes_on)
        if len(drafts):
            self._draft(drafts, chosen[drafts], steps)
        ended = self._verify(np.flatnonzero(~goes_on & ~self._over), steps, rng)
        self._look()
        return steps, ended

    def clear(self) -> None:
        """Let all texts be over, with nothing known of them."""
        self.leave(np.arange(len(self._over)))
        self._tracker.forget()

    def leave(self, which: Indices) -> None:
        """Let some texts be over."""
        self._over[which] = True
        self._available[which] = False
        self._remaining[which] = 0

    def _draft(self, which: Indices, draft: Indices, steps: DraftSteps) -> None:
        table, place = self._table, self._tracker.place[which]
        unread = self._tracker.unread[which, draft]
        steps.seconds[which] += self._drafting[self._trace_of[which], draft, unread]
        follows = self._who[which] == draft
        row, free = self._row[which], self._free[which, draft]
        behind = np.minimum(self._right[which], table.left[row] - 1)
        since = np.where(follows, self._since[which], np.where(free, 0, behind))
        cell = (draft * table.rows + row + since) * table.max_draft_length + place - since
        right = self._right[which]
        lucky = (right == place) & (self._luck[which, place] < table.chance.take(cell)) & (place < table.left[row])
        self._right[which] = right + lucky
        self._who[which], self._since[which] = draft, since
        looked_at = self._looked_at[which] & (follows | free | (place == 0))
        self._looked_at[which] = looked_at
        chains = (self._blocks + row[:, None]) * table.max_draft_length + place[:, None]
        same = table.tokens.take(chains) == table.tokens.take(cell)[:, None]
        self._in_play[which] &= self._available[which] & same & looked_at[:, None]
        confidence, entropy, matched, drawn = (
            column.take(cell) for column in (table.confidence, table.entropy, table.matched, table.drawn_probability)
        )
        self._tracker.drafted(draft, confidence, entropy, matched, drawn, which, looked_at)

    def _verify(self, which: Indices, steps: DraftSteps, rng: np.random.Generator) -> Integers:
        """End the rounds of some texts, and begin the next ones; return the texts that are over."""
        table = self._table
        row, drafted = self._row[which], self._tracker.place[which].copy()
        left = table.left[row]
        emitted = np.minimum(self._right[which] + 1, left)
        accepted = np.minimum(self._right[which], emitted)
        first = (self._blocks + row[:, None]) * table.max_draft_length
        hits = self._luck[which, 0, None] < table.chance.take(first)
        self._tracker.verified(accepted, emitted, hits, which)
        steps.tokens[which], steps.drafted[which], steps.accepted[which] = emitted, drafted, accepted
        steps.rounds[which] = 1
        steps.seconds[which] += self._verifying[self._trace_of[which], drafted]
        goes_on = emitted < left
        self._start_round(which[goes_on], (row + emitted)[goes_on], rng)
        self.leave(which[~goes_on])
        return which[~goes_on]

    def _start_round(self, which: Indices, row: Indices, rng: np.random.Generator) -> None:
        self._row[which] = row
        self._right[which] = 0
        self._who[which] = -1
        self._since[which] = 0
        self._looked_at[which] = True
        self._in_play[which] = self._free[which]
        self._luck[which] = rng.random((len(which), self._table.max_draft_length))

    def _look(self, which: Indices | None = None) -> None:
        """Show in some texts, by default in all, what their drafts would go on with."""
        table, rows = self._table, slice(None) if which is None else which
        place, right, since = self._tracker.place[rows, None], self._right[rows, None], self._since[rows, None]
        row = self._row[rows, None]
        last = table.left[row] - 1
        # The draft that proposed the last token follows its chain, and a free one that of the round; the chains of
        # models that take over begin behind what is right.
        follows = self._who[rows, None] == np.arange(table.drafts)
        since = np.where(self._free[rows], 0, np.where(follows, since, np.minimum(right, last)))
        chains = self._blocks + row + since
        available = (place - since < table.limit.take(chains)) & (self._in_play[rows] | ~self._free[rows])
        longest = table.longest[self._trace_of[rows], None]
        available &= (place < longest) & ~self._over[rows, None] & self._at_hand[rows]
        self._available[rows] = available
        cell = chains * table.max_draft_length - since  # of the chain's tokens, less the place in the draft
        looked_at = np.where(available, cell + place, 0)
        confidence, matched = table.confidence.take(looked_at), table.matched.take(looked_at)
        self._tracker.look(available, confidence, matched, table.tokens.take(looked_at), which)
        kept = place + available * table.certain.take(looked_at)
        drawn = np.flatnonzero((right == place)[:, 0] & self._sampled[rows])
        if len(drawn):
            luck = self._luck[rows][drawn, None]
            passes = luck < table.chance.take(cell[drawn, :, None] + self._places, mode="clip")
            passes &= available[drawn, :, None]
            passes |= (self._places < place[drawn])[:, None]
            first = passes.argmin(2)
            kept[drawn] = np.where(passes[:, :, 0] & (first == 0), table.max_draft_length, first)
        remaining = np.where(right < place, right, np.minimum(kept, np.minimum(last, longest))) - place
        remaining[self._over[rows]] = 0
        remaining *= self._present[rows]
        self._remaining[rows] = remaining
