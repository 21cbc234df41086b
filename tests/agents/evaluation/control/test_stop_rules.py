"""The rules that a learned one must beat, on features made by hand and on traces whose best draft is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from specgym.agents.evaluation.control.stop_baselines import (
    Clairvoyant,
    ReplayedPrompts,
    UpperConfidenceBound,
    oracle,
    simple_rules,
)
from specgym.decoding.decoders.stop_rules import DraftTracker, FixedLength, Rows, StopRule
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs.recordings.trace import Trace

ROUND = 1 + 0.2 * np.arange(9)
"""Seconds of a round by drafted tokens, over those of a plain one."""


def features(*places: int) -> np.ndarray:
    tracker = DraftTracker(len(places), 0.2)
    for row, place in enumerate(places):
        for _ in range(place):
            tracker.drafted(0.5, 1.0, rows=np.array([row]))
    return tracker.features


def play(rule: StopRule, rounds: int, chance: float, seed: int = 0) -> None:
    """One draft after another, of which each token is kept with the same chance."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        place = 1
        while not rule(features(place))[0]:
            place += 1
        kept = (rng.random(place) < chance).cumprod().sum()
        rule.verified(np.array([0]), np.array([place]), np.array([kept + 1]), ROUND[[place]].astype(np.float64))


def best_length(chance: float) -> int:
    lengths = np.arange(1, 9)
    tokens = (1 - chance ** (lengths + 1)) / (1 - chance)
    return int(lengths[(tokens / ROUND[1:]).argmax()])


@pytest.mark.parametrize("chance", [0.2, 0.8])
def test_the_bandit_finds_the_best_arm(chance: float) -> None:
    bandit = UpperConfidenceBound(8)
    play(bandit, 6000, chance)
    assert bandit.favourite == best_length(chance)


def test_the_bandit_tries_every_arm_once_before_any_again_also_side_by_side() -> None:
    bandit = UpperConfidenceBound(3)
    bandit.start(3, None)
    assert bandit(features(1, 1, 1)).tolist() == [True, False, False]
    assert bandit(features(1, 2, 2)).tolist() == [True, True, False]
    assert bandit(features(1, 2, 3)).tolist() == [True, True, True]


def test_the_bandit_keeps_its_length_until_the_round_is_over() -> None:
    bandit = UpperConfidenceBound(2)
    assert bandit(features(1)).tolist() == [True]
    assert bandit(features(1)).tolist() == [True]
    bandit.verified(None, np.array([1]), np.array([1]), np.array([1.2]))
    assert bandit(features(1)).tolist() == [False]


def test_the_bandit_forgets_when_it_starts_afresh() -> None:
    bandit = UpperConfidenceBound(8)
    play(bandit, 300, 0.1)
    assert bandit.favourite == 1
    bandit.start(1, None)
    play(bandit, 3000, 0.9)
    assert bandit.favourite > 3


def test_the_oracle_drafts_what_is_acceptable_and_worth_its_time() -> None:
    cheap, dear = Clairvoyant(ROUND, rate=1.5), Clairvoyant(1 + 0.8 * np.arange(9), rate=1.5)
    remaining = np.array([2, 0, -1, 30])
    for rule in (cheap, dear):
        rule.foresee(remaining)
    places = features(1, 3, 2, 8)
    assert cheap(places).tolist() == [False, True, True, True]  # the last one is as long as it may be
    assert dear(places).tolist() == [True, True, True, True]


def test_the_oracle_goes_on_over_a_dear_token_to_cheap_ones() -> None:
    stepped = np.array([1.0, 1.2, 2.4, 2.5, 2.6])
    rule = Clairvoyant(stepped, rate=1.0)
    for remaining, stop in ((1, True), (2, False), (3, False)):
        rule.foresee(np.array([remaining]))
        assert rule(features(1)).tolist() == [stop]


def test_the_oracle_must_be_told() -> None:
    with pytest.raises(ValueError, match="told of 0 drafts and is asked about 1"):
        Clairvoyant(ROUND, rate=1.0)(features(1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_rule_beats_the_oracle(
    telling_trace: Callable[..., Trace], cheap_drafts: LatencyProfile, temperature: float
) -> None:
    prompts = ReplayedPrompts(
        telling_trace(3, temperature=temperature), cheap_drafts, max_draft_length=8, tokens=48, passes=4
    )
    rules = [rule for family in simple_rules(8).values() for rule in family]
    best = max(decoded.throughput for decoded in prompts.decode([*rules, UpperConfidenceBound(8)]))
    assert 1.2 < best < oracle(prompts)[1].throughput


def test_rules_side_by_side_do_as_they_do_alone(
    telling_trace: Callable[..., Trace], cheap_drafts: LatencyProfile
) -> None:
    prompts = ReplayedPrompts(telling_trace(4), cheap_drafts, max_draft_length=8, tokens=48)
    rules: list[StopRule] = [FixedLength(1), FixedLength(5), UpperConfidenceBound(8)]
    together = [decoded.throughput for decoded in prompts.decode(rules)]
    assert together == pytest.approx([prompts.decode([rule])[0].throughput for rule in rules])


def test_a_round_takes_what_the_profile_says(
    make_drafted_trace: Callable[..., Trace], cheap_drafts: LatencyProfile
) -> None:
    trace = make_drafted_trace(np.ones((12, 3)), 0.5, prompts=1)
    decoded = ReplayedPrompts(trace, cheap_drafts, max_draft_length=3, tokens=12).decode([FixedLength(3)])[0]
    assert decoded.tokens.tolist() == [12]
    assert decoded.rounds.tolist() == [3]
    assert decoded.seconds.tolist() == pytest.approx([3 * 1.6])
    assert decoded.draft_length == 3
    assert decoded.draft_acceptance_rate == 1


def test_the_bandit_is_told_the_seconds_of_whole_rounds(
    make_drafted_trace: Callable[..., Trace], cheap_drafts: LatencyProfile
) -> None:
    seen: list[tuple[int, float]] = []

    class Watched(UpperConfidenceBound):
        def verified(
            self, rows: Rows, drafted: NDArray[np.int64], emitted: NDArray[np.int64], seconds: NDArray[np.float64]
        ) -> None:
            seen.extend(zip(drafted.tolist(), seconds.tolist(), strict=True))
            super().verified(rows, drafted, emitted, seconds)

    trace = make_drafted_trace(np.zeros((40, 4)), 0.5, prompts=1)
    ReplayedPrompts(trace, cheap_drafts, max_draft_length=4, tokens=40).decode([Watched(4)])
    assert {drafted for drafted, _ in seen} >= {1, 2, 3, 4}
    for drafted, seconds in seen[:-1]:  # the last step emits the text's last token besides, without a draft
        assert seconds == pytest.approx(0.010 + 0.002 * drafted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UpperConfidenceBound(0), "longest must be at least 1"),
        (lambda: UpperConfidenceBound(4, exploration=0), "exploration must be finite and above 0"),
        (lambda: Clairvoyant([1.0], 1.0), "for 0 and 1 drafted tokens at least"),
        (lambda: Clairvoyant(ROUND, float("nan")), "rate must be finite"),
    ],
)
def test_impossible_rules_are_refused(make: Callable[[], StopRule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
