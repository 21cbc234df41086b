"""The rule that weighs a drafted token's expected gain against its cost, and the chances that it goes by."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgym.decoding.decoders.expected_gain import BINS, LEVELS, ExpectedGain, KeepChances, bins_of, levels_of
from specgym.decoding.decoders.stop_rules import ConfidenceBelow, DraftTracker, StopRule
from specgym.decoding.decoders.threshold import ThresholdDecoder
from specgym.decoding.decoders.traits import Stop
from specgym.decoding.drafts.copying import PromptLookupDrafter
from specgym.decoding.latency.profile import LatencyProfileError
from specgym.decoding.loading.pair import Pair
from tests.helpers.table_models import TableModel, random_table
from tests.helpers.toy_profile import charged, toy_profile

PRIOR = 2.0
LONGEST = 8
ASSUMED = KeepChances.assumed()


def flat(chance: float) -> KeepChances:
    """Chances that are alike whatever the confidence and the tolerance."""
    return KeepChances(np.full((LEVELS, BINS), chance), np.full(LEVELS, chance))


def rule(drafting: float = 0.1, chances: KeepChances = ASSUMED, tolerance: float = 0.0) -> ExpectedGain:
    return ExpectedGain.of(toy_profile(drafting, chances=chances), LONGEST, tolerance)


# Chances.


def test_bins_are_of_equal_width_and_hold_what_lies_beyond() -> None:
    confidence = np.array([0.0, 0.0624, 0.0625, 0.5, 0.99, 1.0, -0.1, 1.2], np.float32)
    assert bins_of(confidence).tolist() == [0, 0, 1, 8, 15, 15, 0, 15]
    assert bins_of(confidence.reshape(2, 4)).shape == (2, 4)
    assert bins_of(confidence).dtype == np.uint8


def test_the_level_of_a_tolerance_is_the_nearest() -> None:
    tolerances = np.array([0.0, 0.024, 0.026, 0.3, 0.999, 1.0, -5.0, 2.0])
    expected = [0, 0, 1, 6, 20, 20, 0, 20]
    assert levels_of(tolerances).tolist() == expected
    assert [levels_of(tolerance) for tolerance in tolerances.tolist()] == expected


@given(tolerance=st.floats(0, 1))
def test_levels_are_the_same_for_numbers_and_arrays(tolerance: float) -> None:
    assert levels_of(np.array([tolerance])).tolist() == [levels_of(tolerance)]
    assert abs(levels_of(tolerance) / (LEVELS - 1) - tolerance) <= 0.5 / (LEVELS - 1) + 1e-9


def test_of_a_draft_that_nobody_measured_confidence_is_taken_at_its_word() -> None:
    assert ASSUMED.kept[0] == pytest.approx((np.arange(BINS) + 0.5) / BINS)
    assert ASSUMED.kept[-1] == pytest.approx(1)
    assert ASSUMED.kept[10] == pytest.approx(0.5 + ASSUMED.kept[0] / 2)
    assert ASSUMED.average == pytest.approx(ASSUMED.kept.mean(1))


def counted(
    bins: list[list[int]], passes: list[list[float]], distance: list[list[float]], drafted: list[int]
) -> KeepChances:
    """`KeepChances.fit` token by token."""
    kept, average = np.empty((LEVELS, BINS)), np.empty(LEVELS)
    for level in range(LEVELS):
        tried, well = [PRIOR] * BINS, [PRIOR * chance for chance in ASSUMED.kept[level].tolist()]
        all_tried, all_well = PRIOR, PRIOR * float(ASSUMED.average[level])
        for number, count in enumerate(drafted):
            reached = 1.0
            for place in range(count):
                near = distance[number][place] <= np.float32(level / (LEVELS - 1))
                chance = 1.0 if near else passes[number][place]
                tried[bins[number][place]] += reached
                well[bins[number][place]] += reached * chance
                all_tried, all_well = all_tried + reached, all_well + reached * chance
                reached *= chance
        kept[level] = np.array(well) / np.array(tried)
        average[level] = all_well / all_tried
    return KeepChances(kept, average)


@pytest.mark.parametrize("sampled", [False, True])
def test_chances_are_the_share_kept_of_the_tokens_that_were_reached(sampled: bool) -> None:
    rng = np.random.default_rng(0)
    bins = rng.integers(0, BINS, (30, 5))
    passes = rng.random((30, 5)) if sampled else (rng.random((30, 5)) < 0.6).astype(float)
    distance, drafted = rng.random((30, 5)).astype(np.float32), rng.integers(0, 6, 30)
    fitted = KeepChances.fit(bins, passes, distance, drafted)
    expected = counted(bins.tolist(), passes.tolist(), distance.tolist(), drafted.tolist())
    np.testing.assert_allclose(fitted.kept, expected.kept, atol=1e-6)
    np.testing.assert_allclose(fitted.average, expected.average, atol=1e-6)


def test_where_nothing_was_drafted_the_prior_stands_and_much_overrules_it() -> None:
    sure = np.full((1000, 1), BINS - 1)
    never, always = np.zeros((1000, 1)), np.ones((1000, 1))
    fitted = KeepChances.fit(sure, never, always, np.ones(1000, np.int64))
    np.testing.assert_allclose(fitted.kept[:, :-1], ASSUMED.kept[:, :-1], rtol=1e-6)
    assert (fitted.kept[:-1, -1] < 0.003).all()
    assert fitted.kept[-1, -1] == 1  # a tolerance of 1 keeps everything
    nothing = KeepChances.fit(sure, never, always, np.zeros(1000, np.int64))
    np.testing.assert_allclose(nothing.kept, ASSUMED.kept, rtol=1e-6)
    np.testing.assert_allclose(nothing.average, ASSUMED.average, rtol=1e-6)


def test_a_larger_tolerance_never_keeps_less_of_a_single_token() -> None:
    rng = np.random.default_rng(1)
    shape = (200, 1)
    fitted = KeepChances.fit(rng.integers(0, BINS, shape), rng.random(shape), rng.random(shape), np.ones(200, int))
    assert (np.diff(fitted.kept, axis=0) >= -1e-7).all()


def test_chances_come_back_from_json_as_they_were() -> None:
    rng = np.random.default_rng(2)
    chances = KeepChances(rng.random((LEVELS, BINS)), rng.random(LEVELS))
    again = KeepChances.from_json(json.loads(json.dumps(chances.to_json())))
    assert np.array_equal(again.kept, chances.kept)
    assert np.array_equal(again.average, chances.average)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": np.zeros((LEVELS, BINS - 1))}, r"kept must have shape \(21, 16\), got \(21, 15\)"),
        ({"average": np.zeros(3)}, r"average must have shape \(21,\), got \(3,\)"),
        ({"kept": np.full((LEVELS, BINS), 1.1)}, "kept must hold probabilities"),
        ({"average": np.full(LEVELS, -0.1)}, "average must hold probabilities"),
        ({"average": np.full(LEVELS, math.nan)}, "average must hold probabilities"),
    ],
)
def test_what_is_no_table_of_chances_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeepChances(**{"kept": ASSUMED.kept, "average": ASSUMED.average, **change})


@pytest.mark.parametrize("content", [{}, {"kept": [[1.0]]}, {"kept": None, "average": None}, {"kept": [["a"]]}, 3])
def test_json_that_holds_no_chances_is_refused(content: Any) -> None:
    with pytest.raises(ValueError, match=r"chances|shape|float"):
        KeepChances.from_json(content)


# The rule.


def brute_force(confidences: list[float], drafting: float, chances: KeepChances, tolerance: float) -> int:
    """Length of a draft, as the class says it: token by token, in plain numbers."""
    level = levels_of(tolerance)
    reading = 0.02
    for drafted in range(1, LONGEST):
        kept = [float(chances.kept[level, int(min(c * BINS, BINS - 1))]) for c in confidences[:drafted]]
        products = [math.prod(kept[: place + 1]) for place in range(drafted)]
        seconds = 1.0 + drafted * (drafting + reading)
        worth = max((1 + sum(products)) / seconds, 1.0)
        brings, costs = products[-1] * float(chances.average[level]), drafting + reading
        if brings <= costs * worth:
            return drafted
    return LONGEST


confidences = st.lists(st.floats(0, 1, width=32), min_size=LONGEST, max_size=LONGEST)
fractions = st.floats(0, 1)
costs = st.floats(0, 0.9)


@given(confidences=confidences, drafting=costs, tolerance=fractions, seed=st.integers(0, 20))
def test_a_draft_ends_where_the_next_token_is_not_expected_to_pay(
    confidences: list[float], drafting: float, tolerance: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    chances = KeepChances(rng.random((LEVELS, BINS)) ** 0.2, rng.random(LEVELS) ** 0.2)
    item = rule(drafting, chances, tolerance)
    bins = bins_of(np.array([confidences], np.float32))
    length = int(item.lengths(bins, [levels_of(tolerance)])[0, 0])
    lengths = {brute_force(confidences, drafting * nudge, chances, tolerance) for nudge in (1 - 1e-9, 1, 1 + 1e-9)}
    assert length in lengths  # where both sides are as good as equal, rounding decides


@given(confidences=confidences, drafting=costs, dearer=costs, tolerance=fractions)
def test_a_dearer_draft_is_never_longer(
    confidences: list[float], drafting: float, dearer: float, tolerance: float
) -> None:
    bins, level = bins_of(np.array([confidences], np.float32)), [levels_of(tolerance)]
    cheap, dear = sorted((drafting, dearer))
    assert rule(dear).lengths(bins, level)[0, 0] <= rule(cheap).lengths(bins, level)[0, 0]


@given(chance=fractions, surer=fractions, drafting=costs)
def test_a_surer_draft_is_never_shorter(chance: float, surer: float, drafting: float) -> None:
    bins = np.zeros((1, LONGEST), np.uint8)
    low, high = sorted((chance, surer))
    assert rule(drafting, flat(low)).lengths(bins)[0, 0] <= rule(drafting, flat(high)).lengths(bins)[0, 0]


@given(confidences=confidences, place=st.integers(0, LONGEST - 1), drafting=costs)
def test_one_token_of_less_confidence_never_makes_a_draft_longer(
    confidences: list[float], place: int, drafting: float
) -> None:
    doubtful = [*confidences[:place], confidences[place] / 2, *confidences[place + 1 :]]
    lengths = rule(drafting).lengths(bins_of(np.array([confidences, doubtful], np.float32)), [0])[0]
    assert lengths[1] <= lengths[0]


def test_certain_drafts_that_cost_nothing_are_as_long_as_they_may_be_and_hopeless_ones_end_at_once() -> None:
    bins = np.zeros((1, LONGEST), np.uint8)
    assert (ExpectedGain.of(toy_profile(0.0, 0.0), LONGEST).lengths(bins, [LEVELS - 1]) == LONGEST).all()
    assert (rule(0.0, flat(1.0)).lengths(bins) == LONGEST).all()
    assert (rule(0.1, flat(0.0)).lengths(bins) == 1).all()
    assert (rule(2.0, flat(1.0)).lengths(bins) == 1).all()  # a token costs more than plain decoding takes for it


@given(
    drafts=st.lists(confidences, min_size=1, max_size=6),
    drafting=costs,
    tolerance=fractions,
)
def test_asked_token_by_token_drafts_side_by_side_end_where_lengths_says(
    drafts: list[list[float]], drafting: float, tolerance: float
) -> None:
    sure = np.array(drafts, np.float32)
    item = rule(drafting, tolerance=tolerance)
    expected = item.lengths(bins_of(sure), [levels_of(tolerance)])[0]
    item.start(len(drafts), 0)
    for _ in range(2):  # a new draft begins afresh
        tracker = DraftTracker(len(drafts), 0.1)
        ends = np.zeros(len(drafts), np.int64)
        for place in range(LONGEST):
            tracker.drafted(sure[:, place], 0.0)
            stops = item(tracker.features)
            assert stops.dtype == np.bool_
            ends[(ends == 0) & stops] = place + 1
        assert ends.tolist() == expected.tolist()


def test_each_level_of_the_tolerance_goes_by_its_own_chances() -> None:
    kept = np.zeros((LEVELS, BINS))
    kept[5] = 1.0
    chances = KeepChances(kept, kept[:, 0])
    bins = np.zeros((3, LONGEST), np.uint8)
    lengths = rule(0.01, chances).lengths(bins)
    assert lengths.shape == (LEVELS, 3)
    assert lengths.dtype == np.uint8
    assert (lengths[5] == LONGEST).all()
    assert (np.delete(lengths, 5, 0) == 1).all()
    assert rule(0.01, chances).lengths(bins, [5, 0])[:, 0].tolist() == [LONGEST, 1]


def test_without_chances_of_its_own_a_profile_is_served_by_assumed_ones() -> None:
    bins = np.arange(BINS, dtype=np.uint8)[:, None].repeat(LONGEST, 1)
    lengths = ExpectedGain.of(toy_profile(0.05), LONGEST).lengths(bins)
    assert np.array_equal(lengths, rule(0.05, ASSUMED).lengths(bins))
    assert len(np.unique(lengths)) > 3


@pytest.mark.parametrize(
    ("seconds", "plain", "message"),
    [
        ([1.0], 1.0, "seconds must be positive"),
        ([1.0, 0.0], 1.0, "seconds must be positive"),
        ([1.0, math.nan], 1.0, "seconds must be positive"),
        ([1.0, 1.1], 0.0, "plain_seconds must be positive, got 0"),
        ([1.0, 1.1], math.inf, "plain_seconds must be positive, got inf"),
    ],
)
def test_costs_that_make_no_sense_are_refused(seconds: list[float], plain: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpectedGain(seconds, plain, ASSUMED)


def test_it_names_itself_and_its_longest_draft_and_needs_no_entropy() -> None:
    item = rule()
    assert (item.name, item.longest, item.looks_at_entropy) == ("expected gain", LONGEST, False)


# In threshold decoding.

PROMPT = [1, 0, 1]


@pytest.fixture
def pair() -> Pair:
    """A target that repeats itself at times, and a draft that copies."""
    return Pair(TableModel(random_table(6, seed=1, spread=2.0)), PromptLookupDrafter(6, longest=2))


def drafted(decoder: ThresholdDecoder, fallback: float = 0.3) -> list[int]:
    generation = decoder.generate(PROMPT, max_new_tokens=40, seed=0, knobs={"fallback": fallback})
    return [round_.drafted for round_ in generation.rounds]


def test_a_decoder_drafts_as_long_as_the_rule_of_its_fallback_says(pair: Pair) -> None:
    kept = np.zeros((LEVELS, BINS))
    kept[10:] = 1.0
    decoder = charged(ThresholdDecoder(pair, LONGEST), toy_profile(chances=KeepChances(kept, kept[:, 0])))
    assert max(drafted(decoder, 0.2)) == 1
    assert drafted(decoder, 0.5) == drafted(ThresholdDecoder(pair, LONGEST, "never"), 0.5)
    assert max(drafted(decoder, 0.5)) > 2


def test_charged_anew_it_goes_by_the_new_costs(pair: Pair) -> None:
    decoder = charged(ThresholdDecoder(pair, LONGEST), toy_profile(drafting=2.0))
    assert max(drafted(decoder)) == 1
    assert max(drafted(charged(decoder, toy_profile(drafting=0.0, chances=flat(1.0))))) > 1


def test_uncharged_it_measures_its_pair_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measured(pair: Pair, **options: Any) -> Any:
        asked.append((pair, options))
        return toy_profile(drafting=2.0)

    monkeypatch.setattr("specgym.decoding.latency.measure.measured", measured)
    decoder = ThresholdDecoder(pair, LONGEST)
    assert asked == []
    assert max(drafted(decoder)) == max(drafted(decoder)) == 1
    assert [subject for subject, _ in asked] == [pair]
    drafted(charged(ThresholdDecoder(pair, LONGEST)))
    drafted(ThresholdDecoder(pair, LONGEST, "never"))
    drafted(ThresholdDecoder(pair, LONGEST, ConfidenceBelow(0.5)))
    assert len(asked) == 1


def test_never_and_a_rule_of_ones_own_take_no_notice_of_costs(pair: Pair) -> None:
    rules: tuple[Stop | StopRule, ...] = ("never", ConfidenceBelow(0.7))
    for stop in rules:
        decoder = ThresholdDecoder(pair, LONGEST, stop)
        before = drafted(decoder)
        assert drafted(charged(decoder, toy_profile(drafting=2.0))) == before
        assert max(before) > 1


def test_a_profile_of_other_rounds_and_an_unknown_stop_are_refused(pair: Pair) -> None:
    other = toy_profile()
    object.__setattr__(other, "kind", "lookahead")
    with pytest.raises(LatencyProfileError, match="made for lookahead rounds, and chain rounds are to be charged"):
        ThresholdDecoder(pair).charge_by(other)
    with pytest.raises(ValueError, match="stop must be one of 'expected-gain', 'never', got 'sometimes'"):
        ThresholdDecoder(pair, stop="sometimes")  # type: ignore[arg-type]
