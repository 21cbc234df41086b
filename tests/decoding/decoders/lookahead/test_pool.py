"""The n-gram pool: what it keeps, what it lets go, and that its bounds hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from specgym.decoding.decoders.lookahead.decoder import LookaheadDecoder, LookaheadRound, LookaheadSession
from specgym.decoding.decoders.lookahead.pool import Guess, NGramPool, PoolSettings, PoolSettingsError
from specgym.decoding.errors import SpecgymError
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.sampling import Sampling

RETENTIONS = ("recency", "frequency", "sliding")


def runs(pool: NGramPool, key: int, now: int = 0) -> list[tuple[int, ...]]:
    return [guess.tokens for guess in pool.find(key, now)]


def sized(pool: NGramPool) -> tuple[int, int]:
    """Sizes counted by hand; they must be those that the pool tells."""
    groups = pool._guesses.values()
    assert all(groups)
    assert len(pool) == sum(map(len, groups))
    assert pool.keys == len(groups)
    return len(pool), pool.keys


def test_by_recency_the_run_found_longest_ago_gives_way() -> None:
    pool = NGramPool(PoolSettings(per_key=2))
    pool.add(1, (5, 6), 0)
    pool.add(1, (7, 8), 0)
    assert runs(pool, 1) == [(7, 8), (5, 6)]
    pool.add(1, (5, 6), 0)  # found again
    assert runs(pool, 1) == [(5, 6), (7, 8)]
    pool.add(1, (9, 9), 0)
    assert runs(pool, 1) == [(9, 9), (5, 6)]
    assert sized(pool) == (2, 1)
    assert runs(pool, 2) == []


def test_by_frequency_the_run_found_least_often_gives_way_and_the_most_frequent_comes_first() -> None:
    pool = NGramPool(PoolSettings(retention="frequency", per_key=3))
    for run in ((1,), (2,), (3,), (1,), (1,), (3,)):
        pool.add(0, run, 0)
    assert runs(pool, 0) == [(1,), (3,), (2,)]
    pool.add(0, (4,), 0)
    assert runs(pool, 0) == [(1,), (3,), (4,)]
    pool.add(0, (5,), 0)  # of those found once, 4 is the one found longest ago
    assert runs(pool, 0) == [(1,), (3,), (5,)]
    pool.add(0, (5,), 0)  # of those found twice, the latest comes first
    assert runs(pool, 0) == [(1,), (5,), (3,)]
    assert sized(pool) == (3, 1)


def test_sliding_retention_forgets_what_was_not_found_lately() -> None:
    pool = NGramPool(PoolSettings(retention="sliding", horizon=10, per_key=2))
    pool.add(1, (5,), 0)
    pool.add(1, (6,), 4)
    assert runs(pool, 1, 10) == [(6,), (5,)]
    assert runs(pool, 1, 11) == [(6,)]
    pool.add(1, (6,), 12)
    pool.add(1, (6,), 3)  # a run of the text that is noted late is not older for it
    assert runs(pool, 1, 22) == [(6,)]
    assert runs(pool, 1, 23) == []
    assert sized(pool) == (0, 0)  # the token that nothing is kept for is forgotten as well
    pool.add(1, (1,), 30)
    pool.add(1, (2,), 30)
    pool.add(1, (3,), 30)
    assert runs(pool, 1, 31) == [(3,), (2,)]  # else it is as by recency


@pytest.mark.parametrize("retention", ["recency", "frequency"])
def test_other_retentions_never_forget_by_age(retention: Any) -> None:
    pool = NGramPool(PoolSettings(retention=retention, horizon=1))
    pool.add(1, (5,), 0)
    assert runs(pool, 1, 1_000_000) == [(5,)]


def test_the_token_used_longest_ago_gives_way() -> None:
    pool = NGramPool(PoolSettings(max_keys=2))
    pool.add(1, (5,), 0)
    pool.add(1, (6,), 0)
    pool.add(2, (5,), 0)
    pool.find(1, 0)  # looking up is a use
    pool.add(3, (5,), 0)
    assert sized(pool) == (3, 2)
    assert runs(pool, 2) == []
    pool.add(1, (7,), 0)  # so is adding
    pool.add(4, (5,), 0)
    assert (runs(pool, 3), runs(pool, 1), runs(pool, 4)) == ([], [(7,), (6,), (5,)], [(5,)])


def test_what_is_known_of_a_run_is_kept_while_it_is_found_again() -> None:
    pool = NGramPool(PoolSettings())
    pool.add(1, (5, 6), 3, 0.25)
    (guess,) = pool.find(1, 3)
    assert (guess.probability, guess.first_probability, guess.seen, guess.last_seen) == (0.25, 0.5, 1, 3)
    guess.tried, guess.begun, guess.accepted = 4, 3, 5
    pool.add(1, (5, 6), 9, 0.04)
    assert pool.find(1, 9) == [guess]
    assert (guess.probability, guess.seen, guess.last_seen, guess.tried) == (0.04, 2, 9, 4)


class Plain:
    """The pool's rules, told plainly: a list of what was found, the latest last, and of the tokens' uses."""

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self.kept: list[list[Any]] = []  # key, tokens, how often, when last
        self.uses: list[int] = []

    def _use(self, key: int) -> None:
        self.uses = [other for other in self.uses if other != key] + [key]

    def add(self, key: int, tokens: tuple[int, ...], now: int) -> None:
        known = next((item for item in self.kept if item[:2] == [key, tokens]), list[Any]([key, tokens, 0, 0]))
        group = [item for item in self.kept if item[0] == key and item is not known]
        if not known[2] and len(group) == self.settings.per_key:
            least = min(group, key=lambda item: item[2]) if self.settings.retention == "frequency" else group[0]
            self.kept.remove(least)
        if known in self.kept:
            self.kept.remove(known)
        self.kept.append([key, tokens, known[2] + 1, max(now, known[3])])
        self._use(key)
        while len(self.uses) > self.settings.max_keys:
            gone = self.uses.pop(0)
            self.kept = [item for item in self.kept if item[0] != gone]

    def find(self, key: int, now: int) -> list[tuple[int, ...]]:
        if key in self.uses:
            self._use(key)
        if self.settings.retention == "sliding":
            self.kept = [item for item in self.kept if item[0] != key or now - item[3] <= self.settings.horizon]
        group = [item for item in reversed(self.kept) if item[0] == key]
        if not group:
            self.uses = [other for other in self.uses if other != key]
        if self.settings.retention == "frequency":
            group.sort(key=lambda item: -item[2])
        return [item[1] for item in group]


steps = st.lists(
    st.tuples(st.booleans(), st.integers(0, 4), st.lists(st.integers(0, 2), min_size=1, max_size=2)), max_size=60
)


@given(steps, st.sampled_from(RETENTIONS), st.integers(1, 4), st.integers(1, 4), st.integers(1, 20))
def test_any_use_keeps_to_the_bounds_and_to_the_rules(
    some: list[tuple[bool, int, list[int]]], retention: Any, max_keys: int, per_key: int, horizon: int
) -> None:
    settings = PoolSettings(retention=retention, max_keys=max_keys, per_key=per_key, horizon=horizon)
    pool, expected = NGramPool(settings), Plain(settings)
    for now, (finds, key, tokens) in enumerate(some):
        if finds:
            assert runs(pool, key, now) == expected.find(key, now)
        else:
            pool.add(key, tuple(tokens), now)
            expected.add(key, tuple(tokens), now)
        size, keys = sized(pool)
        assert size == len(expected.kept)
        assert keys == len(expected.uses) <= max_keys
        assert all(len(group) <= per_key for group in pool._guesses.values())


@pytest.mark.parametrize("retention", RETENTIONS)
def test_a_long_text_stays_within_the_bound_and_costs_no_more_at_its_end(
    make_table: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch, retention: Any
) -> None:
    length = 20_000 if retention == "recency" else 3_000
    settings = PoolSettings(retention=retention, max_keys=24, per_key=3, horizon=50)
    target = make_table(48, seed=1, spread=2.5, context=30_000)
    decoder = LookaheadDecoder(Pair(target), pool=settings)
    session = decoder.start([1, 2, 3], max_new_tokens=length, sampling=Sampling(), seed=0)
    assert isinstance(session, LookaheadSession)
    calls = {"add": 0, "find": 0}

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(session.pool, name)

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return original(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(session.pool, name, counted(name))
    fullest = accepted = 0
    while not session.finished:
        before = dict(calls)
        round_ = session.step({"window": 3, "ngram": 3, "guesses": 2})
        assert isinstance(round_, LookaheadRound)
        # What a round does is bounded by its knobs: an n-gram a column, and one a token that the round before emitted.
        assert calls["find"] - before["find"] == 1
        assert calls["add"] - before["add"] <= 3 + 3
        assert round_.available <= 3
        assert round_.target_tokens <= 2 * 3 + 2 * 2
        assert round_.pool_size == len(session.pool) <= 24 * 3
        assert session.pool.keys <= 24
        fullest = max(fullest, round_.pool_size)
        accepted += round_.accepted
    assert len(session.tokens) == length
    sized(session.pool)
    assert fullest > 60  # the bound was needed
    assert accepted > length / 40
    assert session.target.length < 20_010


def test_the_seeds_fill_the_pool_with_what_they_say(table_of: Callable[..., LanguageModel]) -> None:
    vocabulary = 9
    table = 9.0 * torch.eye(vocabulary).roll(1, 1).expand(vocabulary, -1, -1).contiguous()
    prompt = [0, 4, 8, 0, 4, 1]

    def pooled(seeds: Any) -> dict[int, set[tuple[int, ...]]]:
        decoder = LookaheadDecoder(Pair(table_of(table)), pool=PoolSettings(seeds=seeds))
        session = decoder.start(prompt, max_new_tokens=20)
        assert isinstance(session, LookaheadSession)
        for _ in range(2):  # in which the window of 4 rows harvests nothing
            session.step({"window": 1, "ngram": 5, "guesses": 1})
        assert len(session.tokens) == 2
        return {key: set(group) for key, group in session.pool._guesses.items()}

    assert pooled("nothing") == {}
    assert pooled("prompt") == {0: {(4, 8, 0, 4)}, 4: {(8, 0, 4, 1)}}
    assert pooled("text") == {0: {(4, 8, 0, 4)}, 4: {(8, 0, 4, 1)}, 8: {(0, 4, 1, 2)}}


@pytest.mark.parametrize("seeds", ["nothing", "prompt", "text"])
def test_a_chunk_has_the_prompts_n_grams_and_its_own(make_table: Callable[..., LanguageModel], seeds: Any) -> None:
    prompt, size = [1, 2, 3, 1, 2, 4], 12
    decoder = LookaheadDecoder(
        Pair(make_table(16, seed=1, spread=2.0, context=256)),
        pool=PoolSettings(seeds=seeds, chunk_tokens=size, ranking="learned"),
    )
    session = decoder.start(prompt, max_new_tokens=60, seed=0)
    assert isinstance(session, LookaheadSession)
    pools, begun, largest = [session.pool], 0, 0

    def seen(first: int, end: int) -> set[tuple[int, ...]]:
        return {tuple(session.context[place : place + 3]) for place in range(first, end - 2)}

    while not session.finished:
        before = len(session.context)
        round_ = session.step({"window": 1, "ngram": 3, "guesses": 3})
        assert isinstance(round_, LookaheadRound)
        largest = max(largest, len(session.pool))
        if session.pool is not pools[-1]:  # nothing was found yet but by this round's window, a run at most
            assert session.pool.ranking is pools[-1].ranking
            assert (before - len(prompt)) // size > begun
            pools.append(session.pool)
            begun = (before - len(prompt)) // size
            kept = {(key, *run) for key, group in session.pool._guesses.items() for run in group}
            assert len(kept - (seen(0, len(prompt)) if seeds != "nothing" else set())) <= 1
            assert seeds == "nothing" or kept >= seen(0, len(prompt))
    assert len(pools) == 5
    whole = LookaheadDecoder(decoder.pair, pool=PoolSettings(seeds=seeds)).generate(prompt, max_new_tokens=60, seed=0)
    assert whole.tokens == session.tokens
    assert max(getattr(round_, "pool_size", 0) for round_ in whole.rounds) > largest


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens of the n-gram pool must be a whole number of at least 1, got 0"),
        ({"seeds": "all"}, "seeds of the n-gram pool must be one of 'nothing', 'prompt', 'text', got 'all'"),
        (
            {"retention": "age"},
            "retention of the n-gram pool must be one of 'recency', 'frequency', 'sliding', got 'age'",
        ),
        ({"horizon": 0}, "horizon of the n-gram pool must be a whole number of at least 1, got 0"),
        ({"max_keys": 1.5}, "max_keys of the n-gram pool must be a whole number"),
        ({"max_keys": float("inf")}, "max_keys of the n-gram pool must be a whole number"),
        ({"per_key": -1}, "per_key of the n-gram pool must be a whole number"),
        ({"top_share": 1.1}, "top_share of the n-gram pool must be a number from 0 to 1, got 1.1; or None"),
        ({"max_overlap": -0.1}, "max_overlap of the n-gram pool must be a number from 0 to 1"),
        ({"min_acceptance": float("nan")}, "min_acceptance of the n-gram pool must be a number from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(PoolSettingsError, match=message):
        PoolSettings(**setting)
    with pytest.raises(SpecgymError):
        dataclasses.replace(PoolSettings(), **setting)
    assert PoolSettings().seeds == "text"


def test_a_guess_is_expected_to_bring_what_was_recorded_corrected_by_what_happened() -> None:
    guess = Guess((3, 4), 0.25, 0)
    assert guess.expected_acceptance() == pytest.approx(0.5)  # the root of 0.25: recorded for one token
    assert guess.score() == pytest.approx(0.5 + 0.25)  # the first token, and both
    guess.tried, guess.begun, guess.accepted = 6, 6, 9
    assert guess.expected_acceptance() == pytest.approx((6 + 2 * 0.5) / 8)  # two trials' worth of the record
    assert guess.score() == pytest.approx((9 + 2 * 0.75) / 8)
    never = Guess((3, 4), 0.0, 0)
    assert never.expected_acceptance() == never.score() == 0
