"""Weights in float16: only where every number survives that, and then the same arithmetic on the same numbers."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgym.decoding import AutoregressiveDecoder, LanguageModel, Pair, SpeculativeDecoder, bytes_of_pass
from specgym.decoding.loading import checkpoint
from specgym.decoding.models import linear_layers
from specgym.decoding.models.linear_layers import HalfWeight, PrepackedLinear, halved
from specgym.decoding.models.output_layer import ReducedOutput, reduce_output

MakeModel = Callable[..., PreTrainedModel]
PROMPT = [5, 6, 7]
pytestmark = pytest.mark.skipif(
    torch.backends.quantized.engine not in ("x86", "fbgemm"), reason="this build of torch multiplies by no float16"
)


def random_weight(outputs: int = 70, inputs: int = 45) -> Tensor:
    """A weight in float32, with rows of very different sizes, one of them of zeros."""
    rows = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) / 16
    rows *= 10.0 ** (torch.arange(outputs) % 9 - 6)[:, None]
    rows[3], rows[5, :4] = 0.0, -0.0
    return rows


def _of_float16(weight: Tensor) -> Tensor:
    return weight.half().float()


def _of_bfloat16(weight: Tensor) -> Tensor:
    return weight.bfloat16().float()


def _of_eight_bits(weight: Tensor) -> Tensor:
    return checkpoint.unpack(checkpoint.pack({"x": weight}))["x"]


def _of_all_three(weight: Tensor) -> Tensor:
    parts = zip((_of_float16, _of_bfloat16, _of_eight_bits), weight.chunk(3), strict=True)
    return torch.cat([rounded(part) for rounded, part in parts])


def _kept_in_half(model: Any) -> int:
    layers = (layer.packed for layer in model.modules() if isinstance(layer, PrepackedLinear))
    return sum(isinstance(packed, HalfWeight) for packed in layers)


def _rounded(model: PreTrainedModel, rounded: Callable[[Tensor], Tensor] = _of_float16) -> PreTrainedModel:
    """Round the matrices of a model in place."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(rounded(weight))
    return model


@pytest.mark.parametrize("rounded", [_of_float16, _of_bfloat16, _of_eight_bits, _of_all_three])
def test_what_a_checkpoint_holds_in_fewer_bits_comes_back_to_the_last_one(
    rounded: Callable[[Tensor], Tensor],
) -> None:
    weight = rounded(random_weight())
    packed = halved(weight)
    assert packed is not None
    assert torch.equal(packed.dense().view(torch.int32), weight.view(torch.int32))
    assert packed.nbytes <= weight.nbytes / 2 + 4 * len(weight)
    inputs = torch.randn(11, 45, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(70, generator=torch.Generator().manual_seed(2))
    for count in (1, 2, 5, 11):
        expected = torch.nn.functional.linear(inputs[:count].double(), weight.double(), bias.double())
        size = inputs[:count].double().abs() @ weight.double().abs().t() + bias.abs()  # of what is added up
        for shaped in (inputs[:count], inputs[None, :count]):
            result = packed.times(shaped, bias).reshape(count, 70)
            assert ((result - expected).abs() <= 2e-6 * size).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda weight: weight.normal_(),
        lambda weight: weight[-1, -1].add_(1e-7),
        lambda weight: weight[0, 0].fill_(torch.nan),
        lambda weight: weight[-1, 0].fill_(torch.inf),
        lambda weight: weight[-1, 0].fill_(1e-30),
    ],
    ids=["float32", "one number", "nan", "infinity", "too far apart"],
)
def test_other_numbers_are_left_alone(spoil: Callable[[Tensor], object]) -> None:
    weight = _of_float16(torch.randn(40, 45, generator=torch.Generator().manual_seed(0)))
    assert halved(weight) is not None
    assert halved(weight.double()) is None
    spoil(weight)
    assert halved(weight) is None


@pytest.fixture
def make_half(make_model: MakeModel) -> MakeModel:
    """Models 192 wide, with matrices that float16 holds."""

    def make(family: str = "llama", rounded: Callable[[Tensor], Tensor] = _of_float16, **more: Any) -> PreTrainedModel:
        settings = {"hidden": 192, "layers": 1, "vocabulary": 256, "spread": 0.1, **more}
        return _rounded(make_model(family, **settings), rounded)

    return make


@pytest.mark.parametrize(
    ("family", "rounded"),
    [("llama", _of_float16), ("llama", _of_eight_bits), ("gpt2", _of_bfloat16), ("opt", _of_eight_bits)],
)
def test_greedy_output_is_that_of_generate(
    make_half: MakeModel, family: str, rounded: Callable[[Tensor], Tensor]
) -> None:
    twin: Any = make_half(family, rounded)
    with torch.no_grad():
        expected = twin.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, pad_token_id=0)[0, 3:]
    target, draft = make_half(family, rounded), make_half(family, rounded, seed=1)
    pair = Pair(target, draft)
    assert _kept_in_half(target) > 3
    assert _kept_in_half(draft) > 3
    for decoder in (AutoregressiveDecoder(pair), SpeculativeDecoder(pair)):
        assert list(decoder.generate(PROMPT, max_new_tokens=len(expected)).tokens) == expected.tolist()
    pair.unpack()
    for model in (target, draft):
        assert _kept_in_half(model) == 0
    state = twin.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in target.state_dict().items())
    pair.pack()
    assert _kept_in_half(draft) > 3


def test_a_draft_is_packed_in_float16_or_not_at_all(make_model: MakeModel) -> None:
    wide: dict[str, Any] = {"hidden": 512, "layers": 1, "vocabulary": 2048, "spread": 0.1}
    pair = Pair(make_model("llama", **wide), draft := make_model("llama", **wide, seed=1))
    assert any(isinstance(layer, PrepackedLinear) for layer in pair.target.model.modules())
    assert not any(isinstance(layer, PrepackedLinear) for layer in draft.modules())
    rounded = _rounded(make_model("llama", **wide, seed=1))
    Pair(pair.target, rounded, prepack=False)
    assert _kept_in_half(rounded) == 0
    Pair(pair.target, rounded)
    assert _kept_in_half(rounded) == 8


def test_rows_of_a_reduced_output_are_kept_so_too(make_half: MakeModel) -> None:
    model: Any = make_half(tie_word_embeddings=True)
    tokens = torch.arange(0, 256, 2)
    expected = LanguageModel(copy.deepcopy(model), prepack=False).forward(torch.tensor(PROMPT)).scores[:, tokens]
    reduce_output(model, tokens)
    read = LanguageModel(model, role="draft")
    for _ in range(2):
        torch.testing.assert_close(read.forward(torch.tensor(PROMPT)).scores[:, tokens], expected)
        layer = model.get_output_embeddings()
        assert isinstance(layer, ReducedOutput)
        assert isinstance(layer.kept_rows, HalfWeight)
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        read = LanguageModel(model, role="draft")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
        doubled = model(torch.tensor([PROMPT])).logits[0][:, tokens]
    torch.testing.assert_close(read.fresh().forward(torch.tensor(PROMPT)).scores[:, tokens], doubled)


@pytest.mark.parametrize("fault", ["absent", "wrong", "altered"])
def test_without_right_products_weights_stay_float32_and_a_line_says_so(
    make_half: MakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    stock = HalfWeight.times

    def absent(*_: object) -> Tensor:
        raise RuntimeError("no such kernel")

    def wrong(weight: HalfWeight, inputs: Tensor, bias: Tensor | None) -> Tensor:
        return stock(weight, inputs.half().float(), bias)

    def altered(weight: HalfWeight) -> Tensor:  # as one would do that has no smallest numbers
        numbers = torch.ops.quantized.linear_unpack_fp16(weight.packed)[0]
        return numbers.where(numbers.abs() >= 2.0**-14, numbers.new_zeros(()))

    if fault == "altered":
        monkeypatch.setattr(HalfWeight, "dense", altered)
    else:
        monkeypatch.setattr(HalfWeight, "times", absent if fault == "absent" else wrong)
    linear_layers.halves_are_right.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "specgym"):
            Pair(model := make_half())
    finally:
        linear_layers.halves_are_right.cache_clear()
    assert _kept_in_half(model) == 0
    assert ["weights stay float32" in record.message for record in caplog.records].count(True) == 1


def test_a_pass_reads_half_the_bytes(make_half: MakeModel) -> None:
    model, tied, reduced = make_half(), make_half(tie_word_embeddings=True), make_half()
    sizes = [weight.nbytes for name, weight in model.named_parameters() if "embed_tokens" not in name]
    whole, large = (sum(size for size in sizes if size >= least) for least in (0, 4 * linear_layers.SMALLEST_HALVED))
    assert bytes_of_pass(model) == bytes_of_pass(tied) == whole
    reduce_output(reduced, torch.arange(64))
    assert bytes_of_pass(reduced) == whole - 4 * 192 * (256 - 64)
    for packed in (model, tied):
        LanguageModel(packed)
        assert bytes_of_pass(packed) == whole - large / 2
