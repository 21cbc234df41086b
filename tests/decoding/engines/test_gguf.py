"""Models written as GGUF files: read back they are what they were; what cannot be written is named."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerBase

from specgym.decoding.engines.gguf import GgufSettings, GgufType, main, write_gguf, write_model
from specgym.decoding.engines.gguf_header import GgufHeader, read_header
from specgym.decoding.errors import ArgumentError, UnsupportedModelError, VocabularyMismatchError
from specgym.decoding.loading.find_model import load_model, load_tokenizer
from specgym.decoding.models.output_layer import reduce_output

TEXT = "Once upon a time, 12 of them said:\n\n\tdef f(x): return x  # naïve"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("tiny-10m")


def llama(**settings: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{**shape, "vocab_size": 4096, "num_key_value_heads": 2, **settings})  # type: ignore[arg-type]
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def scores(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return torch.as_tensor(model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits)


def types(path: Path) -> dict[str, str]:
    """Types of the tensors of a file."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(("kind", "tolerance", "tied"), [("f32", 1e-5, True), ("q8_0", 2e-2, False)])
def test_a_model_read_back_is_what_it_was(
    kind: GgufType, tolerance: float, tied: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = llama(tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 50000.0})
    write_model(model, tokenizer, tmp_path / "model.gguf", kind=kind)
    again, reread = load_model(str(tmp_path / "model.gguf"), dtype=torch.float32, device="cpu")
    torch.testing.assert_close(scores(again, tokenizer), scores(model, tokenizer), rtol=0, atol=tolerance)
    assert reread(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    stored = types(tmp_path / "model.gguf")
    assert stored["blk.1.attn_k.weight"] == kind.upper()
    assert stored["output_norm.weight"] == "F32"
    assert ("output.weight" in stored) == (not tied)


def test_rows_that_no_block_divides_are_in_float16(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_model(llama(intermediate_size=80), tokenizer, tmp_path / "model.gguf", kind="q8_0")
    stored = types(tmp_path / "model.gguf")
    assert (stored["blk.0.ffn_down.weight"], stored["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


def test_tokens_that_a_draft_never_proposes_score_nothing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    kept = torch.arange(0, 4096, 3)
    reduce_output(model, kept)
    write_model(model, tokenizer, tmp_path / "model.gguf", kind="f32")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    embeddings, output = tensors["token_embd.weight"], tensors["output.weight"]
    torch.testing.assert_close(output[kept], embeddings[kept], rtol=0, atol=0)
    assert int(output.any(1).sum()) == len(kept)
    assert int(embeddings.any(1).sum()) == 4096


def test_a_draft_gets_its_targets_tokenizer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    target, draft, other = (tmp_path / f"{name}.gguf" for name in ("target", "draft", "other"))
    write_model(llama(), tokenizer, target, kind="f16")
    assert types(target)["blk.0.attn_k.weight"] == "F16"
    write_gguf(GgufSettings("tiny-10m-draft-xs", draft, like=target))
    ours, theirs = read_header(target), read_header(draft)
    names = [name for name in ours.values if name.startswith("tokenizer.")]
    assert len(ours.tokens) == 4096
    assert len(names) >= 8
    assert [ours.values[name] for name in names] == [theirs.values[name] for name in names]
    assert (theirs.architecture, theirs.get("llama.attention.key_length")) == ("llama", 32)
    with pytest.raises(VocabularyMismatchError, match=r"has 4000 tokens and .*target.gguf has 4096"):
        write_model(llama(vocab_size=4000), None, other, ours)
    with pytest.raises(VocabularyMismatchError, match="tokenizer has 4096 tokens and the model 4000"):
        write_model(llama(vocab_size=4000), tokenizer, other)


def test_padded_rows_have_tokens_of_no_use(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_model(llama(vocab_size=4100), tokenizer, tmp_path / "model.gguf")
    header = read_header(tmp_path / "model.gguf")
    assert header.tokens[4095:] == [tokenizer.convert_ids_to_tokens(4095), *(f"[PAD{n}]" for n in range(4096, 4100))]
    kinds = header.get("tokenizer.ggml.token_type")
    assert isinstance(kinds, list)
    assert (kinds[0], kinds[4095], kinds[4096]) == (
        gguf.TokenType.CONTROL,
        gguf.TokenType.NORMAL,
        gguf.TokenType.UNUSED,
    )


def test_digits_on_their_own_are_smollm(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("tiny-10m")
    assert header_of(tokenizer, tmp_path / "plain.gguf").get("tokenizer.ggml.pre") == "gpt-2"
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    assert header_of(tokenizer, tmp_path / "digits.gguf").get("tokenizer.ggml.pre") == "smollm"


def header_of(tokenizer: PreTrainedTokenizerBase, path: Path) -> GgufHeader:
    write_model(llama(), tokenizer, path)
    return read_header(path)


def test_what_cannot_be_written_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    opt = OPTConfig(vocab_size=96, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    for model, reason in (
        (llama(rope_parameters=scaled), "rope_type is 'linear'"),
        (llama(attention_bias=True), "attention_bias is True"),
        (llama(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (OPTForCausalLM(opt), "it is a opt"),
    ):
        with pytest.raises(UnsupportedModelError, match=f"cannot be written as GGUF here: (its )?{reason}"):
            write_model(model, tokenizer, path)
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer .* give the GGUF file of the target"):
        write_model(llama(), None, path)
    other = load_tokenizer("tiny-10m")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with pytest.raises(UnsupportedModelError, match=r"BPE with the pre-tokenizer .*none of those .*gpt-2, smollm"):
        write_model(llama(), other, path)
    path.write_bytes(b"mine")
    with pytest.raises(ArgumentError, match="exists; name another file"):
        main(["tiny-10m-draft-xs", str(path)])
    assert path.read_bytes() == b"mine"
