"""Threshold decoding: a draft token is kept where the two models are close enough, whatever the dice would say.

At a drafted position let TV be the total variation between the draft's and the target's distribution. TV <= `fallback`
keeps the token outright; otherwise the exact test of speculative sampling decides. A rejection takes the last
`rollback` draft tokens back, itself included, and the target emits the token that follows those kept. A draft ends as
soon as one more token is expected to bring less than it costs (`expected_gain`).

Both ways of keeping a token leave a conditional distribution within `fallback` of the target's, which is this decoder's
certificate when sampling with `rollback` = 1; `fallback` = 0 is then exact speculative sampling. A larger rollback
judges tokens by what came after them, so that the text is biased even at `fallback` = 0, by an amount that
`Round.divergence` cannot see: it knows only what each token was drawn from. Greedy decoding at `fallback` = 0 gives the
target's own text whatever the rollback. A token that greedy decoding would have chosen anyway does not diverge at all,
whatever the distance between the models; any other counts with that distance, though its one-hot distribution differs
wholly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..drafts.drafter import Proposal
from ..errors import ArgumentError
from ..loading.pair import Pair
from ..sampling import draw, total_variation
from .chain import ChainDecoder
from .chain_session import SpeculativeSession, Verdict, first_false
from .choice_rules import ChoiceRule
from .expected_gain import LEVELS, levels_of
from .stop_rules import StopRule
from .traits import Stop, ThresholdTraits

if TYPE_CHECKING:
    from ..latency.mixed_profile import MixedProfile


class ThresholdSession(SpeculativeSession):
    """One prompt being generated with the fallback and rollback thresholds."""

    def _judge(self, scores: Tensor, proposal: Proposal, knobs: Mapping[str, float]) -> Verdict:
        p = self.sampling.probabilities(scores)
        drafted = proposal.tokens.shape[0]
        distance = self._distances(p, scores, proposal)
        outright, passes = distance <= knobs["fallback"], self._passes(p, proposal)
        agreed = first_false(outright | passes)
        rollback = self._whole_rollback(knobs["rollback"])
        kept = torch.where(agreed < drafted, (agreed + 1 - rollback).clamp(min=0), agreed)
        # The residual belongs to the rejected position alone; a token put further back comes from the target there.
        successor = self._successor(p, proposal, agreed)
        if rollback > 1:
            further_back = p[kept].argmax(-1) if self.sampling.greedy else draw(p[kept], self.generator)
            successor = torch.where(kept < agreed, further_back, successor)
        strayed = outright & ~passes if self.sampling.greedy else outright  # drawn tokens are the draft's outright
        return Verdict(kept, successor, torch.where(strayed, distance, 0.0))

    def _distances(self, p: Tensor, scores: Tensor, proposal: Proposal) -> Tensor:
        """Total variation between draft and target at every drafted position, shape (drafted,)."""
        # One-hot distributions make the distance useless, so greedy decoding compares the models at temperature 1.
        p = scores[:-1].softmax(-1) if self.sampling.greedy else p[:-1]
        if proposal.logits is None:  # a one-hot draft
            return 1 - p.gather(-1, proposal.tokens.unsqueeze(-1)).squeeze(-1)
        q = proposal.logits.softmax(-1) if proposal.probabilities is None else proposal.probabilities
        return total_variation(p, q)

    def _whole_rollback(self, rollback: float) -> int:
        """A neighbouring whole number, at random by the fraction, so that the mean moves smoothly with the knob."""
        whole = int(rollback)
        if rollback > whole:
            whole += int(self._rng.random() < rollback - whole)
        return whole


class ThresholdDecoder(ThresholdTraits, ChainDecoder):
    """Speculative decoding with a `fallback` and a `rollback` threshold; lossy unless `fallback` is 0 (and
    `rollback` 1, when sampling).

    Args:
        pair: a target with a draft.
        max_draft_length: longest draft, in tokens, and the upper end of the `rollback` knob.
        stop: where drafts end. `"expected-gain"` weighs what one more token is expected to bring against what it costs
            (`ExpectedGain`), by the profile that `charge_by` was given, and else by the pair's own, which is measured
            on this machine when the first text is begun, and kept. `"never"` drafts `max_draft_length` tokens every
            round. Or a rule of one's own, which all texts of this decoder share.
        choice: see `ChainDecoder`, in place of `stop`.
        costs: see `ChainDecoder`.

    Raises:
        ValueError: the pair has no draft, `max_draft_length` is not positive, there is no such rule, or the pair has
            several drafts, each with costs of its own, and they are to end by the expected gain.
    """

    session_class = ThresholdSession

    def __init__(
        self,
        pair: Pair,
        max_draft_length: int = 16,
        stop: Stop | StopRule = "expected-gain",
        choice: ChoiceRule | None = None,
        costs: MixedProfile | None = None,
    ) -> None:
        super().__init__(pair, choice, costs)
        if choice is not None:
            if isinstance(stop, StopRule):
                raise ArgumentError("a choice says itself where drafts end; give it or stop, not both")
            stop = "never"
        named: dict[str, Any] = {} if isinstance(stop, StopRule) else {"stop": stop}
        self.knobs = self.knobs_without_pair(max_draft_length=max_draft_length, **named)
        self.max_draft_length = max_draft_length
        if isinstance(stop, StopRule):
            stop.start(1, seed=0)
            self.stop = stop
        self.stops_by_gain = False
        if stop == "expected-gain":
            self._weigh(max_draft_length, np.linspace(0, 1, LEVELS).tolist())

    def draft_length(self, knobs: Mapping[str, float]) -> int:
        """Return the longest draft, whatever the knobs."""
        return self.max_draft_length

    def stop_rule(self, knobs: Mapping[str, float]) -> StopRule | None:
        """Return the rule for this fallback."""
        return self._gains[levels_of(knobs["fallback"])] if self._gains else self.stop
