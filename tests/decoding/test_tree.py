"""The shape of token trees."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from specgym.decoding.tree import TokenTree


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


def test_a_chain_is_a_tree_without_branches() -> None:
    chain = TokenTree.chain(4)
    assert chain.parents == (-1, 0, 1, 2)
    assert torch.equal(chain.visible, torch.ones(4, 4).tril().bool())
    assert len(TokenTree.chain(0)) == 0
