"""Deployments: a target and a draft on some hardware, what their rounds cost, and a list of sensible ones.

For simulations over thousands of deployments: arrays in and out, and free of torch. The costs are those of `roofline`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError, check_fields, one_of, sequence_of, whole_number
from .accelerators import APPLE, COMPILED, CONSUMER_GPU, EAGER, HARDWARE, LLAMA_CPP, SERVER_GPU, Hardware, find_hardware
from .model_shapes import MODEL_SHAPES, STORED_BITS, ModelShape
from .roofline import passes_seconds, require_devices, require_software

MEMORY_SHARE = 0.9
"""Share of a device's memory that weights, keys and values may take: vLLM's `gpu_memory_utilization` (0.9 in
vllm/config/cache.py of version 0.11)."""
_GROUPS = {SERVER_GPU: 128}  # weights that share a scale: AWQ and GPTQ on servers, llama.cpp's formats elsewhere
_LLAMA_CPP_GROUP = 32

_DEVICES = (1, 2, 4, 8)
_SERVED_BATCH = 8  # sequences that a server has to have room for
_SLOWEST = 1.0  # seconds a token that somebody would wait for
_SMALLEST_TARGET = 0.95e9  # parameters
_DRAFT_SIZES = 60e6, 8.2e9
_SMALLEST_SERVED_QUANTISED = _SMALLEST_SPREAD = 6e9
_WHOLE_NODE = 60e9  # parameters of targets that are often given all eight devices
_LARGEST_EAGER = 15e9
_FAMILIES = ("llama-3", "qwen2.5", "qwen3", "gemma-2", "gemma-3", "opt", "pythia", "smollm2")
_GENERIC = ("llama-68m", "smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b")
"""Drafts for any target; where the vocabularies differ, tokens are translated."""


@dataclass(frozen=True)
class Deployment:
    """A target and its draft as somebody runs them.

    Weights of 8 and 4 bits have a 16-bit scale for 128 weights on servers, and for 32 elsewhere
    (`ModelShape.quantised`).

    Attributes:
        target: its shape, in 16 bits.
        draft: its shape, in 16 bits; None for a draft that costs nothing, such as an n-gram table's.
        hardware: of each device.
        devices: that the target is spread over, by tensor parallelism.
        target_bits: of a stored weight: 16, 8 or 4.
        draft_bits: likewise.
        context: tokens that every sequence has read.
        draft_devices: that the draft is spread over: 1, or all of them, as in vLLM (vllm/config/speculative.py,
            `draft_tensor_parallel_size`).
        software: `compiled`; `eager` for a GPU that waits for the host between kernels; `llama.cpp` for a GPU that
            multiplies quantised weights with few tokens one after the other.

    Raises:
        ValueError: a number is out of its range, the hardware has no link for several devices or is not what the
            software is for, or a model cannot read so long a context.
    """

    target: ModelShape
    draft: ModelShape | None
    hardware: Hardware
    devices: int = 1
    target_bits: int = 16
    draft_bits: int = 16
    context: int = 2048
    draft_devices: int = 1
    software: str = COMPILED

    def __post_init__(self) -> None:
        check_fields(self, whole_number, "devices", "target_bits", "draft_bits", "context", "draft_devices")
        for name in ("target_bits", "draft_bits"):
            one_of(name, getattr(self, name), STORED_BITS)
        require_devices(self.hardware, self.devices, self.draft_devices)
        require_software(self.hardware, self.software)
        for model in (self.target, *([self.draft] if self.draft else [])):
            if model.context_limit is not None and self.context > model.context_limit:
                raise ArgumentError(
                    f"context must be at most {model.context_limit}, as far as {model.name} reads, got {self.context}"
                )

    @property
    def label(self) -> str:
        """Name in tables."""
        draft = "free" if self.stored_draft is None else self.stored_draft.name
        software = "" if self.software == COMPILED else f" {self.software}"
        return f"{self.stored_target.name}+{draft} on {self.devices}x{self.hardware.name}{software} at {self.context}"

    @property
    def hardware_class(self) -> str:
        """Kind of the hardware, one of `KINDS`."""
        return self.hardware.kind

    @cached_property
    def stored_target(self) -> ModelShape:
        """Shape of the target as it is stored."""
        return _stored(self.target, self.target_bits, self.hardware.kind)

    @cached_property
    def stored_draft(self) -> ModelShape | None:
        """Shape of the draft as it is stored."""
        return None if self.draft is None else _stored(self.draft, self.draft_bits, self.hardware.kind)

    def memory(self, batch_size: int = 1) -> float:
        """Bytes that the fullest device holds: its part of the models, and of the keys and values of so many sequences.

        Raises:
            ValueError: `batch_size` is not positive.
        """
        whole_number("batch_size", batch_size)
        placed = [(self.stored_target, self.devices)]
        if self.stored_draft is not None:
            placed.append((self.stored_draft, self.draft_devices))
        return sum(_held(model, devices, batch_size, self.context) for model, devices in placed)

    def fits(self, batch_size: int = 1) -> bool:
        """True if the models and the keys and values of so many sequences fit in the memory of the devices.

        Raises:
            ValueError: `batch_size` is not positive, or the hardware's memory is not known.
        """
        return self.memory(batch_size) <= MEMORY_SHARE * _memory_of(self.hardware)


@lru_cache(maxsize=1024)  # thousands of deployments store few models
def _stored(model: ModelShape, bits: int, kind: str) -> ModelShape:
    return model.quantised(bits, group_size=_GROUPS.get(kind, _LLAMA_CPP_GROUP))


def _memory_of(hardware: Hardware) -> float:
    if hardware.memory is None:
        raise ArgumentError(f"memory of {hardware.name} is not known; give Hardware(..., memory=bytes)")
    return hardware.memory


def _held(model: ModelShape, devices: int, batch_size: int, context: int) -> float:
    """Bytes of a model, its keys and its values on one of so many devices."""
    cached = batch_size * model.key_value_bytes(context) / min(devices, model.key_value_heads or devices)
    return model.weight_bytes / devices + cached


@lru_cache(maxsize=32768)  # a target has many drafts, and a draft many targets
def _seconds(model: ModelShape, hardware: Hardware, devices: int, context: int, software: str) -> float:
    """Seconds of a pass over a token of one sequence."""
    return float(passes_seconds(model, hardware, 1, 1, context, devices=devices, software=software))


def round_costs(
    deployment: Deployment, batch_sizes: ArrayLike, longest: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Seconds of plain decoding, of drafting and of verifying, for many batch sizes at once.

    The same as the tables of a `roofline`: drafting k tokens takes k steps, and their verification is a target pass
    over k + 1 tokens of every sequence.

    Args:
        deployment: whose rounds.
        batch_sizes: sequences decoded together, each 1 or more, shape (sizes,).
        longest: longest draft, in tokens.

    Returns:
        Seconds of a step of plain decoding, shape (sizes,); seconds of a drafted token, shape (sizes,); seconds of a
        target pass that verifies 0 to `longest` drafted tokens, shape (sizes, longest + 1).

    Raises:
        ValueError: a batch size or `longest` is not positive.
    """
    longest = whole_number("longest", longest)
    sizes = np.asarray(sequence_of("batch_sizes", np.asarray(batch_sizes).tolist(), whole_number))
    target = passes_seconds(
        deployment.stored_target,
        deployment.hardware,
        np.arange(1, longest + 2),
        sizes[:, None],
        deployment.context,
        devices=deployment.devices,
        software=deployment.software,
    )
    step = np.zeros(len(sizes))
    if deployment.stored_draft is not None:
        step = passes_seconds(
            deployment.stored_draft,
            deployment.hardware,
            1,
            sizes,
            deployment.context,
            devices=deployment.draft_devices,
            software=deployment.software,
        )
    return target[:, 0], step, target


def sensible_deployments(
    *,
    targets: Iterable[ModelShape] | None = None,
    drafts: Iterable[ModelShape] | None = None,
    hardware: Iterable[Hardware | str] | None = None,
    contexts: Sequence[int] = (512, 2048, 8192),
) -> list[Deployment]:
    """Every combination that somebody would run, in a fixed order.

    A draft is smaller than a third of its target, and of its family or one of a few that serve any target. Weights have
    16, 8 or 4 bits, the draft's 16 on servers and as many as the target's elsewhere; small targets on servers 16 alone.
    A target is spread over the fewest devices that have room for a batch (of 8 on servers, of 1 elsewhere), on servers
    also over twice as many from 6 billion parameters on, and over 8 from 60 billion on. Targets of up to 15 billion
    parameters in 16 bits on one GPU are there with eager software, too. Fewer bits are run by llama.cpp on Apple's
    GPUs, and by either on a single consumer's. A target writes a token a second or more, and drafting one takes less.

    Args:
        targets: to choose from; by default the named shapes of 1 billion parameters or more.
        drafts: to choose from; by default the named shapes of 60 million to 8 billion parameters.
        hardware: to choose from; by default all of `HARDWARE`.
        contexts: tokens that every sequence has read; combinations with models that cannot read so many are left out.

    Raises:
        UnknownHardwareError: there is no hardware of that name.
        ValueError: a context is not positive, or the memory of some hardware is not known.
    """
    named = list(MODEL_SHAPES.values())
    low, high = _DRAFT_SIZES
    targets = [model for model in named if model.stored_parameters >= _SMALLEST_TARGET] if targets is None else targets
    drafts = [model for model in named if low <= model.stored_parameters <= high] if drafts is None else list(drafts)
    machines = [find_hardware(machine) for machine in (HARDWARE if hardware is None else hardware)]
    lengths = sequence_of("contexts", contexts, whole_number)
    return [
        deployment
        for target in targets
        for draft in drafts
        if _may_draft(draft, target)
        for machine in machines
        for bits in STORED_BITS
        for context in lengths
        if all(model.context_limit is None or context <= model.context_limit for model in (target, draft))
        for deployment in _spread(target, draft, machine, bits, context)
    ]


def _may_draft(draft: ModelShape, target: ModelShape) -> bool:
    related = any(draft.name.startswith(family) and target.name.startswith(family) for family in _FAMILIES)
    return 3 * draft.stored_parameters < target.stored_parameters and (related or draft.name in _GENERIC)


def _spread(target: ModelShape, draft: ModelShape, hardware: Hardware, bits: int, context: int) -> Iterator[Deployment]:
    """A combination on as many devices as somebody would use."""
    server = hardware.kind == SERVER_GPU
    if server and bits < 16 and target.stored_parameters < _SMALLEST_SERVED_QUANTISED:
        return
    draft_bits = 16 if server else bits
    stored_target, stored_draft = _stored(target, bits, hardware.kind), _stored(draft, draft_bits, hardware.kind)
    batch_size = _SERVED_BATCH if server else 1
    room = MEMORY_SHARE * _memory_of(hardware) - _held(stored_draft, 1, batch_size, context)
    counts = _DEVICES if hardware.link_bandwidth is not None else (1,)
    heads = target.key_value_heads or max(_DEVICES)
    possible = [
        devices
        for devices in counts
        if heads % devices == 0 and _held(stored_target, devices, batch_size, context) <= room
    ]
    if not possible:
        return
    fewest = possible[0]
    chosen = {fewest}
    if server:
        chosen |= {2 * fewest} if target.stored_parameters >= _SMALLEST_SPREAD else set()
        chosen |= {max(_DEVICES)} if target.stored_parameters >= _WHOLE_NODE else set()
    run = [(devices, COMPILED) for devices in possible if devices in chosen]
    if hardware.kind == APPLE and bits < 16:
        run = [(fewest, LLAMA_CPP)]
    elif hardware.kind == CONSUMER_GPU and bits < 16 and fewest == 1:
        run.append((1, LLAMA_CPP))
    elif hardware.kind in (SERVER_GPU, CONSUMER_GPU) and fewest == 1 and target.stored_parameters <= _LARGEST_EAGER:
        run += [(1, EAGER)] if bits == 16 else []
    for devices, software in run:
        step = _seconds(stored_draft, hardware, 1, context, software)
        if step < _seconds(stored_target, hardware, devices, context, software) <= _SLOWEST:
            yield Deployment(target, draft, hardware, devices, bits, draft_bits, context, software=software)
