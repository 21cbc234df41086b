"""Write a model as a GGUF file, which llama.cpp and what is built on it read.

For drafts of ours and small targets: models of Llama's shape. The tokenizer is copied from the target's own GGUF file,
so that both have the same vocabulary token by token, or made of the model's own where its kind is known here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import gguf
import numpy as np
import torch
import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ArgumentError, UnsupportedModelError, VocabularyMismatchError, run_command
from ..files import replacing
from ..loading.find_model import load_model
from ..models.output_layer import ReducedOutput
from .gguf_header import GgufHeader, read_header

GgufType = Literal["f32", "f16", "q8_0"]

_ARCHITECTURE: Final = "llama"
_FILE_TYPES: Final = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_BLOCK: Final = 32
"""Numbers of a row that share a scale in Q8_0; rows of other lengths are stored in float16, as llama-quantize does."""
_BYTE_LEVEL: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PRE_TOKENIZERS: Final[dict[str, object]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    },
}
"""Cuts of texts before they are encoded, by llama.cpp's names (src/llama-vocab.cpp, b11549), in tokenizers' form."""
_HELP_LIKE: Final = "give the GGUF file of the target, whose tokenizer is then copied (--like)"


@dataclass
class GgufSettings:
    """Write a model as a GGUF file.

    Models of Llama's shape can be written, drafts that share their target's embeddings included; anything else is
    refused by name.
    """

    model: str
    """Model: a folder, a hub id, or the name of a shipped model."""
    out: Path
    """File to write. An existing file is refused."""
    like: Path | None = None
    """GGUF file of the target, from which the tokenizer is copied. Defaults to the tokenizer of the model itself."""
    type: GgufType = "f16"
    """Type of the matrices; vectors are float32."""


def write_gguf(settings: GgufSettings) -> None:
    """Write a model as a GGUF file.

    Raises:
        ArgumentError: the file exists, or the one to copy from is none.
        UnsupportedModelError: the model or its tokenizer cannot be written; the message names what.
        VocabularyMismatchError: the model has another vocabulary than the file to copy from.
        ModelNotFoundError: and others of `load_model`.
    """
    if settings.out.exists():
        raise ArgumentError(f"{settings.out} exists; name another file, or remove it")
    like = None if settings.like is None else read_header(settings.like)
    model, tokenizer = load_model(settings.model, dtype=torch.float32, device="cpu")
    with replacing(settings.out) as temporary:
        write_model(model, tokenizer, temporary, like, settings.type)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: Path,
    like: GgufHeader | None = None,
    kind: GgufType = "f16",
) -> None:
    """Write a loaded model. Errors as for `write_gguf`.

    Args:
        model: of Llama's shape.
        tokenizer: its own; not needed with `like`.
        path: of the file; written over.
        like: header whose tokenizer is copied.
        kind: of the matrices.
    """
    tensors = dict(_tensors(model))
    rows = len(tensors["token_embd.weight"])
    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    _describe(writer, model, kind)
    if like is not None:
        _copy_tokenizer(writer, like, model, rows)
    else:
        _write_tokenizer(writer, tokenizer, rows)
    for name, tensor in tensors.items():
        data, stored = _stored(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, model: PreTrainedModel, kind: GgufType) -> None:
    config = model.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(str(model.name_or_path)).name or "model")
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors by llama.cpp's names, in float32."""
    _require_llama(model)
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    embeddings: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    for name, tensor in model.state_dict().items():
        if name.startswith("lm_head."):
            continue
        place = names.get_name(name, try_suffixes=(".weight",))
        if place is None:
            raise _unsupported(model, f"it has the tensor {name}")
        array = tensor.to(torch.float32).numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if count := heads.get(place.split(".")[-2]):
            array = _interleave(array, count)
        yield place, array
    if isinstance(output, ReducedOutput):
        # llama.cpp scores all tokens; a draft that was taught some scores the others 0, which is low for a best token.
        weight = torch.zeros_like(output.weight)
        weight[output.tokens] = output.weight[output.tokens]
        yield "output.weight", weight.detach().to(torch.float32).numpy()
    elif output.weight is not embeddings.weight:
        yield "output.weight", output.weight.detach().to(torch.float32).numpy()


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key matrix, shape (heads * size, h).

    Rotary embeddings turn pairs of numbers: of transformers the first and the second half of a head, of llama.cpp's
    Llama neighbours (LLAMA_ROPE_TYPE_NORM in src/llama-model.cpp, b11549).
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _require_llama(model: PreTrainedModel) -> None:
    config = model.config
    if config.model_type != "llama":
        raise _unsupported(model, f"it is a {config.model_type}")
    rope = config.rope_parameters
    for name, value, written in (
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
        ("hidden_act", config.hidden_act, "silu"),
        ("attention_bias", config.attention_bias, False),
        ("mlp_bias", config.mlp_bias, False),
    ):
        if value != written:
            raise _unsupported(model, f"its {name} is {value!r}, not {written!r}")


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model.name_or_path or type(model).__name__} cannot be written as GGUF here: {reason}. "
        "Plain Llama models can; llama.cpp's own convert_hf_to_gguf.py knows more"
    )


def _stored(tensor: np.ndarray, kind: GgufType) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """A tensor's numbers as they are stored, and their type."""
    if tensor.ndim == 1 or kind == "f32":
        return np.ascontiguousarray(tensor, np.float32), gguf.GGMLQuantizationType.F32
    if kind == "f16" or tensor.shape[-1] % _BLOCK:
        return np.ascontiguousarray(tensor, np.float16), gguf.GGMLQuantizationType.F16
    stored = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.quantize(np.ascontiguousarray(tensor), stored), stored


def _copy_tokenizer(writer: gguf.GGUFWriter, like: GgufHeader, model: PreTrainedModel, rows: int) -> None:
    if len(like.tokens) != rows:
        raise VocabularyMismatchError(
            f"{model.name_or_path} has {rows} tokens and {like.path} has {len(like.tokens)}: a draft needs the "
            "vocabulary of its target. Make one for this target"
        )
    for name, entry in like.values.items():
        if name.startswith("tokenizer."):
            kinds = [gguf.GGUFValueType(kind) for kind in entry.types]
            writer.add_key_value(name, entry.value, kinds[0], sub_type=kinds[1] if len(kinds) > 1 else None)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase | None, rows: int) -> None:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None or backend is None:
        raise UnsupportedModelError(f"there is no tokenizer of the tokenizers library to write; {_HELP_LIKE}")
    description = json.loads(backend.to_str())
    model = description["model"]
    pre = next((name for name, known in _PRE_TOKENIZERS.items() if known == description["pre_tokenizer"]), None)
    if model["type"] != "BPE" or pre is None or description["normalizer"] is not None or model["ignore_merges"]:
        raise UnsupportedModelError(
            f"its tokenizer, {model['type']} with the pre-tokenizer {description['pre_tokenizer']}, is none of those "
            f"that can be written ({', '.join(_PRE_TOKENIZERS)}); {_HELP_LIKE}"
        )
    texts = {**model["vocab"], **{token["content"]: token["id"] for token in description["added_tokens"]}}
    if max(texts.values()) >= rows:
        raise VocabularyMismatchError(f"the tokenizer has {max(texts.values()) + 1} tokens and the model {rows}")
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [gguf.TokenType.UNUSED] * rows
    for text, number in texts.items():
        tokens[number], kinds[number] = text, gguf.TokenType.NORMAL
    for token in description["added_tokens"]:
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    encoded = tokenizer("a")["input_ids"]
    for name, number in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and encoded[0] == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: words of the command line; by default those of this program. Errors as for `write_gguf`.
    """
    settings = tyro.cli(
        GgufSettings,
        prog="python -m specgym.decoding.engines.gguf",
        args=arguments,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    write_gguf(settings)
    print(f"{settings.out}: {settings.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    sys.exit(run_command(main))
