"""Our speculative decoding against `transformers`: plain `generate`, assisted generation and prompt lookup.

    python -m benchmarks.against_transformers                        # every shipped pair that is there
    python -m benchmarks.against_transformers --pairs smollm2-lookup --samplings greedy

All sides run in one process on the same pair, prompts, sampling and token limits, one after another on every prompt;
the time of reading the prompt counts for all. `transformers` runs with its own defaults on the plain model; ours are
prepacked as `load_pair` does on CPU; `ours, plain` shows what is left without that. At temperature 1 the assistant of
`transformers` warps twice, which distorts its acceptance, not its output.

The claim to check: ours gives at least 1.3 times the tokens/s of assisted generation on every model-draft pair.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from specgym.decoding import (
    PRESETS,
    AutoregressiveDecoder,
    ConfidenceBelow,
    Decoder,
    ModelDrafter,
    ModelNotFoundError,
    Pair,
    PromptLookupDrafter,
    Sampling,
    SpeculativeDecoder,
    load_pair,
    load_prompts,
    resolve,
)

Side = Callable[[list[int], int], int]


@dataclass
class Settings:
    """Compare with transformers."""

    pairs: tuple[str, ...] = tuple(name for name, preset in PRESETS.items() if name.startswith("tiny") and preset.draft)
    """What `load_pair` takes."""
    samplings: tuple[Literal["greedy", "sample"], ...] = ("greedy", "sample")
    """Greedy, and temperature 1."""
    prompt_sets: tuple[str, ...] = ("prose", "code", "definitions", "chat")
    """What `load_prompts` takes."""
    prompts: int = 4
    """Test prompts of each set."""
    max_new_tokens: int = 64
    """Per prompt."""
    draft_length: int = 8
    """Ours, at most; transformers keeps its own default, 20."""
    confidence: float = 0.4
    """Ours: end a draft after a token of which the draft is less sure. transformers' default is the same."""
    json: Path | None = None
    """Where to write the figures, too."""


def ours(decoder: Decoder, sampling: Sampling, settings: Settings) -> Side:
    """A decoder of this package as one side."""
    knobs = {"draft_length": float(settings.draft_length)} if decoder.knobs else None

    def run(prompt: list[int], seed: int) -> int:
        generation = decoder.generate(
            prompt, max_new_tokens=settings.max_new_tokens, sampling=sampling, seed=seed, knobs=knobs
        )
        return len(generation.tokens)

    return run


def theirs(pair: Pair, sampling: Sampling, settings: Settings, **options: Any) -> Side:
    """`generate` of the plain target as one side."""

    def run(prompt: list[int], seed: int) -> int:
        torch.manual_seed(seed)
        batch = torch.tensor([prompt])
        warping = {"do_sample": False} if sampling.greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        output = pair.target.model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=0,
            **warping,
            **options,
        )
        return int(output.shape[1]) - len(prompt)

    return run


def sides(name: str, sampling: Sampling, settings: Settings) -> tuple[Pair, dict[str, Side]]:
    """Everything that is compared on one pair; the pair is loaded twice, plain and prepacked."""
    packed, plain = load_pair(name), load_pair(name, prepack=False)
    found: dict[str, Side] = {"generate": theirs(plain, sampling, settings)}
    if isinstance(plain.draft, ModelDrafter):
        found["assisted"] = theirs(plain, sampling, settings, assistant_model=plain.draft.model.model)
    elif isinstance(plain.draft, PromptLookupDrafter):
        found["their lookup"] = theirs(plain, sampling, settings, prompt_lookup_num_tokens=10)
    stop = ConfidenceBelow(settings.confidence)
    found["ours, one by one"] = ours(AutoregressiveDecoder(packed), sampling, settings)
    found["ours, plain"] = ours(SpeculativeDecoder(plain, stop=stop), sampling, settings)
    found["ours"] = ours(SpeculativeDecoder(packed, stop=stop), sampling, settings)
    return packed, found


def tokens_per_second(pair: Pair, found: dict[str, Side], settings: Settings) -> dict[str, float]:
    """The median over prompts of each side; the sides take turns."""
    prompts = [
        pair.encode(text) for name in settings.prompt_sets for text in load_prompts(name, limit=settings.prompts).test
    ]
    speeds: dict[str, list[float]] = {side: [] for side in found}
    for side in found.values():
        side(prompts[0], 0)  # warm up
    for seed, prompt in enumerate(prompts):
        for name, side in found.items():
            started = time.perf_counter()
            count = side(prompt, seed)
            speeds[name].append(count / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in speeds.items()}


def main() -> None:
    """Measure and print."""
    settings = tyro.cli(Settings, description=__doc__)
    transformers_logging.set_verbosity_error()
    console = Console()
    results: dict[str, dict[str, float]] = {}
    table = Table(title=f"tokens/s, median over prompts, {settings.max_new_tokens} new tokens")
    for column in ("pair", "sampling", "generate", "assisted / lookup", "ours, one by one", "ours, plain", "ours"):
        table.add_column(column, justify="left" if column in ("pair", "sampling") else "right")
    table.add_column("ours / theirs", justify="right")
    table.add_column("ours / generate", justify="right")
    for name in settings.pairs:
        resolve(name)
        for kind in settings.samplings:
            try:
                pair, found = sides(name, Sampling(0.0 if kind == "greedy" else 1.0), settings)
            except (ModelNotFoundError, FileNotFoundError) as error:
                console.print(f"[yellow]{name} is left out: {error}")
                break
            speed = tokens_per_second(pair, found, settings)
            results[f"{name} {kind}"] = speed
            rival = speed.get("assisted", speed.get("their lookup"))
            table.add_row(
                name,
                kind,
                f"{speed['generate']:.0f}",
                "-" if rival is None else f"{rival:.0f}",
                f"{speed['ours, one by one']:.0f}",
                f"{speed['ours, plain']:.0f}",
                f"{speed['ours']:.0f}",
                "-" if rival is None else f"{speed['ours'] / rival:.2f}",
                f"{speed['ours'] / speed['generate']:.2f}",
            )
            del pair, found
            gc.collect()
    console.print(table)
    if settings.json:
        settings.json.write_text(
            json.dumps({"settings": asdict(settings), "tokens_per_second": results}, indent=2, default=str)
        )


if __name__ == "__main__":
    main()
