"""Cost of a forward pass by its number of tokens, with stock linear layers and with prepacked ones.

    python -m benchmarks.forward_cost                       # a random Llama of about 110 million parameters, float32
    python -m benchmarks.forward_cost --model tiny-10m      # a shipped model, a folder or a hub id

The claim to check: with prepacked layers a pass over 8 tokens costs at most 1.35 times a pass over one.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specgym.decoding import SMALLEST_PREPACKED, LanguageModel, load_model, prepack_linears, write_json


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
    """Thresholds to try: only weights of at least so many elements are prepacked."""
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


def measure(models: dict[str, LanguageModel], settings: Settings) -> dict[str, dict[int, float]]:
    """Median milliseconds of a pass by model and number of tokens; the models take turns, so that both feel the same
    machine."""
    seconds: dict[str, dict[int, list[float]]] = {name: {count: [] for count in settings.tokens} for name in models}
    for model in models.values():
        model.forward(torch.arange(settings.cached) % model.vocabulary_size, last=1)
    for repeat in range(settings.repeats + 2):
        for count in settings.tokens:
            for name, model in models.items():
                tokens = torch.arange(count) % model.vocabulary_size
                started = time.perf_counter()
                model.forward(tokens)
                elapsed = time.perf_counter() - started
                model.truncate(settings.cached)
                if repeat >= 2:  # after two rounds to warm up
                    seconds[name][count].append(elapsed)
    return {
        name: {count: 1000 * statistics.median(values) for count, values in by_count.items()}
        for name, by_count in seconds.items()
    }


def main() -> None:
    """Measure and print."""
    settings = tyro.cli(Settings, description=__doc__)
    models = {"stock": LanguageModel(build(settings), prepack=False)}
    parameters = sum(weight.numel() for weight in models["stock"].model.parameters())
    for smallest in settings.smallest:
        packed = build(settings)
        prepack_linears(packed, smallest)
        models[f"prepacked >= {smallest:,}"] = LanguageModel(packed, prepack=False)
    milliseconds = measure(models, settings)

    table = Table(title=f"ms per pass: {settings.model}, {parameters / 1e6:.0f}M parameters, {settings.dtype}")
    table.add_column("tokens", justify="right")
    for name in models:
        table.add_column(name, justify="right")
        table.add_column("x one token", justify="right")
    for count in settings.tokens:
        cells = [str(count)]
        for by_count in milliseconds.values():
            cells += [f"{by_count[count]:.2f}", f"{by_count[count] / by_count[settings.tokens[0]]:.2f}"]
        table.add_row(*cells)
    Console().print(table)
    if settings.json:
        by_name = {
            name: {str(count): value for count, value in values.items()} for name, values in milliseconds.items()
        }
        write_json(settings.json, {"settings": {**asdict(settings), "json": None}, "milliseconds": by_name})


if __name__ == "__main__":
    main()
