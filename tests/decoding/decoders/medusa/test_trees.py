"""Trees of candidates: the best ones, their shapes, their masks, and what fills them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from specgym.decoding.decoders.medusa.trees import (
    CandidateTree,
    Ranks,
    assumed_accuracies,
    cartesian,
    expected_length,
    sparse,
)
from specgym.decoding.models.language_model import LanguageModel

RAGGED = [(3,), (0,), (0, 2), (0, 2, 1), (1,), (3, 0)]


def every_tree(accuracies: Sequence[Sequence[float]], size: int) -> Iterator[CandidateTree]:
    """All trees of at most `size` nodes."""
    nodes = [
        path
        for depth in range(1, len(accuracies) + 1)
        for path in itertools.product(*(range(len(row)) for row in accuracies[:depth]))
    ]
    for count in range(size + 1):
        for paths in itertools.combinations(nodes, count):
            if all(len(path) == 1 or path[:-1] in paths for path in paths):
                yield CandidateTree(paths)


def chance(path: Ranks, accuracies: Sequence[Sequence[float]]) -> float:
    return math.prod(accuracies[depth][rank] for depth, rank in enumerate(path))


def random_accuracies(rng: random.Random, kind: str) -> list[list[float]]:
    widths = rng.choice([[3], [3, 3], [2, 2, 2], [4, 2], [1, 3, 2]])
    if kind == "ties":
        return [[rng.choice([0.25, 0.5]) for _ in range(width)] for width in widths]
    if kind == "zeros":
        return [[rng.choice([0.0, 0.0, rng.random()]) for _ in range(width)] for width in widths]
    rows = [[rng.random() for _ in range(width)] for width in widths]
    return [sorted(row, reverse=True) for row in rows] if kind == "descending" else rows


@pytest.mark.parametrize("kind", ["descending", "any order", "zeros", "ties"])
def test_no_other_tree_expects_more_than_the_sparse_one(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(12):
        accuracies = random_accuracies(rng, kind)
        for size in (0, 1, 2, 4):
            tree = sparse(accuracies, size)
            best = max(expected_length(other, accuracies) for other in every_tree(accuracies, size))
            assert expected_length(tree, accuracies) == pytest.approx(best)
            assert len(tree) <= size
            assert all(chance(path, accuracies) > 0 for path in tree.paths)  # no place is wasted


def test_sparse_trees_have_the_size_asked_for_as_long_as_there_are_nodes_with_a_chance() -> None:
    accuracies = [[0.5, 0.2, 0.1], [0.4, 0.3, 0.0]]
    there = 3 + 3 * 2
    for size in range(there + 4):
        tree = sparse(accuracies, size)
        assert len(tree) == min(size, there)
        assert {path[:-1] for path in tree.paths} <= {(), *tree.paths}
    assert len(sparse([], 8)) == len(sparse([[], [0.5]], 8)) == len(sparse([[0.0, 0.0], [0.9]], 8)) == 0


def test_larger_sparse_trees_contain_the_smaller_ones_and_promise_more() -> None:
    accuracies = assumed_accuracies(5)
    trees = [sparse(accuracies, size) for size in range(65)]
    for small, large in itertools.pairwise(trees):
        assert set(small.paths) < set(large.paths)
        assert expected_length(small, accuracies) < expected_length(large, accuracies)
    assert trees[0].heads == trees[0].ranks == 0
    assert trees[64].heads > 1


def test_ranks_are_taken_by_their_accuracy_and_not_by_their_number() -> None:
    assert sparse([[0.1, 0.6, 0.3], [0.2, 0.9]], 3).paths == ((1,), (2,), (1, 1))


@pytest.mark.parametrize("accuracies", [[[0.5, 1.2]], [[-0.1]], [[0.5], [math.nan]], [[math.inf]]])
def test_accuracies_out_of_range_are_refused(accuracies: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        sparse(accuracies, 4)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0 candidates, got -1"):
        sparse([[0.5]], -1)


@pytest.mark.parametrize("widths", [(), (1,), (5,), (3, 2), (1, 1, 1, 1), (2, 1, 3), (4, 4, 2)])
def test_cartesian_trees_hold_every_combination_once(widths: tuple[int, ...]) -> None:
    tree = cartesian(widths)
    assert len(tree) == sum(math.prod(widths[:depth]) for depth in range(1, len(widths) + 1))
    assert {path for path in tree.paths if len(path) == len(widths)} == (
        set(itertools.product(*map(range, widths))) if widths else set()
    )
    assert (tree.heads, tree.ranks) == (len(widths), max(widths, default=0))


@pytest.mark.parametrize("widths", [(0,), (2, 0), (2, -1)])
def test_widths_below_one_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths must be at least 1"):
        cartesian(widths)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([()], "is empty"),
        ([(0,), (0, -1)], "negative rank"),
        ([(0,), (1,), (0,)], "occurs twice"),
        ([(0,), (1, 0)], r"\(1, 0\) is in the tree, but \(1,\)"),
        ([(0, 0)], r"but \(0,\), which leads to it, is not"),
    ],
)
def test_paths_that_make_no_tree_are_refused(paths: list[Ranks], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CandidateTree(paths)


TREES = {
    "none": CandidateTree([]),
    "ragged": CandidateTree(RAGGED),
    "chain": cartesian([1, 1, 1, 1]),
    "cartesian": cartesian([3, 2, 2]),
    "sparse": sparse(assumed_accuracies(5), 40),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_a_node_sees_the_root_its_ancestors_and_itself(tree: CandidateTree) -> None:
    paths: list[Ranks] = [(), *tree.paths]
    for row, path in enumerate(paths):
        assert tree.tree.visible[row].tolist() == [other == path[: len(other)] for other in paths]
        assert tree.tree.depths[row] == len(path)
        assert tree.tree.path(row)[1:] == [paths.index(path[:depth]) for depth in range(1, len(path) + 1)]
        assert [paths[child] for child in tree.children[row]] == [
            other for other in paths if other and other[:-1] == path
        ]
    assert tree.tree.height == tree.heads + 1
    assert tree.parents_on(torch.device("cpu")).tolist() == list(tree.tree.parents[1:])


def test_the_order_in_which_paths_are_given_makes_no_difference() -> None:
    rng = random.Random(0)
    for _ in range(10):
        shuffled = rng.sample(RAGGED, len(RAGGED))
        assert CandidateTree(shuffled).paths == ((0,), (1,), (3,), (0, 2), (3, 0), (0, 2, 1))


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_nodes_are_filled_with_the_candidate_of_their_own_head_and_rank(tree: CandidateTree) -> None:
    candidates = torch.arange(100, 100 + tree.heads * tree.ranks).reshape(tree.heads, tree.ranks)
    tokens = tree.filled(torch.tensor([7]), candidates)
    assert tokens.dtype == torch.int64
    # A rank beyond the first heads' must not reach into the next head's candidates.
    assert tokens.tolist() == [7, *(int(candidates[len(path) - 1, path[-1]]) for path in tree.paths)]


def test_a_cut_tree_keeps_what_its_heads_reach() -> None:
    tree = TREES["ragged"]
    for heads in range(5):
        cut = tree.cut(heads)
        assert set(cut.paths) == {path for path in RAGGED if len(path) <= heads}
        assert cut.heads == min(heads, 3)
    assert tree.cut(3) is tree
    assert tree.cut(1).ranks == 4
    assert tree.cut(0).ranks == 0


def test_the_expected_length_is_the_sum_of_the_chances_of_all_nodes() -> None:
    accuracies = [[0.5, 0.2, 0.1, 0.05], [0.4, 0.3, 0.25], [0.3, 0.1]]
    by_hand = 1 + 0.05 + 0.5 + 0.5 * 0.25 + 0.5 * 0.25 * 0.1 + 0.2 + 0.05 * 0.4
    assert expected_length(CandidateTree(RAGGED), accuracies) == pytest.approx(by_hand)
    assert expected_length(CandidateTree([]), accuracies) == 1


def test_the_expected_length_is_what_independent_heads_give() -> None:
    accuracies = [[0.5, 0.3], [0.4, 0.2], [0.6, 0.1]]
    tree = sparse(accuracies, 8)
    rng = random.Random(0)
    total, runs = 0, 20_000
    for _ in range(runs):
        right = tuple(rng.choices(range(3), [*row, 1 - sum(row)])[0] for row in accuracies)  # 2: neither
        total += 1 + sum(right[: len(path)] == path for path in tree.paths)
    # The length of a round varies by about 1, so that the mean is known to about 0.01; five of these are allowed.
    assert total / runs == pytest.approx(expected_length(tree, accuracies), abs=0.05)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_target_scores_each_node_as_if_it_had_read_its_path_alone(
    make_model: Callable[..., PreTrainedModel], family: str
) -> None:
    target = LanguageModel(make_model(family), prepack=False)
    generator = torch.Generator().manual_seed(0)
    for tree in TREES.values():
        prompt = torch.randint(0, 96, (9,), generator=generator)
        candidates = torch.randint(0, 96, (tree.heads, tree.ranks), generator=generator)
        tokens = tree.filled(torch.tensor([5]), candidates)
        reader = target.fresh()
        reader.forward(prompt)
        read = reader.forward(tokens, tree.tree, hidden=True)
        assert read.hidden is not None
        for node in range(len(tree) + 1):
            alone = target.fresh().forward(torch.cat([prompt, tokens[tree.tree.path(node)]]), last=1, hidden=True)
            assert alone.hidden is not None
            torch.testing.assert_close(read.scores[node], alone.scores[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(read.hidden[node], alone.hidden[-1], atol=1e-4, rtol=1e-4)
