"""Drafts in int8: taken though their scores go by the pass, verified by what they drew from, and refused as targets."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from specgym.decoding import DraftTreeDecoder, Pair, Sampling, SpeculativeDecoder, load_pair, memory_of
from specgym.decoding.drafts.drafter import DraftSession, DraftStep, ModelDrafter, ModelStep, draft_digest
from specgym.decoding.errors import UnsupportedModelError
from specgym.decoding.latency.interleaved import fingerprint
from specgym.decoding.loading import quantise as quantising
from specgym.decoding.loading.quantise import Int8Linear, quantise
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.models.output_layer import ReducedOutput, reduce_output
from tests.helpers.known_distributions import PROMPT, distance, exact_joint, walk

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor"
)
MakeModel = Callable[..., PreTrainedModel]


def by_torch(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that somebody has quantised with torch."""
    quantised: PreTrainedModel = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    return quantised


def by_bitsandbytes(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that says it was loaded in 8 bits."""
    copied = copy.deepcopy(model)
    copied.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    return copied


class RoundedLinear(nn.Linear):
    """A layer of a library unknown here: it rounds its inputs by the largest of the pass."""

    levels = 127.0

    def forward(self, inputs: Tensor) -> Tensor:
        scale = inputs.abs().amax() / self.levels
        return super().forward((inputs / scale).round() * scale)


def rounded(model: PreTrainedModel, levels: float) -> PreTrainedModel:
    """A copy of which every linear layer of the blocks is so."""
    changed = copy.deepcopy(model)
    for layer in changed.get_submodule("model.layers").modules():
        if type(layer) is nn.Linear:
            layer.__class__ = RoundedLinear
            vars(layer)["levels"] = levels
    return changed


def by_another_library(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in eight bits of that kind."""
    return rounded(model, 127.0)


@pytest.fixture(scope="module")
def target(make_model: MakeModel) -> PreTrainedModel:
    return make_model("llama")


@pytest.mark.parametrize("kind", [by_torch, by_bitsandbytes, by_another_library])
def test_a_draft_whose_scores_go_by_the_pass_is_read_in_chains_and_a_target_is_refused(
    target: PreTrainedModel, reference: Callable[..., list[list[int]]], kind: Callable[..., PreTrainedModel]
) -> None:
    draft = kind(target)
    pair = Pair(target, draft)
    assert isinstance(pair.draft, ModelDrafter)
    model = pair.draft.model
    assert (model.exact, model.branches) == (False, False)
    assert re.search("quantised dynamically|LLM.int8|other logits", model.why_no_branches)
    generation = SpeculativeDecoder(pair).generate([5, 6, 7], max_new_tokens=32, knobs={"draft_length": 4})
    assert list(generation.tokens) == reference(target, [[5, 6, 7]], 32)[0]
    assert sum(round_.accepted for round_ in generation.rounds) > 10
    with pytest.raises(UnsupportedModelError, match="trees of candidates are read: "):
        DraftTreeDecoder(pair)
    for wrong in (draft, model):
        with pytest.raises(UnsupportedModelError, match=r"as a target|other logits|was made as a draft"):
            Pair(wrong)


def test_a_draft_that_is_misread_is_refused_still(target: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModelError, match="gives other logits in a chain"):
        Pair(target, rounded(target, 1.0))


def test_a_plain_draft_that_is_quantised_later_is_refused_at_the_start_of_a_text(target: PreTrainedModel) -> None:
    draft = copy.deepcopy(target)
    decoder = SpeculativeDecoder(Pair(target, draft))
    torch.ao.quantization.quantize_dynamic(draft, {nn.Linear}, inplace=True)
    with pytest.raises(UnsupportedModelError, match="is quantised dynamically"):
        decoder.generate([5, 6, 7], max_new_tokens=4)


class Reread:
    """A draft that says of its tokens what one pass over the text would say, and not what they were drawn from."""

    def __init__(self, draft: ModelDrafter) -> None:
        self._draft = draft
        self.name, self.vocabulary_size = draft.name, draft.vocabulary_size

    def start(self, prompt: Any, sampling: Any, generator: Any, device: Any) -> DraftSession:
        """Begin a text."""
        self._session = self._draft.start(prompt, sampling, generator, device)
        self.truncate = self._session.truncate
        return self

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        """Draft as the model does."""
        text = list(context)
        for step in self._session.steps(context, count):
            assert isinstance(step, ModelStep)
            scores = self._draft.model.fresh().forward(torch.tensor(text), last=1).scores
            yield ModelStep(step.token, scores, scores.softmax(-1))
            text.append(int(step.token))


def test_samples_follow_the_target_by_what_each_token_was_drawn_from(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, other = (make_model("llama", vocabulary=2, hidden=16, layers=1, seed=seed) for seed in (0, 1))
    pair = Pair(target, rounded(other, 6.0))
    expected = exact_joint(pair.target, Sampling(), PROMPT, 3)
    joint, _, _ = walk(monkeypatch, SpeculativeDecoder(pair), Sampling(), 3, {"draft_length": 2}, ahead=1)
    assert distance(joint, expected) < 1e-5
    assert isinstance(pair.draft, ModelDrafter)
    wrong = SpeculativeDecoder(Pair(pair.target, Reread(pair.draft)))
    joint, _, _ = walk(monkeypatch, wrong, Sampling(), 3, {"draft_length": 2}, ahead=1)
    assert distance(joint, expected) > 1e-3


def test_a_layer_makes_the_same_of_a_token_among_others_as_alone_and_shows_what_is_broken() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(40, 96, generator=generator), torch.randn(40, generator=generator)
    inputs = torch.randn(5, 96, generator=generator) * torch.tensor([1e-6, 1.0, 30.0, 0.0, 1e6])[:, None]
    layer = Int8Linear(weight, bias)
    outputs = layer(inputs)
    assert torch.equal(outputs, torch.cat([layer(row) for row in inputs.split(1)]))
    assert torch.equal(outputs[3], bias)
    exact = inputs @ weight.T
    assert ((outputs - bias - exact).std(1)[[1, 2, 4]] < 0.02 * exact.std(1)[[1, 2, 4]]).all()
    again = Int8Linear(torch.zeros(40, 96), bias)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(inputs), outputs)
    assert torch.equal(copy.deepcopy(layer)(inputs), outputs)
    for broken in (torch.nan, torch.inf):
        inputs[1, 7] = broken
        assert not layer(inputs)[1].isfinite().all()
        assert torch.equal(layer(inputs)[2], outputs[2])


def test_a_processor_whose_sums_run_over_has_inputs_of_seven_bits_and_a_wrong_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = quantising._times

    def clipped(inputs: Tensor, packed: Any, levels: int) -> Tensor:
        return times(inputs, packed, levels).clamp(max=0.0) if levels > most else times(inputs, packed, levels)

    monkeypatch.setattr(quantising, "_times", clipped)
    monkeypatch.setattr(quantising, "_levels", quantising._levels.__wrapped__)
    most = 63
    assert quantising._levels() == 63
    most = 0
    with pytest.raises(UnsupportedModelError, match="multiplies int8 wrongly on this processor; leave int8 out"):
        Int8Linear(torch.ones(2, 2), None)


@pytest.mark.usefixtures("small_enough")
def test_a_target_in_int8_is_refused(target: PreTrainedModel) -> None:
    model = copy.deepcopy(target)
    quantise(model)
    with pytest.raises(UnsupportedModelError, match=r"is quantised to int8 with its inputs.*or this for a draft"):
        Pair(model)
    assert isinstance(Pair(target, model).draft, ModelDrafter)


@pytest.fixture
def small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantising, "SMALLEST_QUANTISED", 32 * 64)


@pytest.mark.usefixtures("small_enough")
def test_large_linear_layers_and_reduced_outputs_are_quantised_and_what_is_shared_stays(make_model: MakeModel) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    embeddings = model.get_parameter("model.embed_tokens.weight")
    before, plain = embeddings.clone(), copy.deepcopy(model)
    assert quantise(model) == 7  # three a block, and the output layer
    assert model.get_parameter("model.embed_tokens.weight") is embeddings
    assert torch.equal(embeddings, before)
    assert type(model.get_submodule("model.layers.0.self_attn.q_proj")) is nn.Linear
    tokens = torch.arange(1, 9)
    read = [LanguageModel(item, prepack=False, role="draft").forward(tokens).scores for item in (plain, model)]
    assert 1e-4 < (read[0] - read[1]).std() / read[0].std() < 0.1

    scored = torch.arange(0, 96, 2)
    reduce_output(plain, scored)
    assert quantise(plain) == 7
    reduced = LanguageModel(plain, prepack=False, role="draft").forward(tokens).scores
    assert isinstance(plain.get_output_embeddings(), ReducedOutput)
    assert (reduced[:, 1::2] == torch.finfo(torch.float32).min).all()
    torch.testing.assert_close(reduced[:, scored], read[1][:, scored], rtol=1e-3, atol=1e-3)


def test_a_name_ending_in_int8_gives_a_quantised_draft_of_less_memory_and_another_digest() -> None:
    pairs = [load_pair(f"tiny-10m+tiny-10m-draft-2l{end}") for end in ("", ":int8", ":int8")]
    plain, quantised, again = (pair.draft for pair in pairs)
    assert isinstance(plain, ModelDrafter)
    assert isinstance(quantised, ModelDrafter)
    assert isinstance(again, ModelDrafter)
    assert (plain.model.exact, quantised.model.exact) == (True, True)  # shallow, and a draft
    assert quantised.model.captured is not None
    assert quantised.model.model is again.model.model
    assert quantised.name == "tiny-10m-draft-2l:int8"
    assert draft_digest(plain) != draft_digest(quantised) == draft_digest(again)
    assert fingerprint(pairs[0]) != fingerprint(pairs[1])
    # Six layers have a fourth of their bytes, and the output layer, which was the target's, is held by itself in int8.
    saved = 6 * 3 * 256 * 688 - 4096 * 256
    assert memory_of(pairs[0]).draft - memory_of(pairs[1]).draft == pytest.approx(saved, rel=0.05)
    plainly, rounded_, _ = (
        SpeculativeDecoder(pair).generate("And it came to pass", max_new_tokens=24, knobs={"draft_length": 3})
        for pair in pairs
    )
    assert plainly.tokens == rounded_.tokens
    assert sum(round_.accepted for round_ in rounded_.rounds) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.bfloat16(), r"is torch\.bfloat16 on cpu, and int8 is for CPUs.*leave int8 out"),
        (lambda model: model, r"has no linear layer of 131,072 weights or more.*leave int8 out"),
    ],
)
def test_what_cannot_be_quantised_is_refused(
    make_model: MakeModel, change: Callable[[PreTrainedModel], PreTrainedModel], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        quantise(change(make_model("llama")))
