"""Statistics against known values, brute force and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from specgym.agents.evaluation.statistics import holm, interval, rank_correlation, resampled_means, sign_flip_test


def test_holm_by_hand_and_in_the_order_given() -> None:
    # Sorted: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 1 * 0.04, which may not be below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # What R's p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") gives.
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_the_sign_flip_test_counts_all_assignments_of_signs() -> None:
    assert sign_flip_test([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip_test([1.0, -1.0]) == 1
    assert sign_flip_test([0.0, 0.0, 0.0]) == 1
    differences = np.random.default_rng(1).normal(0.4, 1, size=9)
    far = [
        abs(np.dot(signs, differences)) >= abs(differences.sum()) - 1e-12
        for signs in itertools.product((-1, 1), repeat=9)
    ]
    assert sign_flip_test(differences) == np.mean(far)
    assert sign_flip_test(-differences) == np.mean(far)
    with pytest.raises(ValueError, match="at least one"):
        sign_flip_test([])


def test_beyond_twelve_pairs_signs_are_drawn_and_agree_with_the_exact_test() -> None:
    differences = np.random.default_rng(2).normal(0.5, 1, size=14)
    signs = np.array(list(itertools.product((-1, 1), repeat=14)))
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean()
    assert 0.01 < exact < 0.5
    assert sign_flip_test(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_test(differences) == sign_flip_test(differences)
    assert sign_flip_test(np.ones(40), draws=99) == 1 / 100  # never 0


def test_the_bootstrap_draws_clusters_and_members_within_them() -> None:
    assert (resampled_means([3.0, 3.0, 3.0], ["a", "a", "b"]) == 3).all()
    # One cluster: the ordinary bootstrap of its members, whose mean has the variance of one over their number.
    values = np.arange(10.0)
    means = resampled_means(values, ["a"] * 10, draws=20_000)
    assert means.mean() == pytest.approx(4.5, abs=0.05)
    assert means.std() == pytest.approx(values.std() / np.sqrt(10), rel=0.03)
    # Clusters whose members are all alike: the ordinary bootstrap of clusters.
    means = resampled_means(np.repeat(values, 3), list("aaabbbcccdddeeefffggghhhiiijjj"), draws=20_000)
    assert means.std() == pytest.approx(values.std() / np.sqrt(10), rel=0.03)
    # A cluster with more members weighs as many.
    assert resampled_means([0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"], draws=20_000).mean() == pytest.approx(
        (0 + 2 * 0.75 + 1) / 4, abs=0.02
    )
    with pytest.raises(ValueError, match="a cluster for each"):
        resampled_means([1.0, 2.0], ["a"])


def test_intervals_over_clusters_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    clusters = [str(place) for place in range(20) for _ in range(4)]
    held = {"clusters": 0, "one by one": 0}
    for trial in range(200):
        values = np.repeat(rng.normal(size=20), 4) + rng.normal(0, 0.5, size=80)
        for way, groups in (("clusters", clusters), ("one by one", [str(place) for place in range(80)])):
            low, high = interval(resampled_means(values, groups, draws=300, seed=trial))
            held[way] += low <= 0 <= high
    assert 0.88 <= held["clusters"] / 200 <= 0.99
    assert held["one by one"] / 200 < 0.8


def test_rank_correlation_agrees_with_scipy_also_with_ties() -> None:
    rng = np.random.default_rng(4)
    first = rng.integers(5, size=30)
    second = first + rng.integers(4, size=30)
    assert rank_correlation(first, second) == pytest.approx(scipy.stats.spearmanr(first, second).statistic)
    assert rank_correlation([1, 2, 3], [1, 8, 27]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [3, 2, 1]) == 0
