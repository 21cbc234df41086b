"""Rules that choose between drafts: at work in decoding, and the features that they see."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import PreTrainedModel

from specgym.decoding import (
    BINS,
    CHOICE_FEATURES,
    FEATURES,
    MOST_DRAFTS,
    SLOT_FEATURES,
    AutoregressiveDecoder,
    ChoiceRule,
    ChoiceTracker,
    FixedLength,
    NGramDrafter,
    Pair,
    PromptLookupDrafter,
    Rows,
    Sampling,
    SpeculativeDecoder,
    ThresholdDecoder,
    drafts_of,
)
from specgym.decoding.drafts.mixed import DraftChoice
from tests.helpers.known_distributions import PROMPT, MakeTable, distance, exact_joint, make_drafter, walk
from tests.helpers.made_up_mixed import made_up_costs, made_up_mixed

NAMES = [feature.name for feature in CHOICE_FEATURES]
SLOTS = [feature.name for feature in SLOT_FEATURES]
CONFIDENCE, ENTROPY, PRODUCT, PLACE, DRAWN = map(
    NAMES.index, ("confidence", "entropy", "product", "place", "drawn_probability")
)


def slot(features: NDArray[np.float32], draft: int, name: str) -> float:
    """A feature of a draft of the first text."""
    return float(features[0, NAMES.index(f"draft_{draft + 1}_{name}")])


class Recorded(ChoiceRule):
    """A rule by a function of the features, which notes what it is told."""

    def __init__(self, choose: Callable[[NDArray[np.float32]], int]) -> None:
        self.choose = choose
        self.seen: list[NDArray[np.float32]] = []
        self.started: list[tuple[int, int | None]] = []
        self.rounds: list[tuple[int, float]] = []

    @property
    def name(self) -> str:
        """`recorded`."""
        return "recorded"

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        self.seen.append(features.copy())
        return np.array([self.choose(features)])

    def start(self, environments: int, seed: int | None) -> None:
        self.started.append((environments, seed))

    def verified(self, rows: Rows, emitted: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        assert rows is None
        self.rounds.append((int(emitted[0]), float(seconds[0])))


def by_what_was_drawn(features: NDArray[np.float32]) -> int:
    """The model (2) until it draws something unlikely, then the table (1), and two tokens at most."""
    if features[0, PLACE] >= 2:
        return 0
    return 1 if features[0, DRAWN] < 0.4 else 2


@pytest.mark.parametrize("kind", ["speculative", "threshold"])
def test_a_choice_that_sees_what_was_drawn_leaves_the_joint_law_as_it_is(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable, kind: str
) -> None:
    target = make_table(3, seed=1, spread=1.2)
    pair = Pair(target, [make_drafter(draft, make_table, 3) for draft in ("suffix", "model")])
    rule = Recorded(by_what_was_drawn)
    decoder = SpeculativeDecoder(pair, choice=rule) if kind == "speculative" else ThresholdDecoder(pair, choice=rule)
    knobs = {} if kind == "speculative" else {"fallback": 0.0, "rollback": 1.0}
    expected = exact_joint(target, Sampling(), PROMPT, 3)
    assert distance(walk(monkeypatch, decoder, Sampling(), 3, knobs)[0], expected) < 1e-5
    assert {by_what_was_drawn(features) for features in rule.seen} == {1, 2}

    def looks_at_what_it_may_drop(self: DraftChoice, number: int, with_entropy: bool = True) -> Any:
        step = real(self, number, with_entropy)
        return None if step is not None and step.drawn_probability() < 0.5 else step

    real = DraftChoice.draft
    monkeypatch.setattr(DraftChoice, "draft", looks_at_what_it_may_drop)
    assert distance(walk(monkeypatch, decoder, Sampling(), 3, knobs)[0], expected) > 0.01


@pytest.fixture(scope="module")
def pair(make_model: Callable[..., PreTrainedModel], make_noisy: Callable[..., PreTrainedModel]) -> Pair:
    """A target with a model, a table and a look-up that are often right."""
    model = make_model("llama", layers=1, vocabulary=16, hidden=32, context=128, spread=0.6)
    text = AutoregressiveDecoder(Pair(model)).generate([1, 2, 3], max_new_tokens=30).tokens
    drafts: list[Any] = [make_noisy(model, 0.2), NGramDrafter.fit([text[:12]], 16, order=3), PromptLookupDrafter(16, 2)]
    return Pair(model, drafts, name="mixed")


def test_a_rule_is_asked_before_every_token_and_told_of_every_round(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = np.random.default_rng(0)
    rule = Recorded(lambda features: int(turns.integers(0, 5)))
    decoder = SpeculativeDecoder(pair, 6, choice=rule)
    assert [knob.name for knob in decoder.knobs] == ["draft_length"]
    plain = AutoregressiveDecoder(pair)
    for prompt in ([1, 2, 3], [4, 5]):
        rule.rounds, rule.seen = [], []
        generation = decoder.generate(prompt, max_new_tokens=30)
        assert generation.tokens == plain.generate(prompt, max_new_tokens=30).tokens
        assert [emitted for emitted, _ in rule.rounds] == [len(round_.tokens) for round_ in generation.rounds]
        assert all(seconds > 0 for _, seconds in rule.rounds)
        assert max(round_.drafted for round_ in generation.rounds) > 1
        begun = [features for features in rule.seen if features[0, PLACE] == 0]
        assert len(begun) in (len(generation.rounds), len(generation.rounds) - 1)  # no room for a draft in the last
    assert rule.started == [(1, 0)]
    assert max(features[0, ENTROPY] for features in rule.seen) > 0
    monkeypatch.setattr(Recorded, "looks_at_entropy", False)
    rule.seen = []
    decoder.generate([1, 2, 3], max_new_tokens=30)
    assert {features[0, ENTROPY] for features in rule.seen} == {0.0}
    assert len({features[0, CONFIDENCE] for features in rule.seen}) > 2
    shorter = decoder.generate([1, 2, 3], max_new_tokens=30, knobs={"draft_length": 1})
    assert {round_.drafted for round_ in shorter.rounds} == {0, 1}


def test_costs_are_told_and_what_a_model_has_to_read_is_counted(pair: Pair) -> None:
    others = made_up_costs(made_up_mixed(free=(False, True, True), right=(0.7, 0.5, 0.5)))
    named = zip(drafts_of(pair.draft), others.drafts, strict=True)
    costs = replace(others, drafts=tuple(replace(cost, name=draft.name) for draft, cost in named))
    rule = Recorded(lambda features: 2 if slot(features, 1, "available") else 0)
    SpeculativeDecoder(pair, 4, choice=rule, costs=costs).generate([1, 2, 3], max_new_tokens=12)
    assert slot(rule.seen[0], 0, "cost_ratio") == pytest.approx(0.12, abs=1e-6)
    assert slot(rule.seen[0], 1, "cost_ratio") == pytest.approx(0.02, abs=1e-4)
    assert rule.seen[0][0, NAMES.index("cost_ratio")] == pytest.approx(0.02)
    unread = [2 ** slot(features, 0, "unread") for features in rule.seen]
    assert unread == pytest.approx(np.round(unread))
    assert unread[0] == 1
    assert unread[-1] > 8  # it was never asked, and nothing but the prompt was read
    with pytest.raises(ValueError, match="is of the drafts"):
        SpeculativeDecoder(pair, choice=rule, costs=others)


def test_choices_that_make_no_sense_are_refused(pair: Pair) -> None:
    rule = Recorded(lambda features: 0)
    single = Pair(pair.target, NGramDrafter.fit([[1, 2, 3]], 16), name="single")
    for decoder in (SpeculativeDecoder, ThresholdDecoder):
        with pytest.raises(ValueError, match="pair single has 1 draft, and a choice is among 2 to 6"):
            decoder(single, choice=rule)
        with pytest.raises(ValueError, match="give it or stop, not both"):
            decoder(pair, stop=FixedLength(3), choice=rule)
    with pytest.raises(ValueError, match="pair single has one draft"):
        SpeculativeDecoder(single).start([1, 2], max_new_tokens=4).look()
    session = SpeculativeDecoder(pair).start([1, 2, 3], max_new_tokens=8)
    session.draft_one(0)
    with pytest.raises(ValueError, match="was begun in the other way, with or without the number of a draft"):
        session.draft_one()


def test_the_features_keep_their_order_and_say_what_they_are() -> None:
    """Policies are arrays of these columns."""
    assert CHOICE_FEATURES[: len(FEATURES)] != FEATURES  # the cost ratio is another
    assert NAMES[: len(FEATURES)] == [feature.name for feature in FEATURES]
    assert [
        *("available", "free", "cost_ratio", "unread", "next_confidence", "next_matched", "agreement"),
        *("chance", "recent_acceptance", "recent_hits", "drafting"),
    ] == SLOTS
    assert NAMES[len(FEATURES) :] == [f"draft_{draft}_{name}" for draft in range(1, MOST_DRAFTS + 1) for name in SLOTS]


TEXTS, DRAFTS = 4, 3
numbers = st.integers(0, 2**32 - 1)


@given(seed=numbers, events=st.lists(st.sampled_from(["drafted", "verified", "forget", "copied"]), max_size=12))
def test_texts_side_by_side_have_the_features_that_each_has_alone(seed: int, events: list[str]) -> None:
    rng = np.random.default_rng(seed)
    free, there = rng.random((TEXTS, DRAFTS)) < 0.5, rng.random((TEXTS, DRAFTS)) < 0.8
    costs = rng.random((TEXTS, DRAFTS)) * 5
    chances = rng.random((TEXTS, DRAFTS, BINS + 1))
    together = ChoiceTracker(TEXTS, free, costs, 0.1, 0.5, there, chances)
    alone = [ChoiceTracker(1, free[text], costs[text], 0.1, 0.5, there[text], chances[text]) for text in range(TEXTS)]
    low, high = np.array([(feature.low, feature.high) for feature in CHOICE_FEATURES], np.float32).T
    zero = np.zeros(1, np.intp)
    for event in events:
        available = there & (rng.random((TEXTS, DRAFTS)) < 0.8)
        seen: Any = rng.random((2, TEXTS, DRAFTS)).astype(np.float32)
        seen[1] *= 40
        tokens = rng.integers(0, 3, (TEXTS, DRAFTS))
        together.look(available, seen[0], seen[1], tokens)
        chosen = np.flatnonzero(rng.random(TEXTS) < 0.6)
        draft: Any = rng.integers(0, DRAFTS, TEXTS)
        columns: Any = rng.random((4, TEXTS))
        accepted = np.minimum(together.place, rng.integers(0, 5, TEXTS))
        hits, looked_at = rng.random((TEXTS, DRAFTS)) < 0.5, rng.random(TEXTS) < 0.7
        if event == "copied":
            together = pickle.loads(pickle.dumps(together))
        if event == "forget":
            together.forget(chosen)
        if event == "drafted":
            sure, nats, matched, drawn = columns[:, chosen]
            together.drafted(draft[chosen], sure, nats, matched, drawn, chosen, looked_at[chosen])
        if event == "verified":
            together.verified(accepted[chosen], accepted[chosen] + 1, hits[chosen], chosen)
        for text, tracker in enumerate(alone):
            tracker.look(available[text, None], seen[0, text, None], seen[1, text, None], tokens[text, None])
            if text in chosen and event == "forget":
                tracker.forget()
            if text in chosen and event == "drafted":
                sure, nats, matched, drawn = columns[:, text, None]
                tracker.drafted(draft[text, None], sure, nats, matched, drawn, zero, looked_at[text, None])
            if text in chosen and event == "verified":
                tracker.verified(accepted[text, None], accepted[text, None] + 1, hits[text, None], zero)
            assert np.array_equal(together.features[text], tracker.features[0])
        assert ((low <= together.features) & (together.features <= high)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, [True] * 7, [0.1] * 7, 0.1), "a choice is among 1 to 6 drafts, got 7"),
        ((1, [True], [math.nan], 0.1), "cost_ratio must be finite and at least 0"),
        ((1, [True], [0.1], -1.0), "cost_ratio must be finite and at least 0"),
        ((0, [True], [0.1], 0.1), "environments must be a whole number of at least 1"),
    ],
)
def test_a_tracker_of_nothing_or_without_costs_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChoiceTracker(*arguments)


def test_chances_are_those_that_were_counted_of_such_tokens() -> None:
    kept = np.linspace(0.2, 0.8, BINS)
    counted = np.array([[*kept, 0.45], [*kept[::-1], 0.6]])
    tracker = ChoiceTracker(1, [True, False], [0.0, 0.1], 0.0, chances=counted)
    middle = np.full((1, 2), 3.5 / BINS, np.float32)
    nothing, both, first = np.zeros((1, 2), np.float32), np.ones((1, 2), np.bool_), np.zeros(1, np.intp)
    tracker.look(both, middle, nothing, np.array([[5, 5]]))
    assert slot(tracker.features, 0, "chance") == pytest.approx(kept[3])  # of its confidence
    assert slot(tracker.features, 1, "chance") == pytest.approx(0.6)  # of any: a model's cannot be seen
    tracker.look(np.array([[False, True]]), middle, nothing, np.array([[5, 5]]))
    assert slot(tracker.features, 0, "chance") == 0
    tracker.drafted(first, 3.5 / BINS, 0.0, 1, 1.0, first)
    assert tracker.features[0, PRODUCT] == pytest.approx(kept[3])
    tracker.drafted(first + 1, 4 / BINS, 1.0, 0, 0.5, first)  # between the middles of two bins
    between = (kept[-4] + kept[-5]) / 2
    assert tracker.features[0, PRODUCT] == pytest.approx(kept[3] * between)
    tracker.drafted(first + 1, 0.9, 1.0, 0, 0.5, first, looked_at=False)
    assert tracker.features[0, PRODUCT] == pytest.approx(kept[3] * between * 0.6)
    assert tracker.features[0, [CONFIDENCE, ENTROPY, DRAWN]].tolist() == [0, 0, 0]
    usual = ChoiceTracker(1, [True], [0.0], 0.0)
    usual.look(both[:, :1], middle[:, :1], nothing[:, :1], np.array([[5]]))
    assert slot(usual.features, 0, "chance") == pytest.approx(3.5 / BINS, rel=1e-6)


def test_drafts_that_propose_the_same_token_agree() -> None:
    tracker = ChoiceTracker(1, [True, True, True, False], [0.0, 0.0, 0.0, 0.1], 0.0)
    nothing = np.zeros((1, 4), np.float32)
    tracker.look(np.ones((1, 4), np.bool_), nothing, nothing, np.array([[5, 5, 7, 5]]))
    assert [slot(tracker.features, draft, "agreement") for draft in range(4)] == [0.5, 0.5, 0.0, 0.0]
    tracker.look(np.array([[True, False, True, True]]), nothing, nothing, np.array([[7, 7, 7, 7]]))
    assert [slot(tracker.features, draft, "agreement") for draft in range(4)] == [1.0, 0.0, 1.0, 0.0]
