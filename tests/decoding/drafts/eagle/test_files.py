"""Heads as files: what is written comes back, public layouts are read, damage and other targets are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from specgym.decoding import (
    EagleDrafter,
    EagleHead,
    EagleHeadError,
    LanguageModel,
    Pair,
    SpeculativeDecoder,
    load_head,
    load_pair,
    save_head,
)
from specgym.decoding.loading.presets import head_folder, resolve
from tests.helpers.small_eagle_heads import small_head

MakeModel = Callable[..., PreTrainedModel]
TEXT = [5, 17, 80, 3, 44, 9]


@pytest.fixture(scope="module")
def target(make_model: MakeModel) -> LanguageModel:
    return LanguageModel(make_model("llama", layers=6, spread=0.15), prepack=False)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("options", [{}, {"vocabulary": range(5, 60)}, {"own_output": True, "vocabulary": range(9)}])
def test_what_is_written_comes_back(
    target: LanguageModel, tmp_path: Path, eight_bits: bool, options: dict[str, Any]
) -> None:
    head = small_head(target.model, **options)
    save_head(head, tmp_path / "head", target, card="about", eight_bits=eight_bits)
    again = load_head(tmp_path / "head", target)
    assert again.shape == head.shape
    assert (tmp_path / "head" / "README.md").read_text() == "about"
    for name, value in head.state_dict().items():
        error = (again.state_dict()[name] - value).abs().max() / value.abs().max()
        assert error <= (0.5 / 127 + 1e-6 if eight_bits and value.ndim == 2 else 2**-11), name
    # Read and written again, nothing changes.
    save_head(again, tmp_path / "copy", target, eight_bits=eight_bits)
    assert load_head(tmp_path / "copy", target).digest() == again.digest()
    pair = Pair(target, again)
    assert len(SpeculativeDecoder(pair).generate(TEXT, max_new_tokens=8).tokens) == 8


def test_a_pair_finds_a_head_by_its_folder(tmp_path: Path) -> None:
    target = load_pair("tiny-3m").target
    head = EagleHead.for_target(target.model)
    save_head(head, tmp_path / "head", target)
    for name in (f"tiny-3m+{tmp_path / 'head'}", f"tiny-3m+suffix,{tmp_path / 'head'}"):
        assert not resolve(name).draft_is_model
        pair = load_pair(name)
        draft = getattr(pair.draft, "drafts", [pair.draft])[-1]
        assert isinstance(draft, EagleDrafter)
        assert draft.head.shape == head.shape
        assert SpeculativeDecoder(pair).generate("And", max_new_tokens=4).tokens
    assert head_folder("tiny-3m") is None
    pair = Pair(target, tmp_path / "head")
    assert isinstance(pair.draft, EagleDrafter)


def test_damage_and_other_targets_are_refused(
    target: LanguageModel, tmp_path: Path, make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    head, folder = small_head(target.model), tmp_path / "head"
    with pytest.raises(EagleHeadError, match=r"no EAGLE head in .*head: .*eagle\.json"):
        load_head(folder, target)
    save_head(head, folder, target)
    other = LanguageModel(make_model("llama", layers=6, spread=0.15, seed=3), prepack=False)
    with pytest.raises(EagleHeadError, match="is another model"):
        load_head(folder, other)
    with caplog.at_level("WARNING", logger="specgym"):
        pair = Pair(other, folder)
    assert "may be right less often" in caplog.text
    assert isinstance(pair.draft, EagleDrafter)
    assert pair.draft.head.model is other.model
    described, weights = folder / "eagle.json", folder / "eagle.safetensors"
    facts = json.loads(described.read_text())
    for changed in ({**facts, "format": "specgym-eagle-9"}, {**facts, "target": "x"}):
        described.write_text(json.dumps(changed))
        with pytest.raises(EagleHeadError, match=r"eagle.*(damaged|format)"):
            load_head(folder, target)
    described.write_text(json.dumps(facts))
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(EagleHeadError, match=r"eagle\.safetensors.*damaged"):
        load_head(folder, target)
    weights.unlink()
    with pytest.raises(EagleHeadError, match="is missing"):
        load_head(folder, target)
    broken = small_head(target.model)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    save_head(broken, folder, target)
    with pytest.raises(EagleHeadError, match="NaN or infinite"):
        load_head(folder, target)


def write_public(
    folder: Path,
    head: EagleHead,
    *,
    speculators: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
    **more: Any,
) -> None:
    """Write a head as the authors of EAGLE-3 do, or as speculators does."""
    shape = head.shape
    layer: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope["rope_theta"],
        "hidden_act": "silu",
        "num_hidden_layers": 1,
        "max_position_embeddings": 256,
    }
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": shape.outputs}
    if speculators:
        config |= {"speculators_model_type": "eagle3", "transformer_layer_config": layer}
    else:
        config |= layer
    state = {name: value.contiguous() for name, value in head.state_dict().items()}
    if speculators:
        state = {name.replace("midlayer.", "layers.0."): value for name, value in state.items()}
    if shape.vocabulary:
        tokens = torch.tensor(shape.vocabulary)
        known = torch.zeros(shape.vocabulary_size, dtype=torch.bool)
        known[tokens] = True
        state |= {"d2t": tokens - torch.arange(len(tokens)), "t2d": known}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    save_file({**state, **(tensors or {})}, folder / "model.safetensors")


@pytest.mark.parametrize("speculators", [False, True])
@pytest.mark.parametrize("own_embeddings", [False, True])
def test_public_heads_draft_what_they_were_made_to(
    target: LanguageModel, tmp_path: Path, speculators: bool, own_embeddings: bool
) -> None:
    head = small_head(target.model, own_output=True, vocabulary=[3, 8, 9, 40, 41, 80], layers=(2, 3))
    head = EagleHead(
        type(head.shape)(
            **{
                **vars(head.shape),
                "norm_features": False,
                "norm_before_residual": speculators,
                "own_embeddings": own_embeddings,
            }
        )
    ).eval()
    head.attach(target.model)
    # A target of six layers is read before layers 2, 3 and 3: named here, since each can be read once.
    write_public(
        tmp_path / "public", head, speculators=speculators,
        eagle_aux_hidden_state_layer_ids=[2, 3], norm_before_residual=speculators,
    )  # fmt: skip
    again = load_head(tmp_path / "public", target)
    assert (again.shape.vocabulary, again.shape.layers) == ((3, 8, 9, 40, 41, 80), (2, 3))
    assert again.shape.own_embeddings is own_embeddings
    texts = []
    for drafting in (head, again):
        generation = SpeculativeDecoder(Pair(target, drafting, prepack=False)).generate(TEXT, max_new_tokens=12)
        texts.append([round_.taken_back for round_ in generation.rounds])
    assert texts[0] == texts[1]
    assert {token for round_ in texts[1] for token in round_} <= {3, 8, 9, 40, 41, 80}


def test_public_heads_that_differ_are_refused_by_name(target: LanguageModel, tmp_path: Path) -> None:
    head = small_head(target.model, own_output=True, layers=(2, 3, 5))
    folder = tmp_path / "public"
    for more, words in (
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({"norm_before_fc": True}, "norm_before_fc is True"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 5]}, r"fc\.weight should have shape"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ({"rope_scaling": {"type": "dynamic"}, "eagle_aux_hidden_state_layer_ids": [2, 3, 5]}, "depends on the length"),
        ({}, "ascending"),  # six layers have no three of the usual places
    ):
        write_public(folder, head, **more)
        with pytest.raises(EagleHeadError, match=words):
            load_head(folder, target)
    write_public(folder, head, tensors={"extra.weight": torch.zeros(2)}, eagle_aux_hidden_state_layer_ids=[2, 3, 5])
    with pytest.raises(EagleHeadError, match=r"extra\.weight"):
        load_head(folder, target)
    state = {name: value for name, value in head.state_dict().items() if "hidden_norm" not in name}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(EagleHeadError, match="one of EAGLE 1 or 2 has"):
        load_head(folder, target)
    (folder / "model.safetensors").unlink()
    with pytest.raises(EagleHeadError, match="fetch the whole folder"):
        load_head(folder, target)
