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

import torch

from ..errors import ArgumentError, VocabularyMismatchError
from ..models.language_model import LanguageModel
from ..sampling import Sampling
from .drafter import Drafter, DraftSession, DraftStep, ModelDrafter, beside, draft_digest, is_free


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
