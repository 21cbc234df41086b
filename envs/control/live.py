"""Live backends of control: texts of one or several pairs, decoded step by step in one batch with joined passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import (
    MOST_DRAFTS,
    Batch,
    ChoiceCharges,
    ChoiceTracker,
    Decoder,
    DraftTracker,
    KnobRule,
    LatencyProfile,
    RoundTracker,
    Session,
    SpeculativeDecoder,
    SpeculativeSession,
)

from ..backends.backend import DraftSteps, Integers
from ..backends.chain_replay import DraftCharges, Indices
from ..backends.choice_replay import Flags
from ..tuning.knob_space import Floats, KnobMoves, knob_entries
from ..workloads import Workload

AnySession = TypeVar("AnySession", bound=Session[Any])

UNKNOWN = -1000
"""`remaining_acceptable` in live decoding, which does not know it; no draft is that long."""


class LiveTexts(ABC, Generic[AnySession]):
    """Texts that decoders decode in one batch, step by step. See `DraftBackend`.

    What the texts do in a step they do together: passes of the same model are joined, and each text is what it would be
    alone. `begin` puts another text in a text's place; until then, one that is over does nothing.

    Args:
        workloads: whose pairs and prompts.
        decoders: of each operating point.
        point_of: the operating point of every text, shape (texts,); each workload has as many points, one workload
            after another.
        max_new_tokens: tokens of each text, at most.
        unseen: features of texts of which nothing is known, shape (texts, features).

    Attributes:
        prompts: numbers of every workload's prompts.
        sessions: of every text; None where none has begun.
    """

    def __init__(
        self,
        workloads: Sequence[Workload],
        decoders: Sequence[Decoder[AnySession]],
        point_of: Indices,
        max_new_tokens: int,
        unseen: NDArray[np.float32],
    ) -> None:
        self._decoders = decoders
        self._point_of: list[int] = point_of.tolist()
        self._texts = [named.prompt_ids() for named in workloads]
        self._samplings = [named.sampling for named in workloads]
        self._max_new_tokens = max_new_tokens
        self._unseen, self._features = unseen, unseen.copy()
        self._batch = Batch(len(point_of))
        self.prompts: Sequence[Integers] = [np.arange(len(texts)) for texts in self._texts]
        self.sessions: list[AnySession | None] = [None] * len(point_of)

    @property
    def features(self) -> NDArray[np.float32]:
        """Features of every text's draft or drafts, shape (texts, features); changed in place."""
        return self._features

    @property
    def over(self) -> NDArray[np.bool_]:
        """Texts that have ended, or not begun, shape (texts,)."""
        return np.array([session not in self._batch for session in self.sessions])

    def begin(self, which: Integers, workloads: Integers, prompts: Integers, rng: np.random.Generator) -> None:
        """Begin other texts, each with a seed of its own."""
        self.leave(which)
        for place, workload, prompt in zip(which.tolist(), workloads.tolist(), prompts.tolist(), strict=True):
            self.sessions[place] = self._batch.add(
                self._decoders[self._point_of[place]],
                self._texts[workload][prompt],
                max_new_tokens=self._max_new_tokens,
                sampling=self._samplings[workload],
                seed=int(rng.integers(2**31)),
            )
        self._together(which, self._start)

    def step(self, actions: NDArray[Any], rng: np.random.Generator) -> tuple[DraftSteps, Integers]:
        """Let every text that is not over do as its action says."""
        texts, which = len(actions), np.flatnonzero(~self.over)
        steps = DraftSteps(np.zeros(texts, np.int64), np.zeros(texts), *(np.zeros(texts, np.int64) for _ in range(3)))
        self._act(which, actions, steps)
        return steps, which[self.over[which]]

    def clear(self) -> None:
        """Let all texts be over, with nothing known of them."""
        self.leave(np.arange(len(self.sessions)))
        self._features[:] = self._unseen

    def leave(self, which: Integers) -> None:
        """Let some texts be over."""
        for place in which.tolist():
            if (session := self.sessions[place]) is not None:
                self._batch.leave(session)

    @abstractmethod
    def _start(self, place: int, session: AnySession) -> None:
        """Do what comes before the first action of a text."""

    @abstractmethod
    def _act(self, which: Integers, actions: NDArray[Any], steps: DraftSteps) -> None:
        """Do as the actions say with some texts, and write down what it brought."""

    @abstractmethod
    def _show(self, place: int, session: AnySession) -> None:
        """Keep what is seen of the text in a place."""

    def _together(self, which: Integers, work: Callable[[int, AnySession], None]) -> None:
        """Let some texts do a piece of work each, joined, and look at them."""

        def seen(place: int, session: AnySession) -> None:
            work(place, session)
            self._show(place, session)

        sessions = [(place, self.sessions[place]) for place in which.tolist()]
        self._batch.together(
            {session: partial(seen, place, session) for place, session in sessions if session is not None}
        )


class LiveDrafts(LiveTexts[SpeculativeSession]):
    """Drafts of the models. See `DraftBackend`.

    Args:
        workloads: whose pairs and prompts.
        charges: what time is charged by, at each operating point.
        batch_sizes: sequences decoded together, of each operating point.
        point_of: as for `LiveTexts`.
        max_draft_length: longest draft, in tokens.
        max_new_tokens: tokens of each text, at most.
    """

    def __init__(
        self,
        workloads: Sequence[Workload],
        charges: Sequence[DraftCharges],
        batch_sizes: Sequence[int],
        point_of: Indices,
        max_draft_length: int,
        max_new_tokens: int,
    ) -> None:
        pairs = [workloads[point * len(workloads) // len(charges)] for point in range(len(charges))]
        decoders = [
            SpeculativeDecoder(named.load(), max_draft_length, cost_ratio=point.cost_ratio, batch_size=batch_size)
            for named, point, batch_size in zip(pairs, charges, batch_sizes, strict=True)
        ]
        unseen = DraftTracker(
            len(charges),
            [point.cost_ratio for point in charges],
            batch_sizes,
            [named.sampling.temperature for named in pairs],
        )
        super().__init__(workloads, decoders, point_of, max_new_tokens, unseen.features[point_of])
        self._charges = charges
        self._longest = max_draft_length
        self._drafted = np.zeros(len(point_of), np.int64)  # tokens drafted so far

    @property
    def remaining_acceptable(self) -> Integers:
        """`UNKNOWN`, shape (texts,)."""
        return np.full(len(self.sessions), UNKNOWN)

    def _start(self, place: int, session: SpeculativeSession) -> None:
        """Draft the first token."""
        self._drafted[place] = int(session.draft_one() is not None)

    def _act(self, which: Integers, actions: NDArray[Any], steps: DraftSteps) -> None:
        """Verify and draft the next (1), or draft one more token."""
        stops = (actions == 1) | (self._drafted >= self._longest)
        self._together(which[stops[which]], partial(self._verify, steps))
        # Only now do the others go on, so that they draft in one pass with those that were verified.
        self._together(which[~self.over[which]], partial(self._draft, steps, stops))

    def _verify(self, steps: DraftSteps, place: int, session: SpeculativeSession) -> None:
        round_ = session.verify()
        steps.tokens[place], steps.rounds[place] = len(round_.tokens), 1
        steps.drafted[place], steps.accepted[place] = round_.drafted, round_.accepted
        steps.seconds[place] = self._charges[self._point_of[place]].seconds[1, self._drafted[place]]
        self._drafted[place] = 0

    def _draft(self, steps: DraftSteps, stops: Flags, place: int, session: SpeculativeSession) -> None:
        """Draft one more token, or the first after a verification, for which the target may have to emit some."""
        charges = self._charges[self._point_of[place]]
        if not stops[place]:
            if session.draft_one() is not None:
                steps.seconds[place] = charges.seconds[0, self._drafted[place]]
                self._drafted[place] += 1
                return
            self._verify(steps, place, session)
        while not session.finished:
            if session.draft_one() is not None:
                self._drafted[place] = 1
                return
            steps.tokens[place] += len(session.verify().tokens)
            steps.rounds[place] += 1
            steps.seconds[place] += charges.empty_round

    def _show(self, place: int, session: SpeculativeSession) -> None:
        self._features[place] = session.tracker.features[0]


class LiveChoices(LiveTexts[SpeculativeSession]):
    """Texts of pairs with several drafts. See `ChoiceBackend`.

    Args:
        workloads: whose pairs and prompts.
        charges: what time is charged by, of each workload.
        workload_of: the workload of every text, shape (texts,).
        max_draft_length: longest draft, in tokens.
        max_new_tokens: tokens of each text, at most.

    Raises:
        ValueError: the charges are of other drafts than the pair has.
    """

    def __init__(
        self,
        workloads: Sequence[Workload],
        charges: Sequence[ChoiceCharges],
        workload_of: Indices,
        max_draft_length: int,
        max_new_tokens: int,
    ) -> None:
        decoders = [
            SpeculativeDecoder(named.load(), max_draft_length, costs=of_workload.profile)
            for named, of_workload in zip(workloads, charges, strict=True)
        ]
        trackers = [
            ChoiceTracker(
                1,
                [draft.free for draft in of_workload.profile.drafts],
                decoder.draft_cost_ratios,
                decoder.target_cost_ratio,
                named.sampling.temperature,
                chances=decoder.draft_chances,
            )
            for named, decoder, of_workload in zip(workloads, decoders, charges, strict=True)
        ]
        unseen = np.concatenate([tracker.features for tracker in trackers])
        super().__init__(workloads, decoders, workload_of, max_new_tokens, unseen[workload_of])
        self._charges = charges
        self._available = np.zeros((len(workload_of), MOST_DRAFTS), np.bool_)

    @property
    def available(self) -> Flags:
        """Drafts that can propose the next token of each text, shape (texts, `MOST_DRAFTS`)."""
        return self._available & ~self.over[:, None]

    @property
    def remaining_acceptable(self) -> Integers:
        """`UNKNOWN`, shape (texts, `MOST_DRAFTS`)."""
        return np.full((len(self.sessions), MOST_DRAFTS), UNKNOWN)

    def _start(self, place: int, session: SpeculativeSession) -> None:
        """Draft nothing: the first action says who drafts."""

    def _act(self, which: Integers, actions: NDArray[Any], steps: DraftSteps) -> None:
        """Draft a token with the draft that the action names (from 1), or verify."""
        self._together(which, partial(self._draft_or_verify, steps, actions - 1))

    def _draft_or_verify(self, steps: DraftSteps, drafts: Integers, place: int, session: SpeculativeSession) -> None:
        charges, draft = self._charges[self._point_of[place]], int(drafts[place])
        choice = session.look()
        steps.seconds[place] = charges.decision_seconds if choice.available.any() else 0.0
        unread = choice.tracker.unread[0].copy()
        if draft >= 0 and session.draft_one(draft) is not None:
            steps.seconds[place] += charges.drafting[draft, unread[draft]]
            return
        round_ = session.verify()
        steps.tokens[place], steps.rounds[place] = len(round_.tokens), 1
        steps.drafted[place], steps.accepted[place] = round_.drafted, round_.accepted
        steps.seconds[place] += charges.verifying[round_.drafted]

    def _show(self, place: int, session: SpeculativeSession) -> None:
        choice = session.look()  # which begins the next round, if none is under way
        self._features[place] = choice.tracker.features[0]
        self._available[place, : len(choice.available)] = choice.available


class LiveRounds(LiveTexts[Session[Any]]):
    """Rounds of any decoder, each with knobs of its own. See `DraftBackend`.

    Args:
        workloads: whose pairs and prompts.
        decoders: of each workload, all with the same knobs.
        profiles: what rounds are charged by, of each workload.
        workload_of: the workload of every text, shape (texts,).
        max_new_tokens: tokens of each text, at most.
        moves: what an action does to the knobs; a text begins with their defaults.
        decision_seconds: charged for every round besides.
    """

    def __init__(
        self,
        workloads: Sequence[Workload],
        decoders: Sequence[Decoder[Any]],
        profiles: Sequence[LatencyProfile],
        workload_of: Indices,
        max_new_tokens: int,
        moves: KnobMoves,
        decision_seconds: float,
    ) -> None:
        temperatures = [named.sampling.temperature for named in workloads]
        unseen = np.stack([RoundTracker(moves.knobs, 0, temperature).features for temperature in temperatures])
        super().__init__(workloads, decoders, workload_of, max_new_tokens, unseen[workload_of])
        self._profiles, self._moves, self._decision_seconds = profiles, moves, decision_seconds
        self._states: Floats = np.tile(moves.defaults(), (len(workload_of), 1))
        self._used = self._states.copy()  # knobs of each text's last round, kept until the next one

    @property
    def remaining_acceptable(self) -> Integers:
        """`UNKNOWN`, shape (texts,)."""
        return np.full(len(self.sessions), UNKNOWN)

    def knobs_of(self, rounds: Integers) -> dict[str, Any]:
        """Entries of `info`: the knobs of a step's rounds, and of texts that had none those that they stand at.

        Args:
            rounds: that each text had in the step, shape (texts,).
        """
        return knob_entries(self._moves.values(np.where(rounds[:, None] > 0, self._used, self._states)))

    def _start(self, place: int, session: Session[Any]) -> None:
        self._states[place] = self._moves.defaults()

    def _act(self, which: Integers, actions: NDArray[Any], steps: DraftSteps) -> None:
        """Move the knobs, and do a round with them."""
        self._states = self._moves.moved(self._states, actions)
        self._used[which] = self._states[which]
        self._together(which, partial(self._round, steps))

    def _round(self, steps: DraftSteps, place: int, session: Session[Any]) -> None:
        names = (knob.name for knob in self._moves.knobs)
        round_ = session.step(_Placed(dict(zip(names, self._states[place].tolist(), strict=True))))
        steps.tokens[place], steps.rounds[place] = len(round_.tokens), 1
        steps.drafted[place], steps.accepted[place] = round_.drafted, round_.accepted
        steps.seconds[place] = self._profiles[self._point_of[place]].charge([round_]) + self._decision_seconds

    def _show(self, place: int, session: Session[Any]) -> None:
        self._features[place] = session.progress.features


@dataclass(frozen=True)
class _Placed(KnobRule):
    """Knobs as an environment's agent has moved them."""

    values: dict[str, float]

    def __call__(self, text: RoundTracker) -> dict[str, float]:
        return self.values
