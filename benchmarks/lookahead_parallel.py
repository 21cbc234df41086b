"""Lookahead decoding by one process and by several, on the same prompts in turns.

    torchrun --nproc-per-node 2 -m benchmarks.lookahead_parallel                        # two processes, a thread each
    torchrun --nproc-per-node 4 -m benchmarks.lookahead_parallel --targets smollm2 --knobs 15 5 15
    torchrun --nproc-per-node 2 -m benchmarks.lookahead_parallel --device cuda          # a device each

The first process decodes every prompt by plain decoding and by Lookahead alone, while the others wait, and then all
decode it together. A text that differs is counted, and in float32 greedy texts may not. *Tokens read* are those of the
widest pass of any process, a step. The time of a step is the median, with what processes tell each other; the rest is
reckoned from it. *CPU ms* are the processor's, a step, of the process that took most of it, without waiting.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from rich.console import Console

from benchmarks.compare_decoders import encoded, table_of
from specgym.decoding import (
    LARGEST_WHOLE,
    AutoregressiveDecoder,
    Decoder,
    Generation,
    LookaheadDecoder,
    Round,
    Sampling,
    load_pair,
    torchrun_group,
    write_json,
)

Timed = dict[str, list[tuple[Generation, float]]]
"""Texts of each method, with the processor's seconds."""


@dataclass
class Settings:
    """Compare Lookahead decoding by several processes with that by one."""

    targets: tuple[str, ...] = ("tiny-10m",)
    """Targets for `load_pair`."""
    prompt_sets: tuple[str, ...] = ("prose", "code")
    """Prompt sets for `load_prompts`."""
    prompts: int = 4
    """Test prompts of a set."""
    tokens: int = 64
    """Tokens generated for a prompt."""
    knobs: tuple[tuple[int, int, int], ...] = ((5, 3, 5), (15, 5, 15))
    """Window, n-gram size and guesses, three numbers a setting."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    device: str = "cpu"
    """Device of the models; `cuda` is the device of each process's number."""
    threads: int = 1
    """Threads of each process, on a CPU."""
    timeout: float = 600.0
    """Seconds after which a process that does not answer is given up."""
    json: Path | None = None
    """File to write the figures to."""


def main() -> None:
    """Decode, and print from the first process."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if settings.device == "cuda" else settings.device
    group = torchrun_group(device, timeout=settings.timeout)
    try:
        report = {target: compared(target, device, group, settings) for target in settings.targets}
        if dist.get_rank() == 0 and settings.json:
            write_json(settings.json, {"settings": {**asdict(settings), "json": str(settings.json)}, "targets": report})
    finally:
        dist.destroy_process_group()


def compared(target: str, device: str, group: dist.ProcessGroup, settings: Settings) -> dict[str, dict[str, float]]:
    """Figures of one target, by method."""
    pair = load_pair(target, device=device).without_draft()
    sampling, first, count = Sampling(settings.temperature), dist.get_rank() == 0, dist.get_world_size()
    plain = AutoregressiveDecoder(pair)
    alone, together = (LookaheadDecoder(pair, max_window=32, group=processes) for processes in (None, group))
    texts: Timed = {}
    prompts = [
        prompt for name in settings.prompt_sets for prompt in encoded(pair, name, settings.prompts, settings.tokens)
    ]
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first one twice: what is set up once is not timed

        def decode(method: str, decoder: Decoder, knobs: dict[str, float] | None) -> None:
            began = time.process_time()
            with pair.capturing(LARGEST_WHOLE if number else 1):  # noqa: B023  (called here)
                text = decoder.generate(
                    prompt,  # noqa: B023
                    max_new_tokens=settings.tokens,
                    sampling=sampling,
                    seed=number,  # noqa: B023
                    knobs=knobs,
                )
            cpu = torch.tensor([time.process_time() - began], device=pair.target.device)
            if decoder is together:
                dist.all_reduce(cpu, dist.ReduceOp.MAX, group)
            if number:  # noqa: B023
                texts.setdefault(method, []).append((text, float(cpu)))

        if first:
            decode("autoregressive", plain, None)
        for shape in settings.knobs:
            knobs = dict(zip(("window", "ngram", "guesses"), map(float, shape), strict=True))
            if first:
                decode(f"{shape}, 1 process", alone, knobs)
            dist.barrier(group)
            decode(f"{shape}, {count} processes", together, knobs)
    return shown(target, texts, settings) if first else {}


def shown(
    target: str, timed: dict[str, list[tuple[Generation, float]]], settings: Settings
) -> dict[str, dict[str, float]]:
    """Print a table of the methods, and return its numbers."""
    table = table_of(
        "method", "tokens per step", "tokens read per step", "CPU ms", "ms per step", "tokens / s", "over plain",
        "same text", title=f"{target}: {settings.threads} thread(s) a process, {len(timed['autoregressive'])} prompts",
    )  # fmt: skip
    texts = {method: [text for text, _ in several] for method, several in timed.items()}
    base, figures = texts["autoregressive"], {}
    for method, decoded in texts.items():
        alike = base if method == "autoregressive" else texts[f"{method.rpartition(', ')[0]}, 1 process"]
        same = sum(text.tokens == other.tokens for text, other in zip(decoded, alike, strict=True))
        if settings.device == "cpu" and settings.temperature == 0 and same < len(decoded):
            raise RuntimeError(f"{method} gives other texts: {len(decoded) - same} of {len(decoded)}")
        rounds = [round_ for text in decoded for round_ in text.rounds]
        tokens, step = sum(len(text.tokens) for text in decoded) / len(rounds), seconds_of(rounds)
        row = {
            "tokens_per_step": tokens,
            "tokens_read": sum(round_.target_tokens for round_ in rounds) / len(rounds),
            "cpu_ms": 1000 * sum(cpu for _, cpu in timed[method]) / len(rounds),
            "step_ms": 1000 * step,
            "tokens_per_second": tokens / step,
            "over_plain": tokens / step * seconds_of([round_ for text in base for round_ in text.rounds]),
            "same": same / len(decoded),
        }
        figures[method] = row
        numbers = [f"{row[name]:.2f}" for name in ("tokens_per_step", "tokens_read", "cpu_ms", "step_ms")]
        table.add_row(
            method, *numbers, f"{row['tokens_per_second']:.1f}", f"{row['over_plain']:.2f}", f"{row['same']:.0%}"
        )
    Console(width=140).print(table)
    return figures


def seconds_of(rounds: list[Round]) -> float:
    """Median time of a round: on a machine that does other work, means are those of its longest breaks."""
    return statistics.median(round_.draft_seconds + round_.verify_seconds for round_ in rounds)


if __name__ == "__main__":
    main()
