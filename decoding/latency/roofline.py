"""A latency profile for hardware that one does not have, from what it can do and how large the models are.

A pass takes as long as reading its bytes or doing its arithmetic, whichever is longer (the roofline of Williams,
Waterman and Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures", 2009), plus an
overhead. For a transformer that generates, the bytes are the weights and every sequence's keys and values, and the
arithmetic is two operations a parameter and token plus attention; see Pope et al., "Efficiently Scaling Transformer
Inference" (arXiv 2211.05102), and Yuan et al., "LLM Inference Unveiled: Survey and Roofline Model Insights"
(arXiv 2402.16363). So one sequence's draft is verified at nearly the price of a token, and a large batch's is not.

Tensor parallelism divides the bytes and the arithmetic by the number of devices, the keys and values by at most the
number of their heads, and adds two all-reduces a layer (Shoeybi et al., "Megatron-LM", arXiv 1909.08053): a latency,
and what a ring of N devices sends, 2 (N - 1) / N of what layers hand on. The overheads stay. docs/replay.md compares
all this with published rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError, number, one_of, sequence_of, whole_number
from ..registry import traits_of
from ..traits import CHAIN
from .accelerators import (
    COMPILED,
    DEQUANTISED,
    EAGER,
    EAGER_LAYER,
    LLAMA_CPP,
    RUNS_ON,
    SOFTWARE,
    VECTOR_LAYER,
    VECTOR_SHARE,
    VECTOR_TOKENS,
    Hardware,
    find_hardware,
)
from .model_shapes import MODEL_SHAPES, ModelShape
from .profile import LatencyProfile

__all__ = [
    "ARITHMETIC_SHARE",
    "BANDWIDTH_SHARE",
    "LINK_SHARE",
    "MODEL_SHAPES",
    "ModelShape",
    "pass_seconds",
    "passes_seconds",
    "require_devices",
    "require_software",
    "roofline",
]

BANDWIDTH_SHARE = 0.83
"""Share of the memory's nominal bandwidth that decoding reaches: "about 1700 GB/s" of 2,039 on an A100 (README of
github.com/meta-pytorch/gpt-fast)."""
ARITHMETIC_SHARE = 0.7
"""Share of the peak that large matrix products reach; Pope et al. report up to 0.76 for whole passes."""


LINK_SHARE = 0.25
"""Share of a link's bandwidth that an all-reduce of decoding reaches. On H100s it is 0.12 of 450 GB/s for 1 MiB over 2
to 8 devices, whose latencies are in `accelerators`, and 0.77 for gigabytes (waynehacking8.github.io/blog/
nccl-nvlink-bandwidth); a batch that verifies drafts sends a few MiB."""
_ACTIVATION = 2  # bytes a number that layers hand on, whatever the weights are stored in


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
    devices: int = 1,
    draft_devices: int = 1,
    software: str = COMPILED,
) -> LatencyProfile:
    """The latency profile of a pair as computed for some hardware, on a grid of batch sizes and contexts.

    A draft of k tokens is k passes over a token each, a round's target pass reads k + 1, and both have a cache as long
    as the context. A round of a decoder that drafts nothing beforehand (`DecoderTraits.single_pass`) is one target
    pass. Choosing tokens is taken to be free, and so is a draft that
    is no model. Whether the memory and the models' own limits allow a point is not asked; `Deployment.fits` tells.

    Args:
        target: the model whose text is wanted, for instance one of `MODEL_SHAPES`.
        draft: the drafting model; None for drafts that cost nothing, such as an n-gram table's.
        hardware: a name in `accelerators.HARDWARE`, or figures of your own.
        decoder: what the profile is for: a decoder that drafts chains, in turns with the target or, on devices of its
            own, meanwhile; or one whose rounds are single passes.
        max_draft_length: of chains, the longest draft in the tables, in tokens; by default 16.
        max_target_tokens: of single passes, the most tokens that one in the table reads; by default what the decoder
            reads with its knobs as high as they go.
        batch_sizes: sequences decoded together, each 1 or more; the profile's own point has the smallest.
        contexts: tokens that every sequence has read, each 1 or more; the profile's own point has the shortest.
        pair: the profile's name for the pair; by default made of the models' names, and the target's for single passes.
        bandwidth_share: of the memory bandwidth, what passes reach; above 0, at most 1.
        arithmetic_share: of the peak arithmetic, what passes reach; above 0, at most 1.
        devices: that the target is spread over, by tensor parallelism.
        draft_devices: that the draft is spread over: 1, or all of them.
        software: `compiled` for kernels launched together, as serving engines do it; `eager` for GPUs that wait for
            the host between kernels; `llama.cpp` for GPUs that multiply quantised weights with up to 8 tokens one after
            the other, so that verifying a few drafted tokens is not free.

    Raises:
        UnknownHardwareError: there is no hardware of that name.
        ValueError: a number is out of its range or does not belong to this decoder, a draft is given for single passes,
            the decoder's rounds are neither chains nor single passes, and cannot be computed, or the hardware has no
            link for several devices, or is not what the software is for.
    """
    hardware = find_hardware(hardware)
    traits = traits_of(decoder)
    kind = traits.cost_kind(greedy=True)
    whole = not (kind == CHAIN or traits.overlaps)
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
    require_devices(hardware, devices, draft_devices)
    require_software(hardware, software)
    spread = {"devices": devices, "draft_devices": draft_devices, "software": software}

    def point(batch_size: int, context: int, points: tuple[LatencyProfile, ...] = ()) -> LatencyProfile:
        def seconds(model: ModelShape, tokens: int, number: int) -> float:
            return pass_seconds(
                model,
                hardware,
                tokens,
                batch_size=batch_size,
                context=context,
                devices=number,
                software=software,
                **shares,
            )

        step = 0.0 if draft is None else seconds(draft, 1, draft_devices)
        target_seconds = {tokens: seconds(target, tokens, devices) for tokens in range(1, read + 1)}
        return LatencyProfile(
            pair=pair or usual,
            draft_seconds={tokens: tokens * step for tokens in range(drafted + 1)},
            target_seconds=target_seconds,
            autoregressive_seconds=target_seconds[1],
            hardware={"device": "roofline", **asdict(hardware), **shares, **spread},
            kind=kind,
            batch_size=batch_size,
            context=context,
            points=points,
            overlaps=traits.overlaps,
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
    devices: int = 1,
    software: str = COMPILED,
) -> float:
    """Seconds of one pass over so many tokens of every sequence. Arguments and errors as for `roofline`."""
    hardware = find_hardware(hardware)
    for name, value in (("tokens", tokens), ("batch_size", batch_size), ("context", context)):
        whole_number(name, value)
    require_devices(hardware, devices)
    require_software(hardware, software)
    shares = {"bandwidth_share": bandwidth_share, "arithmetic_share": arithmetic_share}
    for name, share in shares.items():
        number(name, share, above=0, at_most=1)
    seconds = passes_seconds(model, hardware, tokens, batch_size, context, devices=devices, software=software, **shares)
    return float(seconds)


def passes_seconds(
    model: ModelShape,
    hardware: Hardware,
    tokens: ArrayLike,
    batch_size: ArrayLike,
    context: int,
    *,
    devices: int = 1,
    software: str = COMPILED,
    bandwidth_share: float = BANDWIDTH_SHARE,
    arithmetic_share: float = ARITHMETIC_SHARE,
) -> NDArray[np.float64]:
    """Seconds of many passes at once, as `pass_seconds`; numbers are not checked.

    Args:
        model: whose passes.
        hardware: of each device.
        tokens: that a pass reads of every sequence, an array.
        batch_size: sequences, an array that broadcasts with `tokens`.
        context: tokens that every sequence has read.
        devices: that share the model.
        software: one of `accelerators.SOFTWARE`.
        bandwidth_share: of the memory bandwidth, what passes reach.
        arithmetic_share: of the peak arithmetic, what passes reach.

    Returns:
        In the shape of `tokens` and `batch_size` together.
    """
    batch_size = np.asarray(batch_size, np.float64)
    read = np.asarray(tokens, np.float64) * batch_size
    cached = batch_size * model.key_value_bytes(context) / min(devices, model.key_value_heads or devices)
    bandwidth = hardware.memory_bandwidth * bandwidth_share
    weights = model.parameters * model.bytes_per_parameter / devices
    layer = hardware.layer_overhead
    quantised = model.bytes_per_parameter < _ACTIVATION
    if quantised and hardware.kind in RUNS_ON[EAGER]:  # a GPU with its own memory
        if software == LLAMA_CPP:
            layer = min(layer, VECTOR_LAYER)
        else:
            weights = weights / DEQUANTISED[8 if model.bytes_per_parameter >= 1 else 4]
    reading = (weights + cached) / bandwidth
    operations = 2 * model.parameters + 4 * model.layers * model.hidden_size * model.attended(context)  # of a token
    token = operations / devices / hardware.peak_arithmetic  # at its peak
    seconds = np.maximum(reading, read * token / arithmetic_share)
    if quantised and software == LLAMA_CPP:
        seconds = np.maximum(seconds, reading + (np.minimum(read, VECTOR_TOKENS) - 1) * token / VECTOR_SHARE)
    seconds = seconds + hardware.pass_overhead + model.layers * layer
    if devices > 1 and hardware.link_bandwidth is not None:
        sent = 2 * (devices - 1) / devices * _ACTIVATION * (model.width or model.hidden_size) * read
        reduction = hardware.link_latency + sent / (hardware.link_bandwidth * LINK_SHARE)
        seconds = seconds + 2 * model.layers * reduction
    if software == EAGER:
        seconds = np.maximum(seconds, model.layers * EAGER_LAYER)
    return seconds


def require_devices(hardware: Hardware, devices: int, draft_devices: int = 1) -> None:
    """Check numbers of devices that models are spread over.

    Raises:
        ValueError: the hardware has no link for several, or the draft is spread over some devices but not all.
    """
    if whole_number("devices", devices) > 1 and hardware.link_bandwidth is None:
        raise ArgumentError(
            f"{hardware.name} has no link to spread a model over {devices} devices; give devices=1, or a "
            "Hardware(..., link_bandwidth=bytes a second) of your own"
        )
    one_of("draft_devices", whole_number("draft_devices", draft_devices), (1, devices))


def require_software(hardware: Hardware, software: str) -> None:
    """Check the software that runs passes.

    Raises:
        ValueError: it is none of `accelerators.SOFTWARE`, or makes no difference on this kind of hardware.
    """
    kinds = RUNS_ON[one_of("software", software, SOFTWARE)]
    if hardware.kind not in kinds:
        raise ArgumentError(
            f"software {software!r} is for {', '.join(kinds)}, and {hardware.name} is of kind {hardware.kind!r}; give "
            f"{COMPILED!r}"
        )
