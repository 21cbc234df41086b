"""Drafting with several drafts of one text, of which a rule or a controller chooses who proposes the next token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..drafts.drafter import DraftStep
from ..drafts.mixed import MixedDraftSession
from .choice_features import ChoiceTracker

_TEXT = np.zeros(1, np.intp)


class DraftChoice:
    """The round under way of a text with several drafts, and what can be seen of them.

    A free draft is looked up once, where the round begins. It stays in play as long as all that was drafted is what it
    proposes itself, whoever drafted it; its next token is then known before it is asked. A model that drafted the last
    token goes on. One that takes over in the middle of a round reads all that was drafted, and is not looked at: its
    tokens count as drafted, how sure it is of them is not asked, and no free draft is in play behind them.

    These are the limits of what a recording of each draft alone can show of a token that will be rejected. With more to
    be seen here than there, a policy that learned from recordings would know less than it learned.

    Args:
        session: the drafts at work on the text.
        tracker: of this text alone.

    Attributes:
        tracker: as given.
        available: who can propose the next token, shape (drafts,).
    """

    def __init__(self, session: MixedDraftSession, tracker: ChoiceTracker) -> None:
        self._session = session
        self.tracker = tracker
        drafts = len(session.sessions)
        self.available: NDArray[np.bool_] = np.zeros(drafts, np.bool_)
        self._tokens = np.zeros(drafts, np.int64)
        self._confidence, self._matched = np.zeros((2, drafts), np.float32)
        self.under_way = False

    def begin(self, context: Sequence[int], count: int) -> None:
        """Begin a round of up to `count` drafted tokens after a context, and look at the drafts."""
        self.under_way = True
        self._context = list(context)
        self._left = count
        self._drafting: int | None = None
        self._looked_at = True  # whether how sure the draft is of its tokens may be asked
        self._chain: Iterator[DraftStep] = iter(())
        self._chains: dict[int, Iterator[DraftStep]] = {
            number: self._session.steps_by(number, self._context, count)
            for number, free in enumerate(self._session.free)
            if free
        }
        self._next: dict[int, DraftStep] = {}
        self._look()
        self._first = np.where(self.available & np.array(self._session.free), self._tokens, -1)

    def draft(self, number: int, with_entropy: bool = True) -> DraftStep | None:
        """Let a draft, by its number from 0, propose the next token; None if it cannot.

        Args:
            number: of the draft.
            with_entropy: whether entropy and drawn probability are computed, which costs most; else they are 0 and 1.
        """
        if not (0 <= number < len(self.available) and self.available[number]):
            return None
        if self._session.free[number]:
            step = self._next[number]
        else:
            if number != self._drafting:
                self._looked_at = not self.tracker.place[0]
                self._chain = self._session.steps_by(number, self._context, self._left)
            drafted = next(self._chain, None)
            if drafted is None:
                return None
            step = drafted
        self._drafting = number
        token = int(step.token)
        self._context.append(token)
        self._left -= 1
        self._chains = {
            free: chain
            for free, chain in self._chains.items()
            if self._looked_at and free in self._next and self._next[free].token == token
        }
        if self._looked_at:
            entropy, drawn = (step.entropy(), step.drawn_probability()) if with_entropy else (0.0, 1.0)
            self.tracker.drafted(np.array([number]), step.confidence(), entropy, step.matched, drawn, _TEXT)
        else:
            self.tracker.drafted(np.array([number]), 0.0, 0.0, 0, 0.0, _TEXT, looked_at=False)
        self._look()
        return step

    def verified(self, emitted: Sequence[int], accepted: int) -> None:
        """End the round.

        Args:
            emitted: tokens that it emitted.
            accepted: those among them that were drafted.
        """
        hits = (self._first == emitted[0])[None]
        self.tracker.verified(np.array([accepted]), np.array([len(emitted)]), hits, _TEXT)
        self.under_way = False
        self.available[:] = False
        self._show()

    def _look(self) -> None:
        self._next = {}
        for number, free in enumerate(self._session.free):
            if not free:
                self.available[number] = self._left > 0 and self._session.has_room(number, self._context)
                continue
            step = next(self._chains[number], None) if number in self._chains else None
            self.available[number] = step is not None
            if step is not None:
                self._next[number] = step
                self._tokens[number] = int(step.token)
                self._confidence[number], self._matched[number] = step.confidence(), step.matched
        self._show()

    def _show(self) -> None:
        self.tracker.look(self.available[None], self._confidence[None], self._matched[None], self._tokens[None])
