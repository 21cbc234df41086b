"""A latency profile for hardware that one does not have, from what it can do and how large the models are.

A pass takes as long as reading its bytes or doing its arithmetic, whichever is longer (the roofline of Williams,
Waterman and Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures", 2009), plus an
overhead. For a transformer that generates, the bytes are the weights and every sequence's keys and values, and the
arithmetic is two operations a parameter and token plus attention; see Pope et al., "Efficiently Scaling Transformer
Inference" (arXiv 2211.05102), and Yuan et al., "LLM Inference Unveiled: Survey and Roofline Model Insights"
(arXiv 2402.16363). So one sequence's draft is verified at nearly the price of a token, and a large batch's is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..errors import ArgumentError, number, sequence_of, whole_number
from ..models.output_layer import reduced_output
from ..registry import traits_of
from ..traits import CHAIN
from .accelerators import Hardware, find_hardware
from .profile import LatencyProfile

BANDWIDTH_SHARE = 0.83
"""Share of the memory's nominal bandwidth that decoding reaches: "about 1700 GB/s" of 2,039 on an A100 (README of
github.com/meta-pytorch/gpt-fast)."""
ARITHMETIC_SHARE = 0.7
"""Share of the peak that large matrix products reach; Pope et al. report up to 0.76 for whole passes."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer that determine its speed.

    Attributes:
        name: how profiles call it.
        parameters: that a pass reads in full, which leaves out tables that are only looked up in, and the rows of
            tokens that a draft never proposes.
        bytes_per_parameter: 2 for 16-bit weights, 0.5 for 4-bit ones.
        layers: of attention.
        hidden_size: of all query heads together.
        key_value_bytes_per_token: of one sequence, over all layers.

    Raises:
        ValueError: a number is not positive.
    """

    name: str
    parameters: int
    bytes_per_parameter: float
    layers: int
    hidden_size: int
    key_value_bytes_per_token: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and not (math.isfinite(value) and value > 0):
                raise ArgumentError(f"{field.name} of {self.name} must be finite and positive, got {value}")

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
        return cls(
            name=name or str(getattr(model, "name_or_path", "")) or str(config.model_type),
            parameters=sum(weight.numel() for weight in empty.parameters()) - looked_up - left_out,
            bytes_per_parameter=stored.itemsize,
            layers=layers,
            hidden_size=heads * head_size,
            key_value_bytes_per_token=2 * layers * key_value_heads * head_size * stored.itemsize,
        )


# Of `ModelShape.of` with the config.json of the models that `presets` names, in bfloat16.
MODEL_SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("opt-6.7b", 6_650_077_184, 2, 32, 4096, 524_288),  # facebook/opt-6.7b
        ModelShape("opt-1.3b", 1_311_559_680, 2, 24, 2048, 196_608),  # facebook/opt-1.3b
        ModelShape("opt-125m", 123_664_896, 2, 12, 768, 36_864),  # facebook/opt-125m
        ModelShape("llama-3.1-70b", 69_503_033_344, 2, 80, 8192, 327_680),  # meta-llama/Llama-3.1-70B-Instruct
        ModelShape("llama-3.1-8b", 7_504_924_672, 2, 32, 4096, 131_072),  # meta-llama/Llama-3.1-8B-Instruct
    )
}


def roofline(
    target: ModelShape,
    draft: ModelShape | None,
    hardware: Hardware | str,
    *,
    decoder: str = "speculative",
    max_draft_length: int | None = None,
    max_target_tokens: int | None = None,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    contexts: Sequence[int] = (512, 2048, 8192),
    pair: str | None = None,
    bandwidth_share: float = BANDWIDTH_SHARE,
    arithmetic_share: float = ARITHMETIC_SHARE,
) -> LatencyProfile:
    """The latency profile of a pair as computed for some hardware, on a grid of batch sizes and contexts.

    A draft of k tokens is k passes over a token each, a round's target pass reads k + 1, and both have a cache as long
    as the context. A round of a decoder that drafts nothing beforehand (`DecoderTraits.single_pass`) is one target
    pass. Choosing tokens is taken to be free, and so is a draft that
    is no model. Whether the memory and the models' own limits allow a point is not asked.

    Args:
        target: the model whose text is wanted, for instance one of `MODEL_SHAPES`.
        draft: the drafting model; None for drafts that cost nothing, such as an n-gram table's.
        hardware: a name in `hardware_profiles.HARDWARE`, or figures of your own.
        decoder: what the profile is for: a decoder that drafts chains, or one whose rounds are single passes.
        max_draft_length: of chains, the longest draft in the tables, in tokens; by default 16.
        max_target_tokens: of single passes, the most tokens that one in the table reads; by default what the decoder
            reads with its knobs as high as they go.
        batch_sizes: sequences decoded together, each 1 or more; the profile's own point has the smallest.
        contexts: tokens that every sequence has read, each 1 or more; the profile's own point has the shortest.
        pair: the profile's name for the pair; by default made of the models' names, and the target's for single passes.
        bandwidth_share: of the memory bandwidth, what passes reach; above 0, at most 1.
        arithmetic_share: of the peak arithmetic, what passes reach; above 0, at most 1.

    Raises:
        UnknownHardwareError: there is no hardware of that name.
        ValueError: a number is out of its range or does not belong to this decoder, a draft is given for single passes,
            or the decoder's rounds are neither chains nor single passes, and cannot be computed.
    """
    hardware = find_hardware(hardware)
    traits = traits_of(decoder)
    kind = traits.cost_kind(greedy=True)
    whole = kind != CHAIN
    if whole and not traits.single_pass:
        raise ArgumentError(
            f"{kind} rounds cannot be computed, since the shapes of the models do not tell what proposing takes; "
            f"measure them: specgym.decoding.latency_measure.measured(pair, {decoder!r})"
        )
    limits = {"max_draft_length": max_draft_length, "max_target_tokens": max_target_tokens}
    right, wrong = sorted(limits, reverse=whole)
    if limits[wrong] is not None:
        raise ArgumentError(f"{wrong} is not for {kind} rounds; how large those are computed is {right}")
    if whole and draft is not None:
        raise ArgumentError(f"{kind} rounds have no draft, and {draft.name} was given; give None")
    largest = limits[right]
    if largest is None:
        largest = traits.largest_pass if whole else 16
    largest = whole_number(right, largest)
    drafted, read = (0, largest) if whole else (largest, largest + 1)
    sizes, lengths = (
        sorted({*sequence_of(name, values, whole_number)})
        for name, values in (("batch_sizes", batch_sizes), ("contexts", contexts))
    )
    usual = target.name if whole else f"{target.name}+{'free' if draft is None else draft.name}"
    shares = {"bandwidth_share": bandwidth_share, "arithmetic_share": arithmetic_share}

    def point(batch_size: int, context: int, points: tuple[LatencyProfile, ...] = ()) -> LatencyProfile:
        def seconds(model: ModelShape, tokens: int) -> float:
            return pass_seconds(model, hardware, tokens, batch_size=batch_size, context=context, **shares)

        step = 0.0 if draft is None else seconds(draft, 1)
        target_seconds = {tokens: seconds(target, tokens) for tokens in range(1, read + 1)}
        return LatencyProfile(
            pair=pair or usual,
            draft_seconds={tokens: tokens * step for tokens in range(drafted + 1)},
            target_seconds=target_seconds,
            autoregressive_seconds=target_seconds[1],
            hardware={"device": "roofline", **asdict(hardware), **shares},
            kind=kind,
            batch_size=batch_size,
            context=context,
            points=points,
        )

    first, *others = [(size, length) for size in sizes for length in lengths]
    return point(*first, points=tuple(point(*other) for other in others))


def pass_seconds(
    model: ModelShape,
    hardware: Hardware | str,
    tokens: int,
    *,
    batch_size: int = 1,
    context: int = 512,
    bandwidth_share: float = BANDWIDTH_SHARE,
    arithmetic_share: float = ARITHMETIC_SHARE,
) -> float:
    """Seconds of one pass over so many tokens of every sequence. Arguments and errors as for `roofline`."""
    hardware = find_hardware(hardware)
    for name, value in (("tokens", tokens), ("batch_size", batch_size), ("context", context)):
        whole_number(name, value)
    for name, share in (("bandwidth_share", bandwidth_share), ("arithmetic_share", arithmetic_share)):
        number(name, share, above=0, at_most=1)
    read = model.parameters * model.bytes_per_parameter + batch_size * context * model.key_value_bytes_per_token
    operations = (2 * model.parameters + 4 * model.layers * model.hidden_size * context) * batch_size * tokens
    overhead = hardware.pass_overhead + model.layers * hardware.layer_overhead
    return overhead + max(
        read / (hardware.memory_bandwidth * bandwidth_share),
        operations / (hardware.peak_arithmetic * arithmetic_share),
    )
