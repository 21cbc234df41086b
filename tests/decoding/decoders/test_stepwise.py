"""Rounds whose drafts end where a rule or a controller outside says: the text stays the target's."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor, PreTrainedModel

from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.decoders.chain_session import SpeculativeSession
from specgym.decoding.decoders.knob_rules import TEXT_FEATURES
from specgym.decoding.decoders.lookahead.decoder import LookaheadDecoder
from specgym.decoding.decoders.stop_rules import FEATURES, ConfidenceBelow, FixedLength, ProductBelow, Rows, StopRule
from specgym.decoding.decoders.threshold import ThresholdDecoder
from specgym.decoding.drafts.copying import PromptLookupDrafter
from specgym.decoding.drafts.drafter import Drafter, ModelDrafter, ModelStep
from specgym.decoding.drafts.ngram import NGramDrafter
from specgym.decoding.errors import KnobError, NumericalError, SpecgymError
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.rounds import Round
from specgym.decoding.sampling import Sampling

MakeTable = Callable[..., LanguageModel]
VOCABULARY = 8
PROMPT = [1, 0, 1]
KINDS = ["model", "ngram", "prompt-lookup"]
PLACE, ACCEPTANCE, LENGTH = (
    [feature.name for feature in FEATURES].index(name)
    for name in ("place", "recent_acceptance", "mean_acceptance_length")
)


def pair_of(kind: str, make_table: MakeTable, **target: Any) -> Pair:
    """A target with a draft that is often right and often wrong."""
    model = make_table(VOCABULARY, seed=1, spread=2.0, **target)
    text = AutoregressiveDecoder(Pair(model)).generate(PROMPT, max_new_tokens=40, sampling=Sampling(), seed=9).tokens
    draft: Drafter
    if kind == "model":
        mixed = 0.8 * model.table + 0.2 * make_table(VOCABULARY, seed=2, spread=2.0).table  # type: ignore[attr-defined]
        draft = ModelDrafter(type(model)(mixed))
    elif kind == "ngram":
        draft = NGramDrafter.fit([text], VOCABULARY, order=3)
    else:
        draft = PromptLookupDrafter(VOCABULARY, longest=2)
    return Pair(model, draft)


def start(decoder: SpeculativeDecoder | ThresholdDecoder, **options: Any) -> SpeculativeSession:
    return decoder.start(PROMPT, **{"max_new_tokens": 60, "seed": 5, **options})


def without_times(round_: Round) -> Round:
    return replace(round_, draft_seconds=0.0, verify_seconds=0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("length", [1, 3, 16])
def test_drafting_to_a_fixed_length_from_outside_gives_the_rounds_of_step(
    make_table: MakeTable, kind: str, temperature: float, length: int
) -> None:
    decoder = SpeculativeDecoder(pair_of(kind, make_table))
    stepped, steered = (start(decoder, sampling=Sampling(temperature)) for _ in range(2))
    while not stepped.finished:
        expected = stepped.step({"draft_length": length})
        for place in range(1, length + 1):
            features = steered.draft_one()
            if features is None:
                break
            assert features[PLACE] == place
        assert without_times(steered.verify()) == without_times(expected)
    assert steered.finished
    assert steered.tokens == stepped.tokens
    seen = len(TEXT_FEATURES)
    assert steered.progress.features[:seen].tolist() == stepped.progress.features[:seen].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_rule_of_fixed_length_gives_the_rounds_of_that_draft_length(
    make_table: MakeTable, kind: str, temperature: float
) -> None:
    pair = pair_of(kind, make_table)
    options: dict[str, Any] = {"max_new_tokens": 60, "sampling": Sampling(temperature), "seed": 5}
    ruled = SpeculativeDecoder(pair, stop=FixedLength(4)).generate(PROMPT, **options)
    plain = SpeculativeDecoder(pair).generate(PROMPT, knobs={"draft_length": 4}, **options)
    assert [without_times(round_) for round_ in ruled.rounds] == [without_times(round_) for round_ in plain.rounds]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_targets_wherever_drafts_end(make_table: MakeTable, kind: str) -> None:
    pair = pair_of(kind, make_table)
    expected = AutoregressiveDecoder(pair).generate(PROMPT, max_new_tokens=60).tokens
    drafted = set()
    for seed in range(10):
        rng = random.Random(seed)
        session = start(SpeculativeDecoder(pair, max_draft_length=6))
        while not session.finished:
            if rng.random() < 0.2:
                round_ = session.step({"draft_length": 2})
            else:
                while rng.random() < 0.7 and session.draft_one() is not None:
                    pass
                round_ = session.verify()
            drafted.add(round_.drafted)
            assert round_.tokens
        assert session.tokens == expected
    assert {0, 1, 2, 3} <= drafted <= set(range(7))


@pytest.mark.parametrize("rule", [ConfidenceBelow(0.4), ProductBelow(0.3)])
def test_rules_leave_the_greedy_text_of_a_real_model_as_it_is(
    make_model: Callable[..., PreTrainedModel], rule: StopRule
) -> None:
    model = make_model("llama")
    pair = Pair(model, make_model("llama", layers=1))
    expected = AutoregressiveDecoder(pair).generate([5, 6], max_new_tokens=40)
    generation = SpeculativeDecoder(pair, stop=rule).generate([5, 6], max_new_tokens=40, knobs={"draft_length": 8})
    assert generation.tokens == expected.tokens
    assert len({round_.drafted for round_ in generation.rounds}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_ends_after_the_first_token_that_the_rule_doubts(make_table: MakeTable, temperature: float) -> None:
    pair = pair_of("model", make_table)
    watched, ruled = (
        start(SpeculativeDecoder(pair, 10, stop=ConfidenceBelow(0.5)), sampling=Sampling(temperature)) for _ in range(2)
    )
    lengths = set()
    for _ in range(12):
        confidences: list[float] = []
        while (features := watched.draft_one()) is not None:
            confidences.append(float(features[0]))
            if features[0] < 0.5:
                break
        assert ruled.step().drafted == len(confidences)
        watched.verify()
        lengths.add(len(confidences))
    assert len(lengths) > 2


@pytest.mark.parametrize("rule", [ConfidenceBelow(0.5), ProductBelow(0.2), FixedLength(3)], ids=lambda rule: rule.name)
def test_the_entropy_is_left_out_for_rules_that_do_not_look_at_it(
    make_table: MakeTable, rule: StopRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounds() -> list[Round]:
        session = start(SpeculativeDecoder(pair_of("model", make_table), stop=rule))
        return [without_times(session.step()) for _ in range(8)]

    monkeypatch.setattr(type(rule), "looks_at_entropy", True)
    expected = rounds()
    monkeypatch.undo()
    monkeypatch.setattr(ModelStep, "entropy", lambda step: pytest.fail("the entropy was computed"))
    assert rounds() == expected


def test_a_rule_drafts_as_far_as_it_may_and_the_knob_shortens_it(make_table: MakeTable) -> None:
    session = start(SpeculativeDecoder(pair_of("model", make_table), 12, stop=ConfidenceBelow(0.0)))
    assert session.step().drafted == 12
    assert session.step({"draft_length": 3}).drafted == 3


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_drafted_where_there_is_no_room_or_nothing_is_known(make_table: MakeTable, kind: str) -> None:
    pair = pair_of(kind, make_table)
    session = start(SpeculativeDecoder(pair, max_draft_length=3), max_new_tokens=40)
    while not session.finished:
        room = session._room
        drafted = 0
        while session.draft_one() is not None:
            drafted += 1
        assert session.draft_one() is None
        assert drafted <= min(room, 3)
        assert session.verify().drafted == drafted
    nothing = pair_of("ngram", make_table)
    nothing.draft = NGramDrafter.fit([[6, 7]], VOCABULARY, order=2)
    session = start(SpeculativeDecoder(nothing))
    assert session.draft_one() is None
    assert len(session.verify().tokens) == 1


def test_a_finished_session_drafts_nothing_and_verifies_nothing(make_table: MakeTable) -> None:
    session = start(SpeculativeDecoder(pair_of("model", make_table)), max_new_tokens=1)
    assert session.draft_one() is None
    assert len(session.verify().tokens) == 1
    assert session.draft_one() is None
    round_ = session.verify()
    assert (round_.tokens, round_.drafted, round_.accepted) == ((), 0, 0)
    with pytest.raises(KnobError, match="no knob 'haste'"):
        session.verify({"haste": 1})


def test_step_refuses_a_round_that_was_begun_outside(make_table: MakeTable) -> None:
    session = start(SpeculativeDecoder(pair_of("model", make_table)))
    session.draft_one()
    session.draft_one()
    with pytest.raises(RuntimeError, match=r"a round with 2 drafted tokens is under way.*end it with verify"):
        session.step()
    assert session.verify().drafted == 2
    assert session.step().drafted == 5


def test_the_tracker_follows_every_round_however_it_was_made(make_table: MakeTable) -> None:
    session = start(SpeculativeDecoder(pair_of("model", make_table), cost_ratio=0.25, batch_size=4))
    acceptance, length = 0.5, 2.0
    for number in range(8):
        for _ in range(number % 4):
            session.draft_one()
        round_ = session.verify() if number % 4 else session.step()
        acceptance += 0.2 * (round_.accepted / round_.drafted - acceptance)
        length += 0.2 * (len(round_.tokens) - length)
        assert session.tracker.features[0, ACCEPTANCE] == pytest.approx(acceptance, rel=1e-5)
        assert session.tracker.features[0, LENGTH] == pytest.approx(length, rel=1e-5)
    assert session.tracker.features[0, 6:8].tolist() == [0.25, 2]


def test_features_are_a_copy_of_the_drafts_own(make_table: MakeTable) -> None:
    session = start(SpeculativeDecoder(pair_of("model", make_table)))
    first = session.draft_one()
    assert first is not None
    kept = first.copy()
    second = session.draft_one()
    assert second is not None
    assert np.array_equal(first, kept)
    assert second[2] == np.float32(first[0]) * np.float32(second[0])  # the product of the confidences
    assert first.shape == (len(FEATURES),)
    assert first.dtype == np.float32


def test_what_a_controller_thinks_is_in_neither_time_of_its_round(
    make_table: MakeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def clock() -> float:  # one second passes with every look
        nonlocal now
        now += 1
        return now

    def rounds(thinking: float) -> list[Round]:
        nonlocal now
        session = start(SpeculativeDecoder(pair_of("model", make_table)))
        cycles = []
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", clock)
            for drafted in (3, 0, 1):
                for _ in range(drafted):
                    session.draft_one()
                    now += thinking
                cycles.append(session.verify())
        return cycles

    hasty = rounds(0.0)
    assert hasty == rounds(1000.0)
    # Each token takes one second, and so does putting them together.
    assert [(round_.draft_seconds, round_.verify_seconds) for round_ in hasty] == [(4, 1), (1, 1), (2, 1)]


class Learner(StopRule):
    """Drafts ever longer, by the verdicts so far."""

    name = "learner"

    def __init__(self) -> None:
        self.verdicts: list[tuple[int, int, float]] = []
        self.started: list[tuple[int, int | None]] = []

    def start(self, environments: int, seed: int | None) -> None:
        self.started.append((environments, seed))

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        return features[:, PLACE] > len(self.verdicts)

    def verified(
        self, rows: Rows, drafted: NDArray[np.int64], emitted: NDArray[np.int64], seconds: NDArray[np.float64]
    ) -> None:
        assert rows is None
        self.verdicts.append((int(drafted[0]), int(emitted[0]), float(seconds[0])))


def test_a_rule_is_told_of_every_round_and_keeps_what_it_learned_from_text_to_text(make_table: MakeTable) -> None:
    rule = Learner()
    decoder = SpeculativeDecoder(pair_of("model", make_table), stop=rule)
    rounds = [start(decoder, max_new_tokens=40).step() for _ in range(4)]
    assert [round_.drafted for round_ in rounds] == [1, 2, 3, 4]
    assert rule.verdicts == [(r.drafted, len(r.tokens), r.draft_seconds + r.verify_seconds) for r in rounds]
    assert rule.started == [(1, 0)]


def test_threshold_decoding_can_be_steered_too(make_table: MakeTable) -> None:
    decoder = ThresholdDecoder(pair_of("model", make_table), 4, "never")
    stepped, steered = (start(decoder, sampling=Sampling()) for _ in range(2))
    knobs = {"fallback": 0.3, "rollback": 2.0}
    while not stepped.finished:
        while steered.draft_one() is not None:
            pass
        assert without_times(steered.verify(knobs)) == without_times(stepped.step(knobs))


def test_a_broken_draft_is_not_trusted_by_a_rule(make_table: MakeTable) -> None:
    pair = pair_of("model", make_table)
    broken = ModelDrafter(type(pair.target)(torch.full((VOCABULARY,) * 3, float("nan"))))  # type: ignore[arg-type]
    decoder = SpeculativeDecoder(Pair(pair.target, broken), stop=ConfidenceBelow(0.1))
    generation = decoder.generate(PROMPT, max_new_tokens=20)
    assert generation.tokens == AutoregressiveDecoder(pair).generate(PROMPT, max_new_tokens=20).tokens
    assert {round_.drafted for round_ in generation.rounds[:-1]} == {1}


def test_an_error_in_verification_is_not_hidden_by_the_next_step(make_table: MakeTable) -> None:
    pair = pair_of("model", make_table)
    pair.target.table[:] = float("nan")  # type: ignore[attr-defined]
    session = start(SpeculativeDecoder(pair))
    session.draft_one()
    with pytest.raises(NumericalError):
        session.verify()
    with pytest.raises(SpecgymError, match="NumericalError: "):
        session.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_draft_length": 0}, "max_draft_length must be a whole number"),
        ({"cost_ratio": -1.0}, "cost_ratio must be finite and at least 0"),
        ({"batch_size": 0}, "batch_size must be finite and at least 1"),
    ],
)
def test_decoders_that_make_no_sense_are_refused(make_table: MakeTable, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeculativeDecoder(pair_of("model", make_table), **options)


def step_to_the_end(session: Any) -> None:
    while not session.finished:
        session.step()


class Interrupt(LogitsProcessor):
    """A logits processor during whose call the user presses Ctrl-C."""

    def __init__(self, call: int) -> None:
        self.calls_left = call

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls_left -= 1
        if not self.calls_left:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("decoder_class", [AutoregressiveDecoder, SpeculativeDecoder, LookaheadDecoder])
@pytest.mark.parametrize("call", [2, 7])  # while the draft, and while the target of `SpeculativeDecoder` is at work
def test_a_text_whose_round_was_broken_off_does_not_go_on_as_if_nothing_had_happened(
    make_model: Callable[..., PreTrainedModel],
    make_noisy: Callable[..., PreTrainedModel],
    decoder_class: Any,
    call: int,
) -> None:
    model = make_model("llama")
    decoder = decoder_class(Pair(model, make_noisy(model, 0.01)))
    expected = decoder.generate(PROMPT, max_new_tokens=20).tokens
    session = decoder.start(PROMPT, max_new_tokens=20, logits_processor=[Interrupt(call)])
    with pytest.raises(KeyboardInterrupt):
        step_to_the_end(session)
    so_far = [*session.tokens]
    assert so_far == expected[: len(so_far)]
    for _ in range(2):
        with pytest.raises(SpecgymError, match="broken off"):
            session.step()
    assert session.tokens == so_far
    assert decoder.generate(PROMPT, max_new_tokens=20).tokens == expected


def test_a_round_of_a_controller_that_was_broken_off_is_not_verified(
    make_model: Callable[..., PreTrainedModel], make_noisy: Callable[..., PreTrainedModel]
) -> None:
    model = make_model("llama")
    decoder = SpeculativeDecoder(Pair(model, make_noisy(model, 0.01)))
    session = decoder.start(PROMPT, max_new_tokens=20, logits_processor=[Interrupt(3)])
    for _ in range(2):
        session.draft_one()
    with pytest.raises(KeyboardInterrupt):
        session.verify()
    with pytest.raises(SpecgymError, match="broken off"):
        session.draft_one()
    with pytest.raises(SpecgymError, match="broken off"):
        session.verify()
