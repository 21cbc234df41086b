"""Figures of some processors with their sources, for `roofline`.

Bandwidths are those of the memory that holds the weights. Peaks are dense, without structured sparsity: 16-bit tensor
cores on GPUs, float32 on CPUs, so give a CPU a float32 `ModelShape`.

The overheads are the software's more than the hardware's. On GPUs they stand for passes whose kernels are launched
together (compiled, CUDA graphs), as serving engines do it. They come from gpt-fast's published rates at batch size 1 on
an A100 (github.com/meta-pytorch/gpt-fast, README): Llama-2-7B 104.9 tokens/s while reading 1,397.31 GB/s, Llama-3.1-8B
93.89 and 1,410.76, where memory was seen to reach "about 1700 GB/s". What is left of a token's time is 1.7 and 1.8 ms
for 32 layers, here 55 microseconds a layer, taken for the other GPUs too. Passes launched one kernel at a time take
several times that; measure those. On CPUs the overheads are those of transformers 5.23 with a 16-wide Llama of 2, 12
and 24 layers, timed on one thread of a Xeon server.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields

from ..errors import ArgumentError, SpecgymError

_GPU_LAYER = 55e-6
_CPU_PASS = 0.24e-3
_CPU_LAYER = 0.155e-3


class UnknownHardwareError(SpecgymError, ValueError):
    """A name that is not in `HARDWARE`; the message lists those that are."""


@dataclass(frozen=True)
class Hardware:
    """One processor with its memory.

    Attributes:
        name: how profiles call it.
        memory_bandwidth: bytes/s.
        peak_arithmetic: floating-point operations/s in the type that the models compute in, a multiply-add being two.
        pass_overhead: seconds that every pass takes, however small the model.
        source: where the figures are from.
        layer_overhead: seconds that every layer of a pass takes, however narrow.

    Raises:
        ValueError: a bandwidth or a peak that is not positive, or an overhead that is negative.
    """

    name: str
    memory_bandwidth: float
    peak_arithmetic: float
    pass_overhead: float
    source: str
    layer_overhead: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            overhead = field.name.endswith("overhead")
            if isinstance(value, str) or (math.isfinite(value) and (value > 0 or (overhead and value == 0))):
                continue
            least = "at least 0" if overhead else "positive"
            raise ArgumentError(f"{field.name} of {self.name} must be finite and {least}, got {value}")


HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            "a100-80gb-sxm",
            memory_bandwidth=2.039e12,
            peak_arithmetic=312e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            source="NVIDIA A100 datasheet (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf): 2,039 GB/s; bfloat16 "
            "tensor cores 312 TFLOPS, 624 with sparsity",
        ),
        Hardware(
            "h100-sxm",
            memory_bandwidth=3.35e12,
            peak_arithmetic=989e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            source="NVIDIA H100 datasheet (resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet): "
            "3.35 TB/s; bfloat16 tensor cores 1,979 TFLOPS with sparsity, so 989 without",
        ),
        Hardware(
            "h200-sxm",
            memory_bandwidth=4.8e12,
            peak_arithmetic=989e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            source="NVIDIA H200 datasheet (resources.nvidia.com, hpc-datasheet-sc23-h200): 4.8 TB/s; bfloat16 tensor "
            "cores 1,979 TFLOPS with sparsity, so 989 without",
        ),
        Hardware(
            "rtx-4090",
            memory_bandwidth=1.008e12,
            peak_arithmetic=165e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            source="waredb.com/processor/nvidia-geforce-rtx-4090: 1,008 GB/s; bfloat16 tensor cores 165.15 TFLOPS, "
            "330.3 with sparsity",
        ),
        Hardware(
            "l4",
            memory_bandwidth=300e9,
            peak_arithmetic=121e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            source="NVIDIA L4 datasheet (resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet): 300 GB/s; "
            "bfloat16 tensor cores 242 TFLOPS with sparsity, so 121 without",
        ),
        Hardware(
            "t4",
            memory_bandwidth=320e9,
            peak_arithmetic=65e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            source="NVIDIA T4 datasheet (t4-tensor-core-datasheet-951643.pdf): float16 tensor cores 65 TFLOPS, no "
            "bfloat16; sysrqmts.com/en/gpus/nvidia/tesla/t4: 320 GB/s",
        ),
        Hardware(
            "epyc-9654",
            memory_bandwidth=12 * 4.8e9 * 8,  # channels, transfers a second, bytes a transfer
            peak_arithmetic=96 * 2.4e9 * 2 * 8 * 2,  # cores, base clock, units, lanes, operations a multiply-add
            pass_overhead=_CPU_PASS,
            layer_overhead=_CPU_LAYER,
            source="hpctech.co.jp/product/amd-epyc-9004-series: 12 channels of DDR5-4800; 96 cores at 2.4 GHz base "
            "with a 256-bit data path, of which Zen 4 has two for multiply-adds; float32, one socket",
        ),
        Hardware(
            "m1-max-cpu",
            memory_bandwidth=204.8e9,
            peak_arithmetic=2.454e12,
            pass_overhead=_CPU_PASS,
            layer_overhead=_CPU_LAYER,
            source="github.com/ggml-org/llama.cpp/pull/1642: 204.8 GB/s for the CPU; gist.github.com/philipturner/"
            "3bda14e876a635e73745c42f2eb240c8: 2,454 GFLOPS in float32 matrix products; a laptop",
        ),
    )
}


def find_hardware(hardware: Hardware | str) -> Hardware:
    """The hardware that a name stands for; hardware itself is returned as it is.

    Raises:
        UnknownHardwareError: there is none of that name.
    """
    if isinstance(hardware, Hardware):
        return hardware
    if hardware in HARDWARE:
        return HARDWARE[hardware]
    close = difflib.get_close_matches(hardware.lower(), HARDWARE, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise UnknownHardwareError(
        f"{hardware!r} is no known hardware.{hint} Give one of {', '.join(HARDWARE)}, or a Hardware(...) of your own"
    )
