"""Matrices in 8 bits: how far a weight may move, and what is said of scales that are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specgym.decoding.fit.draft.init_from_target import take_layers
from specgym.decoding.loading.checkpoint import CheckpointError, load_checkpoint, pack, save_checkpoint, unpack
from tests.helpers.sealing import reseal

MATRIX = "model.layers.0.mlp.up_proj.weight"


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=True, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


@given(st.integers(0, 2**32), st.floats(-30, 30), st.integers(1, 9), st.integers(1, 9))
def test_no_weight_moves_by_more_than_half_a_step_of_its_row(seed: int, power: float, rows: int, columns: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    matrix[0] = 0
    packed = pack({"x": matrix})
    assert packed["x"].dtype == torch.int8
    back = unpack(packed)["x"]
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert bool(((back - matrix).abs() <= 0.5001 * step).all())
    assert not back[0].any()
    assert torch.equal(pack({"x": back})["x"], packed["x"])  # what was rounded once stays where it is


def test_only_matrices_of_floating_point_are_packed() -> None:
    tensors = {"norm": torch.randn(5), "tokens": torch.arange(6).view(2, 3), "cube": torch.randn(2, 2, 2)}
    packed = pack(tensors)
    assert packed.keys() == tensors.keys()
    assert all(torch.equal(packed[name], tensors[name]) for name in tensors)
    assert unpack(packed).keys() == tensors.keys()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    with pytest.raises(ValueError, match="'x' holds numbers that are not finite"):
        pack({"x": torch.tensor([[1.0, bad]])})


def test_a_folder_holds_matrices_in_8_bits_and_loads_into_any_type(tmp_path: Path) -> None:
    model = tiny_llama()
    save_checkpoint(model, tmp_path, card="", eight_bits=True)
    stored = load_file(tmp_path / "model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in stored.items()}
    assert kinds[MATRIX] == torch.int8
    assert kinds[MATRIX + "_scale"] == torch.float32
    assert kinds["model.norm.weight"] == torch.float16
    for dtype in (torch.float32, torch.bfloat16):
        back = load_checkpoint(tmp_path, dtype)
        assert {parameter.dtype for parameter in back.parameters()} == {dtype}
    kept = dict(load_checkpoint(tmp_path).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            step = parameter.detach().abs().amax(1, keepdim=True) / 127
            assert bool(((kept[name] - parameter).abs() <= 0.5001 * step).all())


def test_tensors_are_shared_with_a_folder_in_8_bits(tmp_path: Path) -> None:
    target = tiny_llama()
    draft, shared = take_layers(target, [0])
    save_checkpoint(target, tmp_path / "target", card="", eight_bits=True)
    save_checkpoint(draft, tmp_path / "draft", card="", shared_with="../target", shared=shared, eight_bits=True)
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "draft/model.safetensors")
    target, draft = (load_checkpoint(tmp_path / name) for name in ("target", "draft"))
    embeddings = [model.get_input_embeddings().get_parameter("weight") for model in (target, draft)]
    assert torch.equal(*embeddings)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, "is in 8 bits, and its scales .* are missing"),
        (torch.ones(23), r"is float32 of shape \(23,\), not a row of 24 scales"),
        (torch.ones(24, 1), r"of shape \(24, 1\), not a row of 24 scales"),
        (torch.ones(24, dtype=torch.int64), "is int64 of shape"),
        (torch.tensor([1.0] * 23 + [float("nan")]), "a scale that is negative or not finite"),
        (torch.tensor([1.0] * 23 + [float("inf")]), "a scale that is negative or not finite"),
        (torch.tensor([1.0] * 23 + [-1.0]), "a scale that is negative or not finite"),
    ],
)
def test_a_damaged_scale_is_named_with_its_file(tmp_path: Path, scale: Tensor | None, message: str) -> None:
    save_checkpoint(tiny_llama(), tmp_path, card="", eight_bits=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors[MATRIX + "_scale"]
    save_file(tensors if scale is None else {**tensors, MATRIX + "_scale": scale}, path)
    reseal(tmp_path / "specgym.json")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: '{MATRIX}.*{message}.*reinstall") as caught:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_8_bits_where_they_do_not_belong_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'x' is in 8 bits and no matrix, but of shape \(3,\)"):
        unpack({"x": torch.ones(3, dtype=torch.int8), "x_scale": torch.ones(3)})
    with pytest.raises(ValueError, match="'x_scale' belongs to a tensor that is not in 8 bits"):
        unpack({"x": torch.ones(3, 2), "x_scale": torch.ones(3)})
