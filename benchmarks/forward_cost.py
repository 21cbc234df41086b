"""Cost of a forward pass by its number of tokens: stock, with packed linear layers, and captured; and its bound.

    python -m benchmarks.forward_cost                       # a random Llama of about 110 million parameters, float32
    python -m benchmarks.forward_cost --model tiny-10m      # a shipped model, a folder or a hub id

No pass is shorter than reading its weights takes. So the bytes of the weights that a pass uses (embeddings are looked
up, and count for nothing) and the rate at which a core reads, measured between the passes, give a bound for each side.

The claim to check: with packed layers a pass over 8 tokens costs at most 1.35 times a pass over one.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specgym.decoding import (
    SMALLEST_PREPACKED,
    LanguageModel,
    bytes_of_pass,
    load_model,
    prepack_linears,
    write_json,
)


@dataclass
class Settings:
    """Measure forward passes."""

    model: str = "random"
    """`random` (12 layers, hidden size 768, vocabulary 32,000), or what `load_model` takes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of tokens in a pass."""
    cached: int = 128
    """Tokens in the cache before each pass."""
    repeats: int = 15
    """Passes of each kind; the median counts."""
    smallest: tuple[int, ...] = field(default_factory=lambda: (SMALLEST_PREPACKED,))
    """Thresholds to try: of the weights that do not fit into float16, those of at least so many elements are packed."""
    json: Path | None = None
    """File to write the figures to, too."""


def build(settings: Settings) -> PreTrainedModel:
    """The model, the same at every call."""
    dtype = getattr(torch, settings.dtype)
    if settings.model != "random":
        return load_model(settings.model, dtype=dtype, device="cpu")[0]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    return LlamaForCausalLM(config).to(dtype)


class Figures(NamedTuple):
    """Medians of what was measured."""

    milliseconds: dict[str, dict[int, float]]
    """Time of a pass, by model and number of tokens."""
    capturing: dict[int, float]
    """Passes that capturing one takes as long as, by their number of tokens."""
    bytes_a_second: float
    """Rate at which this machine reads from memory, on as many threads as the passes had."""


CAPTURED = ", captured"
"""End of the names of models whose passes are captured, at the first of each size."""
_READ = 2**25
"""Numbers of float32 in what is read to measure the rate: four times what a large cache holds."""


def measure(models: dict[str, LanguageModel], settings: Settings) -> Figures:
    """Time the models' passes; models and reading take turns, so that all feel the same machine."""
    seconds: dict[str, dict[int, list[float]]] = {name: {count: [] for count in settings.tokens} for name in models}
    memory, reading, first = torch.ones(_READ), list[float](), dict[int, float]()
    for model in models.values():
        model.forward(torch.arange(settings.cached) % model.vocabulary_size, last=1)
    for repeat in range(settings.repeats + 2):
        started = time.perf_counter()
        memory.sum()
        reading.append(time.perf_counter() - started)
        for count in settings.tokens:
            for name, model in models.items():
                tokens = torch.arange(count) % model.vocabulary_size
                started = time.perf_counter()
                model.forward(tokens)
                elapsed = time.perf_counter() - started
                model.truncate(settings.cached)
                if repeat >= 2:  # after two rounds to warm up
                    seconds[name][count].append(elapsed)
                elif repeat == 0 and name.endswith(CAPTURED):
                    first[count] = elapsed
    milliseconds = {
        name: {count: 1000 * statistics.median(values) for count, values in by_count.items()}
        for name, by_count in seconds.items()
    }
    captured = next(by_count for name, by_count in milliseconds.items() if name.endswith(CAPTURED))
    capturing = {count: 1000 * first[count] / captured[count] for count in settings.tokens}
    return Figures(milliseconds, capturing, memory.nbytes / statistics.median(reading))


def main() -> None:
    """Measure and print."""
    settings = tyro.cli(Settings, description=__doc__)
    models = {"stock": LanguageModel(build(settings), prepack=False)}
    parameters = sum(weight.numel() for weight in models["stock"].model.parameters())
    for smallest in settings.smallest:
        name = "packed" if len(settings.smallest) == 1 else f"packed from 2^{smallest.bit_length() - 1}"
        packed = build(settings)
        prepack_linears(packed, smallest)
        models[name] = LanguageModel(packed, prepack=False)
        models[name + CAPTURED] = captured = LanguageModel(packed, prepack=False)
        models[name].captured = None
        if captured.captured is not None:
            captured.captured.patience = 1
    models["stock"].captured = None
    figures = measure(models, settings)
    sizes = {name: bytes_of_pass(model.model) for name, model in models.items()}
    bounds = {name: 1000 * size / figures.bytes_a_second for name, size in sizes.items()}

    table = Table(title=f"Passes of {settings.model}, {parameters / 1e6:.0f}M parameters, {settings.dtype}")
    for column in ("tokens", "layers", "ms", "x one token", "x stock", "x bound", "GB/s"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for count in settings.tokens:
        for name, by_count in figures.milliseconds.items():
            value = by_count[count]
            ratios = value / by_count[settings.tokens[0]], value / figures.milliseconds["stock"][count]
            cells = [f"{ratio:.2f}" for ratio in (value, *ratios, value / bounds[name])]
            table.add_row(str(count), name, *cells, f"{sizes[name] / value / 1e6:.1f}")
    console = Console()
    console.print(table)
    console.print(f"memory reads {figures.bytes_a_second / 1e9:.1f} GB/s")
    passes = ", ".join(f"{passes:.0f} passes over {count}" for count, passes in figures.capturing.items())
    console.print(f"capturing took as long as {passes} tokens")
    for name, size in sizes.items():
        console.print(f"{name}: {size / 1e6:.1f} MB of weights a pass, at least {bounds[name]:.2f} ms")
    if settings.json:
        by_name: dict[str, Any] = {
            name: {str(count): value for count, value in values.items()}
            for name, values in figures.milliseconds.items()
        }
        write_json(
            settings.json,
            {
                "settings": {**asdict(settings), "json": None},
                "milliseconds": by_name,
                "capturing": {str(count): passes for count, passes in figures.capturing.items()},
                "bytes": sizes,
                "bytes_a_second": figures.bytes_a_second,
            },
        )


if __name__ == "__main__":
    main()
