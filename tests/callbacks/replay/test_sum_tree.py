"""The sum tree: drawn in proportion to priorities, whatever was changed before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from specgym.callbacks.replay.segments import SumTree


def unlikeliness(drawn: np.ndarray, priorities: np.ndarray) -> float:
    """Chi-square of how often places were drawn against their priorities, over its 99.99th percentile."""
    expected = drawn.size * priorities / priorities.sum()
    counts = np.bincount(drawn.reshape(-1), minlength=len(priorities))
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    return float(statistic / chi2.ppf(0.9999, possible.sum() - 1))


@pytest.mark.parametrize("places", [3, 5, 8, 37])
def test_draws_in_proportion_to_priorities(places: int) -> None:
    rng = np.random.default_rng(places)
    priorities = rng.exponential(size=places)
    priorities[0] = 0
    tree = SumTree(places)
    tree.set(np.arange(places), priorities)
    # Batches of one: stratified ones are drawn more evenly than chance, which would hide a bias from the bound.
    assert unlikeliness(tree.draw(20_000, 1, rng), priorities) < 1
    assert unlikeliness(tree.draw(500, 40, rng), priorities) < 1
    assert unlikeliness(tree.draw(20_000, 1, rng), np.where(priorities > 0, 1.0, 0.0)) > 1


def test_a_stratified_batch_of_equal_priorities_has_every_place_once() -> None:
    tree = SumTree(6)
    tree.set(np.arange(6), np.ones(6))
    drawn = tree.draw(50, 6, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, np.broadcast_to(np.arange(6), (50, 6)))


@given(
    st.integers(1, 20).flatmap(
        lambda places: st.tuples(
            st.just(places),
            st.lists(st.tuples(st.integers(0, places - 1), st.integers(0, 9)), min_size=1, max_size=30),
            st.integers(1, 5),
        )
    )
)
def test_finds_what_a_running_sum_finds_after_any_changes(case: tuple[int, list[tuple[int, int]], int]) -> None:
    places, changes, at_once = case
    tree, naive = SumTree(places), np.zeros(places)
    for start in range(0, len(changes), at_once):
        part = np.array(changes[start : start + at_once])
        tree.set(part[:, 0], part[:, 1])
        for place, priority in part:
            naive[place] = priority
    np.testing.assert_array_equal(tree.priorities, naive)
    assert tree.total == naive.sum()
    if naive.sum():
        masses = np.arange(0, naive.sum(), 0.5)
        np.testing.assert_array_equal(tree.find(masses), np.searchsorted(np.cumsum(naive), masses, side="right"))


def test_a_place_with_priority_zero_is_not_found_even_at_the_very_end() -> None:
    tree = SumTree(5)
    tree.set(np.array([0, 1, 2]), np.array([0.1, 0.2, 0.7]))
    assert tree.find(np.array([tree.total, np.nextafter(tree.total, 2)])).tolist() == [2, 2]


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="places"):
        SumTree(0)
    tree = SumTree(3)
    with pytest.raises(ValueError, match="all priorities are 0"):
        tree.draw(1, 1, np.random.default_rng(0))
    with pytest.raises(IndexError, match="0 to 2"):
        tree.set(np.array([3]), np.ones(1))
    with pytest.raises(IndexError, match="0 to 2"):
        tree.set(np.array([-1]), np.ones(1))
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            tree.set(np.array([1]), np.array([wrong]))
    assert tree.total == 0
