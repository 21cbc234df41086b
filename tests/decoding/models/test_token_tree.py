"""The shape of token trees."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from specgym.decoding.models.kv_cache import TokenTree


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    count = draw(st.integers(0, 20))
    return TokenTree([draw(st.integers(-1, node - 1)) for node in range(count)])


@given(trees())
def test_a_node_sees_exactly_its_path_and_is_as_deep_as_that_is_long(tree: TokenTree) -> None:
    assert tree.visible.shape == (len(tree), len(tree))
    assert tree.depths.shape == (len(tree),)
    for node in range(len(tree)):
        path = tree.path(node)
        assert path == sorted(path)
        assert path[-1] == node
        assert tree.visible[node].nonzero().flatten().tolist() == path
        assert tree.depths[node] == len(path) - 1


@given(trees())
def test_what_is_visible_is_what_a_plain_loop_finds(tree: TokenTree) -> None:
    expected = torch.zeros(len(tree), len(tree), dtype=torch.bool)
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            expected[node] = expected[parent]
        expected[node, node] = True
    assert torch.equal(tree.visible, expected)
    assert tree.height == max((int(row.sum()) for row in expected), default=0)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 16, 17, 100])
def test_chains_of_every_length_see_all_before(length: int) -> None:
    assert torch.equal(TokenTree.chain(length).visible, torch.ones(length, length).tril().bool())
    assert TokenTree.chain(length).height == length


def test_what_a_pass_needs_is_moved_to_a_device_once() -> None:
    tree = TokenTree((-1, 0, 0, 1))
    depths, hidden = tree.on(torch.device("cpu"))
    assert torch.equal(depths, tree.depths)
    assert torch.equal(hidden, ~tree.visible)
    again = tree.on(torch.device("cpu"))
    assert again[0] is depths
    assert again[1] is hidden
    elsewhere = tree.on(torch.device("meta"))
    assert all(part.device.type == "meta" for part in elsewhere)
    assert [part.shape for part in elsewhere] == [(4,), (4, 4)]
    assert tree.on(torch.device("cpu"))[0] is depths


def test_a_chain_is_a_tree_without_branches() -> None:
    chain = TokenTree.chain(4)
    assert chain.parents == (-1, 0, 1, 2)
    assert torch.equal(chain.visible, torch.ones(4, 4).tril().bool())
    assert len(TokenTree.chain(0)) == 0
