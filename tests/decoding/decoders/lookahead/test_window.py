"""The lookahead window: which guess is about which place, what it harvests, and that no text's end gets in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from specgym.decoding.decoders.lookahead.decoder import LookaheadDecoder, LookaheadRound, LookaheadSession
from specgym.decoding.decoders.lookahead.pool import PoolSettings
from specgym.decoding.decoders.lookahead.window import Layout, Window
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.sampling import Sampling

TableOf = Callable[..., LanguageModel]
SURE = [0.5, 0.6, 0.7]


def fillers(first: int = 90) -> Callable[[], int]:
    """90, 91, 92, ..."""
    numbers = itertools.count(first)
    return lambda: next(numbers)


def test_three_rounds_by_hand() -> None:
    window = Window(7, fillers())
    window.resize(3, 1)
    assert window.rows == [[7, 90, 91]]

    # 7 is followed by 11; the guesses 90 and 91 by 12 and 13. A row is missing: nothing is harvested.
    assert window.advance([11, 12, 13], [11], 2, SURE) == []
    # 12 was guessed for the place after 11. The column that the text has passed goes to the other end, and a filler
    # takes the place of the token that was current.
    assert window.rows == [[11, 91, 92], [12, 13, 11]]

    window.resize(3, 2)
    result = window.advance([21, 22, 23], [12], 2, [0.1, 0.2, 0.3])
    assert [(item.key, item.tokens) for item in result] == [(11, (12, 21)), (91, (13, 22)), (92, (11, 23))]
    assert [item.probability for item in result] == pytest.approx([0.6 * 0.1, 0.7 * 0.2, 0.5 * 0.3])
    assert window.rows == [[12, 13, 11], [21, 22, 23]]  # moved up a row, and on a place: aligned as they are

    result = window.advance([31, 32, 33], [21, 31], 2, SURE)  # two tokens at once
    assert [(item.key, item.tokens) for item in result] == [(12, (21, 31)), (13, (22, 32)), (11, (23, 33))]
    assert [item.probability for item in result] == pytest.approx([0.1 * 0.5, 0.2 * 0.6, 0.3 * 0.7])
    assert window.rows == [[31, 23, 21], [32, 33, 31]]


def test_a_window_of_one_row_is_jacobi_iteration() -> None:
    window = Window(7, fillers())
    window.resize(4, 1)
    result = window.advance([1, 2, 3, 4], [1], 1, [1.0] * 4)
    assert [(item.key, item.tokens) for item in result] == [(7, (1,)), (90, (2,)), (91, (3,)), (92, (4,))]
    assert window.rows == [[1, 2, 3, 4]]
    window.advance([2, 5, 6, 8], [2, 5, 6], 1, [1.0] * 4)
    assert window.rows == [[6, 8, 2, 5]]


def test_more_tokens_than_columns_and_a_pass_without_the_window() -> None:
    window = Window(7, fillers())
    window.resize(3, 1)
    window.advance([11, 12, 13], [1, 2, 3, 4, 5], 1, SURE)
    assert window.rows == [[5, 13, 11]]  # four places on, which is one
    window.follow([6, 8])
    assert window.rows == [[8, 90 + 2, 13]]


def test_its_size_may_change_at_any_time() -> None:
    window = Window(7, fillers())
    for ngram in (4, 4, 4):
        window.resize(3, ngram - 1)
        window.advance([1, 2, 3], [5], ngram - 1, SURE)
    assert [len(row) for row in window.rows] == [3, 3, 3]
    rows = [list(row) for row in window.rows]
    window.resize(2, 2)
    assert window.rows == [row[:2] for row in rows[:2]]
    window.resize(4, 5)  # wider, but rows come one a round
    assert [row[:2] for row in window.rows] == [row[:2] for row in rows[:2]]
    assert [len(row) for row in window.rows] == [4, 4]
    result = window.advance([1, 2, 3, 4], [5], 2, [0.9] * 4)
    assert result[0].probability > 0
    assert result[3].probability == 0  # through a filler


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(2, 6), st.integers(1, 8)), min_size=1, max_size=20))
def test_any_changes_leave_a_rectangle_that_begins_with_the_current_token(changes: list[tuple[int, int, int]]) -> None:
    window, tokens = Window(0, fillers(1000)), itertools.count(1)
    current, rows = 0, 1
    for columns, ngram, emitted in changes:
        rows = min(rows, ngram - 1)
        window.resize(columns, rows)
        assert window.rows[0][0] == current
        assert [len(row) for row in window.rows] == [columns] * rows
        new = [next(tokens) for _ in range(emitted)]
        result = window.advance([next(tokens) for _ in range(columns)], new, ngram - 1, [1.0] * columns)
        assert len(result) == (columns if rows == ngram - 1 else 0)
        assert all(len(item.tokens) == ngram - 1 for item in result)
        current, rows = new[-1], min(rows + 1, ngram - 1)


def counting(vocabulary: int) -> Tensor:
    """Each token is followed by the next number."""
    return 9.0 * torch.eye(vocabulary).roll(1, 1).expand(vocabulary, -1, -1).contiguous()


@pytest.mark.parametrize("ngram", [2, 3, 5, 6])
def test_the_window_fills_up_for_n_less_two_rounds_and_then_harvests_every_round(table_of: TableOf, ngram: int) -> None:
    decoder = LookaheadDecoder(Pair(table_of(counting(6))), pool=PoolSettings(seeds="nothing"))
    session = decoder.start([0, 1, 2, 3, 4, 5], max_new_tokens=90, seed=0)
    rounds = [session.step({"window": 4, "ngram": ngram, "guesses": 3}) for _ in range(ngram + 6)]
    for number, round_ in enumerate(rounds):
        assert isinstance(round_, LookaheadRound)
        assert round_.target_tokens == 4 * min(number + 1, ngram - 1) + round_.guesses * (ngram - 1)
        assert (round_.pool_size > 0) == (number >= ngram - 2)
    assert len(rounds[-1].tokens) >= ngram  # a guess of N - 1 tokens came true, or more


def test_shape_changes_take_effect_in_the_same_round(table_of: TableOf) -> None:
    session = LookaheadDecoder(Pair(table_of(counting(50)))).start([1], max_new_tokens=90)

    def read(window: int, ngram: int) -> int:
        return session.step({"window": window, "ngram": ngram, "guesses": 0}).target_tokens

    assert [read(4, 4), read(4, 4), read(4, 4), read(4, 4)] == [4, 8, 12, 12]
    assert [read(7, 4), read(7, 2), read(7, 6), read(1, 6), read(1, 6), read(3, 6)] == [21, 7, 7, 2, 3, 12]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seeds", ["nothing", "prompt", "text"])
def test_no_token_that_ends_a_text_is_guessed(table_of: TableOf, temperature: float, seeds: str) -> None:
    # The text counts; after anything that does not count a text would end. Fillers lead there all the time.
    vocabulary, end = 20, 7
    table = torch.zeros(vocabulary, vocabulary, vocabulary)
    table[:, :, end] = 20.0
    for token in range(vocabulary):
        table[token, (token + 1) % vocabulary, end] = -20.0
        table[token, (token + 1) % vocabulary, (token + 2) % vocabulary] = 20.0
    table[5, 6] = -20.0
    table[5, 6, 8] = table[6, 8, 9] = table[8, 9, 10] = 20.0
    table[6, 8, end] = -20.0
    ended = 0

    target = table_of(table, eos=[end])
    for prompt in ([0, 1], [end, 3, end, 2, end, 3, 4], [8, 9, end]):
        decoder = LookaheadDecoder(Pair(target), pool=PoolSettings(seeds=seeds, min_acceptance=0.0))  # type: ignore[arg-type]
        session = decoder.start(prompt, max_new_tokens=60, sampling=Sampling(temperature), seed=0)
        assert isinstance(session, LookaheadSession)
        judge = session._judge

        def watch(values: Sequence[float], plan: Layout, chains: Any, judge: Callable = judge) -> Any:
            nonlocal ended
            choices = values[-len(plan.scored) :]
            ends = [choices[plan.place[node]] == end for node in plan.newest]
            judged = judge(values, plan, chains)
            assert end not in judged[2]
            assert [sure == 0 for sure in judged[3]] == ends  # nobody is sure of what stands in for an end
            ended += sum(ends)
            return judged

        session._judge = watch  # type: ignore[method-assign]
        rounds = 0
        while not session.finished:
            session.step({"window": 1 + (rounds + 2) % 7, "ngram": 2 + (rounds + 2) % 5, "guesses": 4})
            rounds += 1
            cells = [token for row in session._window.rows for token in row]
            assert end not in cells[1:]
            pooled = [run for group in session.pool._guesses.values() for run in group]
            assert all(end not in run for run in pooled)
    assert ended > 20  # the target did choose it, in the window
