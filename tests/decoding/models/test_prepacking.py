"""Prepacking: a model that somebody handed over keeps working as theirs, and its weights are held once."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM, PreTrainedModel

from specgym.decoding import (
    AutoregressiveDecoder,
    LanguageModel,
    LookaheadDecoder,
    Pair,
    SpeculativeDecoder,
    describe_hardware,
    memory_of,
    prepack_linears,
    weights_digest,
)
from specgym.decoding.errors import UnsupportedModelError
from specgym.decoding.models import linear_layers
from specgym.decoding.models.identity import probe
from specgym.decoding.models.linear_layers import PrepackedLinear

MakeModel = Callable[..., PreTrainedModel]
PROMPT = [5, 6, 7]
TOKENS = torch.tensor([PROMPT])
unpacks = pytest.mark.filterwarnings("ignore:the plain weight of a packed layer:UserWarning")


@pytest.fixture
def make_wide(make_model: MakeModel) -> MakeModel:
    """Models that are prepacked by default: four layers each of the smallest size that is, or larger."""

    def make(**more: Any) -> PreTrainedModel:
        return make_model("llama", **{"hidden": 512, "layers": 1, "vocabulary": 2048, "spread": 0.1, **more})

    return make


@pytest.fixture
def wide(make_wide: MakeModel) -> PreTrainedModel:
    """One of them."""
    return make_wide()


def packed(model: nn.Module) -> int:
    """Number of packed layers."""
    return sum(isinstance(layer, PrepackedLinear) for layer in model.modules())


def logits(model: Any) -> Tensor:
    """Scores of the owner's own pass after the prompt, shape (vocabulary,)."""
    with torch.no_grad():
        return model(input_ids=TOKENS).logits[0, -1]


def text(model: PreTrainedModel) -> list[int]:
    """Tokens that a pair of this model writes, greedily."""
    return list(AutoregressiveDecoder(Pair(model)).generate(PROMPT, max_new_tokens=12).tokens)


def bytes_of(model: nn.Module) -> int:
    """Bytes that all weights take, plain and packed."""
    with linear_layers.only_looking():
        plain = {weight.data_ptr(): weight.untyped_storage().nbytes() for weight in model.parameters()}
    return sum(plain.values()) + sum(x.packed.nbytes for x in model.modules() if isinstance(x, PrepackedLinear))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-3 * float(expected.std()), rtol=1e-3)


def test_hooks_of_before_and_after_the_pair_are_called(wide: PreTrainedModel) -> None:
    layer: Any = wide.get_submodule("model.layers.0.mlp.down_proj")
    calls = list[str]()

    def halve(_: nn.Module, read: Any, written: Tensor) -> Tensor:
        calls.append("before")
        return 0.5 * written

    layer.register_forward_hook(halve)
    expected = logits(wide)
    pair = Pair(wide)
    assert packed(wide) == 4
    assert wide.get_submodule("model.layers.0.mlp.down_proj") is layer
    assert isinstance(layer, nn.Linear)
    layer.register_forward_pre_hook(lambda _, read: calls.append("after"))
    calls.clear()
    close(pair.target.fresh().forward(TOKENS[0]).scores[-1], expected)
    assert calls == ["after", "before"]
    assert packed(wide) == 4


@unpacks
def test_a_hook_that_reads_the_weight_gets_it(wide: PreTrainedModel) -> None:
    expected = logits(wide)
    layer: Any = wide.get_submodule("model.layers.0.mlp.down_proj")
    weight, seen = layer.weight.detach().clone(), list[Tensor]()
    pair = Pair(wide)
    layer.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.detach().clone()))
    close(pair.target.fresh().forward(TOKENS[0]).scores[-1], expected)
    assert torch.equal(seen[0], weight)
    assert packed(wide) == 3


@unpacks
@pytest.mark.parametrize("added_after", [False, True], ids=["adapter, then pair", "pair, then adapter"])
def test_an_adapter_that_is_merged_after_the_pair_was_made_is_not_lost(
    wide: PreTrainedModel, added_after: bool
) -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False
    )
    without = logits(wide)
    if added_after:
        Pair(wide)
    adapted = peft.get_peft_model(wide, options).eval()
    expected = logits(adapted)
    assert not torch.allclose(expected, without, atol=float(without.std()) / 10)
    inside: PreTrainedModel = adapted.get_base_model()
    pair = Pair(inside)
    assert packed(inside) >= 3
    close(pair.target.fresh().forward(TOKENS[0]).scores[-1], expected)
    merged = adapted.merge_and_unload()
    close(logits(merged), expected)
    close(pair.target.fresh().forward(TOKENS[0]).scores[-1], expected)


def _saved(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _loaded(model: PreTrainedModel, _: Path) -> PreTrainedModel:
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()})
    return model


def _stored(model: PreTrainedModel, _: Path) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _trained(model: PreTrainedModel, _: Path) -> PreTrainedModel:
    assert model.train().training
    return model.eval()


COPIES: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": _stored,
    "save_pretrained": _saved,
    "load_state_dict": _loaded,
    "train": _trained,
    "double": lambda model, _: model.double().float(),
    "share_memory": lambda model, _: model.share_memory(),
}


@pytest.mark.parametrize("tied", [False, True], ids=["own output", "tied"])
@pytest.mark.parametrize("way", COPIES)
def test_what_needs_plain_weights_gets_them_and_says_so(
    make_wide: MakeModel, way: str, tied: bool, tmp_path: Path
) -> None:
    model = make_wide(tie_word_embeddings=tied)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = text(model)
    assert packed(model) == 4
    with pytest.warns(UserWarning, match=r"the plain weight of a packed layer.*Pair\.unpack\(\)"):
        result = COPIES[way](model, tmp_path)
    for whole in (result, model):
        assert packed(whole) == 0
        state = whole.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], before[name]) for name in before)
        assert sum(weight.numel() for weight in whole.parameters()) == sum(
            weight.numel() for weight in {id(weight): weight for weight in model.parameters()}.values()
        )
    assert text(result) == expected


@unpacks
def test_gpt2_gets_its_transposed_weights_back(make_model: MakeModel) -> None:
    model = make_model("gpt2")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = logits(model)
    assert prepack_linears(model, smallest=1) > 8
    close(logits(model), expected)
    state = model.state_dict()
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert packed(model) == 0


@unpacks
def test_weights_are_the_parameters_that_they_were_and_can_be_trained(make_wide: MakeModel) -> None:
    model, twin = make_wide(), make_wide()
    before = [id(weight) for weight in model.parameters()]
    text(model)
    for trained in (model, twin):
        optimiser = torch.optim.SGD(trained.parameters(), lr=0.1)
        trained(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
    assert [id(weight) for weight in model.parameters()] == before
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, other)
    assert text(model) == text(twin)


@unpacks
def test_a_pass_with_gradients_or_autocast_is_the_stock_layers(make_wide: MakeModel) -> None:
    model, twin = make_wide(), make_wide()
    gradients = list[Tensor]()
    Pair(model)
    for owned in (model, twin):
        embedded: Any = owned.get_input_embeddings()(TOKENS).detach().requires_grad_()
        owned(inputs_embeds=embedded).logits[0, -1].max().backward()
        gradients.append(embedded.grad)
    close(*gradients)
    Pair(model).pack()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model), logits(twin))


def test_training_mode_is_refused_until_it_ends(wide: PreTrainedModel) -> None:
    expected = text(wide)
    decoder = AutoregressiveDecoder(Pair(wide))
    with pytest.warns(UserWarning, match=r"Pair\.pack\(\)"):
        wide.train()
    with pytest.raises(UnsupportedModelError, match=r"training mode.*model\.eval\(\)"):
        decoder.generate(PROMPT, max_new_tokens=12)
    wide.eval()
    assert list(decoder.generate(PROMPT, max_new_tokens=12).tokens) == expected


def _add_in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight[:64].add_(1.0)


def _add_behind_versions(weight: Tensor) -> None:
    weight.data[:64] += 1.0


def _put_another(weight: Tensor) -> None:
    weight.data = weight.detach() + torch.arange(len(weight))[:, None] % 3


@pytest.mark.parametrize("change", [_add_in_place, _add_behind_versions, _put_another])
@unpacks
def test_changed_embeddings_change_the_output_layer_that_is_tied_to_them(
    make_wide: MakeModel, change: Callable[[Tensor], None]
) -> None:
    models: list[Any] = [make_wide(tie_word_embeddings=True) for _ in range(2)]
    model, twin = models
    pair = Pair(model)
    assert isinstance(model.get_output_embeddings(), PrepackedLinear)
    for weight in (model.get_input_embeddings().weight, twin.get_input_embeddings().weight):
        change(weight)
    close(pair.target.fresh().forward(TOKENS[0]).scores[-1], logits(twin))
    close(logits(model), logits(twin))
    pair.unpack()
    pair.pack()
    change(model.get_input_embeddings().weight)
    change(twin.get_input_embeddings().weight)
    close(logits(model), logits(twin))


def test_weights_that_something_else_holds_are_left_alone(make_wide: MakeModel) -> None:
    trained = make_wide()
    optimiser = torch.optim.SGD(trained.parameters(), lr=0.1)
    Pair(trained)
    assert packed(trained) == 0
    assert optimiser.param_groups
    model, draft = make_wide(), make_wide(seed=1)
    draft.get_output_embeddings().weight = model.get_output_embeddings().weight
    pair, expected = Pair(model, draft), text(model)
    assert packed(model) == 3
    assert torch.equal(draft.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert list(SpeculativeDecoder(pair).generate(PROMPT, max_new_tokens=12).tokens) == expected


def _parametrized(layer: Any) -> None:
    parametrizations.weight_norm(layer)


def _pruned(layer: Any) -> None:
    prune.random_unstructured(layer, "weight", amount=0.3)


def _replaced_forward(layer: Any) -> None:
    stock = layer.forward
    layer.forward = lambda inputs: 2 * stock(inputs)


def _subclassed(layer: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    layer.__class__ = Doubled


@pytest.mark.parametrize("change", [_parametrized, _pruned, _replaced_forward, _subclassed])
def test_a_layer_that_computes_something_else_is_left_alone(
    wide: PreTrainedModel, change: Callable[[Any], None]
) -> None:
    change(wide.get_submodule("model.layers.0.mlp.down_proj"))
    expected = logits(wide)
    pair = Pair(wide)
    assert packed(wide) == 3
    close(pair.target.fresh().forward(TOKENS[0]).scores[-1], expected)


@unpacks
@pytest.mark.parametrize("change", [_parametrized, _pruned, _replaced_forward])
def test_a_layer_may_be_changed_after_the_pair(make_wide: MakeModel, change: Callable[[Any], None]) -> None:
    model, twin = make_wide(), make_wide()
    pair = Pair(model)
    for owned in (model, twin):
        torch.manual_seed(0)
        change(owned.get_submodule("model.layers.0.mlp.down_proj"))
    close(pair.target.fresh().forward(TOKENS[0]).scores[-1], logits(twin))
    close(logits(model), logits(twin))


@unpacks
def test_weights_are_never_held_twice(wide: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sizes = bytes_of(wide), list[int]()
    largest = 4 * wide.get_output_embeddings().weight.numel()
    for name in ("_pack", "_unpack"):
        stock = getattr(linear_layers, name)

        def counted(*args: Any, stock: Callable[..., Any] = stock) -> Any:
            packed = stock(*args)
            sizes.extend([bytes_of(wide)] if packed is not False else [])
            return packed

        monkeypatch.setattr(linear_layers, name, counted)
    pair = Pair(wide)
    pair.unpack()
    pair.pack()
    wide.state_dict()
    assert len(sizes) == 16
    assert all(whole - largest < size < whole + largest for size in sizes)
    assert sizes[-1] == whole


def test_unpack_gives_every_layer_back_and_pack_takes_them_again(wide: PreTrainedModel) -> None:
    plain = text(wide)
    pair = Pair(wide, wide)
    assert packed(wide) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.unpack()
        assert packed(wide) == 0
        assert type(wide.get_output_embeddings()) is nn.Linear
        assert list(SpeculativeDecoder(pair).generate(PROMPT, max_new_tokens=12).tokens) == plain
        pair.pack()
        assert packed(wide) == 4
        assert list(SpeculativeDecoder(pair).generate(PROMPT, max_new_tokens=12).tokens) == plain


@pytest.fixture
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the plain weight of a packed layer")
        yield


@pytest.mark.usefixtures("_warnings_are_errors")
@pytest.mark.parametrize("tied", [False, True], ids=["own output", "tied"])
def test_decoding_measuring_and_hashing_leave_layers_packed(make_wide: MakeModel, tied: bool) -> None:
    model: Any = make_wide(tie_word_embeddings=tied)
    digest, size = weights_digest(model), bytes_of(model)
    pair = Pair(model, model)
    for decoder in (AutoregressiveDecoder(pair), SpeculativeDecoder(pair), LookaheadDecoder(Pair(model))):
        decoder.generate(PROMPT, max_new_tokens=8)
    with torch.no_grad():
        model.generate(TOKENS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.eval().to("cpu", torch.float32)
    probe(LanguageModel(model))
    assert weights_digest(model) == digest
    assert memory_of(pair).target >= size - 16
    assert describe_hardware(pair)["prepacked"]
    assert packed(model) == 4
