"""Lookup of models: places, their order, and refusals."""

import json
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    WhisperConfig,
)

from specgym.decoding.errors import UnsupportedModelError
from specgym.decoding.loading import find_model as loading
from specgym.decoding.loading.checkpoint import CheckpointError, save_checkpoint
from specgym.decoding.loading.find_model import (
    ModelFileError,
    ModelNotFoundError,
    load_model,
    load_tokenizer,
    shipped_models,
)

_CONFIG = GPT2Config(vocab_size=8, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)


class NoNetwork(Exception):
    """A network attempt where none is allowed."""


def _no_network(*args: object, **kwargs: object) -> None:
    raise NoNetwork(args)


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test here may depend on the machine's network or hub cache."""
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<s>", "</s>", *"abcdef"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def _model(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(_CONFIG)


def _embeddings(model: PreTrainedModel) -> torch.Tensor:
    return model.state_dict(keep_vars=True)["transformer.wte.weight"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and its tokenizer as save_pretrained writes them."""
    path = tmp_path / "saved"
    _model().save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that ships ``small`` and ``small-draft``, which shares its embeddings."""
    path = tmp_path / "package"
    _tokenizer().save_pretrained(path / "tokenizer")
    save_checkpoint(_model(), path / "small", card="", tokenizer="../tokenizer", dtype=torch.float32)
    save_checkpoint(
        _model(), path / "small-draft", card="", tokenizer="../tokenizer", shared_with="../small",
        shared=["transformer.wte.weight"],
    )  # fmt: skip
    monkeypatch.setattr(loading, "_SHIPPED", path)
    return path


def _hub_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def model_info(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(loading.HfApi, "model_info", model_info)


class _Response:
    """Part of an HTTP response that the hub's errors read."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.request = None
        self.status_code = 404


def test_a_local_folder_gives_model_and_tokenizer_ready_for_use(folder: Path) -> None:
    model, tokenizer = load_model(str(folder), device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert model.name_or_path == str(folder)
    torch.testing.assert_close(_embeddings(model), _embeddings(_model()))
    assert tokenizer("a c")["input_ids"] == [2, 4]


def test_the_dtype_is_the_callers_choice(folder: Path) -> None:
    assert load_model(str(folder), dtype=torch.bfloat16, device="cpu")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("device", [None, "cpu", "auto", torch.device("cpu")])
def test_every_way_to_name_a_device_works(folder: Path, device: str | torch.device | None) -> None:
    expected = "cuda" if torch.cuda.is_available() and device in (None, "auto") else "cpu"
    assert load_model(str(folder), device=device)[0].device.type == expected


def test_a_shipped_model_loads_without_a_network_attempt(package: Path) -> None:
    model, tokenizer = load_model("small", device="cpu")
    assert model.name_or_path == "small"
    assert tokenizer("b")["input_ids"] == [3]
    assert load_tokenizer("small-draft")("b")["input_ids"] == [3]


def test_a_shipped_draft_can_borrow_its_targets_embeddings(package: Path) -> None:
    target, _ = load_model("small", device="cpu")
    draft, _ = load_model("small-draft", device="cpu", shared_from=target)
    assert _embeddings(draft) is _embeddings(target)
    alone, _ = load_model("small-draft", device="cpu")
    torch.testing.assert_close(_embeddings(alone), _embeddings(target))


def test_a_local_folder_is_taken_before_a_shipped_model_of_the_same_name(package: Path, tmp_path: Path) -> None:
    _model(seed=1).save_pretrained(tmp_path / "small")
    _tokenizer().save_pretrained(tmp_path / "small")
    model, _ = load_model("small", device="cpu")
    torch.testing.assert_close(_embeddings(model), _embeddings(_model(seed=1)))


def test_a_folder_that_holds_no_model_does_not_hide_a_shipped_one(package: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    assert load_model("small", device="cpu")[0].name_or_path == "small"


def test_a_folder_with_an_adapter_says_how_to_merge_it_and_that_works(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], init_lora_weights=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(model, options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedModelError, match="holds an adapter and no model") as refusal:
        load_model(str(tmp_path / "adapter"))
    way_out = re.search(r"peft\.AutoPeft\S+", str(refusal.value))
    assert way_out is not None
    assert f"tokenizer of {str(folder)!r} belongs there" in str(refusal.value)
    merged = str(tmp_path / "merged")
    eval(way_out[0].rstrip(";").replace("FOLDER", "merged"), {"peft": peft, "merged": merged})
    _tokenizer().save_pretrained(merged)
    assert load_model(merged, device="cpu")[0].name_or_path == merged


def test_an_adapter_in_the_hub_says_how_to_merge_it(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename="adapter_config.json"), SimpleNamespace(rfilename="README.md")]
    monkeypatch.setattr(loading.HfApi, "model_info", lambda *args, **kwargs: SimpleNamespace(siblings=files))
    with pytest.raises(ModelNotFoundError, match=r"hub: it has an adapter.*from_pretrained\('somebody/adapter'\)"):
        load_model("somebody/adapter")


def test_the_path_of_a_shipped_folder_works_too(package: Path) -> None:
    assert load_tokenizer(str(package / "small"))("a")["input_ids"] == [2]


@pytest.mark.parametrize("name", [name for name in shipped_models() if name.startswith("tiny")])
def test_the_tokenizer_of_every_shipped_model_loads_without_a_network_attempt(name: str) -> None:
    assert load_tokenizer(name)("Once upon a time")["input_ids"]


def _fill_hub_cache(tmp_path: Path, folder: Path, without: str = "") -> None:
    repository = tmp_path / "hub" / "models--someone--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    if without:
        (snapshot / without).unlink()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def test_a_model_in_the_hub_cache_loads_without_a_network_attempt(folder: Path, tmp_path: Path) -> None:
    _fill_hub_cache(tmp_path, folder)
    model, tokenizer = load_model("someone/model", device="cpu")
    assert model.name_or_path == "someone/model"
    assert tokenizer("f")["input_ids"] == [7]


@pytest.fixture
def borrower(folder: Path, tmp_path: Path) -> Path:
    """A draft that takes its embeddings and its tokenizer from a model of the hub."""
    save_checkpoint(
        _model(seed=1), tmp_path / "draft", card="", tokenizer="someone/model", shared_with="someone/model",
        shared=["transformer.wte.weight"],
    )  # fmt: skip
    return tmp_path / "draft"


def test_a_draft_borrows_from_a_model_of_the_hub(borrower: Path, folder: Path, tmp_path: Path) -> None:
    _fill_hub_cache(tmp_path, folder)
    alone, tokenizer = load_model(str(borrower), device="cpu")
    assert tokenizer("f")["input_ids"] == [7]
    torch.testing.assert_close(_embeddings(alone), _embeddings(_model()))
    target, _ = load_model("someone/model", device="cpu")
    draft, _ = load_model(str(borrower), device="cpu", shared_from=target)
    assert _embeddings(draft) is _embeddings(target)


def test_a_draft_whose_lender_is_nowhere_names_it(borrower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hub_raises(monkeypatch, AssertionError("the hub was asked"))
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelNotFoundError, match=r"cannot load the model 'someone/model'"):
            load(str(borrower), offline=True)


def test_a_half_filled_hub_cache_is_not_the_end_of_the_lookup(folder: Path, tmp_path: Path) -> None:
    _fill_hub_cache(tmp_path, folder, without="model.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"hub cache(?s:.*)hub: no answer"):
        load_model("someone/model", device="cpu")


def test_without_a_network_the_error_lists_every_place_and_the_way_out(package: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load_model("someone/unheard-of")
    for part in ("local path", "hub cache: not there", "no answer", "HF_ENDPOINT", "package", "one of: small"):
        assert part in str(caught.value)


def test_an_unknown_id_is_told_from_a_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    _hub_raises(monkeypatch, RepositoryNotFoundError("404", response=_Response()))  # type: ignore[arg-type]
    with pytest.raises(ModelNotFoundError, match=r"no public model of this id.*hf auth login"):
        load_model("someone/unheard-of")


def test_a_gated_model_asks_for_its_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*args: object, **kwargs: object) -> None:
        raise OSError("You are trying to access a gated repo.") from GatedRepoError("403", response=_Response())  # type: ignore[arg-type]

    monkeypatch.setattr(loading.HfApi, "model_info", lambda *args, **kwargs: SimpleNamespace(siblings=None))
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(ModelNotFoundError, match="gated; accept its licence"):
        load_model("meta-llama/Llama-3.1-8B-Instruct")


def test_a_misspelt_shipped_name_gets_a_suggestion(package: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="Did you mean 'small-draft'"):
        load_model("small-draf", offline=True)


@pytest.mark.parametrize("name", ["a/b/c", "not an id", "../nowhere", "", "  "])
def test_what_cannot_be_an_id_is_not_asked_for(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="Looked in"):
        load_model(name)


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_offline_makes_no_network_attempt(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _hub_raises(monkeypatch, AssertionError("the hub was asked"))
    if way == "environment":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="hub: not asked"):
        load_model("someone/model", offline=way == "argument")


@pytest.mark.parametrize(
    ("config", "architecture", "reason"),
    [
        (WhisperConfig(), "WhisperForConditionalGeneration", r"has an encoder and writes no text \(whisper\)"),
        (BertConfig(), "BertForMaskedLM", r"no causal language model \(BertForMaskedLM\)"),
        (BertConfig(), "BertLMHeadModel", "no causal language model"),
        (GPT2Config(), "GPT2ForSequenceClassification", r"no causal language model \(GPT2ForSequenceClassification\)"),
        (ViTConfig(), "ViTForImageClassification", "no causal language model"),
    ],
)
def test_models_that_do_not_generate_from_left_to_right_are_refused_by_name(
    config: Any, architecture: str, reason: str, tmp_path: Path
) -> None:
    config.architectures = [architecture]
    config.save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match=rf"'other' .*{reason}.*give a model that transformers knows"):
        load_model("other")


def test_a_model_type_that_transformers_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(UnsupportedModelError, match=r"'odd' needs code.*nonesuch"):
        load_model("odd")


def test_code_from_a_folder_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UnsupportedModelError, match="needs code"):
        load_model(str(folder))


def test_damaged_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(ModelFileError, match=r"saved are damaged"):
        load_model(str(folder))


def test_weights_that_lack_a_tensor_are_refused_instead_of_filled_with_noise(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"saved lack 'transformer\.h\.0\.mlp\.c_fc\.weight'"):
        load_model(str(folder))


@pytest.mark.parametrize("victim", ["model.safetensors", "tokenizer.json"])
def test_a_folder_with_a_missing_file_is_named_and_nothing_else_is_tried(folder: Path, victim: str) -> None:
    (folder / victim).unlink()
    with pytest.raises(ModelFileError, match=r"the folder .*saved is incomplete.*save_pretrained"):
        load_model(str(folder))


def test_a_folder_without_a_tokenizer_is_refused_instead_of_given_an_empty_one(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelFileError, match="no tokenizer files"):
        load_model(str(folder))


def test_a_config_that_is_not_json_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match="saved"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"n_head": "many"}),
        ("config.json", {"n_layer": 2000}),
        ("config.json", {"num_labels": 5000}),
        ("config.json", {"activation_function": "nonsense"}),
        ("config.json", {"architectures": [None]}),
        ("config.json", {"n_embd": 4}),
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
    ],
    ids=str,
)
def test_what_libraries_say_of_a_bad_file_becomes_an_error_that_names_the_folder(
    folder: Path, file: str, changes: dict[str, Any]
) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))
    with pytest.raises(ModelFileError, match="saved"):
        load_model(str(folder))


def test_a_damaged_shipped_model_is_named(package: Path) -> None:
    (package / "small" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"small.model\.safetensors"):
        load_model("small")
