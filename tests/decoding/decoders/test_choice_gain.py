"""The rule that weighs the next token of several drafts: what it chooses, what it learns, and the texts that come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import PreTrainedModel

from specgym.decoding import (
    BINS,
    FEATURES,
    MOST_DRAFTS,
    SLOT_FEATURES,
    AutoregressiveDecoder,
    Batch,
    ChoiceCharges,
    ChoiceTracker,
    DraftCosts,
    ExpectedGainChoice,
    Generation,
    KeepChances,
    LanguageModel,
    LatencyProfileError,
    MixedProfile,
    ModelDrafter,
    NGramDrafter,
    Pair,
    PromptLookupDrafter,
    Sampling,
    SpeculativeDecoder,
    SuffixDrafter,
    ThresholdDecoder,
    drafts_of,
    is_free,
)
from specgym.decoding.decoders.expected_gain import TextChances
from specgym.decoding.drafts.mixed import DraftChoice
from tests.helpers.known_distributions import PROMPT, MakeTable, distance, exact_joint, make_drafter, walk
from tests.helpers.made_up_mixed import made_up_costs, made_up_mixed
from tests.helpers.small_eagle_heads import small_head
from tests.helpers.toy_profile import toy_profile

COMMON = {feature.name: place for place, feature in enumerate(FEATURES)}
SLOT = {feature.name: place for place, feature in enumerate(SLOT_FEATURES)}
LONGEST = 6


def costs_of(pair: Pair, drafting: float = 0.05, reading: float = 0.02, chances: Any = None) -> MixedProfile:
    """A mixed profile by which plain decoding takes 1 second a token, and free drafts next to none."""
    drafts = tuple(
        DraftCosts(draft.name, is_free(draft), {1: 1e-6 if is_free(draft) else drafting}, chances)
        for draft in drafts_of(pair.draft)
    )
    return MixedProfile(pair.name, drafts, {1: 1.0, 33: 1.0 + 32 * reading}, 1.0, {})


@pytest.fixture(scope="module")
def pair(make_model: Callable[..., PreTrainedModel], make_noisy: Callable[..., PreTrainedModel]) -> Pair:
    """A target with an EAGLE head, a model, a copy of the text and a table, each of which is right at times."""
    model = make_model("llama", layers=3, vocabulary=16, hidden=32, context=128, spread=0.6)
    text = AutoregressiveDecoder(Pair(model)).generate([1, 2, 3], max_new_tokens=40).tokens
    drafts: list[Any] = [
        *drafts_of(Pair(model, small_head(model, seed=1)).draft),
        ModelDrafter(LanguageModel(make_noisy(model, 0.05))),
        SuffixDrafter(16),
        NGramDrafter.fit([text[:20]], 16, order=3),
    ]
    return Pair(model, drafts, name="mixed")


def chosen_by(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Numbers of the drafts that are asked for a token, from 0, as they come."""
    asked: set[int] = set()
    real = DraftChoice.draft

    def draft(self: DraftChoice, number: int, with_entropy: bool = True) -> Any:
        asked.add(number)
        return real(self, number, with_entropy)

    monkeypatch.setattr(DraftChoice, "draft", draft)
    return asked


# Texts.


def test_greedy_texts_are_those_of_plain_decoding_with_a_head_a_model_copies_and_a_table(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = AutoregressiveDecoder(pair.without_draft())
    asked = chosen_by(monkeypatch)
    decoder = SpeculativeDecoder(pair, stop="expected-gain", costs=costs_of(pair))
    assert [(knob.name, knob.default) for knob in decoder.knobs] == [("draft_length", 16)]
    lengths = set()
    for prompt in ([1, 2, 3], [7, 9, 4, 4, 2], [5]):
        generation = decoder.generate(prompt, max_new_tokens=40)
        assert generation.tokens == plain.generate(prompt, max_new_tokens=40).tokens
        lengths |= {round_.drafted for round_ in generation.rounds}
    assert len(asked - {-1}) >= 3
    assert len(lengths) > 3
    shorter = decoder.generate([1, 2, 3], max_new_tokens=40, knobs={"draft_length": 1})
    assert {round_.drafted for round_ in shorter.rounds} == {0, 1}


def rounds(generations: Sequence[Generation]) -> list[list[tuple[Any, ...]]]:
    """Tokens of every round of some texts, and how many it drafted."""
    return [[(round_.tokens, round_.drafted) for round_ in text.rounds] for text in generations]


def test_a_text_is_the_same_by_its_seed_whatever_was_decoded_before_and_beside_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[1, 2, 3], [6, 6, 2, 1], [9]]
    settings: dict[str, Any] = {"max_new_tokens": 24, "sampling": Sampling(0.7)}

    def fresh() -> SpeculativeDecoder:
        return SpeculativeDecoder(pair, stop="expected-gain", costs=costs_of(pair, drafting=0.1))

    decoder = fresh()
    alone = [fresh().generate(prompt, seed=number, **settings) for number, prompt in enumerate(prompts)]
    again = [decoder.generate(prompt, seed=number, **settings) for number, prompt in enumerate(prompts)]
    assert rounds(again) == rounds(alone)
    assert rounds(decoder.generate_batch(prompts, seed=0, **settings)) == rounds(alone)
    batch = Batch()
    sessions = [batch.add(decoder, prompt, seed=number, **settings) for number, prompt in enumerate(prompts)]
    while len(batch):
        batch.step()
    assert [session.tokens for session in sessions] == [text.tokens for text in alone]
    monkeypatch.setattr(ExpectedGainChoice, "for_text", lambda self: self)  # sums that texts share are found out
    assert rounds(fresh().generate_batch(prompts, seed=0, **settings)) != rounds(alone)


def test_the_joint_law_is_the_targets_and_a_rule_that_drops_what_was_drawn_is_found_out(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable
) -> None:
    target = make_table(3, seed=1, spread=1.2)
    pair = Pair(target, [make_drafter(draft, make_table, 3) for draft in ("suffix", "model")])
    decoder = SpeculativeDecoder(pair, 3, stop="expected-gain", costs=costs_of(pair, 0.1))
    expected = exact_joint(target, Sampling(), PROMPT, 3)
    asked = chosen_by(monkeypatch)
    assert distance(walk(monkeypatch, decoder, Sampling(), 3)[0], expected) < 1e-5
    assert asked - {-1} == {0, 1}

    def dropped(self: DraftChoice, number: int, with_entropy: bool = True) -> Any:
        step = real(self, number, with_entropy)
        return None if step is not None and step.drawn_probability() < 0.5 else step

    real = DraftChoice.draft
    monkeypatch.setattr(DraftChoice, "draft", dropped)
    assert distance(walk(monkeypatch, decoder, Sampling(), 3)[0], expected) > 0.01


# Choices.


def rounds_made_by_hand(rng: np.random.Generator, texts: int, steps: int) -> list[NDArray[np.float32]]:
    """Features of texts at the tokens of a round, one after another."""
    result = []
    product = np.ones(texts, np.float32)
    for place in range(steps):
        features = np.zeros((texts, len(FEATURES) + MOST_DRAFTS * len(SLOT_FEATURES)), np.float32)
        slots = features[:, len(FEATURES) :].reshape(texts, MOST_DRAFTS, len(SLOT_FEATURES))
        if place:
            product *= rng.uniform(0.5, 1, texts).astype(np.float32)
        features[:, COMMON["place"]], features[:, COMMON["product"]] = place, product
        slots[:, :4, SLOT["available"]] = rng.random((texts, 4)) < 0.7
        slots[:, :4, SLOT["chance"]] = rng.random((texts, 4)) * slots[:, :4, SLOT["available"]]
        slots[:, :2, SLOT["unread"]] = np.log2(rng.integers(1, 40, (texts, 2)))
        result.append(features)
    return result


def test_it_chooses_what_gains_most_as_computed_directly() -> None:
    profile = made_up_costs(made_up_mixed(), drafting=0.15, reading=0.03)
    rule = ExpectedGainChoice(ChoiceCharges.of(profile, LONGEST, 64, decision_seconds=0.01))
    rng, texts = np.random.default_rng(0), 200
    rule.start(texts, None)
    expected, seconds = [1.0] * texts, [profile.target(1)] * texts
    seen = set()
    for place, features in enumerate(rounds_made_by_hand(rng, texts, LONGEST + 1)):
        actions = rule(features)
        for text, row in enumerate(features.astype(float)):
            slots = row[len(FEATURES) :].reshape(MOST_DRAFTS, len(SLOT_FEATURES))
            expected[text] += row[COMMON["product"]] if place else 0.0
            worth = max(expected[text] / seconds[text], 1.0)
            best, gained, price = 0, 0.0, 0.0
            for draft in range(4):
                more = profile.target(place + 2) - profile.target(place + 1) if place < LONGEST else np.inf
                cost = profile.reading(draft, round(2 ** slots[draft, SLOT["unread"]])) + more + 0.01
                gain = row[COMMON["product"]] * slots[draft, SLOT["chance"]] - worth * cost
                if slots[draft, SLOT["available"]] and gain > gained:
                    best, gained, price = draft + 1, gain, cost
            assert actions[text] == best
            seconds[text] += price
            seen.add((place, best))
    assert {best for _, best in seen} == {0, 1, 2, 3, 4}
    assert {best for place, best in seen if place == LONGEST} == {0}


def test_dear_drafts_are_left_alone_and_cheap_ones_go_on(pair: Pair) -> None:
    def drafted(**costs: Any) -> int:
        decoder = SpeculativeDecoder(pair, stop="expected-gain", costs=costs_of(pair, **costs))
        return sum(round_.drafted for round_ in decoder.generate([1, 2, 3], max_new_tokens=30).rounds)

    assert drafted(drafting=3.0, reading=2.0) == 0
    assert drafted(drafting=0.0001, reading=0.0) > drafted(drafting=0.2, reading=0.1) > 0


# Chances.


def rounds_of(tracker: ChoiceTracker, right: Callable[[float], float], rounds: int, rng: np.random.Generator) -> None:
    """Rounds of four tokens of a free draft beside a model, whose tokens are right by their confidence."""
    first, both = np.zeros(1, np.intp), np.ones((1, 2), np.bool_)
    nothing, tokens = np.zeros((1, 2), np.float32), np.array([[5, 5]])
    for _ in range(rounds):
        sure = rng.integers(0, BINS, 4).astype(np.float32) / BINS + np.float32(0.5 / BINS)
        kept = rng.random(4) < [right(float(value)) for value in sure]
        for value in sure:
            tracker.look(both, np.full((1, 2), value, np.float32), nothing, tokens)
            tracker.drafted(first, float(value), 0.0, 1, 1.0, first)
        accepted = int(np.argmin(np.append(kept, False)))
        tracker.verified(np.array([accepted]), np.array([accepted + 1]), np.array([[kept[0], False]]), first)


def chance_shown(tracker: ChoiceTracker, confidence: float) -> list[float]:
    look = np.full((1, 2), confidence, np.float32)
    tracker.look(np.ones((1, 2), np.bool_), look, np.zeros((1, 2), np.float32), np.array([[5, 5]]))
    begin = len(FEATURES) + SLOT["chance"]
    return [float(tracker.features[0, begin + draft * len(SLOT_FEATURES)]) for draft in range(2)]


class CountsBehindMistakes(ChoiceTracker):
    """Counts tokens behind a wrong one, too, as if they had been right."""

    def _learn(self, learned: TextChances, rows: Any, accepted: Any, *others: Any) -> None:
        super()._learn(learned, rows, self.place[rows], *others)


def falling(confidence: float) -> float:
    """Chance of a token that is right the less often, the surer its draft is."""
    return 0.8 - 0.6 * confidence


def test_chances_that_nobody_counted_follow_the_text_and_a_wrong_count_does_not() -> None:
    make: Callable[..., ChoiceTracker]
    off = []
    for make in (ChoiceTracker, CountsBehindMistakes):
        tracker = make(1, [True, False], [0.0, 0.1], 0.02, learns=[True, True])
        assert chance_shown(tracker, 15.5 / BINS)[0] == pytest.approx(15.5 / BINS)
        rounds_of(tracker, falling, 1000, np.random.default_rng(0))
        middles = (np.arange(BINS) + 0.5) / BINS
        off.append(max(abs(chance_shown(tracker, float(middle))[0] - falling(middle)) for middle in middles))
        assert chance_shown(tracker, 0.5)[1] == 0.5  # the model never drafted
        tracker.forget()
        assert chance_shown(tracker, 15.5 / BINS)[0] == pytest.approx(15.5 / BINS)
    assert off[0] < 0.1 < 0.2 < off[1]


def test_few_tokens_say_something_of_all_confidences_and_counted_chances_stay() -> None:
    chances = np.array([KeepChances.assumed().exact, KeepChances.assumed().exact])
    for learns in (True, False):
        tracker = ChoiceTracker(1, [True, False], [0.0, 0.1], 0.02, chances=chances, learns=[learns, False])
        rounds_of(tracker, lambda confidence: 0.0, 12, np.random.default_rng(1))
        for confidence in (0.2, 0.5, 0.9):
            assert (chance_shown(tracker, confidence)[0] < 0.5 * confidence) == learns
            assert chance_shown(tracker, confidence)[1] == 0.5


def test_each_text_of_many_counts_for_itself() -> None:
    prior = np.tile(KeepChances.assumed().exact, (2, 1, 1))
    counts = TextChances(prior, np.ones((2, 1), np.bool_))
    second, first = np.ones(6, np.intp), np.zeros(6, np.intp)
    counts.count(second, first, first + 3, first > 0)
    assert counts.of([0])[0] == pytest.approx(prior[0])
    assert counts.of([1])[0, 0, 3] == pytest.approx((2 * prior[1, 0, 3] * 2 / (2 + 6 * prior[1, 0, 3])) / 8)
    assert counts.of([1])[0, 0, BINS] == pytest.approx(2 * prior[1, 0, BINS] / 8)
    counts.forget([1])
    assert counts.of([1])[0] == pytest.approx(prior[1])


def test_the_text_lowers_the_chances_of_a_draft_that_is_wrong(pair: Pair) -> None:
    class Wrong(PromptLookupDrafter):
        """A look-up that is sure of what it found, and adds one to it."""

        def start(self, *arguments: Any) -> Any:
            session: Any = super().start(*arguments)
            steps = session.steps
            session.steps = lambda context, count: (
                replace(step, token=(step.token + 1) % 16) for step in steps(context, count)
            )
            return session

    wrong = Pair(pair.target, [Wrong(16, 1), drafts_of(pair.draft)[1]], name="wrong")

    def drafted(chances: KeepChances | None) -> int:
        decoder = SpeculativeDecoder(wrong, stop="expected-gain", costs=costs_of(wrong, 5.0, 0.05, chances))
        rounds = decoder.generate([1, 2, 3], max_new_tokens=60).rounds
        return sum(round_.drafted for round_ in rounds[-10:])

    assert drafted(None) < drafted(KeepChances.assumed()) / 2


# Costs, and what is refused.


def test_uncharged_it_measures_its_pair_once_and_by_the_sampling(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measured(pair: Pair, **options: Any) -> MixedProfile:
        asked.append((pair, options))
        return costs_of(pair, 3.0, 2.0)

    monkeypatch.setattr("specgym.decoding.latency.mixed_measure.measured_mixed", measured)
    decoder = SpeculativeDecoder(pair, stop="expected-gain")
    assert asked == []
    for _ in range(2):
        rounds = decoder.generate([1, 2, 3], max_new_tokens=6, sampling=Sampling(0.5), seed=0).rounds
        assert all(round_.drafted == 0 for round_ in rounds)
    assert asked == [(pair, {"sampling": Sampling(0.5)})]
    decoder.charge_by(costs_of(pair))
    assert any(round_.drafted for round_ in decoder.generate([1, 2, 3], max_new_tokens=12).rounds)
    SpeculativeDecoder(pair, stop="expected-gain", costs=costs_of(pair)).start([1], max_new_tokens=2)
    assert len(asked) == 1


def test_what_does_not_suit_is_refused_with_the_way_out(pair: Pair) -> None:
    decoder = SpeculativeDecoder(pair, stop="expected-gain")
    with pytest.raises(LatencyProfileError, match=r"mixed has 4 drafts: charge it by measured_mixed\(pair\)"):
        decoder.charge_by(toy_profile())
    with pytest.raises(LatencyProfileError, match="is of the drafts"):
        decoder.charge_by(made_up_costs(made_up_mixed()))
    alone = Pair(pair.target, SuffixDrafter(16), name="alone")
    with pytest.raises(LatencyProfileError, match=r"alone has 1 draft: charge it by measured\(pair\)"):
        SpeculativeDecoder(alone, stop="expected-gain").charge_by(costs_of(alone))
    with pytest.raises(ValueError, match="has several; give stop='never' or a rule, or decode it exactly"):
        ThresholdDecoder(pair)
    with pytest.raises(ValueError, match="give it or stop, not both"):
        SpeculativeDecoder(pair, stop="expected-gain", choice=decoder.choice or ExpectedGainChoice(
            ChoiceCharges.of(costs_of(pair), 4, 8)))  # fmt: skip
    many = Pair(pair.target, [SuffixDrafter(16, longest=length) for length in range(1, 8)], name="many")
    with pytest.raises(ValueError, match="pair many has 7 drafts, and a choice is among 2 to 6"):
        SpeculativeDecoder(many, stop="expected-gain")
