"""Several drafts of one target, of which any may propose the next token.

Each is started once a text. One that is not asked costs nothing; a model that is asked again reads what it missed in
the same pass as its next token. A token of one draft may follow those of another: whatever is drafted is verified, row
by row against what it was drawn from, and so the text stays the target's whoever chooses, as long as the choice does
not drop a token that was drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from copy import copy

import numpy as np
import torch
from numpy.typing import NDArray

from ..decoders.choice_features import LONGEST, ChoiceTracker
from ..errors import ArgumentError, VocabularyMismatchError
from ..models.language_model import LanguageModel
from ..sampling import Sampling
from .drafter import Drafter, DraftSession, DraftStep, ModelDrafter, beside, draft_digest, is_free

_TEXT = np.zeros(1, np.intp)


class MixedDraft:
    """Several drafts of one target.

    Left to itself it drafts by the fixed rule of engines that combine a look-up with a model: of the drafts that are
    free the one whose next token was decided by the longest context proposes, and where none knows a token, the first
    that is not free.

    Args:
        drafts: two or more, in the order of preference, all of one vocabulary.

    Raises:
        ArgumentError: there are fewer than two, or one of them is mixed itself.
        VocabularyMismatchError: their vocabularies differ.
    """

    def __init__(self, drafts: Sequence[Drafter]) -> None:
        self.drafts = tuple(drafts)
        if len(self.drafts) < 2 or any(isinstance(draft, MixedDraft) for draft in self.drafts):
            raise ArgumentError(f"a mixed draft takes two or more drafts that are not mixed, got {len(self.drafts)}")
        self.vocabulary_size = self.drafts[0].vocabulary_size
        if other := next((draft for draft in self.drafts if draft.vocabulary_size != self.vocabulary_size), None):
            raise VocabularyMismatchError(
                f"draft {self.drafts[0].name} has a vocabulary of {self.vocabulary_size} tokens and draft {other.name} "
                f"one of {other.vocabulary_size}; give drafts that speak of one target's tokens: Pair(target, [...])"
            )
        self.name = ",".join(draft.name for draft in self.drafts)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(int(getattr(draft, "nbytes", 0)) for draft in self.drafts)

    def digest(self) -> str:
        """Return a SHA-256 over all drafts in order, 64 hex digits."""
        return hashlib.sha256(" ".join(map(draft_digest, self.drafts)).encode()).hexdigest()

    def beside(self, target: LanguageModel) -> MixedDraft:
        """Return the drafts for a text that a target reads."""
        near = copy(self)
        near.drafts = tuple(beside(draft, target) for draft in self.drafts)
        return near

    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> MixedDraftSession:
        """Begin a text with every draft."""
        sessions = [draft.start(prompt, sampling, generator, device) for draft in self.drafts]
        return MixedDraftSession(sessions, [is_free(draft) for draft in self.drafts])


class MixedDraftSession:
    """Several drafts at work on one text.

    Attributes:
        sessions: of each draft, in order.
        free: whether each draft's proposals may be looked at without being asked for.
    """

    def __init__(self, sessions: Sequence[DraftSession], free: Sequence[bool]) -> None:
        self.sessions = tuple(sessions)
        self.free = tuple(free)

    def steps_by(self, place: int, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        """Begin a draft of up to `count` tokens by one of the drafts.

        Args:
            place: number of the draft.
            context: prompt, emitted tokens, and those that other drafts have proposed since.
            count: tokens at most.
        """
        return self.sessions[place].steps(context, count)

    def has_room(self, place: int, context: Sequence[int]) -> bool:
        """Return whether a draft could read a context, if it is a model with a limit; True of any other."""
        room = getattr(self.sessions[place], "room", None)
        return room is None or room(context) > 0

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        """Begin a draft by the fixed rule of `MixedDraft`."""
        drafts = [session.steps(context, count) for free, session in zip(self.free, self.sessions, strict=True) if free]
        known = [(step, steps) for steps in drafts if (step := next(steps, None)) is not None]
        if known:
            first, rest = max(known, key=lambda draft: draft[0].matched)
            yield first
            yield from rest
            return
        for free, session in zip(self.free, self.sessions, strict=True):
            if not free:
                yield from session.steps(context, count)
                return

    def truncate(self, length: int) -> None:
        """Let every draft forget what was read or drafted from a position on."""
        for session in self.sessions:
            session.truncate(length)


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
        """Begin a round of up to `count` drafted tokens after a context, `LONGEST` at most, and look at the drafts."""
        self.under_way = True
        self._context = list(context)
        self._left = count = min(count, LONGEST)
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


def drafts_of(draft: Drafter | None) -> tuple[Drafter, ...]:
    """Return the drafts of a mixed one, in order; any other alone; none for None."""
    if draft is None:
        return ()
    return draft.drafts if isinstance(draft, MixedDraft) else (draft,)


def draft_models(draft: Drafter | None) -> list[LanguageModel]:
    """Return the models that draft, in order; none where no draft is a model."""
    return [part.model for part in drafts_of(draft) if isinstance(part, ModelDrafter)]


def with_models(draft: Drafter, change: Callable[[LanguageModel], LanguageModel]) -> Drafter:
    """Return a copy of a draft with its models changed; one without a model as it is."""
    if not draft_models(draft):
        return draft
    changed = copy(draft)
    if isinstance(changed, MixedDraft):
        changed.drafts = tuple(with_models(part, change) for part in changed.drafts)
    elif isinstance(changed, ModelDrafter):
        changed.model = change(changed.model)
        changed.vocabulary_size = changed.model.vocabulary_size
    return changed
