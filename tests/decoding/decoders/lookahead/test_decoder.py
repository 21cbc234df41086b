"""The decoders as a user meets them: knobs, bad input, metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from specgym.decoding import Pair, Sampling
from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.lookahead.decoder import JacobiDecoder, LookaheadDecoder
from specgym.decoding.decoders.lookahead.pool import PoolSettings
from specgym.decoding.decoders.lookahead.traits import LookaheadRound, LookaheadStatistics
from specgym.decoding.drafts.drafter import ModelDrafter
from specgym.decoding.errors import KnobError, NumericalError, PromptError
from specgym.decoding.latency.profile import LatencyProfile
from specgym.decoding.models.language_model import LanguageModel

MakeTable = Callable[..., LanguageModel]
TableOf = Callable[..., LanguageModel]


def counting(vocabulary: int = 8) -> Tensor:
    """Each token is followed by the next number."""
    return 9.0 * torch.eye(vocabulary).roll(1, 1).expand(vocabulary, -1, -1).contiguous()


def defaults(decoder: LookaheadDecoder) -> tuple[float, ...]:
    return tuple(knob.default for knob in decoder.knobs)


def test_the_knobs_are_whole_numbers_with_the_published_defaults(make_table: MakeTable) -> None:
    pair = Pair(make_table(8, seed=1))
    decoder = LookaheadDecoder(pair)
    assert decoder.lossless
    assert decoder.knobs == LookaheadDecoder.knobs_without_pair()
    assert [(knob.name, knob.low, knob.high, knob.integer) for knob in decoder.knobs] == [
        ("window", 1, 16, True),
        ("ngram", 2, 6, True),
        ("guesses", 0, 16, True),
    ]
    assert defaults(decoder) == (5, 3, 5)  # on a CPU
    assert defaults(LookaheadDecoder(pair, preset="large")) == (15, 5, 15)
    small = LookaheadDecoder(pair, preset="large", max_window=4, max_ngram=3, max_guesses=2)
    assert defaults(small) == tuple(knob.high for knob in small.knobs) == (4, 3, 2)
    assert [knob.name for knob in JacobiDecoder(pair, max_window=7).knobs] == ["window"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"window": 0}, "knob window must be a whole number from 1 to 16, got 0"),
        ({"window": 17}, "knob window must be a whole number from 1 to 16, got 17"),
        ({"ngram": 1}, "knob ngram must be a whole number from 2 to 6, got 1"),
        ({"ngram": 2.5}, "knob ngram must be a whole number from 2 to 6, got 2.5"),
        ({"guesses": -1}, "knob guesses must be a whole number from 0 to 16"),
        ({"guesses": math.nan}, "knob guesses must be a whole number from 0 to 16"),
        ({"draft_length": 3}, "has no knob 'draft_length'; it has: window, ngram, guesses"),
    ],
)
def test_knobs_out_of_range_are_refused_by_name(
    make_table: MakeTable, knobs: Mapping[str, float], message: str
) -> None:
    session = LookaheadDecoder(Pair(make_table(8, seed=1))).start([1, 2], max_new_tokens=9)
    with pytest.raises(KnobError, match=message):
        session.step(knobs)
    assert session.tokens == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_window": 0}, "max_window"),
        ({"max_ngram": 1}, "max_ngram must be a whole number of at least 2"),
        ({"max_ngram": 0}, "max_ngram"),
        ({"max_guesses": 0}, "max_guesses"),
        ({"preset": "huge"}, "preset must be one of 'small', 'large', got 'huge'"),
    ],
)
def test_a_decoder_out_of_range_is_refused_by_name(
    make_table: MakeTable, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LookaheadDecoder(Pair(make_table(8, seed=1)), **arguments)


@pytest.mark.parametrize("kind", [LookaheadDecoder, JacobiDecoder])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_in_the_middle_of_a_text_are_refused(
    table_of: TableOf, kind: type[LookaheadDecoder], value: float, temperature: float
) -> None:
    table = counting() * 5
    table[:, 5, 3] = value
    with pytest.raises(NumericalError, match=r"table gave NaN or infinite logits after \d tokens"):
        kind(Pair(table_of(table))).generate([0, 1], max_new_tokens=30, sampling=Sampling(temperature), seed=0)


def test_bad_prompts_are_refused_as_by_other_decoders(make_table: MakeTable) -> None:
    decoder = LookaheadDecoder(Pair(make_table(8, seed=1)))
    for prompt in ([], [8], [-1], "text"):
        with pytest.raises(PromptError):
            decoder.start(prompt, max_new_tokens=9)
    with pytest.raises(ValueError, match="max_new_tokens"):
        decoder.start([1], max_new_tokens=0)


def test_a_draft_makes_no_difference(make_table: MakeTable) -> None:
    target, draft = make_table(8, seed=1), ModelDrafter(make_table(8, seed=2))
    draft.start = None  # type: ignore[method-assign, assignment]  # whoever uses it fails
    texts = [
        LookaheadDecoder(pair).generate([1, 2], max_new_tokens=40, sampling=Sampling(), seed=3).tokens
        for pair in (Pair(target), Pair(target, draft))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("seed", [7, 2**40, -5])
def test_a_seed_fixes_the_text_and_every_round(make_table: MakeTable, seed: int) -> None:
    decoder = LookaheadDecoder(Pair(make_table(8, seed=1)))

    def facts(seed: int | None) -> list[tuple[int, ...]]:
        rounds = decoder.generate([1, 2], max_new_tokens=40, sampling=Sampling(), seed=seed).rounds
        return [(round_.drafted, round_.accepted, round_.target_tokens, *round_.tokens) for round_ in rounds]

    assert facts(seed) == facts(seed)
    assert facts(seed) != facts(8)
    assert facts(None) != facts(None)


def test_a_finished_session_makes_empty_rounds(table_of: TableOf) -> None:
    session = LookaheadDecoder(Pair(table_of(counting(), eos=[4]))).start([1, 2], max_new_tokens=40)
    while not session.finished:
        session.step()
    assert session.tokens == [3, 4]
    empty = session.step()
    assert empty.tokens == ()
    assert (empty.draft_steps, empty.target_tokens) == (0, 0)


def test_empty_rounds_count_for_nothing(table_of: TableOf) -> None:
    session = LookaheadDecoder(Pair(table_of(counting(), eos=[4]))).start([1, 2], max_new_tokens=40)
    rounds = [session.step() for _ in range(5)]
    assert rounds[-1].tokens == ()
    result = [round_ for round_ in rounds if round_.tokens]
    assert LookaheadStatistics.of(rounds) == LookaheadStatistics.of(result)
    profile = LatencyProfile("toy", {0: 0.0}, {1: 1.0, 2: 2.0}, 1.0, {}, kind="lookahead")
    assert profile.charge(rounds) == profile.charge(result)


def test_a_vocabulary_that_ends_texts_all_through_does_not_stop_it(table_of: TableOf) -> None:
    generation = LookaheadDecoder(Pair(table_of(counting(), eos=list(range(8))))).generate([1, 2], max_new_tokens=4)
    assert (generation.tokens, generation.finish_reason) == ([3], "eos")


def test_rounds_tell_what_they_read(table_of: TableOf) -> None:
    decoder = LookaheadDecoder(Pair(table_of(counting())), pool=PoolSettings(seeds="prompt"))
    session = decoder.start([0, 1, 2, 3, 4, 5, 6, 7, 0, 1], max_new_tokens=30)
    round_ = session.step({"window": 4, "ngram": 4, "guesses": 2})
    assert isinstance(round_, LookaheadRound)
    assert (round_.available, round_.guesses) == (1, 1)
    assert round_.tokens == (2, 3, 4, 5)  # the run of the prompt, and the target's own token
    assert (round_.draft_steps, round_.accepted, round_.divergence) == (0, 3, 0.0)
    assert round_.drafted == 3 + 3  # the rest of the window's first row, and the guess
    assert round_.target_tokens == 4 + 3
    parts = round_.mask_seconds + round_.forward_seconds + round_.judge_seconds
    assert parts == pytest.approx(round_.verify_seconds, abs=1e-6)
    assert min(round_.mask_seconds, round_.forward_seconds, round_.judge_seconds, round_.draft_seconds) >= 0


def a_round(tokens: int, available: int, guesses: int, read: int, pool: int, seconds: float) -> LookaheadRound:
    return LookaheadRound(
        tokens=tuple(range(tokens)),
        drafted=read - 1,
        accepted=tokens - 1,
        divergence=0.0,
        draft_seconds=seconds,
        verify_seconds=6 * seconds,
        draft_steps=0,
        target_tokens=read,
        available=available,
        guesses=guesses,
        pool_size=pool,
        mask_seconds=seconds,
        forward_seconds=2 * seconds,
        judge_seconds=3 * seconds,
    )


def test_the_statistics_by_hand() -> None:
    rounds = [a_round(1, 0, 0, 5, 0, 1.0), a_round(4, 3, 2, 15, 9, 3.0)]
    assert LookaheadStatistics.of(rounds) == LookaheadStatistics(
        rounds=2,
        step_compression=2.5,
        tokens_read=10.0,
        hit_rate=0.5,
        guesses=1.0,
        pool_size=9,
        prepare_seconds=2.0,
        mask_seconds=2.0,
        forward_seconds=4.0,
        judge_seconds=6.0,
    )


def test_statistics_of_a_generation_agree_with_it_and_others_are_refused(make_table: MakeTable) -> None:
    pair = Pair(make_table(8, seed=1))
    generation = LookaheadDecoder(pair).generate([1, 2], max_new_tokens=40, seed=0)
    statistics = LookaheadStatistics.of(generation.rounds)
    assert statistics.step_compression == generation.mean_acceptance_length > 1
    assert statistics.tokens_read == pytest.approx(
        generation.target_tokens_per_token * generation.mean_acceptance_length
    )
    other = AutoregressiveDecoder(pair).generate([1, 2], max_new_tokens=4).rounds
    for rounds in ([], other, [*generation.rounds, *other]):
        with pytest.raises(ValueError, match="rounds of a LookaheadDecoder, at least one"):
            LookaheadStatistics.of(rounds)
