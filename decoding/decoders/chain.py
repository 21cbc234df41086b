"""Exact speculative sampling with a chain of drafted tokens, and the base of decoders that draft chains.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192); Chen et al.,
"Accelerating Large Language Model Decoding with Speculative Sampling" (arXiv 2302.01318).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..decoder import Decoder
from ..drafts.drafter import DraftStep, is_free
from ..drafts.mixed import drafts_of
from ..errors import ArgumentError
from ..loading.pair import Pair, require_draft
from ..rounds import Round
from ..sampling import Sampling
from ..traits import CHAIN
from .chain_session import SpeculativeSession
from .choice_features import MOST_DRAFTS, MOST_UNREAD
from .choice_rules import ChoiceRule, ExpectedGainChoice
from .expected_gain import ExpectedGain
from .stop_rules import DraftTracker, StopRule, TokenRule
from .traits import SpeculativeStop, SpeculativeTraits

if TYPE_CHECKING:
    from ..latency.mixed_profile import MixedProfile
    from ..latency.profile import LatencyProfile

USUAL_COST_RATIO = 0.1


class ChainDecoder(Decoder[SpeculativeSession]):
    """Base of decoders that draft a chain of tokens every round.

    Args:
        pair: a target with a draft.
        choice: see the attribute.
        costs: of several drafts: what a rule or a controller is told, with the chances in it, and what drafts end by
            where they end by the expected gain. By default models cost `USUAL_COST_RATIO`, and what is free nothing.

    Attributes:
        draft: the pair's.
        stop: rule that may end a draft early, whatever the knobs.
        choice: rule that chooses who of several drafts proposes each token, and when the target verifies.
        draft_cost_ratios: what such a rule or a controller is told that a token of each draft adds to a round, over a
            plain token.
        draft_learns: of each draft whether nobody counted how often its tokens are right, so that a rule which learns
            that begins with a guess.
        target_cost_ratio: what they are told that one more token adds to the target's pass.
        cost_ratio: what the rule or a controller is told that one more drafted token costs, in seconds that it adds to
            a round over autoregressive seconds per token.
        batch_size: what they are told of how many sequences are decoded together.
        on_round: called after every round with the draft tokens that were verified and the round, in whose times the
            call is not.

    Raises:
        ValueError: the pair has no draft, or no several ones to choose from.
    """

    stop: StopRule | None = None
    on_round: Callable[[Sequence[DraftStep], Round], None] | None = None
    cost_ratio: float = USUAL_COST_RATIO
    batch_size: int = 1

    def __init__(self, pair: Pair, choice: ChoiceRule | None = None, costs: MixedProfile | None = None) -> None:
        super().__init__(pair)
        self.draft = require_draft(pair, type(self).__name__)
        if choice is not None:
            require_choice(pair)
            choice.start(1, seed=0)
        drafts = drafts_of(self.draft)
        self.choice = choice
        self.draft_cost_ratios: Sequence[float] = [0.0 if is_free(draft) else USUAL_COST_RATIO for draft in drafts]
        self.target_cost_ratio = 0.0
        self.draft_chances: NDArray[np.float64] | None = None
        self.draft_learns = [True] * len(drafts)
        self._costs = costs if costs is None else self._told(costs)
        self._weighed: tuple[int, Sequence[float]] | None = None
        self._gains: list[ExpectedGain] = []  # of each of the tolerances, once costs are known

    def _weigh(self, longest: int, tolerances: Sequence[float] = (0.0,)) -> None:
        """Let drafts end by the expected gain.

        Args:
            longest: tokens of a draft, at most.
            tolerances: at which drafted tokens are kept; each has a rule of its own.

        Raises:
            ArgumentError: the pair has several drafts, and there are several tolerances, or it has too many.
        """
        if self._several:
            if len(tolerances) > 1:
                raise ArgumentError(
                    f"stop='expected-gain' weighs the costs of one draft here, and pair {self.pair.name} has several; "
                    "give stop='never' or a rule, or decode it exactly (SpeculativeDecoder)"
                )
            require_choice(self.pair)
        self._weighed = longest, tolerances
        self.stops_by_gain = True
        if self._several and self._costs is not None:
            self.charge_by(self._costs)

    @property
    def _several(self) -> bool:
        return len(drafts_of(self.draft)) > 1

    def charge_by(self, profile: LatencyProfile | MixedProfile) -> None:
        """Let drafts end by these costs and chances, if they end by the expected gain at all.

        Args:
            profile: of chains; a mixed one for a pair with several drafts.

        Raises:
            LatencyProfileError: it is of another kind, or of other drafts.
        """
        if self._weighed is None:
            return
        from ..latency.mixed_profile import ChoiceCharges, MixedProfile  # which imports from this folder
        from ..latency.profile import LatencyProfileError

        longest, tolerances = self._weighed
        if isinstance(profile, MixedProfile) and self._several:
            charges = ChoiceCharges.of(self._told(profile), longest, MOST_UNREAD)
            self.choice = ExpectedGainChoice(charges)
        elif isinstance(profile, MixedProfile) or self._several:
            raise LatencyProfileError(
                f"pair {self.pair.name} has {len(drafts_of(self.draft))} draft{'s' * self._several}: charge it by "
                f"{'measured_mixed(pair)' if self._several else 'measured(pair)'}, the profile of such pairs"
            )
        else:
            profile = profile.require_kind(CHAIN)
            self._gains = [ExpectedGain.of(profile, longest, tolerance) for tolerance in tolerances]

    def _told(self, costs: MixedProfile) -> MixedProfile:
        """Tell rules and controllers these costs and chances."""
        costs = costs.require_drafts(tuple(draft.name for draft in drafts_of(self.draft)))
        self.draft_cost_ratios, self.target_cost_ratio = costs.cost_ratios, costs.target_cost_ratio
        self.draft_chances = costs.chances
        self.draft_learns = [draft.chances is None for draft in costs.drafts]
        return costs

    def _get_ready(self, sampling: Sampling) -> None:
        if self._weighed is None or self._gains or self.choice is not None:
            return
        from ..latency.measure import measured  # which imports this module
        from ..latency.mixed_measure import measured_mixed

        self.charge_by((measured_mixed if self._several else measured)(self.pair, sampling=sampling))

    @abstractmethod
    def draft_length(self, knobs: Mapping[str, float]) -> int:
        """Return the tokens to draft in a round with these knobs, at most."""

    def stop_rule(self, knobs: Mapping[str, float]) -> StopRule | TokenRule | None:
        """Return the rule that may end a draft early in a round with these knobs."""
        return self.stop


def require_choice(pair: Pair) -> None:
    """Raise ArgumentError unless a pair has several drafts, and no more than a rule can choose among."""
    drafts = len(drafts_of(pair.draft))
    if not 2 <= drafts <= MOST_DRAFTS:
        raise ArgumentError(
            f"pair {pair.name} has {drafts} draft{'s' * (drafts != 1)}, and a choice is among 2 to {MOST_DRAFTS}; name "
            "several, as in 'target+draftA,draftB'"
        )


class SpeculativeDecoder(SpeculativeTraits, ChainDecoder):
    """Exact speculative sampling with a chain of drafted tokens.

    Args:
        pair: a target with a draft.
        max_draft_length: upper end of the `draft_length` knob, in tokens.
        stop: the rule of an engine that may end a draft earlier, by knobs of its own (`SpeculativeOptions`): at a
            `stop_threshold` of 0 it asks for nothing. Or a rule without knobs, asked after every drafted token;
            `draft_length` is then the longest draft, and by default as long as it may be. All texts of this decoder
            share such a rule, and what it learns. `"expected-gain"` is one that weighs what a token is expected to
            bring against what it costs (`ExpectedGain`; with several drafts whose it is, too, `ExpectedGainChoice`), by
            `costs` or the profile that `charge_by` was given, and else by the pair's own, which is measured on this
            machine when the first text is begun, and kept. None is `"never"`.
            Where a rule asks, the host waits for every token of a model draft, which costs nothing on a CPU.
        cost_ratio: see `ChainDecoder`.
        batch_size: see `ChainDecoder`.
        choice: see `ChainDecoder`, in place of `stop`; `draft_length` is then the longest draft, and by default as long
            as it may be.
        costs: see `ChainDecoder`.

    Raises:
        ValueError: the pair has no draft, or no several ones to choose from or too many, a number is out of range, or
            both a choice and another rule are given.
    """

    session_class = SpeculativeSession

    def __init__(
        self,
        pair: Pair,
        max_draft_length: int = 16,
        stop: SpeculativeStop | StopRule | None = "transformers",
        cost_ratio: float = USUAL_COST_RATIO,
        batch_size: int = 1,
        choice: ChoiceRule | None = None,
        costs: MixedProfile | None = None,
    ) -> None:
        super().__init__(pair, choice, costs)
        DraftTracker(1, cost_ratio, batch_size)  # refuses what the sessions' own would refuse
        self.cost_ratio, self.batch_size = cost_ratio, batch_size
        if choice is not None and (isinstance(stop, StopRule) or stop == "expected-gain"):
            raise ArgumentError("a choice says itself where drafts end; give it or stop, not both")
        named: SpeculativeStop = "never" if stop is None or choice is not None or isinstance(stop, StopRule) else stop
        self.knobs = self.knobs_without_pair(max_draft_length=max_draft_length, stop=named)
        self._before = named == "llama.cpp"
        if isinstance(stop, StopRule):
            stop.start(1, seed=0)
            self.stop = stop
        if named == "expected-gain":
            self._weigh(max_draft_length)
        if choice is not None or self.stop is not None:
            self.knobs = (replace(self.knobs[0], default=max_draft_length),)

    def draft_length(self, knobs: Mapping[str, float]) -> int:
        """Return the knob of this name."""
        return int(knobs["draft_length"])

    def stop_rule(self, knobs: Mapping[str, float]) -> StopRule | TokenRule | None:
        """Return the rule of an engine with these knobs, if they ask for anything, or the decoder's own."""
        threshold, fewest = knobs.get("stop_threshold", 0.0), int(knobs.get("min_draft_length", 0))
        if self._gains:
            return self._gains[0]
        return TokenRule(threshold, self._before, fewest) if threshold or fewest else self.stop
