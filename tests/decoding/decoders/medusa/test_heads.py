"""Heads: what they compute, which tokens they propose, and that the target's layers stay the target's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specgym.decoding.decoders.medusa.decoder import MedusaDecoder
from specgym.decoding.decoders.medusa.heads import HeadsShape, MedusaHeads, MedusaHeadsError
from specgym.decoding.decoders.medusa.trees import cartesian
from specgym.decoding.errors import UnsupportedModelError
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.models.linear_layers import PrepackedLinear, prepack_linears
from tests.helpers.small_medusa_heads import random_heads

MakeModel = Callable[..., PreTrainedModel]
SOME = (1, 4, 5, 17, 60, 95)
KINDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "two blocks": {"blocks": 2},
    "no blocks": {"blocks": 0},
    "own output": {"own_output": True},
    "reduced": {"vocabulary": SOME},
    "all": {"blocks": 2, "own_output": True, "vocabulary": SOME},
}


def model_with_bias(make_model: MakeModel) -> PreTrainedModel:
    """One whose output layer has a bias, large enough to decide."""
    model = make_model("phi")
    bias = model.get_output_embeddings().bias
    assert isinstance(bias, nn.Parameter)
    nn.init.normal_(bias, std=2.0)
    return model


@torch.no_grad()
def last_states(model: PreTrainedModel, length: int = 12) -> tuple[Tensor, Tensor]:
    """Hidden states and the target's own scores after some tokens, shapes (length, h) and (length, vocabulary)."""
    tokens = torch.randint(0, 90, (1, length), generator=torch.Generator().manual_seed(0))
    read: Any = model(input_ids=tokens, output_hidden_states=True)
    return read.hidden_states[-1][0], read.logits[0]


@torch.no_grad()
def one_after_another(heads: MedusaHeads, model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Each head by itself, of plain layers: the paper's formula."""
    output: Any = model.get_output_embeddings()
    rows = list(heads.shape.vocabulary) or list(range(heads.shape.vocabulary_size))
    results = []
    for head in range(heads.shape.heads):
        features = hidden
        for block in range(heads.shape.blocks):
            linear = nn.Linear(hidden.shape[-1], hidden.shape[-1])
            linear.weight.copy_(heads.weight[block, head])
            linear.bias.copy_(heads.bias[block, head])
            features = features + nn.SiLU()(linear(features))
        weight = output.weight[rows] if heads.output is None else heads.output[head]
        scores = features @ weight.T
        results.append(scores if output.bias is None else scores + output.bias[rows])
    return torch.stack(results)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_untrained_heads_predict_what_the_target_does(make_model: MakeModel, family: str, kind: dict[str, Any]) -> None:
    model = model_with_bias(make_model) if family == "phi" else make_model(family)
    hidden, scores = last_states(model)
    heads = MedusaHeads.for_target(model, 3, **kind)
    proposed = scores[:, SOME] if "vocabulary" in kind else scores
    torch.testing.assert_close(heads(hidden), proposed.expand(3, -1, -1), atol=1e-4, rtol=1e-4)


def test_untrained_heads_predict_what_a_target_does_that_narrows_its_states_at_the_end(make_model: MakeModel) -> None:
    model = make_model("opt", word_embed_proj_dim=16)
    read = LanguageModel(model, prepack=False).forward(torch.arange(8), hidden=True)
    assert read.hidden is not None
    heads = MedusaHeads.for_target(model, 2)
    assert heads.shape.hidden_size == 16
    with torch.inference_mode():
        torch.testing.assert_close(heads(read.hidden), read.scores.expand(2, -1, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("biased", [False, True])
def test_heads_computed_together_are_heads_computed_one_after_another(
    make_model: MakeModel, kind: dict[str, Any], biased: bool
) -> None:
    model = model_with_bias(make_model) if biased else make_model("llama")
    hidden, _ = last_states(model)
    heads = random_heads(model, 4, **kind)
    expected = one_after_another(heads, model, hidden)
    torch.testing.assert_close(heads(hidden), expected, atol=1e-4, rtol=1e-4)
    assert expected.std(0).min() > 0 or kind == {"blocks": 0}  # the heads differ, and so would a mix-up of them
    # Of any shape, and of the first few heads alone.
    torch.testing.assert_close(heads(hidden[0]), expected[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(heads(hidden.reshape(3, 4, -1)), expected.reshape(4, 3, 4, -1), atol=1e-4, rtol=1e-4)
    for count in (1, 3):
        torch.testing.assert_close(heads(hidden, count), expected[:count], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_candidates_are_each_heads_likeliest_tokens_the_likeliest_first(
    make_model: MakeModel, kind: dict[str, Any]
) -> None:
    model = make_model("llama")
    hidden, _ = last_states(model)
    heads = random_heads(model, 4, **kind)
    rows = heads.shape.vocabulary or tuple(range(96))
    for state in hidden:
        expected = one_after_another(heads, model, state).argsort(-1, descending=True)
        candidates = heads.candidates(state, 3, 5)
        assert candidates.dtype == torch.int64
        assert candidates.tolist() == [[rows[place] for place in row[:5]] for row in expected[:3].tolist()]


def test_places_are_those_of_the_outputs_and_none_for_what_is_left_out(make_model: MakeModel) -> None:
    model = make_model("llama")
    tokens = torch.arange(96).reshape(4, 24)
    assert torch.equal(MedusaHeads.for_target(model).places_of(tokens), tokens)
    reduced = MedusaHeads.for_target(model, vocabulary=SOME)
    places = reduced.places_of(tokens)
    assert places.shape == tokens.shape
    assert places.flatten().tolist() == [SOME.index(token) if token in SOME else -100 for token in range(96)]


def test_the_vocabulary_may_be_given_in_any_order(make_model: MakeModel) -> None:
    heads = MedusaHeads.for_target(make_model("llama"), vocabulary=(60, 4, 4, 1))
    assert heads.shape.vocabulary == (1, 4, 60)
    assert heads.shape.outputs == 3


@pytest.mark.parametrize("kind", ["usual", "reduced", "own output"])
def test_heads_use_a_prepacked_output_layer(make_model: MakeModel, kind: str) -> None:
    model = model_with_bias(make_model)
    heads = random_heads(model, 3, **KINDS[kind])
    hidden, _ = last_states(model)
    with torch.no_grad():  # a graph would hold the output layer's weight, which then stays plain
        expected = heads(hidden)
    prepack_linears(model, smallest=96 * 32)
    assert isinstance(model.get_output_embeddings(), PrepackedLinear)
    heads.attach(model)
    with torch.no_grad():
        torch.testing.assert_close(heads(hidden), expected, atol=1e-4, rtol=1e-4)


def test_heads_of_a_target_in_another_precision_score_in_that_precision(make_model: MakeModel) -> None:
    model = make_model("llama")
    hidden, _ = last_states(model)
    heads = random_heads(model, 3)
    with torch.no_grad():
        expected = heads(hidden)
        heads.attach(model.bfloat16())
        scores = heads(hidden.bfloat16())
    assert scores.dtype == torch.bfloat16
    assert heads.weight.dtype == torch.float32
    assert float((scores.float() - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_the_targets_parameters_are_not_among_the_heads(make_model: MakeModel, kind: dict[str, Any]) -> None:
    model = make_model("llama")
    heads = random_heads(model, 3, **kind)
    names = {"weight", "bias", *(["output"] if kind.get("own_output") else [])}
    assert {name for name, _ in heads.named_parameters()} == names == set(heads.state_dict())
    storages = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in storages for parameter in heads.parameters() if parameter.numel())
    hidden, _ = last_states(model)
    heads(hidden).square().sum().backward()
    mine = [name for name, parameter in heads.named_parameters() if parameter.numel() and parameter.grad is None]
    assert not mine
    if not kind:
        # The layer that they share sees a gradient, which is why whoever trains heads lists their own parameters only.
        optimiser = torch.optim.SGD(heads.parameters(), lr=0.1)
        before = [parameter.clone() for parameter in model.parameters()]
        optimiser.step()
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_heads_need_a_target_before_they_score() -> None:
    heads = MedusaHeads(HeadsShape(2, 8, 12))
    with pytest.raises(RuntimeError, match=r"call attach\(model\) first"):
        heads(torch.zeros(8))


@pytest.mark.parametrize("changed", [{"hidden": 16}, {"vocabulary": 64}])
def test_heads_of_another_shape_are_not_attached(make_model: MakeModel, changed: dict[str, int]) -> None:
    heads = MedusaHeads.for_target(make_model("llama"))
    model = make_model("llama", **changed)
    model.name_or_path = "the-other"
    with pytest.raises(MedusaHeadsError, match="for a target of 96 tokens and width 32, but the-other has"):
        heads.attach(model)


def test_a_model_without_an_output_layer_is_refused(make_model: MakeModel) -> None:
    model: Any = make_model("llama")
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output layer"):
        MedusaHeads.for_target(model.model)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 0}, "heads must be a whole number of at least 1, got 0"),
        ({"heads": 2.5}, "heads must be a whole number"),
        ({"hidden_size": 0}, "hidden_size must be"),
        ({"vocabulary_size": -3}, "vocabulary_size must be"),
        ({"blocks": -1}, "blocks must be a whole number of at least 0, got -1"),
        ({"vocabulary": (3, 1)}, "ascending order, each once"),
        ({"vocabulary": (1, 1)}, "ascending order, each once"),
        ({"vocabulary": (0, 12)}, "token ids below 12"),
        ({"vocabulary": (-1, 3)}, "token ids below 12"),
    ],
    ids=str,
)
def test_shapes_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(MedusaHeadsError, match=message):
        dataclasses.replace(HeadsShape(2, 8, 12), **wrong)


def test_a_tree_that_asks_for_more_than_there_is_is_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    heads = MedusaHeads.for_target(model, 2, vocabulary=SOME)
    for tree in (cartesian([1, 1, 1]), cartesian([7])):
        with pytest.raises(ValueError, match="there are 2 heads of 6 tokens"):
            MedusaDecoder(Pair(model), heads, tree=tree)
    MedusaDecoder(Pair(model), heads, tree=cartesian([6, 6]))


def test_heads_that_serve_two_targets_stay_with_the_first(make_model: MakeModel) -> None:
    item, other = make_model("llama"), make_model("llama", seed=1)
    heads = random_heads(item, 2)
    heads.accuracies = ((0.5, 0.2), (0.4, 0.1))
    first = MedusaDecoder(Pair(item), heads)
    hidden = torch.randn(32, generator=torch.Generator().manual_seed(0))
    before = first.heads.candidates(hidden, 2, 5)
    second = MedusaDecoder(Pair(other), heads)
    assert torch.equal(first.heads.candidates(hidden, 2, 5), before)
    assert not torch.equal(second.heads.candidates(hidden, 2, 5), before)
    assert second.heads.accuracies == heads.accuracies
    assert MedusaDecoder(Pair(item), heads).heads is heads
