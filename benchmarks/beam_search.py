"""Beam search with a shared prefix tree against transformers' `generate(num_beams=...)`.

    python -m benchmarks.beam_search                                        # both targets, a few minutes on one core
    python -m benchmarks.beam_search --targets tiny-3m --beams 2 4 8 --tokens 128

Both sides decode every prompt in turns, with the same loaded weights: once unpacked, as transformers has them
(`generate`), and once as the package keeps them, for both sides. Times include reading the prompt. *Cached* is the most
that the keys and values of a text took, in MiB; a text that differs from that of `generate` is counted.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console

from benchmarks.compare_decoders import encoded, table_of
from specgym.decoding import AutoregressiveDecoder, BeamSearchDecoder, Pair, load_model, load_pair, write_json


@dataclass
class Settings:
    """Compare beam search with transformers' own."""

    targets: tuple[str, ...] = ("tiny-3m", "smollm2")
    """Targets for `load_pair`."""
    prompt_sets: tuple[str, ...] = ("prose", "code")
    """Prompt sets for `load_prompts`."""
    prompts: int = 3
    """Test prompts of a set."""
    tokens: int = 64
    """Tokens generated for a prompt."""
    beams: tuple[int, ...] = (4,)
    """Numbers of beams."""
    threads: int = 1
    """Threads of torch, on a CPU."""
    json: Path | None = None
    """File to write the figures to."""


class Text(NamedTuple):
    """A generated text."""

    tokens: list[int]
    seconds: float
    """With reading the prompt."""
    cpu: float
    """Seconds of the processor, which other work on the machine does not lengthen as much."""
    cached: int
    """Bytes of keys and values at most."""


def stock(model: Any, prompt: list[int], settings: Settings, beams: int) -> Text:
    """A text of `generate`."""
    started, began = time.perf_counter(), time.process_time()
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=beams,
        do_sample=False,
        max_new_tokens=settings.tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    seconds, cpu = time.perf_counter() - started, time.process_time() - began
    parts = [part for layer in output.past_key_values.layers for part in (layer.keys, layer.values)]
    tokens = output.sequences[0, len(prompt) :].tolist()
    return Text(tokens, seconds, cpu, sum(part.numel() * part.element_size() for part in parts))


def ours(pair: Pair, prompt: list[int], settings: Settings, beams: int) -> Text:
    """A text of `BeamSearchDecoder`, or of plain decoding for one beam."""
    decoder = BeamSearchDecoder(pair, num_beams=beams) if beams > 1 else AutoregressiveDecoder(pair)
    started, began, cached = time.perf_counter(), time.process_time(), 0
    session = decoder.start(prompt, max_new_tokens=settings.tokens)
    while not session.finished:
        session.step()
        cached = max(cached, session.target.cache_bytes)
    return Text(session.tokens, time.perf_counter() - started, time.process_time() - began, cached)


def main() -> None:
    """Decode, and print."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    report: dict[str, Any] = {}
    for target in settings.targets:
        pair = load_pair(target, device="cpu").without_draft()
        unpacked = load_model(target, device="cpu")[0]
        prompts = [
            prompt for name in settings.prompt_sets for prompt in encoded(pair, name, settings.prompts, settings.tokens)
        ]
        texts: dict[str, list[Text]] = {}
        for number, prompt in enumerate(
            [prompts[0], *prompts]
        ):  # the first one twice: what is set up once is not timed
            turn = {"plain decoding": ours(pair, prompt, settings, 1)}
            for beams in settings.beams:
                turn[f"generate, {beams} beams"] = stock(unpacked, prompt, settings, beams)
                turn[f"generate, {beams} beams, packed"] = stock(pair.target.model, prompt, settings, beams)
                turn[f"BeamSearchDecoder, {beams} beams"] = ours(pair, prompt, settings, beams)
            for name, text in turn.items() if number else ():
                texts.setdefault(name, []).append(text)
        report[target] = shown(target, texts)
    if settings.json:
        write_json(settings.json, {"settings": {**asdict(settings), "json": str(settings.json)}, "targets": report})


def shown(target: str, texts: dict[str, list[Text]]) -> dict[str, dict[str, float]]:
    """Print a table of the sides, and return its numbers."""
    table = table_of(
        "side", "ms per token", "CPU ms per token", "CPU times plain", "cached, MiB", "same text", title=target
    )
    plain, figures = texts["plain decoding"], {}
    for side, decoded in texts.items():
        beams = side.rpartition(", ")[2] if side.endswith("beams") else side.split(", ")[1] if ", " in side else ""
        alike = texts[f"generate, {beams}"] if beams else plain
        costs = [1000 * text.cpu / len(text.tokens) for text in decoded]
        ratios = [cost * len(base.tokens) / base.cpu / 1000 for cost, base in zip(costs, plain, strict=True)]
        row = {
            "ms_per_token": statistics.median(1000 * text.seconds / len(text.tokens) for text in decoded),
            "cpu_ms_per_token": statistics.median(costs),
            "times_plain": statistics.median(ratios),
            "cached_mib": max(text.cached for text in decoded) / 2**20,
            "same": sum(text.tokens == other.tokens for text, other in zip(decoded, alike, strict=True)) / len(decoded),
        }
        figures[side] = row
        numbers = (f"{row[name]:.2f}" for name in ("ms_per_token", "cpu_ms_per_token", "times_plain", "cached_mib"))
        table.add_row(side, *numbers, f"{row['same']:.0%}")
    Console(width=140).print(table)
    return figures


if __name__ == "__main__":
    main()
