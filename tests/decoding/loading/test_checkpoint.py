"""Checkpoint folders: what comes back, what is shared, and what is said about a folder that is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specgym.decoding.fit.draft.init_from_target import take_layers
from specgym.decoding.loading import checkpoint
from specgym.decoding.loading.checkpoint import load_checkpoint, save_checkpoint
from specgym.decoding.loading.link import CheckpointError, is_checkpoint, lender, read_link, tokenizer_folder
from tests.helpers.architecture_chains import FAMILIES
from tests.helpers.architectures import build
from tests.helpers.sealing import reseal

EMBEDDING = "model.embed_tokens.weight"


def tiny_llama(layers: int = 3, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
            tie_word_embeddings=tied, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedModel, Path]:
    """A target, a draft that shares its embeddings, and the folder that holds both as ``target`` and ``draft``."""
    target = tiny_llama()
    draft, shared = take_layers(target, [0, 2])
    save_checkpoint(target, tmp_path / "target", card="# target\n", dtype=torch.float32)
    save_checkpoint(
        draft, tmp_path / "draft", card="# draft\n", shared_with="../target", shared=shared, dtype=torch.float32
    )
    return target, draft, tmp_path


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back_rounded_to_float16(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied=tied)
    save_checkpoint(model, tmp_path, card="# a card\n")
    back = load_checkpoint(tmp_path)
    assert back.dtype == torch.float32
    assert not back.training
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    torch.testing.assert_close(logits(back), logits(model))
    assert (tmp_path / "README.md").read_text() == "# a card\n"
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert ("lm_head.weight" in stored) is (not tied)


def test_loading_asks_for_the_dtype_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    save_checkpoint(tiny_llama(), tmp_path, card="")
    before = torch.random.get_rng_state()
    assert load_checkpoint(tmp_path, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(before, torch.random.get_rng_state())


class Drawn(TorchDispatchMode):
    """Counts the random numbers that are drawn into memory."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::normal_", "aten::uniform_") and not result.is_meta:
            self.numbers += result.numel()
        return result


def test_no_weight_is_initialised_that_the_file_holds(tmp_path: Path) -> None:
    save_checkpoint(tiny_llama(), tmp_path, card="")
    with Drawn() as drawn:
        load_checkpoint(tmp_path)
    assert drawn.numbers == 0
    with drawn:
        tiny_llama()
    assert drawn.numbers > 0


@pytest.mark.parametrize("name", ["llama", "gptj", "gemma3_text", "phi3-longrope"])
def test_buffers_that_no_file_holds_are_computed(tmp_path: Path, name: str) -> None:
    case = next(case for family in FAMILIES for case in family.cases if str(case) == name)
    model = build(case)
    save_checkpoint(model, tmp_path, card="", dtype=torch.float32)
    back, stored = load_checkpoint(tmp_path), {name for name, _ in model.named_parameters()}
    buffers = dict(back.named_buffers())
    assert set(buffers) - stored
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)
    torch.testing.assert_close(logits(back), logits(model))


def test_transformers_reads_a_folder_that_shares_nothing(tmp_path: Path) -> None:
    model = tiny_llama()
    save_checkpoint(model, tmp_path, card="", dtype=torch.float32)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_shared_tensors_are_not_stored_twice_and_come_back_from_disk(
    pair: tuple[PreTrainedModel, PreTrainedModel, Path],
) -> None:
    _, draft, folder = pair
    stored = load_file(folder / "draft/model.safetensors")
    assert EMBEDDING not in stored
    assert "lm_head.weight" not in stored
    torch.testing.assert_close(logits(load_checkpoint(folder / "draft")), logits(draft))


def test_shared_tensors_use_the_storage_of_the_target_in_memory(
    pair: tuple[PreTrainedModel, PreTrainedModel, Path],
) -> None:
    target, draft, folder = pair
    back = load_checkpoint(folder / "draft", shared_from=target)
    assert back.get_input_embeddings().weight is target.get_input_embeddings().weight
    assert back.get_output_embeddings().weight is target.get_output_embeddings().weight
    torch.testing.assert_close(logits(back), logits(draft))


def test_one_tensor_at_a_time_is_unpacked_and_of_a_lender_only_what_is_lent(
    pair: tuple[PreTrainedModel, PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked: list[list[str]] = []

    def unpack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        unpacked.append(list(tensors))
        return checkpoint_unpack(tensors)

    checkpoint_unpack = checkpoint.unpack
    monkeypatch.setattr(checkpoint, "unpack", unpack)
    _, draft, folder = pair
    back = load_checkpoint(folder / "draft")
    torch.testing.assert_close(logits(back), logits(draft))
    stored = set(load_file(folder / "draft/model.safetensors"))
    assert sorted(unpacked) == sorted([name] for name in {*stored, EMBEDDING})


def test_untied_embeddings_are_both_shared(tmp_path: Path) -> None:
    target = tiny_llama(tied=False)
    draft, shared = take_layers(target, [1])
    assert set(shared) == {EMBEDDING, "lm_head.weight"}
    save_checkpoint(target, tmp_path / "a", card="", dtype=torch.float32)
    save_checkpoint(draft, tmp_path / "b", card="", shared_with="../a", shared=shared, dtype=torch.float32)
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "b")), logits(draft))
    assert load_checkpoint(tmp_path / "b", shared_from=target).lm_head.weight is target.lm_head.weight


def test_saving_refuses_names_that_the_model_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not in the model: nonsense"):
        save_checkpoint(tiny_llama(), tmp_path, card="", shared_with="../a", shared=["nonsense"])
    with pytest.raises(ValueError, match="both or neither"):
        save_checkpoint(tiny_llama(), tmp_path, card="", shared=[EMBEDDING])


@pytest.mark.parametrize("name", ["specgym.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "foreign"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, name: str, damage: str) -> None:
    save_checkpoint(tiny_llama(), tmp_path, card="")
    path = tmp_path / name
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "foreign":
            path.write_bytes(b"[1, 2]" if name.endswith("json") else b"\x80\x04not safetensors at all")
    with pytest.raises(CheckpointError, match=rf"(?s){name}.*reinstall") as caught:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tiny_llama(layers=2), tmp_path / "two", card="")
    save_checkpoint(tiny_llama(layers=3), tmp_path / "three", card="")
    two, three = (tmp_path / name / "model.safetensors" for name in ("two", "three"))
    small = two.read_bytes()
    two.write_bytes(three.read_bytes())
    reseal(tmp_path / "two" / "specgym.json")
    with pytest.raises(CheckpointError, match=r"no place for 'model\.layers\.2"):
        load_checkpoint(tmp_path / "two")
    three.write_bytes(small)
    reseal(tmp_path / "three" / "specgym.json")
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'model\.layers\.2"):
        load_checkpoint(tmp_path / "three")


def test_a_tensor_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tiny_llama(), tmp_path, card="")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, EMBEDDING: tensors[EMBEDDING][:-1].contiguous()}, tmp_path / "model.safetensors")
    reseal(tmp_path / "specgym.json")
    with pytest.raises(CheckpointError, match=r"shape \(39, 16\), but the model needs \(40, 16\)"):
        load_checkpoint(tmp_path)


def test_a_missing_or_foreign_target_is_named(pair: tuple[PreTrainedModel, PreTrainedModel, Path]) -> None:
    _, _, folder = pair
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.embed_tokens\.weight'"):
        load_checkpoint(folder / "draft", shared_from=torch.nn.Linear(2, 2))
    (folder / "target/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"target.model\.safetensors is missing"):
        load_checkpoint(folder / "draft")
    (folder / "target/specgym.json").unlink()
    with pytest.raises(CheckpointError, match="pass the target"):
        load_checkpoint(folder / "draft")


def test_the_link_says_where_the_tokenizer_is(tmp_path: Path) -> None:
    save_checkpoint(tiny_llama(), tmp_path / "model", card="", tokenizer="../tokenizer")
    assert is_checkpoint(tmp_path / "model")
    assert not is_checkpoint(tmp_path)
    assert read_link(tmp_path / "model").tokenizer == "../tokenizer"
    with pytest.raises(CheckpointError, match="holds no tokeniser"):
        tokenizer_folder(tmp_path / "model")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    assert tokenizer_folder(tmp_path / "model") == (tmp_path / "tokenizer").resolve()


def test_a_hub_id_is_told_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    for name in (None, "../target", ".", "inner"):
        assert lender(tmp_path / "model", name) is None
    assert lender(tmp_path / "model", "someone/model") == "someone/model"


def test_a_link_that_names_half_of_a_sharing_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tiny_llama(), tmp_path, card="")
    (tmp_path / "specgym.json").write_text(json.dumps({"shared_with": "../target"}))
    with pytest.raises(CheckpointError, match="both or neither"):
        load_checkpoint(tmp_path)
