"""Samples of Medusa decoding follow the target's distribution, whatever the tree and the heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specgym.decoding.decoders.medusa import decoder as module
from specgym.decoding.decoders.medusa.decoder import MedusaDecoder, TypicalMedusaDecoder
from specgym.decoding.decoders.medusa.trees import CandidateTree, cartesian
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import Sampling
from tests.helpers.first_tokens import ROUNDING, Knobs, Walker, assert_found_out, assert_texts_follow_the_target, usual
from tests.helpers.known_distributions import SAMPLINGS, Branches
from tests.helpers.small_medusa_heads import random_heads
from tests.helpers.table_models import readable_table

TREES = {
    "wide": cartesian([3, 2]),
    "deep": cartesian([2, 1, 2]),
    "chain": cartesian([1, 1, 1]),
    "every child": cartesian([3, 3]),
    "ragged": CandidateTree([(0,), (2,), (2, 1), (2, 1, 0), (2, 1, 2), (1,)]),
    "none": CandidateTree([]),
}


def changing(number: int) -> Mapping[str, float]:
    """Other knobs in every round."""
    return ({"heads": 3, "tree_size": 7}, {"heads": 1, "tree_size": 2}, {"heads": 2, "tree_size": 64}, {"heads": 0})[
        number % 4
    ]


class Choices:
    """Choices of the target after the nodes, a branch of the walk when first looked at.

    A node that nobody looks at makes no difference to the text, and rows of a draw are independent.
    """

    def __init__(self, walk: Branches, p: Tensor) -> None:
        self._walk, self._p = walk, p.double()
        self._known: dict[int, int] = {}

    def __getitem__(self, node: int) -> int:
        if node not in self._known:
            self._known[node] = self._walk.choose((self._p[node] / self._p[node].sum()).tolist())
        return self._known[node]


class MedusaWalker(Walker):
    """Walker whose draws are the target's choices after the nodes."""

    def branch(self, patch: pytest.MonkeyPatch, walk: Branches) -> None:
        """A node is a branch."""
        distributions: list[Tensor] = []
        on_the_host = module._lists

        def draw(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
            distributions.append(p)
            return torch.zeros(p.shape[:-1])

        def lists(greatest: Tensor, tokens: Tensor, choices: Tensor, *more: Tensor) -> list[Any]:
            first, read, _, *rest = on_the_host(greatest, tokens, choices, *more)
            return [first, read, Choices(walk, distributions.pop()), *rest]

        patch.setattr(module, "draw", draw)
        patch.setattr(module, "_lists", lists)


@pytest.fixture
def walker(monkeypatch: pytest.MonkeyPatch) -> Walker:
    return MedusaWalker(monkeypatch)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_sampling_is_exact_with_trees_of_every_shape(walker: Walker, sampling: Sampling) -> None:
    target = readable_table(3, seed=1, spread=1.2)
    heads = random_heads(target.model, heads=3, spread=0.5)
    for tree in TREES.values():
        assert walker.strays(MedusaDecoder(Pair(target), heads, tree=tree), sampling) < ROUNDING
    assert walker.strays(MedusaDecoder(Pair(target), heads), sampling, changing) < ROUNDING
    assert walker.accepted > 1
    assert walker.rejected > 1


@pytest.mark.parametrize(
    "more",
    [{"own_output": True}, {"blocks": 2}, {"blocks": 0}, {"vocabulary": (0, 2)}, {"vocabulary": (1, 2), "blocks": 2}],
    ids=str,
)
def test_sampling_is_exact_with_heads_of_every_kind(walker: Walker, more: dict[str, Any]) -> None:
    target = readable_table(3, seed=2, spread=1.2)
    for sampling in (Sampling(), Sampling(0.7, top_p=0.9)):
        for seed in range(3):
            heads = random_heads(target.model, heads=3, spread=1.0, seed=seed, **more)
            assert walker.strays(MedusaDecoder(Pair(target), heads), sampling, changing) < ROUNDING


def accepts_every_child(tree: CandidateTree, tokens: Sequence[float], choices: Sequence[float]) -> list[int]:
    """The first child of each node, whatever the target says."""
    path, node = list[int](), 0
    while tree.children[node]:
        node = tree.children[node][0]
        path.append(node)
    return path


def accepts_a_sibling(tree: CandidateTree, tokens: Sequence[float], choices: Sequence[float]) -> list[int]:
    """The child that the target chose, and where there is none, the last one: it was nearly chosen."""
    path, node = list[int](), 0
    while tree.children[node]:
        mine = [child for child in tree.children[node] if tokens[child] == choices[node]]
        node = mine[0] if mine else tree.children[node][-1]
        path.append(node)
        if not mine:
            break
    return path


def judges_by_the_parent(tree: CandidateTree, tokens: Sequence[float], choices: Sequence[float]) -> list[int]:
    """Compares a child with what was chosen at its grandparent: the mistake of an index that is off by one."""
    path, node, above = list[int](), 0, 0
    while True:
        following = next((child for child in tree.children[node] if tokens[child] == choices[above]), None)
        if following is None:
            return path
        path.append(following)
        node, above = following, node


@pytest.mark.parametrize("wrong", [accepts_every_child, accepts_a_sibling, judges_by_the_parent])
def test_a_wrong_acceptance_is_found_out_both_ways(
    monkeypatch: pytest.MonkeyPatch,
    walker: Walker,
    wrong: Callable[..., list[int]],
) -> None:
    monkeypatch.setattr(module, "matched", wrong)
    wrong_ones = []
    for vocabulary, tree in ((3, cartesian([2, 2, 2])), (6, cartesian([5, 4, 2]))):
        target = readable_table(vocabulary, seed=1, spread=1.2)
        heads = random_heads(target.model, heads=3, spread=0.5)
        wrong_ones.append(MedusaDecoder(Pair(target), heads, tree=tree))
    first, second = wrong_ones
    assert_found_out(walker, first, second, texts=500)


def test_typical_acceptance_is_found_out_as_lossy(walker: Walker) -> None:
    target = readable_table(3, seed=1, spread=1.2)
    heads = random_heads(target.model, heads=3, spread=0.5)
    decoder = TypicalMedusaDecoder(Pair(target), heads, tree=cartesian([2, 2]))
    far = walker.strays(decoder, Sampling(), lambda number: {"epsilon": 0.0})
    near = walker.strays(decoder, Sampling(), lambda number: {"epsilon": 1.0, "delta": 2.0})
    assert far > 0.05
    assert near < ROUNDING  # no token is twice as probable as one of three equally likely ones and less than certain


CASES: dict[str, tuple[str, CandidateTree | None, Knobs]] = {
    "plain, wide": ("plain", cartesian([4, 2]), usual),
    "top-k, sparse": ("top-k", None, usual),
    "top-p, changing": ("top-p", None, changing),
}


@pytest.mark.parametrize(("name", "tree", "knobs"), CASES.values(), ids=CASES.keys())
def test_sampled_texts_follow_the_target(name: str, tree: CandidateTree | None, knobs: Knobs) -> None:
    target = readable_table(4, seed=2, spread=1.2)
    decoder = MedusaDecoder(Pair(target), random_heads(target.model, heads=3, spread=0.5), tree=tree)
    assert_texts_follow_the_target(decoder, SAMPLINGS[name], 500, knobs)
