"""Which n-grams become guesses: every option's rule by hand, and what each does to real rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from specgym.decoding.decoders.lookahead.decoder import LookaheadDecoder, LookaheadRound
from specgym.decoding.decoders.lookahead.pool import Guess, NGramPool, PoolSettings, Ranking, choose_guesses
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.sampling import Sampling


def guess(tokens: tuple[int, ...], first: float = 1.0, tried: int = 0, begun: int = 0, accepted: int = 0) -> Guess:
    """A guess whose recorded probability is `first` a token."""
    item = Guess(tokens, first ** len(tokens), 0)
    item.tried, item.begun, item.accepted = tried, begun, accepted
    return item


def picked(known: list[Guess], count: int = 9, longest: int = 9, **settings: Any) -> list[tuple[int, ...]]:
    return [tokens for _, tokens in choose_guesses(known, PoolSettings(**settings), count, longest)]


def test_without_options_the_first_are_taken() -> None:
    result = [guess((1, 2)), guess((3, 4)), guess((5, 6))]
    assert picked(result) == [(1, 2), (3, 4), (5, 6)]
    assert picked(result, count=2) == [(1, 2), (3, 4)]
    assert picked(result, count=0) == []
    assert picked(result, longest=0) == []
    assert picked([]) == []


def test_knownthat_are_the_same_once_cut_are_taken_once() -> None:
    result = [guess((1, 2, 3)), guess((1, 2, 4)), guess((1, 5)), guess((1, 2))]
    assert picked(result, longest=2) == [(1, 2), (1, 5)]
    assert picked(result, longest=1) == [(1,)]
    assert picked(result, longest=2, count=2) == [(1, 2), (1, 5)]  # the doubles take no place
    assert [item for item, _ in choose_guesses(result, PoolSettings(), 9, 2)] == [result[0], result[2]]


def test_too_similar_knownare_left_out() -> None:
    result = [guess((1, 2, 3, 4)), guess((1, 2, 3, 9)), guess((1, 2, 8, 9)), guess((4, 3, 2, 1))]
    assert picked(result, max_overlap=1.0) == [item.tokens for item in result]
    assert picked(result, max_overlap=0.75) == [item.tokens for item in result]  # as much as that is allowed
    assert picked(result, max_overlap=0.7) == [(1, 2, 3, 4), (1, 2, 8, 9), (4, 3, 2, 1)]
    assert picked(result, max_overlap=0.0) == [(1, 2, 3, 4), (4, 3, 2, 1)]
    assert picked(result, max_overlap=0.7, count=2) == [(1, 2, 3, 4), (1, 2, 8, 9)]


def test_only_knownthat_are_likely_to_begin_are_taken() -> None:
    result = [guess((1, 2), 0.3), guess((3, 4), 0.6), guess((5, 6), 0.6, tried=8), guess((7, 8), 0.3, tried=6, begun=6)]
    assert picked(result, min_acceptance=0.5) == [(3, 4), (7, 8)]
    assert picked(result, min_acceptance=0.7) == [(7, 8)]
    assert picked(result, min_acceptance=0.0) == [item.tokens for item in result]
    assert picked(result, min_acceptance=1.0) == []


def test_the_fewest_knownthat_make_up_the_share_of_scores_are_taken_the_best_first() -> None:
    # Scores 0.75, 0.2 + 0.04, (4 + 2 * 0.75) / 4: in all 2.365.
    result = [guess((1, 2), 0.5), guess((3, 4), 0.2), guess((5, 6), 0.5, tried=2, begun=2, accepted=4)]
    assert [item.score() for item in result] == pytest.approx([0.75, 0.24, 1.375])
    assert picked(result, top_share=0.0) == [(5, 6)]
    assert picked(result, top_share=0.58) == [(5, 6)]
    assert picked(result, top_share=0.59) == [(5, 6), (1, 2)]
    assert picked(result, top_share=0.9) == [(5, 6), (1, 2), (3, 4)]
    assert picked(result, top_share=1.0) == [(5, 6), (1, 2), (3, 4)]
    assert picked(result, top_share=0.9, count=1) == [(5, 6)]
    assert picked([guess((1,)), guess((2,)), guess((3,))], top_share=0.5) == [(1,), (2,)]  # equals stay in order


def test_a_ranking_goes_by_what_came_true_where_the_text_was_alike() -> None:
    pool = NGramPool(PoolSettings(ranking="learned"))
    assert pool.ranking is not None
    # After 1 2 the key 3 is followed by 4 5; after 7 8 by 9 9, which was found later and more often.
    text = [0, 1, 2, 3, 0, 7, 8, 3]
    pool.add(3, (4, 5), 4, context=pool.context(text, 3))
    for now in (8, 9, 10):
        pool.add(3, (9, 9), now, context=pool.context(text, 7))
    assert pool.context(text, 3) == (2, 1, 0)
    assert pool.context(text, 7) == (8, 7, 0, 3)
    assert [item.tokens for item in pool.find(3, 11)] == [(9, 9), (4, 5)]
    for _ in range(30):
        assert {item.tokens for item in pool.find(3, 11, before=(2, 1, 6))} == {(9, 9), (4, 5)}
        pool.ranking.learn([4, 5, 6])
        assert pool.find(3, 11, before=(8, 7, 6))
        pool.ranking.learn([9])
    assert [item.tokens for item in pool.find(3, 11, before=(2, 1, 6))] == [(4, 5), (9, 9)]
    assert [item.tokens for item in pool.find(3, 11, before=(8, 7, 6))] == [(9, 9), (4, 5)]
    likeliest, other = pool.find(3, 11, before=(2, 1))
    assert likeliest.expected_acceptance() > 0.8 > 0.2 > other.expected_acceptance()
    assert likeliest.score() == pytest.approx(2 * likeliest.expected_acceptance())


def test_a_step_of_learning_by_hand() -> None:
    ranking = Ranking()
    item = guess((1, 2), 1.0)
    item.contexts = [(5, 6), (5, 9)]
    assert ranking.order([item], (5, 9, 3), 0) == [item]
    features = [1.0, 2 / 2, 0.0, 0.0, 0.5, 0.0]
    before = list(ranking.weights)
    expected = 1 / (1 + math.exp(-sum(weight * feature for weight, feature in zip(before, features, strict=True))))
    assert item.learned == pytest.approx(expected)
    ranking.learn([1, 7])  # one of two tokens is right
    slopes = [(expected - 0.5) * feature for feature in features]
    after = [weight - 0.5 * slope / math.sqrt(1 + slope * slope) for weight, slope in zip(before, slopes, strict=True)]
    assert ranking.weights == pytest.approx(after)
    ranking.learn([1, 7])  # nothing was ordered since
    assert ranking.weights == pytest.approx(after)


guesses = st.lists(
    st.builds(
        guess,
        st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple),
        st.floats(0, 1),
        st.integers(0, 9),
        st.integers(0, 9),
        st.integers(0, 20),
    ),
    max_size=12,
)
shares = st.none() | st.floats(0, 1)


@given(guesses, shares, shares, shares, st.integers(0, 9), st.integers(0, 5))
def test_whatever_the_options_the_choice_is_some_of_what_was_found(
    known: list[Guess], top: float | None, overlap: float | None, least: float | None, count: int, longest: int
) -> None:
    settings = PoolSettings(top_share=top, max_overlap=overlap, min_acceptance=least)
    result = choose_guesses(known, settings, count, longest)
    assert len(result) <= count
    assert all(item in known and tokens == item.tokens[:longest] and tokens for item, tokens in result)
    assert len({tokens for _, tokens in result}) == len(result)
    if least is None and known and count and longest:
        assert result


OPTIONS: dict[str, dict[str, Any]] = {
    "top share": {"top_share": 0.5},
    "overlap": {"max_overlap": 0.3},
    "two stages": {"min_acceptance": 0.6},
    "one a token": {"per_key": 1},
    "few tokens": {"max_keys": 2},
    "frequency": {"retention": "frequency", "per_key": 3},
    "sliding": {"retention": "sliding", "horizon": 5},
    "learned": {"ranking": "learned", "min_acceptance": 0.2},
    "unseeded": {"seeds": "nothing"},
    "prompt": {"seeds": "prompt"},
}


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_changes_what_is_verified(
    make_table: Callable[..., LanguageModel], option: dict[str, Any]
) -> None:
    def verified(pool: PoolSettings) -> list[tuple[int, int, tuple[int, ...]]]:
        decoder = LookaheadDecoder(Pair(make_table(6, seed=3, spread=1.5)), pool=pool)
        sampling = Sampling(0.8)
        session = decoder.start([1, 2, 3, 1, 4, 2, 1, 2], max_new_tokens=80, sampling=sampling, seed=0)
        rounds = []
        while not session.finished:
            round_ = session.step({"window": 3, "ngram": 4, "guesses": 6})
            assert isinstance(round_, LookaheadRound)
            assert round_.guesses <= min(6, round_.available)
            rounds.append((round_.available, round_.guesses, round_.tokens))
        return rounds

    assert verified(PoolSettings(**option)) != verified(PoolSettings())


def test_options_that_select_verify_fewer_knownthan_were_found(make_table: Callable[..., LanguageModel]) -> None:
    for option in ("top share", "overlap", "two stages"):
        decoder = LookaheadDecoder(Pair(make_table(6, seed=3, spread=1.5)), pool=PoolSettings(**OPTIONS[option]))
        rounds = decoder.generate([1, 2, 3, 1, 4, 2], max_new_tokens=80, sampling=Sampling(), seed=0).rounds
        kept = [round_ for round_ in rounds if isinstance(round_, LookaheadRound)]
        assert 0 < sum(round_.guesses for round_ in kept) < sum(min(5, round_.available) for round_ in kept)
