"""Knobs that a rule chooses before every round: the text stays the target's, and the features are those of the text."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from math import log2
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from transformers import PreTrainedModel

from specgym.decoding import (
    AutoregressiveDecoder,
    Batch,
    Decoder,
    FollowAcceptance,
    Generation,
    Knob,
    KnobError,
    KnobRule,
    LookaheadDecoder,
    Pair,
    Round,
    RoundTracker,
    Sampling,
    Session,
    SpeculativeDecoder,
    round_features,
)
from specgym.decoding.decoders.lookahead import decoder as module
from tests.helpers.branching_dice import Dice
from tests.helpers.first_tokens import ROUNDING, SIGNIFICANCE, Walker, assert_texts_follow_the_target, sampled
from tests.helpers.known_distributions import Branches

SHAPE = Knob("width", 1, 9, 3, integer=True, logarithmic=True)
SHARE = Knob("share", 0, 1, 0.5, search=(0.25, 0.75))


class AtRandom(KnobRule):
    """All knobs anywhere in their ranges, whole or not, anew in every round."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)

    def __call__(self, text: RoundTracker) -> Mapping[str, float]:
        return {knob.name: self.rng.uniform(knob.low, knob.high) for knob in text.knobs}


class ByText(KnobRule):
    """Whatever the text so far says: all the features matter."""

    def __call__(self, text: RoundTracker) -> Mapping[str, float]:
        draw = random.Random(str(text.features.tolist()))
        return {knob.name: draw.uniform(knob.low, min(knob.high, 4)) for knob in text.knobs}


class Fixed(KnobRule):
    """Values that stay."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def __call__(self, text: RoundTracker) -> Mapping[str, float]:
        return self.values


@pytest.fixture
def pair(make_model: Callable[..., PreTrainedModel], make_noisy: Callable[..., PreTrainedModel]) -> Pair:
    target = make_model("llama", layers=1, vocabulary=12)
    return Pair(target, make_noisy(target, 0.3), name="toy")


@pytest.fixture(params=[SpeculativeDecoder, LookaheadDecoder])
def decoder(request: pytest.FixtureRequest, pair: Pair) -> Decoder[Any]:
    kind: type[Decoder[Any]] = request.param
    return kind(pair)


def test_greedy_text_is_the_targets_own_whatever_the_rule_does(decoder: Decoder[Any]) -> None:
    plain = AutoregressiveDecoder(decoder.pair)
    prompts = [[3, 1, 4], [5]]
    expected = [plain.generate(prompt, max_new_tokens=32).tokens for prompt in prompts]
    reads = set()
    for rule in (AtRandom(), ByText()):
        texts = [decoder.generate(prompt, max_new_tokens=32, knobs=rule) for prompt in prompts]
        assert [text.tokens for text in texts] == expected
        reads |= {round_.target_tokens for text in texts for round_ in text.rounds}
        assert any(round_.accepted for text in texts for round_ in text.rounds)
    assert len(reads) > 4


class LookaheadWalker(Walker):
    """Every outcome of the target's draws and of the dice for guesses."""

    def branch(self, patch: pytest.MonkeyPatch, walk: Branches) -> None:
        """A token of the target's own is a branch."""

        def draw(p: Tensor, generator: Any = None) -> int:
            return walk.choose((p.double() / p.double().sum()).tolist())

        patch.setattr(module, "draw", draw)

    def begin(self, session: Session, walk: Branches) -> None:
        """A throw is a branch."""
        session._rng = Dice(walk)


def test_sampling_is_exact_under_a_rule_that_looks_at_the_text(
    monkeypatch: pytest.MonkeyPatch, make_table: Callable[..., Any]
) -> None:
    walker = LookaheadWalker(monkeypatch)
    decoder = LookaheadDecoder(Pair(make_table(3, seed=1, spread=1.2)), max_window=4)
    for rule in (ByText(), FollowAcceptance({"window": 1, "guesses": 1}, {"window": 4, "guesses": 4}, 1, 2, 1)):
        assert walker.strays(decoder, Sampling(), lambda number, rule=rule: rule) < ROUNDING  # type: ignore[misc]
    assert min(walker.accepted, walker.rejected) > 0.5


class Foreseeing(KnobRule):
    """A rule that does what none may: it looks at the die that the round is about to throw."""

    session: Session[Any]

    def __call__(self, text: RoundTracker) -> Mapping[str, float]:
        die = random.Random()
        die.setstate(self.session._rng.getstate())
        return {"window": 1, "guesses": 4 if die.random() < 0.5 else 0}


def test_sampled_texts_follow_the_target_but_not_under_a_rule_that_foresees(make_table: Callable[..., Any]) -> None:
    decoder = LookaheadDecoder(Pair(make_table(4, seed=4, spread=1.2)))
    by_text = ByText()
    assert_texts_follow_the_target(decoder, Sampling(), 400, lambda number: by_text)  # type: ignore[arg-type,return-value]
    foreseeing, start = Foreseeing(), decoder.start

    def watched(*arguments: Any, **options: Any) -> Session[Any]:
        foreseeing.session = start(*arguments, **options)
        return foreseeing.session

    decoder.start = watched  # type: ignore[method-assign, assignment]
    p_value, _ = sampled(decoder, Sampling(), 400, lambda number: foreseeing)  # type: ignore[arg-type,return-value]
    assert p_value < SIGNIFICANCE / 10


def test_features_are_those_of_past_rounds() -> None:
    text = RoundTracker([SHAPE, SHARE], prompt=7, temperature=0.5)
    start = text.features
    assert start.dtype == np.float32
    np.testing.assert_allclose(start, [0, 0, 0, 0, 0.5, 0, 0, 3, 0.5, log2(3) / log2(9), 0.5], rtol=1e-6)
    for emitted in (8, 1, 1, 2, 4):
        text.saw(Round(tuple(range(emitted)), 8, emitted - 1, 0.0, 0.0, 0.0, target_tokens=16))
    text.saw(Round((), 0, 0, 0.0, 0.0, 0.0))
    np.testing.assert_allclose(
        text.features[:8], [2, 1, log2(3.2), log2(3.2), 11 / 40, log2(5), log2(17), 3], rtol=1e-6
    )
    for _ in range(16):
        text.saw(Round((1,), 0, 0, 0.0, 0.0, 0.0))
    np.testing.assert_allclose(text.features[:7], [0, 0, 0, log2(32 / 21), 0.5, 0, log2(33)], rtol=1e-6)
    assert (text.mean_tokens(3), text.mean_tokens()) == (1, 32 / 21)
    assert [feature.name for feature in round_features([SHAPE, SHARE])][-2:] == ["knobs/width", "knobs/share"]
    bounds = np.array([(feature.low, feature.high) for feature in round_features([SHAPE, SHARE])])
    for values in ({"width": 9, "share": 1.0}, {"width": 1, "share": 0.0}):
        text.settle(values, lambda asked: dict(asked or {}))
        assert ((bounds[:, 0] <= text.features) & (text.features <= bounds[:, 1])).all()
    assert text.features[-2:].tolist() == [0, 0]


def test_places_in_a_range_and_values_there_are_each_others_inverse() -> None:
    for knob in (SHAPE, SHARE, Knob("plain", -2, 6, 0)):
        low, high = knob.sought
        assert (knob.share(low), knob.share(high)) == (0, 1)
        for share in (0.0, 0.3, 1.0):
            assert knob.share(knob.at_share(share)) == pytest.approx(share)
    assert SHAPE.at_share(0.5) == pytest.approx(3)  # 1 + distance doubles as often from 1 to 3 as from 3 to 9
    assert SHARE.share(0.9) == 1


class ALittleMore(KnobRule):
    """A third of a token more in every round."""

    def __call__(self, text: RoundTracker) -> Mapping[str, float]:
        return {"draft_length": min(text.values["draft_length"] + 1 / 3, 16)}


def test_small_moves_of_a_whole_number_add_up_and_what_is_left_out_stays(pair: Pair) -> None:
    session = SpeculativeDecoder(pair).start([1, 2, 3], max_new_tokens=60)
    session.step({"draft_length": 2, "stop_threshold": 0.25})
    seen = []
    for _ in range(5):
        session.step(ALittleMore())
        seen.append((round(3 * session.progress.values["draft_length"]), session.progress.values["stop_threshold"]))
    assert seen == [(number, 0.25) for number in (7, 8, 9, 10, 11)]
    assert session.progress.features[-2] == pytest.approx(session.decoder.knobs[0].share(11 / 3))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Fixed(draft_length=17), "draft_length must be"),
        (Fixed(draft_length=float("nan")), "draft_length must be"),
        (Fixed(draft_length="3"), "draft_length must be"),
        (Fixed(length=3), "has no knob 'length'"),
        (type("Broken", (KnobRule,), {"__call__": lambda self, text: 3})(), "what Broken returns must be a mapping"),
    ],
)
def test_what_a_rule_must_not_return_is_refused_and_forgotten(pair: Pair, rule: KnobRule, message: str) -> None:
    session = SpeculativeDecoder(pair).start([1, 2, 3], max_new_tokens=8)
    before = dict(session.progress.values)
    with pytest.raises(KnobError, match=message):
        session.step(rule)
    assert session.progress.values == before
    session.step(Fixed())


def test_texts_of_a_batch_have_a_rule_each(decoder: Decoder[Any]) -> None:
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    rules: list[Any] = [ByText(), {decoder.knobs[0].name: 2}, Fixed(**{decoder.knobs[0].name: 4})]

    def counts(texts: list[Generation]) -> list[list[tuple[int, ...]]]:
        return [[round_.tokens for round_ in text.rounds] for text in texts]

    alone = [
        decoder.generate(prompt, max_new_tokens=12, knobs=rule, seed=place)
        for place, (prompt, rule) in enumerate(zip(prompts, rules, strict=True))
    ]
    assert counts(decoder.generate_batch(prompts, max_new_tokens=12, knobs=rules, seed=0)) == counts(alone)
    shared = decoder.generate_batch(prompts, max_new_tokens=12, knobs=rules[0], seed=0)
    assert counts(shared)[0] == counts(alone)[0]
    batch = Batch()
    sessions = [batch.add(decoder, prompt, max_new_tokens=12, seed=place) for place, prompt in enumerate(prompts)]
    asked = dict(zip(sessions, rules, strict=True))
    while len(batch):
        batch.step({session: asked[session] for session in batch.sessions})
    assert [session.tokens for session in sessions] == [text.tokens for text in alone]


def test_a_rule_between_two_settings_follows_what_rounds_have_brought() -> None:
    rule = FollowAcceptance({"width": 1, "share": 0.75}, {"width": 9, "share": 0.25}, low=1, high=3, rounds=2)
    text = RoundTracker([SHAPE, SHARE], prompt=1)
    assert rule(text) == {"width": 1, "share": 0.75}
    for emitted, width, share in ((2, 3, 0.5), (2, 3, 0.5), (4, 9, 0.25), (1, 9**0.75, 0.375), (9, 9, 0.25)):
        text.saw(Round((0,) * emitted, 0, 0, 0.0, 0.0, 0.0))
        assert rule(text) == {"width": pytest.approx(width), "share": pytest.approx(share)}
    for change, message in {
        "low": "low must be below high, got 3 and 3",
        "rounds": "rounds must be a whole number",
        "many": "settings of the same knobs",
        "few": "few must be a mapping",
    }.items():
        wrong = {"low": 3, "rounds": 17, "many": {"width": 2}, "few": 4}[change]
        with pytest.raises(ValueError, match=message):
            FollowAcceptance(**{**vars(rule), change: wrong})
