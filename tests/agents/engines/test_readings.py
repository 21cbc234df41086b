"""Readings and facts that follow from an engine's counts."""

from __future__ import annotations

import numpy as np
import pytest

from specgym.agents.engines.readings import Counts, RoundCost, facts_of, readings_of, rounds_with_draft
from specgym.decoding import LOOKUP, PromptSet
from specgym.envs import EngineBackend
from tests.helpers.fake_engine import PLAIN_SECONDS, Behaviour, FakeEngine

TEXTS = PromptSet("texts", tuple(f"train {place}" for place in range(40)), ("test",), "made up", "CC0")


def counts_of(length: int, **behaviour: float) -> Counts:
    backend = EngineBackend(FakeEngine(behaviour=Behaviour(**behaviour)), [TEXTS], max_new_tokens=100)  # type: ignore[arg-type]
    counts = Counts.of(backend.compare({"num_tokens": length}, [(0, place) for place in range(40)]))
    assert counts is not None
    return counts


def test_a_share_of_right_tokens_is_recovered_at_every_place() -> None:
    counts = counts_of(4, alpha=0.7)
    readings = readings_of(counts, counts.rounds, 4)
    rates = readings.kept[0, :4] / readings.reached[0, :4]
    np.testing.assert_allclose(rates, 0.7, atol=0.04)  # 1,300 rounds: a standard error of about 0.012
    assert readings.reached[0, 4:].sum() == 0
    assert readings.kept.sum() == pytest.approx(counts.accepted, abs=4)
    assert readings.drafts[0] @ np.arange(17) == pytest.approx(counts.drafted, rel=0.02)


def test_drafts_that_end_early_are_told_from_wrong_ones() -> None:
    counts = Counts(tokens=1800, rounds=1000, drafted=1900, accepted=800, seconds=1.0, plain_token=0.001)
    readings = readings_of(counts, 1000, 8)  # drafts of 1.9 tokens where 8 were allowed
    by_length = readings_of(counts._replace(drafted=8000), 1000, 8)
    rate = readings.kept.sum() / readings.reached.sum()
    assert rate > by_length.kept.sum() / by_length.reached.sum() + 0.05
    assert readings.kept.sum() == pytest.approx(800, abs=8)


@pytest.mark.parametrize("lengths", [(3, 12), (16, 4)])
def test_the_cost_of_a_drafted_token_follows_from_two_settings(lengths: tuple[int, int]) -> None:
    engine = FakeEngine()
    costs = []
    for length in lengths:
        counts = counts_of(length, token_cost=0.2)
        assert counts.plain_token == pytest.approx(PLAIN_SECONDS)
        costs.append(RoundCost.of(counts, counts.rounds))
    facts = facts_of(engine, 0.0, costs)
    assert facts.short_round[0] == pytest.approx(1.8)
    assert facts.long_round[0] == pytest.approx(4.2)
    assert facts.fixed[0]
    alone = facts_of(engine, 0.0, costs[:1])
    assert alone.short_round[0] == pytest.approx(1.8)  # on the line from a plain token


def test_rounds_of_a_look_up_without_a_match_cost_a_plain_token() -> None:
    engine = FakeEngine(draft=LOOKUP)
    counts = Counts(tokens=150, rounds=100, drafted=200, accepted=50, seconds=1.25, plain_token=0.01)
    drafting = rounds_with_draft(engine, {"num_tokens": 4.0}, counts)
    assert drafting == 50
    assert RoundCost.of(counts, drafting) == pytest.approx((4.0, 1.5))
    assert rounds_with_draft(FakeEngine(), {"num_tokens": 4.0}, counts) == 100


def test_an_engine_without_counts_has_none() -> None:
    backend = EngineBackend(FakeEngine(behaviour=Behaviour(counts=False)), [TEXTS])
    assert Counts.of(backend.compare({"num_tokens": 3}, [(0, 0)])) is None
