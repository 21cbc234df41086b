"""The one pass over window and guesses gives what plain passes over what each token should see give."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from transformers import PreTrainedModel

from specgym.decoding.decoders.lookahead.window import Layout, layout
from specgym.decoding.models.kv_cache import BranchingCache
from specgym.decoding.models.language_model import LanguageModel

MakeModel = Callable[..., PreTrainedModel]
SHAPES = [(4, 5, (3, 1, 4)), (1, 6, (2, 2)), (5, 1, ()), (2, 3, (1,)), (1, 1, (5, 5, 5))]


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Logits after the last of some tokens, by one pass of the stock model without a cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.std()), rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_every_cell_and_every_guess_sees_what_it_should(make_model: MakeModel, family: str, attention: str) -> None:
    stock = make_model(family, attention=attention)
    for number, (rows, columns, lengths) in enumerate(SHAPES):
        cached = random_tokens((0, 9)[number % 2] if number else 7, seed=1)
        window = [random_tokens(columns, seed=10 + row) for row in range(rows)]
        guesses = [random_tokens(length, seed=20 + place) for place, length in enumerate(lengths)]
        read = [token for row in window for token in row] + [token for guess in guesses for token in guess]
        plan = layout(rows, columns, lengths)
        assert len(plan.tree) == len(read)
        model = LanguageModel(stock, prepack=False)
        model.read(cached)
        scores = model.forward(torch.tensor(read), plan.tree).scores
        node = 0
        for row in range(rows):
            for column in range(columns):
                sees = window[0][: column + 1] + [window[above][column] for above in range(1, row + 1)]
                close(scores[node], plain(stock, cached + sees))
                node += 1
        for guess in guesses:
            for place in range(len(guess)):
                close(scores[node], plain(stock, [*cached, window[0][0], *guess[: place + 1]]))
                node += 1

        model.truncate(len(cached))
        target_value = model.forward(torch.tensor(read), plan.tree, rows=plan.scored_on(torch.device("cpu"))).scores
        close(target_value, scores[plan.scored])

        for chain, tokens in zip(plan.chains, [window[0][1:], *guesses], strict=True):
            for length in {0, len(chain) // 2, len(chain)}:
                model.truncate(len(cached))
                model.forward(torch.tensor(read), plan.tree)
                model.keep([0, *chain[:length]])
                text = [*cached, window[0][0], *tokens[:length]]
                assert model.length == len(text)
                close(model.forward(torch.tensor([5, 6])).scores[-1], plain(stock, [*text, 5, 6]))
                reader = LanguageModel(stock, prepack=False)
                reader.read(text)
                model.truncate(len(text))
                assert isinstance(model._cache, BranchingCache)
                assert isinstance(reader._cache, BranchingCache)
                for kept, expected in zip(model._cache._own_layers, reader._cache._own_layers, strict=True):
                    assert kept._stored_keys is not None
                    assert kept._stored_values is not None
                    assert expected.keys is not None
                    assert expected.values is not None
                    assert kept.length == expected.length == len(text)
                    close(kept._stored_keys[..., : len(text), :], expected.keys)
                    close(kept._stored_values[..., : len(text), :], expected.values)


def test_a_token_that_sees_one_too_many_is_noticed(make_model: MakeModel) -> None:
    stock = make_model("llama")
    model = LanguageModel(stock, prepack=False)
    tokens = random_tokens(6, seed=3)
    scores = model.forward(torch.tensor(tokens), Layout(2, 3, ()).tree).scores
    with pytest.raises(AssertionError):
        close(scores[5], plain(stock, tokens))  # as if cell (1, 2) saw the whole window


@given(st.integers(1, 6), st.integers(1, 8), st.lists(st.integers(1, 5), max_size=6))
def test_the_places_of_a_layout_fit_together(rows: int, columns: int, lengths: list[int]) -> None:
    plan = Layout(rows, columns, lengths)
    for row in range(rows):
        for column in range(columns):
            assert int(plan.tree.depths[row * columns + column]) == row + column
    assert [plan.tree.path(node)[0] for node in range(len(plan.tree))] == [0] * len(plan.tree)
    assert list(plan.trunk) == list(range(columns))
    assert list(plan.newest) == list(range((rows - 1) * columns, rows * columns))
    assert [len(guess) for guess in plan.guesses] == lengths
    for chain in plan.chains:
        assert all(plan.tree.path(node) == [0, *chain[: place + 1]] for place, node in enumerate(chain))
    # What is asked for is what is verified, and what the window's next row comes from.
    assert set(plan.scored) == {0, *plan.checked, *plan.newest}
    assert plan.scored[: len(plan.checked) + 1] == [0, *plan.checked]  # in front, where a slice can take them
    assert [plan.scored[plan.place[node]] for node in plan.scored] == plan.scored
    cpu = torch.device("cpu")
    assert plan.checked_on(cpu).tolist() == plan.checked
    above = [plan.scored[place] for place in plan.parents_on(cpu).tolist()]
    assert above == [plan.tree.parents[node] for node in plan.checked]


def test_each_shape_is_laid_out_once() -> None:
    assert layout(3, 4, (2, 2)) is layout(3, 4, (2, 2))
    assert layout(3, 4, (2, 2)) is not layout(3, 4, (2, 1))
