"""Drafts that propose some tokens only: what they score, what is refused, and that texts stay the target's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.decoders.threshold import ThresholdDecoder
from specgym.decoding.drafts.drafter import ModelDrafter, propose
from specgym.decoding.errors import UnsupportedModelError
from specgym.decoding.fit.draft.init_from_target import take_layers
from specgym.decoding.loading.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.identity import weights_digest
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.models.output_layer import ReducedOutput, reduce_output, reduced_output
from specgym.decoding.sampling import Sampling
from tests.helpers.sealing import reseal

FAMILIES = ("llama", "gpt2", "opt", "gpt_neox")
MakeModel = Callable[..., PreTrainedModel]
TOKENS = torch.tensor([token for token in range(96) if token % 3])
LEFT_OUT = torch.tensor([token for token in range(96) if not token % 3])


def scores(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_whole_layer_and_the_least_number(make_model: MakeModel, family: str) -> None:
    model = make_model(family)
    whole = scores(model)
    reduce_output(model, TOKENS)
    result = scores(model)
    assert result.shape == whole.shape
    torch.testing.assert_close(result[..., TOKENS], whole[..., TOKENS])
    assert (result[..., LEFT_OUT] == torch.finfo(torch.float32).min).all()
    for sampling in (Sampling(), Sampling(0.1), Sampling(1.5, top_k=80), Sampling(0.7, top_p=0.999)):
        probabilities = sampling.probabilities(result)
        assert (probabilities[..., LEFT_OUT] == 0).all()
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 12))


def test_a_bias_is_used_where_there_is_one(make_model: MakeModel) -> None:
    model = make_model("phi")  # whose output layer has one
    with torch.no_grad():
        model.lm_head.bias.normal_()
    whole = scores(model)
    reduce_output(model, TOKENS)
    torch.testing.assert_close(scores(model)[..., TOKENS], whole[..., TOKENS])


def test_the_rows_follow_the_weight(make_model: MakeModel) -> None:
    model = make_model("llama")
    reduce_output(model, TOKENS)
    before = scores(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    torch.testing.assert_close(scores(model)[..., TOKENS], 2 * before[..., TOKENS])
    model.double()
    assert scores(model).dtype == torch.float64
    reduced = model.lm_head
    reduced.weight = nn.Parameter(torch.zeros_like(reduced.weight))
    assert (scores(model)[..., TOKENS] == 0).all()


def test_what_is_left_out_gets_no_gradient(make_model: MakeModel) -> None:
    layer = ReducedOutput(make_model("llama").lm_head, TOKENS)
    layer.scores(torch.ones(2, layer.weight.shape[1])).sum().backward()
    assert layer.weight.grad is not None
    assert (layer.weight.grad[TOKENS] == 2).all()
    assert (layer.weight.grad[LEFT_OUT] == 0).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([5, 96], "ids below 96 in ascending order"),
        ([-1, 5], "ids below 96 in ascending order"),
        ([5, 4], "ids below 96 in ascending order"),
        ([5, 5], "ids below 96 in ascending order"),
        ([], "a row of int64, not"),
        ([[1, 2]], "a row of int64, not"),
        ([1.0, 2.0], "a row of int64, not"),
    ],
)
def test_tokens_that_make_no_sense_are_refused_when_made_and_when_loaded(
    make_model: MakeModel, tmp_path: Path, tokens: list[int], message: str
) -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match=message):
        reduce_output(model, torch.tensor(tokens))
    save_checkpoint(model, tmp_path, card="")
    stored = load_file(tmp_path / "model.safetensors")
    save_file({**stored, "lm_head.tokens": torch.tensor(tokens)}, tmp_path / "model.safetensors")
    reseal(tmp_path / "specgym.json")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: 'lm_head\.tokens' cannot be used .*{message}"):
        load_checkpoint(tmp_path)


def test_a_model_without_an_output_layer_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output layer"):
        reduce_output(make_model("llama").model, TOKENS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_comes_back_with_its_tokens_and_the_embeddings_of_the_target(
    make_model: MakeModel, tmp_path: Path, family: str, tied: bool
) -> None:
    target = make_model(family, tie_word_embeddings=tied)
    draft, shared = take_layers(target, [0])
    reduce_output(draft.eval(), TOKENS)
    save_checkpoint(target, tmp_path / "target", card="", dtype=torch.float32)
    save_checkpoint(draft, tmp_path / "draft", card="", shared_with="../target", shared=shared, dtype=torch.float32)
    stored = load_file(tmp_path / "draft/model.safetensors")
    tokens = next(name for name in stored if name.endswith(".tokens"))
    assert not {*shared, tokens.replace(".tokens", ".weight")} & set(stored)
    for source in (None, target):
        back = load_checkpoint(tmp_path / "draft", shared_from=source)
        layer = reduced_output(back)
        assert layer is not None
        assert torch.equal(layer.tokens, TOKENS)
        assert (layer.weight is target.get_output_embeddings().weight) is (source is target)
        assert (layer.weight is back.get_input_embeddings().weight) is tied
        torch.testing.assert_close(scores(back), scores(draft))
    other, _ = take_layers(target, [0])
    reduce_output(other, TOKENS[1:])
    assert weights_digest(other) != weights_digest(draft)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_rule_sees_of_such_a_draft_is_finite(make_model: MakeModel, dtype: torch.dtype) -> None:
    draft: Any = make_model("llama")
    draft.to(dtype)
    reduce_output(draft, TOKENS)
    for sampling in (Sampling(0.0), Sampling(), Sampling(0.01), Sampling(0.8, top_k=3)):
        drafter = ModelDrafter(LanguageModel(draft))
        session = drafter.start([1, 2], sampling, torch.Generator(), torch.device("cpu"))
        for step in session.steps([1, 2], 4):
            assert math.isfinite(step.entropy())
            assert 0 <= step.entropy() <= math.log(len(TOKENS)) + 1e-4
            assert 0 < step.confidence() <= 1
        tokens = propose(session, [1, 2], 8).tokens
        assert not torch.isin(tokens, LEFT_OUT).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_equals_generate(
    make_model: MakeModel,
    make_noisy: MakeModel,
    reference: Callable[..., list[list[int]]],
    family: str,
) -> None:
    model = make_model(family)
    draft = make_noisy(model, 0.02)
    reduce_output(draft, TOKENS)
    prompts = [[number, number + 1, 3 * number] for number in range(12)]
    expected = reference(model, prompts, 32)
    assert torch.isin(torch.tensor(expected), LEFT_OUT).any()  # the target says what the draft cannot
    pair = Pair(model, draft)
    drafted = accepted = 0
    for prompt, tokens in zip(prompts, expected, strict=True):
        result = SpeculativeDecoder(pair).generate(prompt, max_new_tokens=32, knobs={"draft_length": 3})
        assert result.tokens == tokens
        drafted += sum(round_.drafted for round_ in result.rounds)
        accepted += sum(round_.accepted for round_ in result.rounds)
        strict = ThresholdDecoder(pair, 4, "never").generate(
            prompt, max_new_tokens=32, knobs={"fallback": 0.0, "rollback": 1.5}
        )
        assert strict.tokens == tokens
    assert 0.05 < accepted / drafted < 0.9


def test_the_divergence_of_what_such_a_draft_said_is_a_number(make_model: MakeModel, make_noisy: MakeModel) -> None:
    model = make_model("llama")
    draft = make_noisy(model, 0.1)
    reduce_output(draft, TOKENS)
    for temperature in (0.0, 1.0):
        result = ThresholdDecoder(Pair(model, draft), 4, "never").generate(
            [1, 2, 3],
            max_new_tokens=40,
            sampling=Sampling(temperature),
            seed=0,
            knobs={"fallback": 0.5, "rollback": 4.0},
        )
        assert sum(round_.accepted for round_ in result.rounds) > 0
        assert 0 <= sum(round_.divergence for round_ in result.rounds) <= len(result.tokens)
