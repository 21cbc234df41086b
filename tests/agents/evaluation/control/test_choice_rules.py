"""Rules that choose among drafts, on features made by hand and on recordings that nobody made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from specgym.agents.evaluation.control.choice_baselines import (
    ChoiceOracle,
    ClosedForm,
    DraftBandit,
    FixedChoice,
    FixedChoices,
)
from specgym.agents.evaluation.control.choice_tuning import MixedPrompts, choose_rules, lone_drafts, oracle
from specgym.decoding import FEATURES, MOST_DRAFTS, SLOT_FEATURES, ChoiceCharges, ChoiceRule, FurtherCosts
from specgym.envs.recordings.mixed_trace import MixedTrace
from tests.helpers.made_up_mixed import made_up_costs, made_up_mixed

LONGEST = 4
COMMON = [feature.name for feature in FEATURES]
SLOT = [feature.name for feature in SLOT_FEATURES]


def row(place: int = 0, confidence: float = 1.0, **drafts: dict[str, float]) -> np.ndarray:
    """Features of a text; drafts by `d1`, `d2`, ..., those that are given can go on unless they say otherwise."""
    result = np.zeros(len(FEATURES) + MOST_DRAFTS * len(SLOT_FEATURES), np.float32)
    result[[COMMON.index(name) for name in ("place", "confidence", "product")]] = place, confidence, confidence
    for name, values in drafts.items():
        begin = len(FEATURES) + (int(name[1:]) - 1) * len(SLOT_FEATURES)
        for feature, value in {"available": 1.0, **values}.items():
            result[begin + SLOT.index(feature)] = value
    return result


@pytest.fixture(scope="module")
def trace() -> MixedTrace:
    return made_up_mixed(prompts=6, tokens=24, longest=LONGEST)


def charges_of(trace: MixedTrace, **costs: float) -> ChoiceCharges:
    return ChoiceCharges.of(made_up_costs(trace, **costs), LONGEST, 24)


def prompts_of(trace: MixedTrace, **options: int) -> MixedPrompts:
    return MixedPrompts(trace, made_up_costs(trace), LONGEST, 24, **options)


def test_a_draft_alone_goes_on_to_its_length_as_far_as_it_can() -> None:
    rule = FixedChoice((2,), (3,), (0,), ("small",))
    rows = [row(0, d2={}), row(2, d2={"drafting": 1}), row(3, d2={"drafting": 1}), row(1, d1={}), row(0, d1={})]
    assert rule(np.array(rows)).tolist() == [2, 2, 0, 0, 0]
    assert rule.name == "small 3"
    assert FixedChoice()(np.array(rows)).tolist() == [0] * 5


def test_a_look_up_drafts_if_it_matches_and_else_the_model_and_nobody_takes_over() -> None:
    rule = FixedChoice((3, 1), (4, 2), (2, 0))
    matching, vague = {"next_matched": 2.0, "free": 1.0}, {"next_matched": 1.0, "free": 1.0}
    rows = [
        row(0, d1={}, d3=matching),
        row(0, d1={}, d3=vague),
        row(0, d1={"available": 0}, d3=vague),
        row(1, d1={}, d3={**vague, "drafting": 1}),  # the shortest match is asked for where the draft begins
        row(4, d1={}, d3={**matching, "drafting": 1}),
        row(1, d1={"drafting": 1}, d3=matching),
        row(2, d1={"drafting": 1}, d3=matching),
        row(1, d1={}, d3={"available": 0, "drafting": 1}),  # it knows no more, and the round ends
    ]
    assert rule(np.array(rows)).tolist() == [3, 1, 0, 3, 0, 1, 0, 0]
    assert rule.name == "draft 3 4 (match 2), else draft 1 2"


def test_rules_side_by_side_choose_as_each_does_alone() -> None:
    rules = [FixedChoice((3, 1), (4, 2), (2, 0)), FixedChoice((1,), (1,), (0,)), FixedChoice()]
    rng = np.random.default_rng(0)
    rows = np.array(
        [row(int(rng.integers(0, 4)), d1={}, d3={"next_matched": float(rng.integers(0, 4))}) for _ in range(12)]
    )
    together = FixedChoices(rules, 4)(rows)
    assert together.tolist() == [
        choice for place, rule in enumerate(rules) for choice in rule(rows[4 * place : 4 * place + 4]).tolist()
    ]
    assert len(set(together.tolist())) > 1


def test_costs_are_those_of_reading_and_of_the_longer_pass(trace: MixedTrace) -> None:
    costs = FurtherCosts(charges_of(trace, drafting=0.1, reading=0.02))(np.array([row(1, d1={"unread": 2.0}, d2={})]))[
        0
    ]
    assert costs[0, 0] == pytest.approx(0.1 + 3 * 0.002 + 0.02)  # four tokens are read
    assert costs[0, 1] == pytest.approx(costs[0, 0] + 0.1 + 0.02)
    assert costs[1, :3] == pytest.approx([0.22, 0.44, 0.66])
    assert costs[2, 0] == pytest.approx(0.02, abs=1e-4)
    assert np.isinf(costs[:, 3:]).all()  # a draft of four with one drafted has room for three


def test_the_clairvoyant_takes_what_is_accepted_and_worth_its_time(trace: MixedTrace) -> None:
    rule = ChoiceOracle(charges_of(trace, drafting=0.3, reading=0.02), rate=2.0)
    rows = np.array([row(place, d1={}, d3={"free": 1.0}) for place in (0, 0, 0, 0, 4)])
    rule.foresee(np.array([[1, 0, 0, 0, 0, 0], [3, 0, 1, 0, 0, 0], [3, 0, 2, 0, 0, 0], [-1, 0, 0, 0, 0, 0], [9] * 6]))
    # A token of the model takes 0.64 of one, three of them leave 1.08, and one of the table 0.96.
    assert rule(rows).tolist() == [1, 1, 3, 0, 0]
    with pytest.raises(ValueError, match="told of 5 texts and is asked about 1"):
        rule(rows[:1])


def test_the_closed_form_weighs_what_it_can_see_against_what_it_knows_on_average(trace: MixedTrace) -> None:
    rule = ClosedForm(charges_of(trace, drafting=0.2, reading=0.02), rate=2.0)
    sure, unsure, model = {"free": 1.0, "chance": 0.95}, {"free": 1.0, "chance": 0.03}, {"chance": 0.6}
    rows = np.array([row(0, d1=model, d3=sure), row(0, d1=model, d3=unsure), row(0, d3=unsure)])
    assert rule(rows).tolist() == [3, 1, 0]
    # After two tokens that are hardly ever right even a sure one is not worth reading.
    dear = ClosedForm(charges_of(trace, drafting=0.2, reading=0.15), rate=2.0)
    begun = {**sure, "drafting": 1.0}
    assert dear(np.array([row(0, d3=sure)])).tolist() == [3]
    assert dear(np.array([row(2, 0.05, d3=begun)])).tolist() == [0]
    assert dear(np.array([row(2, 0.95, d3=begun)])).tolist() == [3]


def test_the_bandit_tries_every_arm_and_keeps_to_it_for_a_round() -> None:
    arms = [FixedChoice(), FixedChoice((1,), (2,), (0,)), FixedChoice((2,), (1,), (0,))]
    bandit = DraftBandit(arms)
    first, second = row(0, d1={}, d2={}), row(1, d1={"drafting": 1}, d2={})
    assert bandit(np.array([first, first, first])).tolist() == [0, 1, 2]
    assert bandit(np.array([first, second, second])).tolist() == [0, 1, 0]
    for emitted, seconds in ((1, 1.0), (3, 1.2), (1, 1.1)):
        bandit.verified(np.array([(1, 3, 1).index(emitted)]), np.array([emitted]), np.array([seconds]))
    for _ in range(60):
        arm = bandit(np.array([first, first, first])).tolist()
        tokens = np.array([{0: 1, 1: 3, 2: 1}[choice] for choice in arm])
        bandit.verified(None, tokens, np.array([1.1, 1.1, 1.1]))
    assert bandit.favourite == arms[1]


@pytest.mark.parametrize("temperature", ["", "@1.0"])
def test_no_rule_beats_the_clairvoyant(temperature: str) -> None:
    prompts = prompts_of(made_up_mixed(f"tiny/prose{temperature}", longest=LONGEST, tokens=24), passes=3)
    chosen = choose_rules(prompts)
    rules: list[ChoiceRule] = [*lone_drafts(prompts), *chosen.simple.values(), chosen.bandit]
    best = max(decoded.throughput for decoded in prompts.decode(rules))
    assert 1.2 < best < oracle(prompts)[1].throughput


def test_the_best_numbers_of_every_rule_are_chosen(trace: MixedTrace) -> None:
    prompts = prompts_of(trace)
    chosen = choose_rules(prompts).simple
    reached = {name: prompts.decode([rule])[0].throughput for name, rule in chosen.items()}
    assert reached["single"] == max(decoded.throughput for decoded in prompts.decode(lone_drafts(prompts)))
    assert reached["hybrid"] > 1.02 * reached["single"]
    tried = [
        FixedChoice((look_up, model), (length, long), (matched, 0))
        for look_up in (3, 4)
        for model in (1, 2)
        for length in (1, 2, 4)
        for long in (0, 1, 2, 4)
        for matched in (1, 2, 3)
    ]
    assert reached["hybrid"] > 0.97 * max(decoded.throughput for decoded in prompts.decode(tried))


def test_rules_side_by_side_do_as_they_do_alone(trace: MixedTrace) -> None:
    prompts = prompts_of(trace)
    rules: list[ChoiceRule] = [FixedChoice((1,), (2,), (0,)), ClosedForm(prompts.charges, 1.5), FixedChoice()]
    together = [decoded.throughput for decoded in prompts.decode(rules)]
    assert together == pytest.approx([prompts.decode([rule])[0].throughput for rule in rules])
    assert together[2] == pytest.approx(1.0)


def test_a_pair_without_a_look_up_or_without_a_model_has_a_hybrid_too() -> None:
    for free in ((False, False), (True, True)):
        prompts = prompts_of(made_up_mixed(free=free, right=(0.7, 0.8), prompts=2, tokens=24))
        hybrid = choose_rules(prompts).simple["hybrid"]
        assert prompts.decode([hybrid])[0].throughput > 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda trace: ClosedForm(charges_of(trace), -1.0), "rate must be finite"),
        (lambda trace: ChoiceOracle(charges_of(trace), float("nan")), "rate must be finite"),
        (lambda trace: DraftBandit([]), "at least 1 arm"),
    ],
)
def test_impossible_rules_are_refused(
    make: Callable[[MixedTrace], ChoiceRule], message: str, trace: MixedTrace
) -> None:
    with pytest.raises(ValueError, match=message):
        make(trace)
