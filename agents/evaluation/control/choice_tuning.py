"""Choosing the numbers of choice rules by throughput on training prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import ChoiceCharges, ChoiceRule, MixedProfile
from specgym.envs import DraftChoiceVectorEnv, MixedTrace

from .choice_baselines import ChoiceOracle, ClosedForm, DraftBandit, FixedChoice, FixedChoices
from .side_by_side import Decoded, SideBySide, Sums, at_own_rate

_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
_COARSE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_MATCHED = (1, 2, 3, 5)
_SWEEPS = 2
_O = TypeVar("_O")


@dataclass(frozen=True)
class MixedPrompts(SideBySide[ChoiceRule]):
    """Every prompt of a recording of several drafts, to be decoded with any rules.

    Attributes:
        trace: what was recorded.
        profile: what time is charged by.
        max_draft_length: longest draft, in tokens.
        tokens: of each text, at most.
        decision_seconds: charged for every decision.
        passes: how often each prompt is decoded; once where the trace is greedy.
    """

    trace: MixedTrace
    profile: MixedProfile
    max_draft_length: int = 12
    tokens: int = 64
    decision_seconds: float = 0.0
    passes: int = 1

    @property
    def plain_seconds(self) -> float:
        return self.profile.autoregressive_seconds

    @property
    def charges(self) -> ChoiceCharges:
        """Seconds of every step."""
        return ChoiceCharges.of(self.profile, self.max_draft_length, self.tokens, self.decision_seconds)

    def environment(self, texts: int) -> DraftChoiceVectorEnv:
        return DraftChoiceVectorEnv(
            texts,
            recording=self.trace,
            profile=self.profile,
            max_draft_length=self.max_draft_length,
            max_new_tokens=self.tokens,
            decision_seconds=self.decision_seconds,
        )

    def learns(self, rule: ChoiceRule) -> bool:
        return type(rule).verified is not ChoiceRule.verified

    def tell(self, rule: ChoiceRule, rows: NDArray[np.intp], info: Mapping[str, NDArray[Any]], seconds: Sums) -> None:
        rule.verified(rows, info["tokens"][rows], seconds)

    def together(self, rules: Sequence[ChoiceRule], texts: int) -> Sequence[tuple[ChoiceRule, int]]:
        fixed = [rule for rule in rules if isinstance(rule, FixedChoice)]
        if len(fixed) < len(rules):
            return super().together(rules, texts)
        return [(FixedChoices(fixed, texts), len(rules) * texts)]


@dataclass(frozen=True)
class ChosenRules:
    """Rules chosen on the training prompts of a workload.

    Attributes:
        simple: by method, the best of the simple rules.
        bandit: having decoded the training prompts once.
    """

    simple: dict[str, ChoiceRule]
    bandit: DraftBandit


def lone_drafts(prompts: MixedPrompts) -> list[FixedChoice]:
    """Every draft alone at every length, plain decoding among them."""
    names = prompts.trace.drafts
    return [
        FixedChoice(),
        *(
            FixedChoice((place + 1,), (length,), (0,), (name,))
            for place, name in enumerate(names)
            for length in _LENGTHS
            if length <= prompts.max_draft_length
        ),
    ]


def choose_rules(prompts: MixedPrompts) -> ChosenRules:
    """Choose every rule's numbers by its throughput, and let the bandit learn.

    Args:
        prompts: for training.
    """
    lone = lone_drafts(prompts)
    reached = [decoded.throughput for decoded in prompts.decode(lone)]
    chosen: dict[str, ChoiceRule] = {"single": lone[int(np.argmax(reached))]}
    chosen["hybrid"] = _hybrid(prompts, lone, reached)
    chosen["closed form"], _ = at_own_rate(prompts, lambda rate: ClosedForm(prompts.charges, rate))
    bandit = DraftBandit(lone)
    prompts.decode([bandit])
    return ChosenRules(chosen, bandit)


def oracle(prompts: MixedPrompts) -> tuple[ChoiceOracle, Decoded]:
    """The clairvoyant at the rate of its own throughput, and what it reaches."""
    return at_own_rate(prompts, lambda rate: ChoiceOracle(prompts.charges, rate))


def _hybrid(prompts: MixedPrompts, lone: Sequence[FixedChoice], reached: Sequence[float]) -> FixedChoice:
    """The best of the fixed rules of engines: one look-up or all of them in turn, and then a model.

    The look-ups with their match and length, and the model with its length, are chosen in turn, each with the best of
    the other, beginning with the model and the length that are best alone. Where there is no look-up or no model, the
    rule is without.
    """
    trace, lengths = prompts.trace, [length for length in _COARSE if length <= prompts.max_draft_length]
    look_ups = [place + 1 for place, free in enumerate(trace.free) if free]
    models = [place + 1 for place, free in enumerate(trace.free) if not free]
    orders = [*((draft,) for draft in look_ups), *([tuple(look_ups)] if len(look_ups) > 1 else [])]

    def rule(order: tuple[int, ...], matched: int, length: int, model: tuple[int, ...], long: int) -> FixedChoice:
        drafts = (*order, *model)
        return FixedChoice(
            drafts,
            (*[length] * len(order), *[long] * len(model)),
            (*[matched] * len(order), *[0] * len(model)),
            tuple(trace.drafts[draft - 1] for draft in drafts),
        )

    by_model = [
        (value, alone.drafts, alone.lengths[0]) for value, alone in zip(reached, lone, strict=True) if alone.drafts
    ]
    _, model, long = max((entry for entry in by_model if entry[1][0] in models), default=(0.0, (), 0))
    best = lone[int(np.argmax(reached))]
    order, matched, length = (orders or [()])[0], 1, 1
    for _ in range(_SWEEPS):
        first = [(order, matched, length) for order in orders for matched in _MATCHED for length in lengths]
        if first:
            best, (order, matched, length) = _best_of(
                prompts, [(rule(*option, model, long), option) for option in first]
            )
        second = [((draft,), long) for draft in models for long in (0, *lengths)]
        if second:
            chosen = [(rule(order, matched, length, *option), option) for option in second]
            best, (model, long) = _best_of(prompts, chosen)
    return best


def _best_of(prompts: MixedPrompts, options: Sequence[tuple[FixedChoice, _O]]) -> tuple[FixedChoice, _O]:
    reached = [decoded.throughput for decoded in prompts.decode([rule for rule, _ in options])]
    return options[int(np.argmax(reached))]
