"""Trees grown level by level are those that adding the best node one at a time gives."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgym.decoding.decoders.draft_tree.grow_tree import EVERYTHING, Candidates, DraftedTree

Path = tuple[int, ...]


def chances(path: Path, width: int, seed: int) -> list[float]:
    """Chances of the children of a node, by its path of tokens: descending, some alike."""
    rng = random.Random(f"{seed}/{path}")
    return sorted((rng.choice((0.05, 0.1, 0.2, 0.3, 0.5, 0.9, 1.0)) for _ in range(width)), reverse=True)


def grow(width: int, depth: int, budget: int, seed: int, random_children: bool, threshold: float = 0.0) -> DraftedTree:
    """Grow a tree like `TreeDraft`; tokens are the places among the children."""
    tree = Candidates(99, width, depth, budget, random_children)
    level, row = [0], 0
    while level and tree.width:
        new: list[int] = []
        for place in level:
            path: list[int] = []
            node = tree.nodes[place]
            while node.parent >= 0:
                path.insert(0, node.token)
                node = tree.nodes[node.parent]
            new += tree.add(place, range(tree.width), chances(tuple(path), tree.width, seed))
        chosen = tree.chosen(new)
        for place in chosen:
            tree.nodes[place].cut = tree.nodes[place].score < threshold
        level = [place for place in chosen if tree.goes_on(place)]
        for place in level:
            row += 1
            tree.nodes[place].row = row
    return tree.finished()


def paths(tree: DraftedTree) -> set[Path]:
    """Paths of the nodes below the root, by tokens."""
    return {tuple(tree.tokens[node] for node in tree.tree.path(number)[1:]) for number in range(1, len(tree) + 1)}


def one_at_a_time(width: int, depth: int, budget: int, seed: int) -> list[float]:
    """Chances of the nodes that best-first growth adds, best first."""
    heap: list[tuple[float, Path]] = (
        [(-chance, (token,)) for token, chance in enumerate(chances((), width, seed))] if depth else []
    )
    heapq.heapify(heap)
    result: list[float] = []
    while heap and len(result) < budget:
        negative, path = heapq.heappop(heap)
        result.append(-negative)
        if len(path) < depth:
            for token, chance in enumerate(chances(path, width, seed)):
                heapq.heappush(heap, (negative * chance, (*path, token)))
    return result


def chance_of(path: Path, width: int, seed: int) -> float:
    product = 1.0
    for place, token in enumerate(path):
        product *= chances(path[:place], width, seed)[token]
    return product


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 24), st.integers(0, 10_000))
def test_a_tree_grown_by_levels_is_the_best_one(width: int, depth: int, budget: int, seed: int) -> None:
    tree = grow(width, depth, budget, seed, random_children=False)
    result = paths(tree)
    assert len(result) == len(tree) <= budget
    width = min(width, budget)
    ours = sorted((chance_of(path, width, seed) for path in result), reverse=True)
    assert ours == pytest.approx(one_at_a_time(width, depth, budget, seed))
    assert all(path[:-1] in result or len(path) == 1 for path in result)
    assert tree.cut == 0
    assert not any(tree.lost)


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 24), st.integers(0, 10_000))
def test_random_children_stay_or_go_together(width: int, depth: int, budget: int, seed: int) -> None:
    tree = grow(width, depth, budget, seed, random_children=True)
    width = min(width, budget)
    assert len(tree) <= budget
    assert {len(children) for children in tree.children} <= {0, width}
    with_children = [node for node, children in enumerate(tree.children) if children]
    assert len(with_children) <= max(1, budget // max(width, 1))
    if width and depth:
        assert with_children[0] == 0
    assert all(tree.rows[node] >= 0 for node in with_children)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 24), st.integers(0, 10_000), st.booleans())
def test_what_is_cut_is_told_and_costs_no_other_node_its_place(
    width: int, depth: int, budget: int, seed: int, random_children: bool
) -> None:
    whole = grow(width, depth, budget, seed, random_children)
    pruned = grow(width, depth, budget, seed, random_children, threshold=0.3)
    width = min(width, budget)
    assert paths(pruned) <= paths(whole)
    if random_children:
        hopeless = {path for path in paths(pruned) if chance_of(path, width, seed) < 0.3}
        lost = [node for node, tokens in enumerate(pruned.lost) if tokens]
        assert all(pruned.lost[node] == {EVERYTHING} for node in lost)
        assert {tuple(pruned.tokens[step] for step in pruned.tree.path(node)[1:]) for node in lost} <= hopeless
        assert not any(path[:-1] in hopeless for path in paths(pruned))
    else:
        kept = {path for path in paths(whole) if chance_of(path, width, seed) >= 0.3}
        assert paths(pruned) == kept
        below = {
            (*(pruned.tokens[step] for step in pruned.tree.path(node)[1:]), token)
            for node, tokens in enumerate(pruned.lost)
            for token in tokens
        }
        # And others, in the places of what would have followed those that were cut.
        assert below >= {path for path in paths(whole) - kept if path[:-1] in kept or len(path) == 1}
        assert all(chance_of(path, width, seed) < 0.3 for path in below)
        assert pruned.cut == len(below)


def test_a_token_that_was_drawn_twice_is_one_node_with_two_draws() -> None:
    tree = Candidates(99, 3, 1, 3, random=True)
    new = tree.add(0, [7, 4, 7], [0.5, 0.2, 0.5])
    assert [tree.nodes[place].token for place in new] == [7, 4]
    assert tree.chosen(new) == []
    finished = tree.finished()
    assert finished.tokens == [99, 7, 4]
    assert finished.children[0] == [1, 2, 1]
