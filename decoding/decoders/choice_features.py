"""The features by which rules choose, token by token, which of several drafts goes on (`choice_rules`).

Live and recorded decoding keep them by the same code. What a draft would propose is looked at only where that costs
microseconds (tables, look-ups); of a model, only what it did before is known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError, whole_number
from .expected_gain import BINS, KeepChances, TextChances, bins_of
from .stop_rules import FEATURES, RECENT, DraftTracker, Feature, Rows, all_or

MOST_DRAFTS = 6
"""Drafts that a pair may have where a rule chooses among them."""

SLOT_FEATURES = (
    Feature(
        "available",
        0,
        1,
        "1 if the draft can propose a token here: a model has room; a free one proposed all that was drafted itself, "
        "and knows the next",
    ),
    Feature("free", 0, 1, "1 if its proposals may be looked at without being asked for"),
    Feature(
        "cost_ratio", 0, 4, "seconds that a token of it adds to a round if nothing is unread, over a plain token's"
    ),
    Feature("unread", 0, 12, "logarithm to base 2 of the tokens that a model reads to propose the next; 0 if one"),
    Feature("next_confidence", 0, 1, "of a free draft's next token; 0 for others"),
    Feature("next_matched", 0, 32, "tokens of context that a free draft found its next token by; 0 for others"),
    Feature("agreement", 0, 1, "share of the other available free drafts whose next token is the same"),
    Feature(
        "chance",
        0,
        1,
        "share of tokens like its next one that were right on earlier texts (`KeepChances`): of that confidence if it "
        "is free, of any if it is a model",
    ),
    Feature("recent_acceptance", 0, 1, "accepted over drafted of its tokens, averaged over its rounds; first 0.5"),
    Feature(
        "recent_hits",
        0,
        1,
        "share of rounds whose first token it had right, of all at whose start it knew one if it is free, else of "
        "those that it began; first 0.5",
    ),
    Feature("drafting", 0, 1, "1 if it proposed the last token of this draft"),
)
"""Columns of each draft. The averages give the newest round a weight of `RECENT`, older ones ever less."""

_OTHERWISE = {
    "cost_ratio": "seconds that one more token adds to the target's pass, over those of a plain token",
    "confidence": "of the last drafted token; 1 before the first, 0 of a model that took over within the draft",
    "product": "chance that all drafted so far is right: the product of `chance` of its tokens, by their confidence",
    "drawn_probability": "with which that token was drawn; 1 before the first, 0 of a model that took over",
}

CHOICE_FEATURES = (
    *(
        replace(feature, doc=_OTHERWISE[feature.name]) if feature.name in _OTHERWISE else feature
        for feature in FEATURES
    ),
    *(
        replace(feature, name=f"draft_{slot}_{feature.name}")
        for slot in range(1, MOST_DRAFTS + 1)
        for feature in SLOT_FEATURES
    ),
)
"""The columns, in order: `FEATURES`, whatever drafts proposed the tokens; then `SLOT_FEATURES` of each draft in turn.

Where a text has fewer than `MOST_DRAFTS` drafts, the columns of the others are 0.
"""

(_AVAILABLE, _FREE, _COST, _UNREAD, _NEXT, _MATCHED, _AGREEMENT, _CHANCE, _ACCEPTANCE, _HITS, _DRAFTING) = range(
    len(SLOT_FEATURES)
)
_CONFIDENCE, _PRODUCT = ([feature.name for feature in FEATURES].index(name) for name in ("confidence", "product"))
_HIGH = np.array([feature.high for feature in SLOT_FEATURES], np.float32)
LONGEST = int(next(feature.high for feature in FEATURES if feature.name == "place"))
"""Tokens of a draft, at most, where a rule chooses among several."""
_PLACES = np.arange(LONGEST)[:, None]
_NEWEST = np.float32(RECENT)
_CONFIDENCES = np.linspace(0, 1, 257)
_STEPS, _HALF = np.float32(len(_CONFIDENCES) - 1), np.float32(0.5)
_MIDDLES = (np.arange(BINS) + 0.5) / BINS
_BETWEEN = np.array([np.interp(_CONFIDENCES, _MIDDLES, row) for row in np.eye(BINS)])
"""Chances by the middles of the bins to chances by `_CONFIDENCES`, linear between, shape (`BINS`, confidences)."""
MOST_UNREAD = 1 << int(_HIGH[_UNREAD])
"""Tokens that a draft is shown to have to read, at most."""
_LOGARITHMS = np.log2(np.maximum(np.arange(MOST_UNREAD), 1)).astype(np.float32)
_NOBODY = -1 - np.arange(MOST_DRAFTS)
"""Stand for tokens that are not known: no two are the same, and none is a token."""

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


class ChoiceTracker:
    """The features of many texts side by side, each with several drafts.

    In every round: `look`, then `drafted` and `look` for every token that is drafted, then `verified`. Only `look`
    shows what the drafts would go on with and have to read. Everything is computed in float32, so that a text has the
    same features alone and among thousands.

    Args:
        environments: how many texts.
        free: whether each draft is, shape (drafts,) or (environments, drafts), `MOST_DRAFTS` at most.
        cost_ratio: see `SLOT_FEATURES`; of the same shape.
        target_cost_ratio: what one more token adds to the target's pass, over a plain token; a number, or one a text.
        temperature: of the sampling, at least 0; a number, or one a text.
        present: whether there is such a draft, of the same shape; by default all are there.
        chances: how often tokens of each draft were right on earlier texts, as in `KeepChances.exact`, shape
            (drafts, `BINS` + 1) or (environments, drafts, `BINS` + 1); by default those of drafts of which nothing was
            measured.
        learns: whether those of a draft are what every text begins with, and follow what becomes of its tokens, of the
            same shape as `free`; by default of none.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        environments: int,
        free: ArrayLike,
        cost_ratio: ArrayLike,
        target_cost_ratio: ArrayLike,
        temperature: ArrayLike = 0.0,
        present: ArrayLike = True,
        chances: ArrayLike | None = None,
        learns: ArrayLike = False,
    ) -> None:
        environments = whole_number("environments", environments)
        ratio = np.asarray(cost_ratio, np.float64)
        if not 1 <= ratio.shape[-1] <= MOST_DRAFTS:
            raise ArgumentError(f"a choice is among 1 to {MOST_DRAFTS} drafts, got {ratio.shape[-1]}")
        if not (np.isfinite(ratio) & (ratio >= 0)).all():
            raise ArgumentError(f"cost_ratio must be finite and at least 0, got {cost_ratio!r}")
        self._common = DraftTracker(
            environments, target_cost_ratio, temperature=temperature, columns=len(CHOICE_FEATURES)
        )
        self._drafts = ratio.shape[-1]
        shape = (environments, self._drafts)
        self._share_features()
        there = np.broadcast_to(np.asarray(present, np.bool_), shape)
        self._free: Flags = np.broadcast_to(np.asarray(free, np.bool_), shape) & there
        self._reads: Flags = there & ~self._free
        self._may_agree = bool((self._free.sum(1) > 1).any())
        self._nothing_known = there[:, :, None] * np.float32(0.5)
        self._slots[:, :, _FREE] = self._free
        self._slots[:, :, _COST] = np.minimum(ratio, _HIGH[_COST]) * there
        counted = np.asarray(KeepChances.assumed().exact if chances is None else chances, np.float64)
        known = _between(counted)
        self._chances = np.array(np.broadcast_to(known, (*shape, known.shape[-1]))).ravel()
        self._table = np.arange(0, self._chances.size, known.shape[-1]).reshape(shape)  # where each draft's begin
        learning = np.broadcast_to(np.asarray(learns, np.bool_), shape)
        prior = np.broadcast_to(counted, (*shape, BINS + 1))
        self._learned = TextChances(prior, learning) if learning.any() else None
        self._bins = np.zeros((environments, LONGEST), np.intp)  # of the tokens of this draft
        self._first_bins = np.zeros(shape, np.intp)  # of what free drafts knew where the round began
        self._numbers = np.arange(self._drafts)
        self._place = np.zeros(environments, np.intp)
        self._unread: Integers = np.ones(shape, np.int64)
        self._knew: Flags = np.zeros(shape, np.bool_)
        self._who = np.zeros((environments, LONGEST), np.intp)
        self.forget()

    @property
    def features(self) -> NDArray[np.float32]:
        """Shape (environments, features), columns as in `CHOICE_FEATURES`. Updated in place: copy what you keep."""
        return self._common.features

    @property
    def place(self) -> NDArray[np.intp]:
        """Tokens drafted so far in this round, shape (environments,); changed in place."""
        return self._place

    @property
    def unread(self) -> Integers:
        """Tokens that each draft reads to propose the next, at least 1, shape (environments, drafts); changed in place.

        Those of the prompt but its last were read before the text began. It says nothing of a free draft.
        """
        return self._unread

    def __getstate__(self) -> dict[str, Any]:
        """Leave the view of the features out of pickles and copies, which would make an array of its own of it."""
        return {name: value for name, value in vars(self).items() if name != "_slots"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Look at the copied features."""
        vars(self).update(state)
        self._share_features()

    def _share_features(self) -> None:
        columns = self._common.features[:, len(FEATURES) :]
        self._slots = columns.reshape(len(columns), MOST_DRAFTS, len(SLOT_FEATURES))[:, : self._drafts]

    def forget(self, rows: Rows = None) -> None:
        """Begin a text: nothing was drafted or verified yet."""
        where = all_or(rows)
        self._common.forget(rows)
        self._slots[where, :, _ACCEPTANCE : _HITS + 1] = self._nothing_known[where]
        self._begin_round(where)
        self._unread[where] = 1
        self._slots[where, :, _UNREAD] = 0.0
        self._slots[where, :, _AVAILABLE] = 0.0
        self._slots[where, :, _NEXT : _CHANCE + 1] = 0.0
        if self._learned is not None:
            self._learned.forget(where)
            self._show_chances(where)

    def look(
        self,
        available: Flags,
        confidence: NDArray[np.float32],
        matched: NDArray[np.float32],
        tokens: NDArray[np.integer[Any]],
        rows: Rows = None,
    ) -> None:
        """Look at who could propose the next token, and at what the free drafts would propose.

        Args:
            available: who could, shape (rows, drafts).
            confidence: of the free drafts' next tokens, shape (rows, drafts). This and what follows is ignored where a
                draft is not free, or not available.
            matched: see `OneHotStep`, shape (rows, drafts).
            tokens: shape (rows, drafts).
            rows: the texts concerned.
        """
        where = all_or(rows)
        known = available & self._free[where]
        seen = np.zeros((len(known), self._drafts, 4), np.float32)
        seen[:, :, 0] = confidence
        seen[:, :, 1] = np.minimum(matched, _HIGH[_MATCHED])
        if self._may_agree:
            compared = np.where(known, tokens, _NOBODY[: self._drafts]).T
            same = np.add.reduce(compared[:, None] == compared, 0, np.int8) - 1
            others = np.maximum(np.add.reduce(known, 1, np.int8)[:, None] - known, 1)
            seen[:, :, 2] = same.T / others.astype(np.float32)
        seen[:, :, :3] *= known[:, :, None]
        seen[:, :, 3] = self._chance(seen[:, :, 0], self._table[where], known) * available
        self._slots[where, :, _NEXT : _CHANCE + 1] = seen
        self._slots[where, :, _AVAILABLE] = available
        self._slots[where, :, _UNREAD] = _LOGARITHMS.take(self._unread[where], mode="clip") * self._reads[where]
        begins = (self._place[where] == 0)[:, None]
        if begins.any():
            self._knew[where] = np.where(begins, known, self._knew[where])
            if self._learned is not None:
                self._first_bins[where] = np.where(begins, bins_of(confidence), self._first_bins[where])

    def drafted(
        self,
        draft: NDArray[np.intp],
        confidence: ArrayLike,
        entropy: ArrayLike,
        matched: ArrayLike,
        drawn_probability: ArrayLike,
        rows: NDArray[np.intp],
        looked_at: ArrayLike = True,
    ) -> None:
        """One more token was drafted.

        Args:
            draft: number of the draft that proposed it, from 0, shape (rows,).
            confidence: and what follows: as for `DraftTracker.drafted`.
            rows: the texts that it concerns, each once.
            looked_at: whether it may be seen how sure the draft was, shape (rows,) or a number; not of a model that
                took over within the draft, whose numbers are shown as 0.
        """
        where = self._where(rows)
        product = self.features[where, _PRODUCT].copy()  # a view, of a text alone
        if looked_at is not True:
            columns = (confidence, entropy, matched, drawn_probability)
            confidence, entropy, matched, drawn_probability = (np.multiply(column, looked_at) for column in columns)
        self._common.drafted(confidence, entropy, matched, drawn_probability, where)
        chance = self._chance(self.features[where, _CONFIDENCE], self._table[rows, draft], looked_at)
        self.features[where, _PRODUCT] = product * chance
        if self._learned is not None:
            bins = bins_of(np.asarray(confidence))
            self._bins[rows, self._place[where]] = bins if looked_at is True else np.where(looked_at, bins, BINS)
        self._who[rows, self._place[where]] = draft
        self._place[where] += 1
        by = draft[:, None] == self._numbers
        self._unread[where] = np.where(by, 1, self._unread[where] + 1)
        self._slots[where, :, _DRAFTING] = by

    def verified(self, accepted: Integers, emitted: Integers, hits: Flags, rows: NDArray[np.intp]) -> None:
        """Rounds are over, and others begin.

        Args:
            accepted: tokens that were drafted and kept, shape (rows,).
            emitted: tokens that the round emitted, shape (rows,).
            hits: whether the first token that each free draft knew at the start of the round is the first that was
                emitted, shape (rows, drafts); ignored where a draft is not free or knew none.
            rows: the texts concerned, each once.
        """
        where, slots = self._where(rows), self._slots
        place = self._place[where]
        self._common.verified(place, accepted, emitted, where)
        longest = int(place.max(initial=0))
        if longest:
            places = _PLACES[:longest]
            by = self._who[where, :longest].T[:, None] == self._numbers[:, None]  # (places, drafts, rows)
            by &= (places < place)[:, None]
            tried = np.add.reduce(by, 0, np.float32).T
            kept = np.add.reduce(by & (places < accepted)[:, None], 0, np.float32).T
            share = kept / np.maximum(tried, np.float32(1))
            before = slots[where, :, _ACCEPTANCE]
            slots[where, :, _ACCEPTANCE] = before + _NEWEST * (tried > 0) * (share - before)
            began = by[0].T & self._reads[where]
        else:
            began = np.zeros((len(rows), self._drafts), np.bool_)
        right = np.where(began, (accepted > 0)[:, None], hits)
        before = slots[where, :, _HITS]
        judged = began | self._knew[where]
        slots[where, :, _HITS] = before + _NEWEST * judged * (right - before)
        if self._learned is not None:
            self._learn(self._learned, rows, accepted, began, judged, right)
        # Of what a draft has read, what was kept stays read; the rest and the target's own token are to be read.
        missed = np.maximum(self._unread[where] - place[:, None], -accepted[:, None])
        self._unread[where] = np.maximum(missed + emitted[:, None], 1)  # at the end of a text nothing may be left
        self._begin_round(where)

    def _learn(
        self,
        learned: TextChances,
        rows: NDArray[np.intp],
        accepted: Integers,
        began: Flags,
        judged: Flags,
        right: Flags,
    ) -> None:
        """Count what became of tokens: first ones as far as they were known, later ones if all before were right."""
        first, by = judged.nonzero()
        bins = np.where(began[first, by], self._bins[rows[first], 0], self._first_bins[rows[first], by])
        last = np.minimum(accepted + 1, self._place[rows])
        text, place = ((_PLACES[:, 0] >= 1) & (_PLACES[:, 0] < last[:, None])).nonzero()
        learned.count(
            np.concatenate([rows[first], rows[text]]),
            np.concatenate([by, self._who[rows[text], place]]),
            np.concatenate([bins, self._bins[rows[text], place]]),
            np.concatenate([right[first, by], place < accepted[text]]),
        )
        self._show_chances(rows)

    def _show_chances(self, where: Any) -> None:
        assert self._learned is not None
        self._chances.reshape(*self._table.shape, -1)[where] = _between(self._learned.of(where))

    def _chance(self, confidence: NDArray[np.float32], table: NDArray[np.intp], seen: Any) -> NDArray[np.float32]:
        """Chances of tokens by their confidence, or by none where it is not seen."""
        steps = (confidence * _STEPS + _HALF).astype(np.intp)
        return self._chances.take(table + (steps if seen is True else np.where(seen, steps, len(_CONFIDENCES))))

    def _where(self, rows: NDArray[np.intp]) -> Any:
        """Return what indexes these rows; a slice for a text alone, which takes half the time."""
        return slice(None) if len(rows) == len(self._place) == 1 else rows

    def _begin_round(self, where: NDArray[np.intp] | Flags | slice) -> None:
        self._place[where] = 0
        self._knew[where] = False
        self._slots[where, :, _DRAFTING] = 0.0


def _between(chances: NDArray[np.float64]) -> NDArray[np.float32]:
    """Chances by `_CONFIDENCES` and last of any, of those by bins and last of any; the last axis changes."""
    return np.concatenate([chances[..., :-1] @ _BETWEEN, chances[..., -1:]], -1).astype(np.float32)
