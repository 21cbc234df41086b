"""Estimate of what any choice of drafts could reach that sees what the learned one sees.

A classifier of the same features is fitted to whether the next token of each draft is right, and calibrated on prompts
that it was not fitted to. What follows a token is fitted, too, to what came of it where the plan decided (backward
induction with fitted continuation values, as for options by Longstaff and Schwartz, "Valuing American Options by
Simulation: A Simple Least-Squares Approach", 2001). Time is priced at the throughput that the plan reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from specgym.decoding import (
    CHOICE_FEATURES,
    MOST_DRAFTS,
    ChoiceCharges,
    ChoiceRule,
    FurtherCosts,
    best_choice,
    of_drafts,
)
from specgym.envs import DraftChoiceVectorEnv

from ...experiments.control.choice_policy import ChoiceScaler, DraftScores
from .choice_baselines import Actions, Features, Flags, Floats
from .choice_tuning import MixedPrompts

if TYPE_CHECKING:
    from ...experiments.control.choose_drafts_settings import PlanSettings

_EXPLORING, _DRAFTING = 0.25, 0.7
"""Share of decisions that try something else, and share of those that draft a token."""
_KEPT_APART = 4
"""One in so many prompts is used to calibrate and not to fit."""
_REMEMBERED = 3
"""Rounds whose decisions are learned from."""
_EPOCHS, _BATCH, _FEWEST, _LEARNING_RATE = 3, 2048, 12, 3e-3
"""Passes over decisions in a round, decisions in a minibatch, and minibatches at least."""
_BINS = 15


class Plan(nn.Module):
    """Chance of each draft's next token to be right, all before it being so, and the worth of what follows.

    Args:
        width: units in each of two layers.
        seed: fixes the first weights.
    """

    middle: Tensor
    spread: Tensor

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        middle, spread = torch.tensor(ChoiceScaler.usual[: len(CHOICE_FEATURES)], dtype=torch.float32).T.contiguous()
        self.register_buffer("middle", middle)
        self.register_buffer("spread", spread)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.chance = DraftScores((width, width))
            self.following = DraftScores((width, width), more=1)
        self.slope = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(()))

    def scaled(self, features: Tensor) -> Tensor:
        """Features as the networks take them, shape (batch, features)."""
        return (features - self.middle) / self.spread

    def logits(self, scaled: Tensor) -> Tensor:
        """Calibrated logits of the chances, shape (batch, `MOST_DRAFTS`)."""
        return self.slope * self.chance(scaled) + self.offset

    def gains(self, features: Tensor, costs: Tensor, rates: Tensor) -> Tensor:
        """Tokens that each draft's next token and what follows are expected to bring, less the price of their time.

        Args:
            features: shape (batch, features).
            costs: seconds of the next token of each draft, over a plain token, shape (batch, `MOST_DRAFTS`).
            rates: throughput that time is priced at, shape (batch,).

        Returns:
            Shape (batch, `MOST_DRAFTS`); very low where a draft cannot go on.
        """
        scaled = self.scaled(features)
        following = self.following(scaled, [rates])
        return self.logits(scaled).sigmoid() - rates.unsqueeze(1) * costs + following


class PlannedChoice(ChoiceRule):
    """Choice by a plan, on one workload.

    Args:
        plan: that was fitted.
        charges: of the pair.
        rate: throughput that time is priced at.
    """

    def __init__(self, plan: Plan, charges: ChoiceCharges, rate: float) -> None:
        self.plan, self.rate = plan, rate
        self._costs = FurtherCosts(charges)

    @property
    def name(self) -> str:
        """`planned`, with the rate."""
        return f"planned at {self.rate:.2f}"

    def __call__(self, features: Features) -> Actions:
        """Choose the draft that is expected to bring most, or to verify."""
        costs = self._costs.next(features)
        return best_choice(_gains(self.plan, features, costs, np.full(len(features), self.rate)))


@dataclass(frozen=True)
class Fitted:
    """A plan that was fitted to some prompts.

    Attributes:
        plan: for all workloads.
        rates: throughput that it reaches on each workload, in order.
    """

    plan: Plan
    rates: Floats

    def rule(self, place: int, prompts: MixedPrompts) -> PlannedChoice:
        """The choice on the workload at this place."""
        return PlannedChoice(self.plan, prompts.charges, float(self.rates[place]))


@dataclass(frozen=True)
class Decisions:
    """Decisions in texts that were decoded side by side, one after another; those of a step stand together.

    Attributes:
        features: shape (decisions, features).
        costs: seconds of the next token of each draft, over a plain token, shape (decisions, `MOST_DRAFTS`).
        right: whether the next token of each draft would lengthen what is emitted, same shape.
        actions: what was chosen, shape (decisions,).
        workload: place of each text's workload, shape (texts,).
        apart: whether the text's prompt is one to calibrate on, shape (texts,).
    """

    features: Features
    costs: Floats
    right: Flags
    actions: Actions
    workload: NDArray[np.intp]
    apart: Flags

    @property
    def available(self) -> Flags:
        """Drafts that could go on, shape (decisions, `MOST_DRAFTS`)."""
        return of_drafts(self.features, "available") > 0

    def of_texts(self, texts: Flags) -> NDArray[np.intp]:
        """Numbers of the decisions in some texts at which any draft could go on."""
        return np.flatnonzero(np.tile(texts, len(self.actions) // len(texts)) & self.available.any(1))


def decide(
    prompts: Sequence[MixedPrompts], plan: Plan, rates: Floats, exploring: float, rng: np.random.Generator
) -> tuple[Decisions, Floats]:
    """Decode every prompt, half of them as planned and half trying other things.

    Args:
        prompts: of each workload.
        plan: that decides.
        rates: throughput that time is priced at on each workload.
        exploring: share of decisions in the second half that try something else.
        rng: for all random choices; which prompts are in which half, too.

    Returns:
        The decisions, and the throughput on each workload as planned, shape (workloads,).
    """
    counts = [many.prompts for many in prompts]
    texts = len(prompts) * max(counts)
    env = DraftChoiceVectorEnv(
        texts,
        recording=[many.trace for many in prompts],
        profile=[many.profile for many in prompts],
        max_draft_length=max(many.max_draft_length for many in prompts),
        max_new_tokens=max(many.tokens for many in prompts),
        decision_seconds=prompts[0].decision_seconds,
    )
    workload, number = env.workload_of, np.arange(texts) // len(prompts)
    chosen = np.where(number < np.array(counts)[workload], number, -1)
    explores = number % 2 == rng.integers(2)
    further = [FurtherCosts(many.charges) for many in prompts]
    features, info = env.reset(seed=int(rng.integers(2**31)), options={"prompt": chosen})
    steps: list[tuple[Features, Floats, Flags, Actions]] = []
    tokens, seconds = np.zeros((2, texts))
    while not env.resting.all():
        costs = np.empty((texts, MOST_DRAFTS))
        for place, more in enumerate(further):
            rows = slice(place, None, len(prompts))
            costs[rows] = more.next(features[rows])
        available = of_drafts(features, "available") > 0
        which = np.flatnonzero(available.any(1))
        actions = np.zeros(texts, np.int64)
        actions[which] = best_choice(_gains(plan, features[which], costs[which], rates[workload[which]]))
        tries = explores & (rng.random(texts) < exploring)
        drawn = np.where(available, rng.random(available.shape), -1.0)
        any_ = np.where(available.any(1) & (rng.random(texts) < _DRAFTING), drawn.argmax(1) + 1, 0)
        actions = np.where(tries, any_, actions)
        steps.append((features, costs, info["remaining_acceptable"] > 0, actions))
        features, _, _, _, info = env.step(actions)
        tokens += info["tokens"]
        seconds += info["seconds"]
    plain = np.array([many.plain_seconds for many in prompts])
    planned = [np.bincount(workload, values * ~explores, len(prompts)) for values in (tokens, seconds)]
    seen, prices, right, chosen_actions = (np.concatenate(column) for column in zip(*steps, strict=True))
    apart = chosen % _KEPT_APART == _KEPT_APART - 1
    decisions = Decisions(seen, prices, right, chosen_actions, workload, apart)
    return decisions, planned[0] / planned[1] * plain


def fit_plan(
    prompts: Sequence[MixedPrompts],
    settings: PlanSettings,
    seed: int = 0,
    apart: bool = True,
    report: Callable[[str], None] = lambda message: None,
) -> Fitted:
    """Fit a plan to the prompts of some workloads.

    Args:
        prompts: of each workload.
        settings: how.
        seed: fixes every random choice.
        apart: calibrate on prompts that are kept apart; else on those that are fitted to.
        report: called with what is being done.
    """
    rng, plan = np.random.default_rng(seed), Plan(settings.width, seed)
    learned = [*plan.chance.parameters(), *plan.following.parameters()]
    optimiser = torch.optim.Adam(learned, _LEARNING_RATE)
    rates, known = np.ones(len(prompts)), list[Decisions]()
    for number in range(settings.rounds):
        report(f"Planning, round {number + 1} of {settings.rounds}")
        new, reached = decide(prompts, plan, rates, _EXPLORING if number else 0.5, rng)
        known = [*known, new][-_REMEMBERED:]
        if number:  # the first one decided by what nobody had fitted
            rates = reached if number == 1 else rates + 0.5 * (reached - rates)
        for group in optimiser.param_groups:
            group["lr"] = _LEARNING_RATE * (1 - number / settings.rounds)
        for decisions in known:
            texts = ~decisions.apart if apart else np.ones_like(decisions.apart)
            _fit(plan, decisions, decisions.of_texts(texts), rates, optimiser, rng)
        texts = new.apart if apart else np.ones_like(new.apart)
        _calibrate(plan, new, new.of_texts(texts))
    return Fitted(plan, rates)


def calibration_error(chances: Floats, right: Flags) -> float:
    """Expected calibration error: distance of chances from how often they came true, over bins of as many each.

    Args:
        chances: 0 to 1, shape (tokens,).
        right: what came true, shape (tokens,).
    """
    order = np.argsort(chances, kind="stable")
    bins = [part for part in np.array_split(order, _BINS) if len(part)]
    off = [abs(chances[part].mean() - right[part].mean()) * len(part) for part in bins]
    return float(np.sum(off) / max(len(chances), 1))


def chances_of(plan: Plan, decisions: Decisions) -> tuple[Floats, Flags]:
    """Chances of all next tokens that there were, and whether they were right, both of shape (tokens,)."""
    rows = decisions.of_texts(np.ones_like(decisions.apart))
    with torch.no_grad():
        logits = plan.logits(plan.scaled(torch.from_numpy(decisions.features[rows])))
    there = decisions.available[rows]
    return logits.sigmoid().numpy().astype(np.float64)[there], decisions.right[rows][there]


def _gains(plan: Plan, features: Features, costs: Floats, rates: Floats) -> Floats:
    with torch.no_grad():
        gains = plan.gains(
            torch.from_numpy(features), torch.from_numpy(costs.astype(np.float32)), torch.from_numpy(rates).float()
        )
    return gains.numpy().astype(np.float64)


def _following(plan: Plan, decisions: Decisions, rates: Floats) -> Floats:
    """Tokens that came of what followed each drafted token in its round, less the price of their time.

    From where something else was tried than the plan would do, it is what the plan expects of its best.

    Returns:
        Shape (decisions,).
    """
    texts = len(decisions.workload)
    rows, prices = decisions.of_texts(np.ones(texts, np.bool_)), rates[decisions.workload]
    expected, planned = np.zeros(len(decisions.actions)), np.zeros(len(decisions.actions), np.int64)
    gains = _gains(plan, decisions.features[rows], decisions.costs[rows], prices[rows % texts])
    expected[rows], planned[rows] = np.maximum(gains.max(1), 0.0), best_choice(gains)
    drafts = decisions.actions > 0
    chosen = np.arange(len(drafts)), np.maximum(decisions.actions - 1, 0)
    brought = decisions.right[chosen] - np.tile(prices, len(drafts) // texts) * decisions.costs[chosen]
    following, after = np.empty(len(drafts)), np.zeros(texts)
    for begin in range(len(drafts) - texts, -1, -texts):
        step = slice(begin, begin + texts)
        following[step] = after
        came = np.where(drafts[step], brought[step] + after, 0.0)
        after = np.where(decisions.actions[step] == planned[step], came, expected[step])
    return following


def _fit(
    plan: Plan,
    decisions: Decisions,
    rows: NDArray[np.intp],
    rates: Floats,
    optimiser: torch.optim.Optimizer,
    rng: np.random.Generator,
) -> None:
    """Fit the chances, and to the plan as it is what follows a token."""
    texts = len(decisions.workload)
    features, right = torch.from_numpy(decisions.features), torch.from_numpy(decisions.right).float()
    there, actions = torch.from_numpy(decisions.available), torch.from_numpy(decisions.actions)
    price = rates[decisions.workload[rows % texts]]
    worth = _following(plan, decisions, rates)[rows]
    prices, worths, drafts = torch.from_numpy(price).float(), torch.from_numpy(worth).float(), actions[rows] > 0
    for _ in range(_EPOCHS):
        for part in np.array_split(rng.permutation(len(rows)), max(_FEWEST, len(rows) // _BATCH)):
            picked, some = rows[part], torch.from_numpy(part)
            scaled = plan.scaled(features[picked])
            chance = nn.functional.binary_cross_entropy_with_logits(
                plan.chance(scaled)[there[picked]], right[picked][there[picked]]
            )
            chosen = actions[picked].clamp(min=1).unsqueeze(1) - 1
            following = plan.following(scaled, [prices[some]]).gather(1, chosen).squeeze(1)
            off = ((following - worths[some]) ** 2)[drafts[some]]
            loss = chance + off.sum() / len(part)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def _calibrate(plan: Plan, decisions: Decisions, rows: NDArray[np.intp]) -> None:
    """Fit slope and offset of the chances' logits (Platt scaling)."""
    there = torch.from_numpy(decisions.available[rows])
    with torch.no_grad():
        logits = plan.chance(plan.scaled(torch.from_numpy(decisions.features[rows])))[there]
    right = torch.from_numpy(decisions.right[rows]).float()[there]
    optimiser = torch.optim.LBFGS([plan.slope, plan.offset], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = nn.functional.binary_cross_entropy_with_logits(plan.slope * logits + plan.offset, right)
        value.backward()
        return value

    optimiser.step(loss)
