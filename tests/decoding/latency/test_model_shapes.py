from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from specgym.decoding.latency.model_shapes import MODEL_SHAPES, ModelShape
from specgym.decoding.models.output_layer import reduce_output

SMALL = ModelShape(
    "small", parameters=100, bytes_per_parameter=2, layers=4, hidden_size=4, key_value_bytes_per_token=10
)
LONG = 131072
OPT = {"vocab_size": 50272, "max_position_embeddings": 2048}
LLAMA = {"vocab_size": 128256, "max_position_embeddings": LONG, "num_key_value_heads": 8}
LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
QWEN = {"vocab_size": 152064, "max_position_embeddings": LONG}
QWEN3 = {"vocab_size": 151936, "max_position_embeddings": 40960, "num_key_value_heads": 8, "head_dim": 128}
GEMMA2 = {"vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window": 4096}
GEMMA3 = {"vocab_size": 262208, "max_position_embeddings": LONG, "sliding_window": 1024}
SMOL = {"vocab_size": 49152, "max_position_embeddings": 8192}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_key_value_heads")

# What config.json says on huggingface.co; litgpt (github.com/Lightning-AI/litgpt, litgpt/config.py) has the same sizes.
CONFIGURATIONS: dict[str, tuple[type[PretrainedConfig], tuple[int, ...], dict[str, Any]]] = {
    "llama-3.1-405b": (LlamaConfig, (16384, 126, 128, 53248), LLAMA | UNTIED),
    "llama-3.1-70b": (LlamaConfig, (8192, 80, 64, 28672), LLAMA | UNTIED),
    "llama-3.1-8b": (LlamaConfig, (4096, 32, 32, 14336), LLAMA | UNTIED),
    "llama-3.2-3b": (LlamaConfig, (3072, 28, 24, 8192), LLAMA | TIED),
    "llama-3.2-1b": (LlamaConfig, (2048, 16, 32, 8192), LLAMA | TIED),
    "llama-2-70b": (LlamaConfig, (8192, 80, 64, 28672, 8), LLAMA2 | UNTIED),
    "llama-2-13b": (LlamaConfig, (5120, 40, 40, 13824, 40), LLAMA2 | UNTIED),
    "llama-2-7b": (LlamaConfig, (4096, 32, 32, 11008, 32), LLAMA2 | UNTIED),
    "llama-68m": (
        LlamaConfig,
        (768, 2, 12, 3072, 12),
        {"vocab_size": 32000, "max_position_embeddings": 2048} | UNTIED,
    ),
    "qwen2.5-72b": (Qwen2Config, (8192, 80, 64, 29568, 8), QWEN | UNTIED),
    "qwen2.5-32b": (Qwen2Config, (5120, 64, 40, 27648, 8), QWEN | UNTIED),
    "qwen2.5-14b": (Qwen2Config, (5120, 48, 40, 13824, 8), QWEN | UNTIED),
    "qwen2.5-7b": (Qwen2Config, (3584, 28, 28, 18944, 4), QWEN | UNTIED),
    "qwen2.5-3b": (
        Qwen2Config,
        (2048, 36, 16, 11008, 2),
        {"vocab_size": 151936, "max_position_embeddings": 32768} | TIED,
    ),
    "qwen2.5-1.5b": (Qwen2Config, (1536, 28, 12, 8960, 2), QWEN | {"vocab_size": 151936} | TIED),
    "qwen2.5-0.5b": (
        Qwen2Config,
        (896, 24, 14, 4864, 2),
        {"vocab_size": 151936, "max_position_embeddings": 32768} | TIED,
    ),
    "qwen3-32b": (Qwen3Config, (5120, 64, 64, 25600), QWEN3 | UNTIED),
    "qwen3-14b": (Qwen3Config, (5120, 40, 40, 17408), QWEN3 | UNTIED),
    "qwen3-8b": (Qwen3Config, (4096, 36, 32, 12288), QWEN3 | UNTIED),
    "qwen3-4b": (Qwen3Config, (2560, 36, 32, 9728), QWEN3 | TIED),
    "qwen3-1.7b": (Qwen3Config, (2048, 28, 16, 6144), QWEN3 | TIED),
    "qwen3-0.6b": (Qwen3Config, (1024, 28, 16, 3072), QWEN3 | TIED),
    "gemma-2-27b": (Gemma2Config, (4608, 46, 32, 36864, 16), GEMMA2 | {"head_dim": 128}),
    "gemma-2-9b": (Gemma2Config, (3584, 42, 16, 14336, 8), GEMMA2 | {"head_dim": 256}),
    "gemma-2-2b": (Gemma2Config, (2304, 26, 8, 9216, 4), GEMMA2 | {"head_dim": 256}),
    "gemma-3-27b": (Gemma3TextConfig, (5376, 62, 32, 21504, 16), GEMMA3 | {"head_dim": 128}),
    "gemma-3-12b": (Gemma3TextConfig, (3840, 48, 16, 15360, 8), GEMMA3 | {"head_dim": 256}),
    "gemma-3-4b": (Gemma3TextConfig, (2560, 34, 8, 10240, 4), GEMMA3 | {"head_dim": 256}),
    "gemma-3-1b": (
        Gemma3TextConfig,
        (1152, 26, 4, 6912, 1),
        {"vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512, "head_dim": 256},
    ),
    "mistral-7b": (
        MistralConfig,
        (4096, 32, 32, 14336, 8),
        {"vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None},
    ),
    "phi-4": (
        Phi3Config,
        (5120, 40, 40, 17920, 10),
        {"vocab_size": 100352, "max_position_embeddings": 16384, "sliding_window": None, "pad_token_id": 0},
    ),
    "opt-30b": (OPTConfig, (7168, 48, 56), OPT),
    "opt-13b": (OPTConfig, (5120, 40, 40), OPT),
    "opt-6.7b": (OPTConfig, (4096, 32, 32), OPT),
    "opt-1.3b": (OPTConfig, (2048, 24, 32), OPT),
    "opt-125m": (OPTConfig, (768, 12, 12), OPT),
    "pythia-12b": (GPTNeoXConfig, (5120, 36, 40, 20480), {"vocab_size": 50688} | UNTIED),
    "pythia-6.9b": (GPTNeoXConfig, (4096, 32, 32, 16384), {"vocab_size": 50432} | UNTIED),
    "pythia-1.4b": (GPTNeoXConfig, (2048, 24, 16, 8192), {"vocab_size": 50304} | UNTIED),
    "pythia-410m": (GPTNeoXConfig, (1024, 24, 16, 4096), {"vocab_size": 50304} | UNTIED),
    "pythia-70m": (GPTNeoXConfig, (512, 6, 8, 2048), {"vocab_size": 50304} | UNTIED),
    "smollm2-1.7b": (LlamaConfig, (2048, 24, 32, 8192, 32), SMOL | TIED),
    "smollm2-360m": (LlamaConfig, (960, 32, 15, 2560, 5), SMOL | TIED),
    "smollm2-135m": (LlamaConfig, (576, 30, 9, 1536, 3), SMOL | TIED),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_named_shapes_follow_from_the_models_configurations(name: str) -> None:
    kind, sizes, others = CONFIGURATIONS[name]
    arguments = dict(zip(KEYS, sizes, strict=False)) | others
    if kind is OPTConfig:
        arguments |= {"ffn_dim": 4 * sizes[0], "word_embed_proj_dim": sizes[0]}
    assert ModelShape.of(kind(**arguments), name=name) == MODEL_SHAPES[name]


def test_every_named_shape_is_compared_with_its_configuration() -> None:
    assert set(MODEL_SHAPES) == set(CONFIGURATIONS)
    sizes = [shape.stored_parameters for shape in MODEL_SHAPES.values()]
    assert min(sizes) < 70e6 < 400e9 < max(sizes)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2", "gpt_neox", "phi", "mistral"])
def test_the_shape_of_a_model_counts_what_a_pass_reads(make_model: Callable[..., PreTrainedModel], family: str) -> None:
    model = make_model(family, layers=3, vocabulary=96, hidden=32, context=64)
    shape = ModelShape.of(model, name=family)
    read = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if name.split(".")[-2] not in ("wpe", "embed_positions")
    )
    embeddings = model.get_input_embeddings().get_parameter("weight")
    if embeddings is not model.get_output_embeddings().get_parameter("weight"):
        read -= embeddings.numel()
    assert shape.parameters == read
    assert shape.stored_parameters == sum(weight.numel() for weight in model.parameters())
    assert (shape.layers, shape.hidden_size, shape.bytes_per_parameter) == (3, 32, 4)
    assert (shape.width, shape.context_limit, shape.windowed_layers) == (32, 64, 0)
    cache = model(input_ids=torch.tensor([[1, 2]]), use_cache=True).past_key_values
    stored = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    assert shape.key_value_bytes_per_token == stored / 2
    assert shape.key_value_heads == cache.layers[0].keys.shape[1]
    reduce_output(model, torch.arange(10))
    assert ModelShape.of(model).parameters == shape.parameters - 86 * 32
    half = ModelShape.of(model.config, torch.float16)
    assert half.bytes_per_parameter == 2
    assert half.key_value_bytes_per_token == shape.key_value_bytes_per_token / 2


def test_weights_of_fewer_bits_pay_for_their_scales() -> None:
    assert SMALL.quantised(16) is SMALL
    eight, four = SMALL.quantised(8), SMALL.quantised(4)
    assert (eight.bytes_per_parameter, four.bytes_per_parameter) == (34 / 32, 18 / 32)  # blocks of Q8_0 and Q4_0
    assert SMALL.quantised(4, group_size=128).bytes_per_parameter == 4.125 / 8
    assert four.name == "small-q4"
    assert four.weight_bytes == 100 * 18 / 32
    assert replace(four, looked_up=20).weight_bytes == 120 * 18 / 32
    assert four.key_value_bytes(7) == SMALL.key_value_bytes(7) == 70


def test_keys_and_values_of_windowed_layers_stop_growing() -> None:
    windowed = replace(SMALL, windowed_layers=3, window=100)
    assert windowed.key_value_bytes(100) == SMALL.key_value_bytes(100)
    assert windowed.key_value_bytes(500) == pytest.approx(10 * (3 * 100 + 500) / 4)
    gemma = MODEL_SHAPES["gemma-3-27b"]
    assert gemma.key_value_bytes(LONG) < 0.2 * gemma.key_value_bytes_per_token * LONG


@pytest.mark.parametrize("field", [field.name for field in fields(ModelShape) if field.type != "str"])
def test_shapes_that_make_no_sense_are_refused(field: str) -> None:
    optional = {field.name for field in fields(ModelShape) if field.default == 0}
    for value in (-1, float("nan"), *([] if field in optional else [0])):
        with pytest.raises(ValueError, match=f"{field} of small must be finite and positive"):
            replace(SMALL, **dict[str, Any]({field: value}))


@pytest.mark.parametrize("changes", [{"windowed_layers": 1}, {"windowed_layers": 5, "window": 100}])
def test_windowed_layers_need_a_window_and_are_no_more_than_the_layers(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="windowed_layers of small must be at most its layers, and 0 without a window"):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [(5, 32, "bits must be one of 16, 8, 4, got 5"), (4, 0, "group_size must be a whole number of at least 1, got 0")],
)
def test_bits_that_nobody_stores_are_refused(bits: int, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.quantised(bits, group_size=group_size)
