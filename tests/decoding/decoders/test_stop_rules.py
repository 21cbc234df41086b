"""The features of a draft, and the rules that end one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from specgym.decoding.decoders.stop_rules import (
    FEATURES,
    RECENT,
    ConfidenceBelow,
    DraftTracker,
    EntropyAbove,
    FixedLength,
    ProductBelow,
    StopRule,
)

NAMES = [feature.name for feature in FEATURES]
DRAFTS = 5


def row(tracker: DraftTracker, number: int = 0) -> dict[str, float]:
    """One draft's features by name."""
    return dict(zip(NAMES, tracker.features[number].tolist(), strict=True))


def test_the_features_keep_their_order() -> None:
    """Policies and recordings are arrays of these columns."""
    assert NAMES == [
        "confidence",
        "entropy",
        "product",
        "place",
        "recent_acceptance",
        "mean_acceptance_length",
        "cost_ratio",
        "batch_size",
        "matched",
        "drawn_probability",
        "temperature",
    ]


def test_a_text_begins_with_nothing_known() -> None:
    tracker = DraftTracker(2, 0.25, 8, [0.5, 9.0])
    start = {**dict.fromkeys(NAMES, 1.0), "entropy": 0, "place": 0, "matched": 0, "recent_acceptance": 0.5}
    start |= {"mean_acceptance_length": 2, "cost_ratio": 0.25, "batch_size": 3}
    assert row(tracker) == {**start, "temperature": 0.5}
    assert row(tracker, 1) == {**start, "temperature": 2}  # of the largest that is told apart
    assert tracker.features.dtype == np.float32


def test_a_draft_multiplies_its_confidences_and_counts_its_tokens() -> None:
    tracker = DraftTracker(1, 0.1)
    tracker.drafted(0.5, 1.5, 7, 0.125)
    tracker.drafted(0.25, 2.5, 3, 0.0625)
    known = row(tracker)
    assert (known["confidence"], known["entropy"], known["product"], known["place"]) == (0.25, 2.5, 0.125, 2)
    assert (known["matched"], known["drawn_probability"]) == (3, 0.0625)


def test_a_round_moves_the_averages_and_ends_the_draft() -> None:
    tracker = DraftTracker(1, 0.1)
    tracker.drafted(0.5, 1.0, 3, 0.5)
    tracker.verified(drafted=4, accepted=3, emitted=4)
    known = row(tracker)
    assert known["recent_acceptance"] == pytest.approx(0.5 + RECENT * (0.75 - 0.5))
    assert known["mean_acceptance_length"] == pytest.approx(2 + RECENT * (4 - 2))
    assert (known["confidence"], known["entropy"], known["product"], known["place"]) == (1, 0, 1, 0)
    assert (known["matched"], known["drawn_probability"]) == (0, 1)


def test_a_round_without_a_draft_says_nothing_about_acceptance() -> None:
    tracker = DraftTracker(1, 0.1)
    tracker.verified(drafted=0, accepted=0, emitted=1)
    assert row(tracker)["recent_acceptance"] == 0.5
    assert row(tracker)["mean_acceptance_length"] == pytest.approx(2 - RECENT)


def test_forgetting_leaves_the_other_texts_and_the_costs() -> None:
    tracker = DraftTracker(3, [0.1, 0.2, 0.3], [1, 2, 4])
    tracker.drafted(0.5, 1.0)
    tracker.verified(2, 2, 3)
    tracker.drafted(0.5, 1.0)
    before = tracker.features.copy()
    tracker.forget(np.array([1]))
    assert np.array_equal(tracker.features[[0, 2]], before[[0, 2]])
    assert np.array_equal(tracker.features[1], DraftTracker(1, 0.2, 2).features[0])
    tracker.set_costs(0.4, 16, np.array([True, False, False]))
    assert tracker.features[:, 6:8].tolist() == np.array([[0.4, 4], [0.2, 1], [0.3, 2]], dtype=np.float32).tolist()


def test_every_feature_stays_within_its_bounds() -> None:
    tracker = DraftTracker(1, 100.0, 1e6)
    for _ in range(40):
        tracker.drafted(1.5, 99.0, 99, 1.5)
        assert all(feature.low <= row(tracker)[feature.name] <= feature.high for feature in FEATURES)
    assert (row(tracker)["place"], row(tracker)["cost_ratio"], row(tracker)["batch_size"]) == (32, 4, 10)
    for _ in range(100):
        tracker.verified(40, 40, 41)
        tracker.drafted(-1.0, -1.0, -1, -1.0)
        assert all(feature.low <= row(tracker)[feature.name] <= feature.high for feature in FEATURES)


shares = st.floats(0, 1, width=32)
drafted_tokens = st.tuples(shares, st.floats(0, 15), st.integers(0, 40), shares)
masks = st.lists(st.booleans(), min_size=DRAFTS, max_size=DRAFTS)
events = st.one_of(
    st.tuples(
        st.just("drafted"),
        masks,
        st.lists(drafted_tokens, min_size=5, max_size=5),
    ),
    st.tuples(
        st.just("verified"),
        masks,
        st.lists(st.tuples(st.integers(0, 16), shares, st.integers(0, 1)), min_size=5, max_size=5),
    ),
    st.tuples(st.just("forget"), masks, st.just([()] * DRAFTS)),
)


@given(history=st.lists(events, max_size=12), by_index=st.booleans())
def test_drafts_side_by_side_have_the_features_that_each_has_alone(
    history: list[tuple[str, list[bool], list[Any]]], by_index: bool
) -> None:
    costs = np.linspace(0, 5, DRAFTS)
    together = DraftTracker(DRAFTS, costs, 2.0 ** np.arange(DRAFTS))
    alone = [DraftTracker(1, costs[number], 2.0**number) for number in range(DRAFTS)]
    for event, mask, values in history:
        if event == "verified":  # drafted, accepted, emitted
            values = [(k, round(share * k), round(share * k) + item) for k, share, item in values]
        chosen = np.flatnonzero(mask)
        columns = [np.array(column) for column in zip(*(values[number] for number in chosen), strict=True)]
        if len(chosen):
            getattr(together, event)(*columns, rows=chosen if by_index else np.array(mask))
        for number in chosen:
            getattr(alone[number], event)(*values[number])
    assert np.array_equal(together.features, np.concatenate([tracker.features for tracker in alone]))


def test_all_drafts_are_meant_where_no_rows_are_given() -> None:
    everyone, listed = DraftTracker(3, 0.1), DraftTracker(3, 0.1)
    values = np.array([0.2, 0.4, 0.6])
    everyone.drafted(values, values)
    listed.drafted(values, values, np.arange(3))
    everyone.verified(2, np.array([0, 1, 2]), np.array([1, 2, 3]))
    listed.verified(2, np.array([0, 1, 2]), np.array([1, 2, 3]), np.arange(3))
    assert np.array_equal(everyone.features, listed.features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.1, 1), "environments must be a whole number of at least 1, got 0"),
        ((1, -0.1, 1), "cost_ratio must be finite and at least 0"),
        ((1, math.nan, 1), "cost_ratio must be finite and at least 0"),
        ((2, [0.1, math.inf], 1), "cost_ratio must be finite and at least 0"),
        ((1, 0.1, 0), "batch_size must be finite and at least 1"),
        ((1, 0.1, math.nan), "batch_size must be finite and at least 1"),
        ((1, 0.1, 1, -0.5), "temperature must be finite and at least 0"),
        ((2, 0.1, 1, [0.5, math.inf]), "temperature must be finite and at least 0"),
    ],
)
def test_a_tracker_of_nothing_or_without_costs_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftTracker(*arguments)


def table(column: str, values: list[float]) -> NDArray[np.float32]:
    """Features of several drafts that differ in one."""
    features = np.zeros((len(values), len(FEATURES)), dtype=np.float32)
    features[:, NAMES.index(column)] = values
    return features


RULES: list[tuple[StopRule, str, list[float], list[bool], str]] = [
    (FixedLength(3), "place", [1, 2, 3, 4], [False, False, True, True], "length 3"),
    (ConfidenceBelow(0.5), "confidence", [0.25, 0.5, 1], [True, False, False], "confidence < 0.5"),
    (EntropyAbove(1.5), "entropy", [0, 1.5, 2], [False, False, True], "entropy > 1.5"),
    (ProductBelow(0.5), "product", [0.25, 0.5, 1], [True, False, False], "product < 0.5"),
]


@pytest.mark.parametrize(("rule", "column", "values", "expected", "name"), RULES)
def test_a_rule_stops_where_it_says(
    rule: StopRule, column: str, values: list[float], expected: list[bool], name: str
) -> None:
    decided = rule(table(column, values))
    assert decided.dtype == np.bool_
    assert decided.tolist() == expected
    assert rule.name == name


@pytest.mark.parametrize("rule", [ConfidenceBelow(0.0), ProductBelow(0.0), EntropyAbove(12.0)])
def test_a_rule_at_its_end_never_stops(rule: StopRule) -> None:
    features = np.tile(np.array([feature.low for feature in FEATURES], dtype=np.float32), (1, 1))
    features[0, NAMES.index("entropy")] = 12
    assert not rule(features).any()


@given(bound=st.floats(0, 1), scale=st.floats(0.05, 2), entropy=st.floats(0, 12, width=32))
def test_the_entropy_rule_is_adaedls_bound_on_the_acceptance(bound: float, scale: float, entropy: float) -> None:
    lower_bound = 1 - math.sqrt(scale * entropy)
    if abs(lower_bound - bound) > 1e-5:
        assert bool(EntropyAbove.from_bound(bound, scale)(table("entropy", [entropy]))[0]) == (lower_bound < bound)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedLength(0), "length must be a whole number from 1 to 32, got 0"),
        (lambda: FixedLength(33), "length must be a whole number from 1 to 32, got 33"),
        (lambda: FixedLength(2.5), "length must be a whole number"),  # type: ignore[arg-type]
        (lambda: ConfidenceBelow(1.5), "threshold must be a number from 0 to 1, got 1.5"),
        (lambda: ConfidenceBelow(math.nan), "threshold must be a number from 0 to 1"),
        (lambda: ProductBelow(-0.1), "threshold must be a number from 0 to 1"),
        (lambda: EntropyAbove(-1.0), "threshold must be a finite number of at least 0, got .*an entropy in nats"),
        (lambda: EntropyAbove(math.inf), "threshold must be a finite number of at least 0, got .*an entropy in nats"),
        (lambda: EntropyAbove.from_bound(1.1), "bound must be a number from 0 to 1"),
        (lambda: EntropyAbove.from_bound(0.5, 0.0), "scale must be a finite number above 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
