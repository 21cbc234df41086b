"""Figures of some processors with their sources, for `roofline`.

Bandwidths are those of the memory that holds the weights. Peaks are dense, without structured sparsity: 16-bit tensor
cores with 32-bit accumulation on GPUs, float32 on CPUs, whose 16-bit weights are widened as they are read. GeForce
cards accumulate in 32 bits at half the rate that is advertised.

The overheads are the software's more than the hardware's. On GPUs they stand for passes whose kernels are launched
together (compiled, CUDA graphs), as serving engines do it. They come from gpt-fast's published rates at batch size 1 on
an A100 (github.com/meta-pytorch/gpt-fast, README): Llama-2-7B 104.9 tokens/s while reading 1,397.31 GB/s, Llama-3.1-8B
93.89 and 1,410.76, where memory was seen to reach "about 1700 GB/s". What is left of a token's time is 1.7 and 1.8 ms
for 32 layers, here 55 microseconds a layer, taken for the other GPUs too; `EAGER_LAYER` is for passes launched one
kernel at a time. On Apple's GPUs they come from llama.cpp's rates for Llama-3-8B in 16 bits and in Q4_K_M on an M2
Ultra (github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference, README: 36.25 and 76.28 tokens/s), in the same way: 0.16
and 0.19 ms a layer. On CPUs the overheads are those of transformers 5.23 with a 16-wide Llama of 2, 12 and 24 layers,
timed on one thread of a Xeon server.

Links are what a device sends in one direction, half of what datasheets call bidirectional. The latency of an all-reduce
over NVLink is vLLM's on H100s, 8.5 to 11.8 microseconds for 512 bytes to 32 KiB on 2 to 8 devices (github.com/
sgl-project/sglang/pull/2904), taken for Infinity Fabric too. Over PCI Express it is three times a kernel's 9
microseconds, as NCCL's was seen to be (github.com/ikawrakow/ik_llama.cpp/pull/1022).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields

from ..errors import ArgumentError, SpecgymError, one_of

SERVER_GPU, CONSUMER_GPU, APPLE, CPU = KINDS = ("server-gpu", "consumer-gpu", "apple", "cpu")
"""Classes of hardware."""
COMPILED, EAGER, LLAMA_CPP = SOFTWARE = ("compiled", "eager", "llama.cpp")
"""Ways to run a pass: kernels launched together; launched by the host, one by one; and the kernels of llama.cpp."""
RUNS_ON = {COMPILED: KINDS, EAGER: (SERVER_GPU, CONSUMER_GPU), LLAMA_CPP: (SERVER_GPU, CONSUMER_GPU, APPLE)}
"""Kinds of hardware for which the software makes a difference, by software."""
EAGER_LAYER = 1 / 25.5 / 32
"""Seconds in which the host launches a layer: the blog of PyTorch on gpt-fast (pytorch.org/blog/
accelerating-generative-ai-2) has 25.5 tokens/s for Llama-2-7B, of 32 layers, on an A100 that waits for the host."""
DEQUANTISED = {8: 0.81, 4: 0.65}
"""Speed of reading weights of so many bits on GPUs, over that of 16 bits, for kernels that widen them. gpt-fast on an
A100 (README: Llama-3.1-70B in 8 bits 18.04 tokens/s, Llama-2-70B in 4 bits 25.25) reaches 0.67 and 0.54 of the nominal
bandwidth once the overheads are taken off, and 0.83 in 16 bits. llama.cpp's kernels read as fast as in 16 bits."""
VECTOR_TOKENS = 8
"""Tokens up to which llama.cpp multiplies quantised weights with one vector after the other (`MMVQ_MAX_BATCH_SIZE` in
ggml/src/ggml-cuda/mmvq.cuh; github.com/ggml-org/llama.cpp/pull/10581 for Metal)."""
VECTOR_SHARE = 0.2
"""Share of the peak that it then reaches, beside reading the weights: 0.20 on an RTX 3090 (Llama 8B in Q4_0, 1 to 8
tokens in 6.4 to 13.7 ms, github.com/ggml-org/llama.cpp/pull/15802) and 0.22 on an M2 Ultra (Qwen2.5 7B in Q8_0, 14.2 to
30.7 ms, pull/10581)."""
VECTOR_LAYER = 35e-6
"""Seconds a layer of quantised weights with llama.cpp's kernels on a GPU with its own memory, instead of its
`layer_overhead`: Llama 8B in Q4_0 on an RTX 3090 (156.56 tokens/s, pull/15802) and Qwen3-8B in Q4_K_M on an RTX 5090
(221.7, github.com/CambrianTech/continuum/pull/1627) leave 30 and 38 microseconds."""

_GPU_LAYER = 55e-6
_APPLE_LAYER = 0.17e-3
_CPU_PASS = 0.24e-3
_CPU_LAYER = 0.155e-3
_NVLINK_LATENCY = 9e-6
_PCIE_LATENCY = 27e-6
_PCIE_3, _PCIE_4, _PCIE_5 = 16e9, 32e9, 64e9  # 16 lanes


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
        kind: class of hardware, one of `KINDS`.
        memory: bytes that weights and keys and values may share; None where it is not known.
        link_bandwidth: bytes/s that a device sends to another; None where devices do not work together.
        link_latency: seconds of an all-reduce of nothing.

    Raises:
        ValueError: a bandwidth, a memory or a peak that is not positive, an overhead or a latency that is negative, or
            an unknown kind.
    """

    name: str
    memory_bandwidth: float
    peak_arithmetic: float
    pass_overhead: float
    source: str
    layer_overhead: float = 0.0
    kind: str = SERVER_GPU
    memory: float | None = None
    link_bandwidth: float | None = None
    link_latency: float = 0.0

    def __post_init__(self) -> None:
        one_of(f"kind of {self.name}", self.kind, KINDS)
        for field in fields(self):
            value = getattr(self, field.name)
            may_be_none = field.default is None and value is None
            overhead = field.name.endswith(("overhead", "latency"))
            if (
                isinstance(value, str)
                or may_be_none
                or (math.isfinite(value) and (value > 0 or (overhead and not value)))
            ):
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
            memory=80e9,
            link_bandwidth=300e9,
            link_latency=_NVLINK_LATENCY,
            source="NVIDIA A100 datasheet (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf): 2,039 GB/s; 80 GB; "
            "bfloat16 tensor cores 312 TFLOPS, 624 with sparsity; NVLink 600 GB/s both ways",
        ),
        Hardware(
            "h100-sxm",
            memory_bandwidth=3.35e12,
            peak_arithmetic=989e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            memory=80e9,
            link_bandwidth=450e9,
            link_latency=_NVLINK_LATENCY,
            source="NVIDIA H100 datasheet (resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet): "
            "3.35 TB/s; 80 GB; bfloat16 tensor cores 1,979 TFLOPS with sparsity, so 989 without; NVLink 900 GB/s both "
            "ways",
        ),
        Hardware(
            "h200-sxm",
            memory_bandwidth=4.8e12,
            peak_arithmetic=989e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            memory=141e9,
            link_bandwidth=450e9,
            link_latency=_NVLINK_LATENCY,
            source="NVIDIA H200 datasheet (resources.nvidia.com, hpc-datasheet-sc23-h200): 4.8 TB/s; 141 GB; bfloat16 "
            "tensor cores 1,979 TFLOPS with sparsity, so 989 without; NVLink 900 GB/s both ways",
        ),
        Hardware(
            "gh200-96gb",
            memory_bandwidth=4.0e12,
            peak_arithmetic=989e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            memory=96e9,
            source="github.com/feifeibear/LLMRoofline, hardware_dict.py (GH200-old): 4.0 TB/s and 989.5 TFLOPS; "
            "nvidia.github.io/TensorRT-LLM/performance/perf-overview.html: GH200 96GB HBM3; as a machine with a "
            "single GPU",
        ),
        Hardware(
            "b200",
            memory_bandwidth=8.0e12,
            peak_arithmetic=2250e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            memory=180e9,
            link_bandwidth=900e9,
            link_latency=_NVLINK_LATENCY,
            source="glennklockwood.com/garden/processors/B200: 8 TB/s at most; bfloat16 2,250 TFLOPS, 4,500 with "
            "sparsity, at 1,000 W; NVLink 900 GB/s each way; "
            "nvidia.github.io/TensorRT-LLM/performance/perf-overview.html: B200 180GB",
        ),
        Hardware(
            "mi300x",
            memory_bandwidth=5.3e12,
            peak_arithmetic=1307e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            memory=192e9,
            link_bandwidth=448e9,
            link_latency=_NVLINK_LATENCY,
            source="emergentmind.com/topics/amd-mi300x-gpu: 5.3 TB/s; 192 GB; Infinity Fabric 448 GB/s among 8 "
            "devices; AMD Instinct MI300X data sheet: bfloat16 1,307.4 TFLOPS, 2,614.9 with sparsity",
        ),
        Hardware(
            "l40s",
            memory_bandwidth=864e9,
            peak_arithmetic=362e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            memory=48e9,
            link_bandwidth=_PCIE_4,
            link_latency=_PCIE_LATENCY,
            source="NVIDIA L40S datasheet (as in mullet.se/product.html?product_id=355414): 864 GB/s; 48 GB; bfloat16 "
            "tensor cores 362 TFLOPS, 733 with sparsity; PCIe Gen4 x16, 64 GB/s both ways",
        ),
        Hardware(
            "a10g",
            memory_bandwidth=600e9,
            peak_arithmetic=70e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            memory=24e9,
            link_bandwidth=_PCIE_4,
            link_latency=_PCIE_LATENCY,
            source="NVIDIA A10G datasheet of Amazon Web Services (NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf): "
            "bfloat16 tensor cores 70 TFLOPS, 140 with sparsity; PCIe Gen4; "
            "baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference: 600 GB/s; 24 GB",
        ),
        Hardware(
            "l4",
            memory_bandwidth=300e9,
            peak_arithmetic=121e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            memory=24e9,
            link_bandwidth=_PCIE_4,
            link_latency=_PCIE_LATENCY,
            source="NVIDIA L4 datasheet (resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet): 300 GB/s; "
            "24 GB; bfloat16 tensor cores 242 TFLOPS with sparsity, so 121 without; PCIe Gen4 x16",
        ),
        Hardware(
            "t4",
            memory_bandwidth=320e9,
            peak_arithmetic=65e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            memory=16e9,
            link_bandwidth=_PCIE_3,
            link_latency=_PCIE_LATENCY,
            source="NVIDIA T4 datasheet (t4-tensor-core-datasheet-951643.pdf): float16 tensor cores 65 TFLOPS, no "
            "bfloat16; 16 GB; PCIe Gen3 x16; sysrqmts.com/en/gpus/nvidia/tesla/t4: 320 GB/s",
        ),
        Hardware(
            "rtx-5090",
            memory_bandwidth=1.792e12,
            peak_arithmetic=209.5e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            kind=CONSUMER_GPU,
            memory=32e9,
            link_bandwidth=_PCIE_5,
            link_latency=_PCIE_LATENCY,
            source="spheron.network/blog/nvidia-rtx-5090-specs: 1,792 GB/s; 32 GB; float16 tensor cores 838 TFLOPS "
            "with sparsity and 16-bit accumulation, so 419 without sparsity, and half of that in 32 bits; PCIe Gen 5 "
            "x16",
        ),
        Hardware(
            "rtx-4090",
            memory_bandwidth=1.008e12,
            peak_arithmetic=165e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            kind=CONSUMER_GPU,
            memory=24e9,
            link_bandwidth=_PCIE_4,
            link_latency=_PCIE_LATENCY,
            source="waredb.com/processor/nvidia-geforce-rtx-4090: 1,008 GB/s; 24 GB; bfloat16 tensor cores 165.15 "
            "TFLOPS, 330.3 with sparsity; PCIe Gen4 x16",
        ),
        Hardware(
            "rtx-3090",
            memory_bandwidth=936e9,
            peak_arithmetic=71e12,
            pass_overhead=0.0,
            layer_overhead=_GPU_LAYER,
            kind=CONSUMER_GPU,
            memory=24e9,
            link_bandwidth=_PCIE_4,
            link_latency=_PCIE_LATENCY,
            source="holynerdvana.blogspot.com/2022/10/nvidia-geforce-rtx-3090-specifications.html: 936 GB/s; 24 GB; "
            "float16 142 TFLOPS, 285 with sparsity, both with 16-bit accumulation, so 71 in 32 bits; PCIe Gen 4 "
            "(NVIDIA Ampere GA102 GPU Architecture, V2.0)",
        ),
        Hardware(
            "m2-ultra-gpu",
            memory_bandwidth=800e9,
            peak_arithmetic=27.2e12,
            pass_overhead=0.0,
            layer_overhead=_APPLE_LAYER,
            kind=APPLE,
            memory=144 * 2**30,
            source="Apple's page on the Mac Pro: 76 cores, 27.2 TFLOPS; "
            "propakistani.pk/2023/06/06/apple-m2-ultra-chip-unveiled-for-mac-pro-and-mac-studio: 800 GB/s; 192 GB, of "
            "which Metal uses three quarters (recommendedMaxWorkingSetSize in "
            "github.com/ggml-org/llama.cpp/issues/3213)",
        ),
        Hardware(
            "m3-max-gpu",
            memory_bandwidth=400e9,
            peak_arithmetic=14.3e12,
            pass_overhead=0.0,
            layer_overhead=_APPLE_LAYER,
            kind=APPLE,
            memory=107.5 * 2**30,
            source="hmc-tech.com/gpu/apple-32-core-m4-max-vs-apple-40-core-m3-max: 40 cores, 14.32 TFLOPS; Apple's "
            "pages: 400 GB/s, 128 GB; github.com/antirez/ds4/pull/893: of 128 GiB, Metal uses 107.52",
        ),
        Hardware(
            "m1-max-cpu",
            memory_bandwidth=204.8e9,
            peak_arithmetic=2.454e12,
            pass_overhead=_CPU_PASS,
            layer_overhead=_CPU_LAYER,
            kind=CPU,
            memory=64e9,
            source="github.com/ggml-org/llama.cpp/pull/1642: 204.8 GB/s for the CPU; "
            "gist.github.com/philipturner/3bda14e876a635e73745c42f2eb240c8: 2,454 GFLOPS in float32 matrix products; "
            "a laptop, of 64 GB at most",
        ),
        Hardware(
            "epyc-9654",
            memory_bandwidth=12 * 4.8e9 * 8,  # channels, transfers a second, bytes a transfer
            peak_arithmetic=96 * 2.4e9 * 2 * 8 * 2,  # cores, base clock, units, lanes, operations a multiply-add
            pass_overhead=_CPU_PASS,
            layer_overhead=_CPU_LAYER,
            kind=CPU,
            memory=12 * 64e9,
            source="hpctech.co.jp/product/amd-epyc-9004-series: 12 channels of DDR5-4800; 96 cores at 2.4 GHz base "
            "with a 256-bit data path, of which Zen 4 has two for multiply-adds; float32, one socket; a module of 64 "
            "GB a channel",
        ),
        Hardware(
            "ryzen-9-7950x",
            memory_bandwidth=2 * 5.2e9 * 8,  # as above
            peak_arithmetic=16 * 4.5e9 * 2 * 8 * 2,  # as above
            pass_overhead=_CPU_PASS,
            layer_overhead=_CPU_LAYER,
            kind=CPU,
            memory=2 * 32e9,
            source="web-autoai.com/articles/amd-ryzen-9-7950x-16-core-32-thread-high-end-cpu: 16 cores of Zen 4 at "
            "4.5 GHz base, DDR5-5200 in the two channels of socket AM5; float32; a module of 32 GB a channel",
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
    longer = [name for name in HARDWARE if hardware.lower() in name]
    close = longer or difflib.get_close_matches(hardware.lower(), HARDWARE, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise UnknownHardwareError(
        f"{hardware!r} is no known hardware.{hint} Give one of {', '.join(HARDWARE)}, or a Hardware(...) of your own"
    )
