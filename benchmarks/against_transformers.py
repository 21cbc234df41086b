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
import statistics
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from transformers.utils import logging as transformers_logging

from benchmarks.compare_decoders import encoded, table_of
from specgym.decoding import (
    PRESETS,
    AutoregressiveDecoder,
    ConfidenceBelow,
    Generation,
    ModelDrafter,
    ModelNotFoundError,
    Pair,
    PromptLookupDrafter,
    Round,
    Sampling,
    Side,
    SpeculativeDecoder,
    TranslatedModel,
    decode_in_turns,
    load_pair,
    resolve,
    write_json,
)


@dataclass
class Settings:
    """Compare with transformers."""

    pairs: tuple[str, ...] = tuple(name for name, preset in PRESETS.items() if name.startswith("tiny") and preset.draft)
    """Pairs for `load_pair`."""
    samplings: tuple[Literal["greedy", "sample"], ...] = ("greedy", "sample")
    """Greedy, and temperature 1."""
    prompt_sets: tuple[str, ...] = ("prose", "code", "definitions", "chat")
    """Prompt sets for `load_prompts`."""
    prompts: int = 4
    """Test prompts of a set."""
    max_new_tokens: int = 64
    """Tokens generated for a prompt."""
    draft_length: int = 8
    """Longest draft of ours; transformers keeps its own default, 20."""
    confidence: float = 0.4
    """Ours: end a draft after a token of which the draft is less sure. transformers' default is the same."""
    json: Path | None = None
    """File to write the figures to, too."""


class TransformersGenerate:
    """transformers' `generate` as a side of the comparison: a single round, which includes reading the prompt.

    Args:
        pair: loaded without prepacking; only its target is used.
        options: further arguments of `generate`, such as an assistant.
    """

    def __init__(self, pair: Pair, **options: Any) -> None:
        self.pair, self.options = pair, options

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | None,
        knobs: Mapping[str, float] | None,
    ) -> Generation:
        """Generate to the end, greedily or at temperature 1."""
        torch.manual_seed(seed or 0)
        batch = torch.tensor([list(prompt_ids)])
        warping = {"do_sample": False} if sampling.greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        started = time.perf_counter()
        model: Any = self.pair.target.model
        output = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
            **warping,
            **self.options,
        )
        seconds = time.perf_counter() - started
        tokens = output[0, len(prompt_ids) :].tolist()
        return Generation(tokens, [Round(tuple(tokens), 0, 0, 0.0, 0.0, seconds)], 0.0, "length")


def sides(name: str, settings: Settings) -> tuple[Pair, dict[str, Side]]:
    """All sides of a pair; the pair is loaded twice, plain and prepacked."""
    packed, plain = load_pair(name), load_pair(name, prepack=False)
    methods = {"generate": Side(TransformersGenerate(plain))}
    if isinstance(plain.draft, ModelDrafter):
        draft, options = plain.draft.model, dict[str, Any]()
        assistant = draft.model
        if isinstance(draft, TranslatedModel):
            options = {"tokenizer": plain.tokenizer, "assistant_tokenizer": draft.translation.draft.tokenizer}
            # Sampling replaces its embeddings and output layer for good (transformers 5.23, candidate_generator.py).
            assistant = deepcopy(assistant)
        methods["rival"] = Side(TransformersGenerate(plain, assistant_model=assistant, **options))
    elif isinstance(plain.draft, PromptLookupDrafter):
        methods["rival"] = Side(TransformersGenerate(plain, prompt_lookup_num_tokens=10))
    stop, knobs = ConfidenceBelow(settings.confidence), {"draft_length": float(settings.draft_length)}
    methods["ours, no draft"] = Side(AutoregressiveDecoder(packed))
    methods["ours, plain"] = Side(SpeculativeDecoder(plain, stop=stop), knobs)
    methods["ours"] = Side(SpeculativeDecoder(packed, stop=stop), knobs)
    return packed, methods


def tokens_per_second(
    pair: Pair, methods: Mapping[str, Side], sampling: Sampling, settings: Settings
) -> dict[str, float]:
    """Medians over prompts, reading the prompt included."""
    tokens = settings.max_new_tokens
    prompts = [ids for name in settings.prompt_sets for ids in encoded(pair, name, settings.prompts, tokens)]
    turns = decode_in_turns(methods, prompts, max_new_tokens=tokens, sampling=sampling)
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    for generations in track(turns, pair.name, total=len(prompts), transient=True):
        for name, generation in generations.items():
            speeds[name].append(len(generation.tokens) / (generation.prefill_seconds + generation.seconds))
    return {name: statistics.median(values) for name, values in speeds.items()}


def main() -> None:
    """Measure and print."""
    settings = tyro.cli(Settings, description=__doc__)
    transformers_logging.set_verbosity_error()
    console = Console(width=140)
    results: dict[str, dict[str, float]] = {}
    table = table_of(
        "pair, sampling", "generate", "assisted / lookup", "ours, no draft", "ours, plain", "ours", "ours / theirs",
        "ours / generate", title=f"tokens/s, median over prompts, {settings.max_new_tokens} new tokens",
    )  # fmt: skip
    for name in settings.pairs:
        resolve(name)
        try:
            pair, methods = sides(name, settings)
        except (ModelNotFoundError, FileNotFoundError) as error:
            console.print(f"[yellow]{name} is left out: {error}")
            continue
        for kind in settings.samplings:
            speed = tokens_per_second(pair, methods, Sampling(0.0 if kind == "greedy" else 1.0), settings)
            results[f"{name} {kind}"] = speed
            rival = speed.get("rival")
            table.add_row(
                f"{name}, {kind}",
                f"{speed['generate']:.0f}",
                "-" if rival is None else f"{rival:.0f}",
                *(f"{speed[method]:.0f}" for method in ("ours, no draft", "ours, plain", "ours")),
                "-" if rival is None else f"{speed['ours'] / rival:.2f}",
                f"{speed['ours'] / speed['generate']:.2f}",
            )
        del pair, methods
        gc.collect()
    console.print(table)
    if settings.json:
        write_json(settings.json, {"settings": {**asdict(settings), "json": None}, "tokens_per_second": results})


if __name__ == "__main__":
    main()
