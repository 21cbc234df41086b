"""Sizes of transformers that determine their speed: of any model, and of named public ones. Free of torch.

torch and transformers are imported where a shape is computed from a model, `ModelShape.of`, and not before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from ..errors import ArgumentError, one_of, whole_number

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

STORED_BITS = (16, 8, 4)
"""Bits of a stored weight that `ModelShape.quantised` knows."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer that determine its speed, and what memory it takes.

    Attributes:
        name: how profiles call it.
        parameters: that a pass reads in full, which leaves out tables that are only looked up in, and the rows of
            tokens that a draft never proposes.
        bytes_per_parameter: 2 for 16-bit weights, 0.5625 for 4-bit ones with a 16-bit scale for every 32.
        layers: of attention.
        hidden_size: of all query heads together.
        key_value_bytes_per_token: of one sequence, over all layers.
        key_value_heads: in a layer, over which devices share keys and values; None for as many as there are devices.
        width: of what layers hand on; None where it is `hidden_size`.
        looked_up: parameters of the tables left out of `parameters`, which take memory all the same.
        windowed_layers: of all layers, those that look back no further than `window`.
        window: tokens; None where no layer has one.
        context_limit: most tokens that the model was trained to read; None where it is not known.

    Raises:
        ValueError: a number is not positive, or there are more windowed layers than layers, or some without a window.
    """

    name: str
    parameters: int
    bytes_per_parameter: float
    layers: int
    hidden_size: int
    key_value_bytes_per_token: float
    key_value_heads: int | None = None
    width: int | None = None
    looked_up: int = 0
    windowed_layers: int = 0
    window: int | None = None
    context_limit: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) or value == field.default:
                continue
            if not (math.isfinite(value) and value > 0):
                raise ArgumentError(f"{field.name} of {self.name} must be finite and positive, got {value}")
        if self.windowed_layers > (0 if self.window is None else self.layers):
            raise ArgumentError(
                f"windowed_layers of {self.name} must be at most its layers, and 0 without a window, got "
                f"{self.windowed_layers} of {self.layers} with a window of {self.window}"
            )

    @property
    def stored_parameters(self) -> int:
        """All parameters, those of tables that are only looked up in included."""
        return self.parameters + self.looked_up

    @property
    def weight_bytes(self) -> float:
        """Memory that the weights take, in bytes."""
        return self.stored_parameters * self.bytes_per_parameter

    def attended(self, context: int) -> float:
        """Tokens that a layer looks back at after so many, averaged over the layers."""
        if self.window is None:
            return context
        windowed = self.windowed_layers * min(context, self.window)
        return (windowed + (self.layers - self.windowed_layers) * context) / self.layers

    def key_value_bytes(self, context: int) -> float:
        """Bytes of one sequence's keys and values after so many tokens."""
        return self.key_value_bytes_per_token * self.attended(context)

    def quantised(self, bits: int, *, group_size: int = 32) -> ModelShape:
        """The shape with weights of fewer bits; arithmetic, keys and values stay as they are.

        Every group of weights has a 16-bit scale, so that a weight takes bits + 16 / group_size: 8.5 and 4.5 with
        groups of 32, as in Q8_0 and Q4_0 of llama.cpp (ggml/src/ggml-common.h: 34 and 18 bytes a block of 32), 4.125
        with groups of 128, as AWQ and GPTQ have them. Zero points, which would add bits / group_size, are left out. All
        weights are stored alike, the output layer's included.

        Args:
            bits: 16 for the shape as it is, 8 or 4.
            group_size: weights that share a scale.

        Raises:
            ValueError: another number of bits, or a group of none.
        """
        one_of("bits", bits, STORED_BITS)
        whole_number("group_size", group_size)
        if bits == 16:
            return self
        return replace(self, name=f"{self.name}-q{bits}", bytes_per_parameter=(bits + 16 / group_size) / 8)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | PretrainedConfig,
        dtype: torch.dtype | None = None,
        *,
        name: str | None = None,
    ) -> ModelShape:
        """The shape of a transformers model, computed from its configuration; no weights are loaded or made.

        Args:
            model: the model, or its configuration.
            dtype: of the weights, keys and values; by default the model's own, and bfloat16 for a configuration.
            name: by default what the model was loaded from, or its type.

        Raises:
            ValueError: transformers knows no causal language model for the configuration.
        """
        import torch
        from torch import nn
        from transformers import AutoModelForCausalLM, PreTrainedModel

        from ..models.output_layer import reduced_output

        config = model.config if isinstance(model, PreTrainedModel) else model
        config = config.get_text_config(decoder=True)
        stored = dtype or (next(model.parameters()).dtype if isinstance(model, PreTrainedModel) else torch.bfloat16)
        with torch.device("meta"):
            empty: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        output = getattr(empty.get_output_embeddings(), "weight", None)
        tables = (module.weight for module in empty.modules() if isinstance(module, nn.Embedding))
        looked_up = sum(table.numel() for table in tables if table is not output)
        reduced = reduced_output(model) if isinstance(model, PreTrainedModel) else None
        left_out = 0 if reduced is None else (len(reduced.weight) - len(reduced.tokens)) * reduced.weight.shape[1]
        heads = int(config.num_attention_heads)
        head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        key_value_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        layers = int(config.num_hidden_layers)
        windowed = (getattr(config, "layer_types", None) or []).count("sliding_attention")
        limit = getattr(config, "max_position_embeddings", None)
        window = getattr(config, "sliding_window", None)
        if not windowed or (limit is not None and window is not None and window >= limit):
            windowed, window = 0, None
        return cls(
            name=name or str(getattr(model, "name_or_path", "")) or str(config.model_type),
            parameters=sum(weight.numel() for weight in empty.parameters()) - looked_up - left_out,
            bytes_per_parameter=stored.itemsize,
            layers=layers,
            hidden_size=heads * head_size,
            key_value_bytes_per_token=2 * layers * key_value_heads * head_size * stored.itemsize,
            key_value_heads=key_value_heads,
            width=int(config.hidden_size),
            looked_up=looked_up,
            windowed_layers=windowed,
            window=window,
            context_limit=limit,
        )


# Of `ModelShape.of` with the config.json of the repositories on huggingface.co, in bfloat16. Dense models alone: of a
# mixture of experts a pass reads the more the more tokens it has.
MODEL_SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        # meta-llama/ Llama-3.1-405B, Llama-3.1-70B-Instruct, Llama-3.1-8B-Instruct, Llama-3.2-3B, Llama-3.2-1B
        ModelShape("llama-3.1-405b", 403_752_042_496, 2, 126, 16384, 516_096, 8, 16384, 2_101_346_304, 0, None, 131072),
        ModelShape("llama-3.1-70b", 69_503_033_344, 2, 80, 8192, 327_680, 8, 8192, 1_050_673_152, 0, None, 131072),
        ModelShape("llama-3.1-8b", 7_504_924_672, 2, 32, 4096, 131_072, 8, 4096, 525_336_576, 0, None, 131072),
        ModelShape("llama-3.2-3b", 3_212_749_824, 2, 28, 3072, 114_688, 8, 3072, 0, 0, None, 131072),
        ModelShape("llama-3.2-1b", 1_235_814_400, 2, 16, 2048, 32_768, 8, 2048, 0, 0, None, 131072),
        # meta-llama/ Llama-2-70b-hf, Llama-2-13b-hf, Llama-2-7b-hf
        ModelShape("llama-2-70b", 68_714_504_192, 2, 80, 8192, 327_680, 8, 8192, 262_144_000, 0, None, 4096),
        ModelShape("llama-2-13b", 12_852_024_320, 2, 40, 5120, 819_200, 40, 5120, 163_840_000, 0, None, 4096),
        ModelShape("llama-2-7b", 6_607_343_616, 2, 32, 4096, 524_288, 32, 4096, 131_072_000, 0, None, 4096),
        # JackFram/ llama-68m
        ModelShape("llama-68m", 43_454_208, 2, 2, 768, 6_144, 12, 768, 24_576_000, 0, None, 2048),
        # Qwen/ Qwen2.5-72B, Qwen2.5-32B, Qwen2.5-14B, Qwen2.5-7B, Qwen2.5-3B, Qwen2.5-1.5B, Qwen2.5-0.5B, Qwen3-32B,
        # Qwen3-14B, Qwen3-8B, Qwen3-4B, Qwen3-1.7B, Qwen3-0.6B
        ModelShape("qwen2.5-72b", 71_460_495_360, 2, 80, 8192, 327_680, 8, 8192, 1_245_708_288, 0, None, 131072),
        ModelShape("qwen2.5-32b", 31_985_308_672, 2, 64, 5120, 262_144, 8, 5120, 778_567_680, 0, None, 131072),
        ModelShape("qwen2.5-14b", 13_991_465_984, 2, 48, 5120, 196_608, 8, 5120, 778_567_680, 0, None, 131072),
        ModelShape("qwen2.5-7b", 7_070_619_136, 2, 28, 3584, 57_344, 4, 3584, 544_997_376, 0, None, 131072),
        ModelShape("qwen2.5-3b", 3_085_938_688, 2, 36, 2048, 36_864, 2, 2048, 0, 0, None, 32768),
        ModelShape("qwen2.5-1.5b", 1_543_714_304, 2, 28, 1536, 28_672, 2, 1536, 0, 0, None, 131072),
        ModelShape("qwen2.5-0.5b", 494_032_768, 2, 24, 896, 12_288, 2, 896, 0, 0, None, 32768),
        ModelShape("qwen3-32b", 31_984_210_944, 2, 64, 8192, 262_144, 8, 5120, 777_912_320, 0, None, 40960),
        ModelShape("qwen3-14b", 13_990_394_880, 2, 40, 5120, 163_840, 8, 5120, 777_912_320, 0, None, 40960),
        ModelShape("qwen3-8b", 7_568_405_504, 2, 36, 4096, 147_456, 8, 4096, 622_329_856, 0, None, 40960),
        ModelShape("qwen3-4b", 4_022_468_096, 2, 36, 4096, 147_456, 8, 2560, 0, 0, None, 40960),
        ModelShape("qwen3-1.7b", 1_720_574_976, 2, 28, 2048, 114_688, 8, 2048, 0, 0, None, 40960),
        ModelShape("qwen3-0.6b", 596_049_920, 2, 28, 2048, 114_688, 8, 1024, 0, 0, None, 40960),
        # google/ gemma-2-27b, gemma-2-9b, gemma-2-2b, gemma-3-27b-it, gemma-3-12b-it, gemma-3-4b-it, gemma-3-1b-it
        ModelShape("gemma-2-27b", 27_227_128_320, 2, 46, 4096, 376_832, 16, 4608, 0, 23, 4096, 8192),
        ModelShape("gemma-2-9b", 9_241_705_984, 2, 42, 4096, 344_064, 8, 3584, 0, 21, 4096, 8192),
        ModelShape("gemma-2-2b", 2_614_341_888, 2, 26, 2048, 106_496, 4, 2304, 0, 13, 4096, 8192),
        ModelShape("gemma-3-27b", 27_009_346_304, 2, 62, 4096, 507_904, 16, 5376, 0, 52, 1024, 131072),
        ModelShape("gemma-3-12b", 11_766_034_176, 2, 48, 4096, 393_216, 8, 3840, 0, 40, 1024, 131072),
        ModelShape("gemma-3-4b", 3_880_263_168, 2, 34, 2048, 139_264, 4, 2560, 0, 29, 1024, 131072),
        ModelShape("gemma-3-1b", 999_885_952, 2, 26, 1024, 26_624, 1, 1152, 0, 22, 512, 32768),
        # mistralai/ Mistral-7B-v0.3
        ModelShape("mistral-7b", 7_113_805_824, 2, 32, 4096, 131_072, 8, 4096, 134_217_728, 0, None, 32768),
        # microsoft/ phi-4
        ModelShape("phi-4", 14_145_704_960, 2, 40, 5120, 204_800, 10, 5120, 513_802_240, 0, None, 16384),
        # facebook/ opt-30b, opt-13b, opt-6.7b, opt-1.3b, opt-125m
        ModelShape("opt-30b", 29_959_845_888, 2, 48, 7168, 1_376_256, 56, 7168, 14_694_400, 0, None, 2048),
        ModelShape("opt-13b", 12_842_977_280, 2, 40, 5120, 819_200, 40, 5120, 10_496_000, 0, None, 2048),
        ModelShape("opt-6.7b", 6_650_077_184, 2, 32, 4096, 524_288, 32, 4096, 8_396_800, 0, None, 2048),
        ModelShape("opt-1.3b", 1_311_559_680, 2, 24, 2048, 196_608, 32, 2048, 4_198_400, 0, None, 2048),
        ModelShape("opt-125m", 123_664_896, 2, 12, 768, 36_864, 12, 768, 1_574_400, 0, None, 2048),
        # EleutherAI/ pythia-12b, pythia-6.9b, pythia-1.4b, pythia-410m, pythia-70m
        ModelShape("pythia-12b", 11_586_549_760, 2, 36, 5120, 737_280, 40, 5120, 259_522_560, 0, None, 2048),
        ModelShape("pythia-6.9b", 6_650_732_544, 2, 32, 4096, 524_288, 32, 4096, 206_569_472, 0, None, 2048),
        ModelShape("pythia-1.4b", 1_311_625_216, 2, 24, 2048, 196_608, 16, 2048, 103_022_592, 0, None, 2048),
        ModelShape("pythia-410m", 353_822_720, 2, 24, 1024, 98_304, 16, 1024, 51_511_296, 0, None, 2048),
        ModelShape("pythia-70m", 44_670_976, 2, 6, 512, 12_288, 8, 512, 25_755_648, 0, None, 2048),
        # HuggingFaceTB/ SmolLM2-1.7B, SmolLM2-360M, SmolLM2-135M
        ModelShape("smollm2-1.7b", 1_711_376_384, 2, 24, 2048, 196_608, 32, 2048, 0, 0, None, 8192),
        ModelShape("smollm2-360m", 361_821_120, 2, 32, 960, 40_960, 5, 960, 0, 0, None, 8192),
        ModelShape("smollm2-135m", 134_515_008, 2, 30, 576, 23_040, 3, 576, 0, 0, None, 8192),
    )
}
