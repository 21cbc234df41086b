"""Rates that others have published for real engines, beside what the roofline computes for the same model and hardware.

    python -m benchmarks.roofline_against_published

*Computed / published* compares times: above 1 the roofline is too slow, below 1 too fast. Rows marked `*` are where
overheads in `decoding/latency/accelerators.py` come from, so they confirm nothing.

A second table has what the best draft length depends on most: the time of a smaller model's pass over that of a larger
one, wherever both were published for the same engine, hardware, number of devices and bits.

The claim to check: half of the computed times are within a quarter of the published ones.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from specgym.decoding import HARDWARE, MODEL_SHAPES, Deployment, ModelShape, round_costs, write_json

# princeton-nlp/Sheared-LLaMA-1.3B, whose layers are as many and as wide as Pythia-1.4B's.
SHEARED = replace(
    MODEL_SHAPES["pythia-1.4b"], name="sheared-llama-1.3b", parameters=1_279_887_360, looked_up=65_536_000
)
# TinyLlama/TinyLlama-1.1B; what llama-bench calls "llama 1B" reads too fast to be Llama 3.2 1B.
TINY_LLAMA = replace(
    MODEL_SHAPES["llama-3.2-1b"],
    name="tinyllama-1.1b",
    parameters=1_034_512_384,
    layers=22,
    key_value_bytes_per_token=22_528,
    key_value_heads=4,
    looked_up=65_536_000,
)
Q4_K_M = {
    "llama-3.1-8b": 4.58 * 2**30,
    "llama-3.1-70b": 39.59 * 2**30,
    "phi-4": 8.43 * 2**30,
    "qwen3-8b": 4.67 * 2**30,
}
"""Bytes of the files, by the pages that have the rates; Qwen3's with as many bits a weight as Llama's."""

GPT_FAST = "github.com/meta-pytorch/gpt-fast, README"
LLAMA_CPP = "github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference, README (llama.cpp)"
# Rates per GPU, as the heading of its H100s has it.
TENSORRT = "github.com/NVIDIA/TensorRT-LLM, docs/source/performance.md of v0.6.1"
BATCHED = "github.com/ggml-org/llama.cpp/pull/15131"
VECTORS = "github.com/ggml-org/llama.cpp/pull/15802"
METAL = "github.com/ggml-org/llama.cpp/pull/10581"
MATRICES = "github.com/ggml-org/llama.cpp/pull/7676"
VLLM = "github.com/vllm-project/vllm/pull/2192"
MARLIN = "github.com/vllm-project/vllm/pull/23197 (vLLM)"
CONTINUUM = "github.com/CambrianTech/continuum/pull/1627 (llama.cpp)"
TINY = "github.com/ggml-org/llama.cpp/pull/24216"
ROCM = "github.com/Epliz/muiLLM/pull/5"
GRAPHS = "cloudai.pt/tag/cuda-graphs"
QUANTO = "github.com/huggingface/optimum-quanto/pull/62"
EPYC = "ahelpme.com/?p=6685 (llama.cpp; an EPYC 9554, whose memory is the same)"
LEASEWEB = "dev.to/leaseweb/cpu-inference-on-amd-epyc-9334-real-numbers-for-llm-and-tts-workloads-54e7"
IK = "github.com/ikawrakow/ik_llama.cpp/pull/128"


@dataclass(frozen=True)
class Settings:
    """Compare computed with published rates."""

    json: Path | None = None
    """File to write the figures to, too."""


@dataclass(frozen=True)
class Published:
    """One published rate.

    Attributes:
        source: where.
        seconds: that `passes` passes take, after a prompt is read if there is one.
        deployment: what ran, at the context of the middle of the text.
        tokens: that a pass reads of every sequence.
        batch_size: sequences.
        passes: number of passes.
        prompt: tokens of every sequence whose reading is part of the seconds.
        calibration: whether the overheads come from here.
    """

    source: str
    seconds: float
    deployment: Deployment
    tokens: int = 1
    batch_size: int = 1
    passes: int = 1
    prompt: int = 0
    calibration: bool = False

    @property
    def computed(self) -> float:
        """Seconds by the roofline."""
        total = self.passes * pass_seconds(self.deployment, self.tokens, self.batch_size)
        if self.prompt:
            reading = replace(self.deployment, context=max(1, self.prompt // 2))
            total += pass_seconds(reading, self.prompt, self.batch_size)
        return total


def pass_seconds(deployment: Deployment, tokens: int, batch_size: int) -> float:
    """Seconds of a target pass over so many tokens of every sequence."""
    _, _, target = round_costs(deployment, [batch_size], max(1, tokens - 1))
    return float(target[0, tokens - 1])


def run(
    model: str | ModelShape,
    hardware: str,
    devices: int = 1,
    context: int = 100,
    *,
    bits: int = 16,
    software: str = "compiled",
) -> Deployment:
    """A target without a draft; weights of fewer bits in groups of 32."""
    shape = MODEL_SHAPES[model] if isinstance(model, str) else model
    return Deployment(
        shape.quantised(bits), None, HARDWARE[hardware], devices=devices, context=context, software=software
    )


def q4_k_m(name: str) -> ModelShape:
    """A model as llama.cpp's Q4_K_M stores it."""
    shape = MODEL_SHAPES[name]
    return replace(shape, name=f"{name}-q4_k_m", bytes_per_parameter=Q4_K_M[name] / shape.stored_parameters)


def published() -> Iterator[Published]:
    """All rates, by source."""
    a100 = "a100-80gb-sxm"
    yield Published(GPT_FAST, 1 / 93.89, run("llama-3.1-8b", a100), calibration=True)
    yield Published(GPT_FAST, 1 / 137.64, run("llama-3.1-8b", a100, bits=8))
    yield Published(GPT_FAST, 1 / 18.04, run("llama-3.1-70b", a100, bits=8), calibration=True)
    yield Published(GPT_FAST, 1 / 196.80, run("llama-2-7b", a100, bits=4))
    yield Published(GPT_FAST, 1 / 25.25, run("llama-2-70b", a100, bits=4), calibration=True)
    for devices, rate in ((2, 149.10), (4, 217.21), (8, 276.01)):
        yield Published(GPT_FAST, 1 / rate, run("llama-3.1-8b", a100, devices))
    for devices, rate in ((4, 37.45), (8, 58.78)):
        yield Published(GPT_FAST, 1 / rate, run("llama-3.1-70b", a100, devices))
    yield Published(GPT_FAST, 1 / 75.58, run("llama-3.1-70b", a100, 8, bits=8))
    yield Published(GPT_FAST, 1 / 15.60, run("llama-3.1-405b", a100, 8, bits=8))

    for hardware, rate, calibration in (
        ("rtx-3090", 46.51, False),
        ("rtx-4090", 54.34, False),
        ("l40s", 43.42, False),
        (a100, 53.18, False),
        ("m2-ultra-gpu", 36.25, True),
        ("m3-max-gpu", 22.39, False),
    ):
        yield Published(LLAMA_CPP, 1 / rate, run("llama-3.1-8b", hardware, context=512), calibration=calibration)
    for hardware, rate, calibration in (
        ("rtx-4090", 127.74, False),
        ("m2-ultra-gpu", 76.28, True),
        ("m3-max-gpu", 50.74, False),
    ):
        small = run(q4_k_m("llama-3.1-8b"), hardware, context=512, software="llama.cpp")
        yield Published(LLAMA_CPP, 1 / rate, small, calibration=calibration)
    large = run(q4_k_m("llama-3.1-70b"), "m2-ultra-gpu", context=512, software="llama.cpp")
    yield Published(LLAMA_CPP, 1 / 12.13, large)
    for hardware, rate in (("rtx-3090", 4239.64), ("rtx-4090", 9056.26), ("m2-ultra-gpu", 1202.74)):
        yield Published(LLAMA_CPP, 512 / rate, run("llama-3.1-8b", hardware, context=512), tokens=512)  # -ub 512
    for tokens, rate in ((1, 65.20), (4, 246.37), (8, 485.16)):
        yield Published(BATCHED, tokens / rate, run("llama-3.1-8b", "rtx-4090", context=256), tokens=tokens)
    vectors = run("llama-3.1-8b", "rtx-3090", context=256, bits=4, software="llama.cpp")
    for tokens, rate in ((1, 156.56), (2, 279.89), (4, 470.48), (8, 583.77)):
        yield Published(VECTORS, tokens / rate, vectors, tokens=tokens, calibration=tokens in (1, 8))
    small = run(q4_k_m("qwen3-8b"), "rtx-5090", software="llama.cpp")
    yield Published(CONTINUUM, 1 / 221.7, small, calibration=True)
    yield Published(TINY, 1 / 652.55, run(TINY_LLAMA, "rtx-5090", context=256))
    matrices = run("llama-3.1-8b", "rtx-4090", context=256, bits=4, software="llama.cpp")
    for tokens, rate in ((16, 1937.21), (64, 5420.06), (512, 10358.75)):
        yield Published(MATRICES, tokens / rate, matrices, tokens=tokens)
    metal = run("qwen2.5-7b", "m2-ultra-gpu", bits=8, software="llama.cpp")
    for tokens, rate in ((1, 70.41), (2, 126.66), (4, 200.40), (8, 260.76)):
        yield Published(METAL, tokens / rate, metal, tokens=tokens, calibration=tokens == 8)

    for model, devices, batch_size, prompt, generated, rate in (
        ("llama-2-7b", 1, 60, 128, 2048, 1928),
        ("llama-2-7b", 1, 384, 128, 128, 5586),
        ("llama-2-7b", 1, 52, 2048, 128, 591),
        ("llama-2-7b", 2, 64, 2048, 2048, 782),
        ("llama-2-70b", 4, 240, 128, 2048, 525),
    ):
        yield Published(
            TENSORRT,
            batch_size * generated / (rate * devices),
            run(model, a100, devices, prompt + generated // 2),
            batch_size=batch_size,
            passes=generated,
            prompt=prompt,
        )
    for model, devices, bits, seconds in (
        ("llama-3.1-8b", 1, 16, (0.236, 0.260, 0.284, 0.336)),
        ("llama-3.1-8b", 1, 8, (0.186, 0.231, 0.248, 0.300)),
        ("llama-3.1-8b", 1, 4, (0.154, 0.194, 0.216, 0.267)),
        ("llama-3.1-70b", 4, 16, (0.558, 0.629, 0.700, 0.855)),
    ):
        for batch_size, total in zip((1, 4, 8, 16), seconds, strict=True):
            served = run(model, "h100-sxm", devices, 272, bits=bits)
            yield Published(MARLIN, total, served, batch_size=batch_size, passes=32, prompt=256)
    yield Published(VLLM, 14.57, run("llama-2-70b", a100, 4, 384), batch_size=64, passes=256, prompt=256)
    yield Published(ROCM, 1 / 410, run("llama-3.1-8b", "mi300x", 4))
    yield Published(GRAPHS, 5.1e-3, run("llama-3.1-8b", "h100-sxm"))
    yield Published(GRAPHS, 8.4e-3, run("llama-3.1-8b", "h100-sxm", software="eager"))
    for shape, milliseconds in ((SHEARED, 21), (MODEL_SHAPES["llama-2-7b"], 37)):
        yield Published(QUANTO, milliseconds / 1000, run(shape, "a10g", software="eager"))
    yield Published(LEASEWEB, 1 / 16.7, run("llama-3.1-8b", "l4"))
    yield Published(EPYC, 1 / 28.74, run(q4_k_m("phi-4"), "epyc-9654"))
    yield Published(EPYC, 1 / 19.194, run("phi-4", "epyc-9654", bits=8))
    yield Published(IK, 512 / 254, run("llama-3.1-8b", "ryzen-9-7950x", context=256, bits=4), tokens=512)


def cost_ratios(rows: list[Published]) -> Iterator[tuple[Published, Published]]:
    """Pairs of rows that differ in the model alone, the smaller model's first."""

    def setup(row: Published) -> tuple[object, ...]:
        run_ = row.deployment
        stored = re.search(r"-q\w+$", run_.target.name)
        return (row.source, run_.hardware.name, run_.devices, stored and stored.group(), run_.software)

    single = [row for row in rows if row.batch_size == row.tokens == row.passes == 1]
    for small, large in itertools.permutations(single, 2):
        if setup(small) == setup(large) and small.deployment.target.parameters < large.deployment.target.parameters:
            yield small, large


def main() -> None:
    """Compute and print."""
    settings = tyro.cli(Settings, description=__doc__)
    rows = list(published())
    table = Table(title="one pass, or a whole batch of texts with its prompts")
    for heading in ("runs", "batch", "tokens", "published, ms", "computed, ms", "computed / published", "source"):
        table.add_column(heading, justify="left" if heading in ("runs", "source") else "right")
    for row in rows:
        what = row.deployment.label.replace("+free", "") + (f" ({row.prompt}+{row.passes})" if row.prompt else "")
        table.add_row(
            what,
            str(row.batch_size),
            str(row.tokens),
            f"{1e3 * row.seconds:,.1f}",
            f"{1e3 * row.computed:,.1f}",
            f"{row.computed / row.seconds:.2f}" + ("*" if row.calibration else ""),
            row.source,
        )
    console = Console(width=200)
    console.print(table)
    costs = Table(title="time of a smaller model's pass over a larger one's")
    for heading in ("models", "published", "computed"):
        costs.add_column(heading, justify="left" if heading == "models" else "right")
    pairs = list(cost_ratios(rows))
    for small, large in pairs:
        costs.add_row(
            f"{small.deployment.target.name} / {large.deployment.label.replace('+free', '')}",
            f"{small.seconds / large.seconds:.3f}",
            f"{small.computed / large.computed:.3f}",
        )
    console.print(costs)
    ratios = [row.computed / row.seconds for row in rows if not row.calibration]
    off = [max(ratio, 1 / ratio) for ratio in ratios]
    print(
        f"{len(ratios)} rates: off by a factor of {statistics.median(off):.2f} at the median, {max(off):.2f} at most; "
        f"within 1.25 in {sum(factor <= 1.25 for factor in off)}, within 1.5 in {sum(factor <= 1.5 for factor in off)}"
    )
    if settings.json:
        figures = [{"label": row.deployment.label, "computed": row.computed, **asdict(row)} for row in rows]
        write_json(settings.json, {"rates": figures})


if __name__ == "__main__":
    main()
