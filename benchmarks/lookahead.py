"""Lookahead decoding against plain decoding, Jacobi decoding, prompt lookup and speculative decoding with a draft.

    python -m benchmarks.lookahead                                   # both shipped targets, 5 minutes
    python -m benchmarks.lookahead --targets tiny-3m --prompts 2     # a first impression
    python -m benchmarks.lookahead --targets smollm2 --device cuda --dtype float32

Every prompt is decoded by all methods, one after another, before the next one. Reading the prompt is not in the times.
A greedy text that is not that of plain decoding is an error in float32; in lower precisions passes of different shapes
round differently, so there it is counted. Without seeding ("window alone") the pool holds only what the window found.

The set `repetitive` is an editing task, made here: a block of the code prompts three times, its most frequent name
numbered _1, _2, _3, and then the first line of a fourth copy. What follows is the rest of that copy.
"""

from __future__ import annotations

import keyword
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specgym.decoding.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoder import Decoder, Generation, Round
from specgym.decoding.files import write_json
from specgym.decoding.lookahead import (
    JacobiDecoder,
    LookaheadDecoder,
    LookaheadRound,
    LookaheadStatistics,
    PoolSettings,
)
from specgym.decoding.pairs import Pair, load_pair
from specgym.decoding.prompt_lookup import PromptLookupDrafter
from specgym.decoding.prompts import PromptSet, encode, load_prompts
from specgym.decoding.sampling import Sampling
from specgym.decoding.speculative import SpeculativeDecoder

PLAIN = "autoregressive"
REPETITIVE = "repetitive"
DRAFTED = {"tiny-10m": "tiny", "tiny-3m": "tiny-3m-1l"}
"""The shipped pair of a target, for the row of speculative decoding."""


@dataclass
class Settings:
    """Compare Lookahead decoding with others."""

    targets: tuple[str, ...] = ("tiny-10m", "tiny-3m")
    """What `load_pair` takes. With target+draft, or where a draft ships for the target, that draft is compared too."""
    prompt_sets: tuple[str, ...] = ("prose", "code", "definitions", "chat", REPETITIVE)
    """What `load_prompts` takes, and `repetitive`."""
    prompts: int = 8
    """Test prompts of each set."""
    tokens: int = 64
    """Generated for each."""
    temperature: float = 0.0
    """0 is greedy."""
    knobs: tuple[tuple[int, int, int], ...] = ((5, 3, 5), (15, 5, 15), (1, 3, 5), (1, 5, 2), (3, 4, 3))
    """Window, n-gram size and guesses of Lookahead decoding, three numbers for each setting."""
    unseeded: tuple[tuple[int, int, int], ...] = ((5, 3, 5), (15, 5, 15))
    """The same, of Lookahead decoding whose pool is filled by the window alone."""
    jacobi_window: int = 8
    """Of Jacobi decoding."""
    lookup_length: int = 4
    """Tokens drafted by prompt lookup, at most."""
    draft_length: int = 2
    """Tokens drafted by a draft model; 2 or 3 is best for the shipped ones on a CPU (docs/draft_length.md)."""
    device: str | None = None
    """Of the models; by default CUDA if there is any."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; by default float32 on a CPU and bfloat16 elsewhere."""
    threads: int = 1
    """torch's, on a CPU."""
    json: Path | None = None
    """Where to write the figures, those of each prompt set too."""


@dataclass(frozen=True)
class Method:
    """One side of the comparison."""

    name: str
    decoder: Decoder
    knobs: Mapping[str, float] | None = None


Results = dict[str, dict[str, list[Generation]]]
"""By prompt set and method, a generation for each prompt."""


def repeated_edits(block: str) -> str:
    """Three copies of a block of code, each with a number behind its most frequent name, and the start of a fourth."""
    names = [name for name in re.findall(r"[A-Za-z_]\w{3,}", block) if name != "self" and not keyword.iskeyword(name)]
    edited = Counter(names).most_common(1)[0][0] if names else "$^"  # matches nothing: then the copies are equal
    copies = [re.sub(rf"\b{edited}\b", f"{edited}_{number}", block) for number in range(1, 5)]
    return "\n\n".join([*copies[:3], copies[3].splitlines()[0]])


def prompts_of(name: str, limit: int) -> PromptSet:
    """A prompt set by name, `repetitive` among them."""
    if name != REPETITIVE:
        return load_prompts(name, limit=limit)
    code = load_prompts("code", limit=limit)
    train, test = (tuple(map(repeated_edits, prompts)) for prompts in (code.train, code.test))
    return PromptSet(name, train, test, code.source, code.licence)


def encoded(pair: Pair, name: str, prompts: int, tokens: int) -> list[list[int]]:
    """The test prompts of a set as token ids, with room for so many tokens after each."""
    assert pair.tokenizer is not None  # load_pair gives one
    return encode(prompts_of(name, prompts), "test", pair.tokenizer, pair.target.context_limit - tokens)


def lookahead(pair: Pair, numbers: Sequence[int], pool: PoolSettings | None = None) -> Method:
    """Lookahead decoding with window, n-gram size and guesses."""
    window, ngram, guesses = numbers
    decoder = LookaheadDecoder(pair, max_window=window, max_ngram=ngram, max_guesses=max(guesses, 1), pool=pool)
    name = f"Lookahead ({window}, {ngram}, {guesses})" + (", window alone" if pool else "")
    return Method(name, decoder, {"window": window, "ngram": ngram, "guesses": guesses})


def methods(pair: Pair, settings: Settings) -> list[Method]:
    """All sides, plain decoding first."""
    copied = Pair(pair.target, PromptLookupDrafter(pair.target.vocabulary_size), pair.tokenizer)
    window, copies, drafts = settings.jacobi_window, settings.lookup_length, settings.draft_length
    found = [
        Method(PLAIN, AutoregressiveDecoder(pair)),
        Method(f"Jacobi ({window})", JacobiDecoder(pair, max_window=window), {"window": window}),
        *(lookahead(pair, numbers, PoolSettings(seeds="nothing")) for numbers in settings.unseeded),
        *(lookahead(pair, numbers) for numbers in settings.knobs),
        Method(f"prompt lookup ({copies})", SpeculativeDecoder(copied), {"draft_length": copies}),
    ]
    if pair.draft is not None:
        found.append(Method(f"draft {pair.draft.name} ({drafts})", SpeculativeDecoder(pair), {"draft_length": drafts}))
    return found


def decode(pair: Pair, sides: Sequence[Method], settings: Settings) -> Results:
    """Every prompt by every side; the sides take turns.

    Raises:
        RuntimeError: a greedy text in float32 is not that of plain decoding.
    """
    sampling = Sampling(temperature=settings.temperature)
    results: Results = {}
    for name in settings.prompt_sets:
        prompts = encoded(pair, name, settings.prompts, settings.tokens)
        results[name] = {side.name: [] for side in sides}
        for number, prompt in enumerate(track(prompts, f"{pair.name}, {name}", transient=True)):
            for side in sides:
                if number == 0:  # warm up
                    side.decoder.generate(prompt, max_new_tokens=16, sampling=sampling, seed=0, knobs=side.knobs)
                generation = side.decoder.generate(
                    prompt, max_new_tokens=settings.tokens, sampling=sampling, seed=number, knobs=side.knobs
                )
                results[name][side.name].append(generation)
                if is_exact(pair, sampling) and generation.tokens != results[name][PLAIN][number].tokens:
                    raise RuntimeError(
                        f"{side.name} on {pair.name} gave another text than plain decoding for test prompt {number} of "
                        f"{name!r}; that is a bug of the decoder, or the target's two best tokens are as good as equal"
                    )
    return results


def is_exact(pair: Pair, sampling: Sampling) -> bool:
    """Whether every side has to give the very same text."""
    return sampling.greedy and next(pair.target.model.parameters()).dtype == torch.float32


def rounds_of(generations: Sequence[Generation]) -> list[Round]:
    """Of all generations together."""
    return [cycle for generation in generations for cycle in generation.rounds]


def hit_rate(rounds: Sequence[Round]) -> float:
    """Share of the rounds in which there was anything to verify from the pool, or from the draft."""
    hits = [cycle.found if isinstance(cycle, LookaheadRound) else cycle.drafted for cycle in rounds]
    return sum(hit > 0 for hit in hits) / len(hits)


def figures(generations: Sequence[Generation], plain: Sequence[Generation]) -> dict[str, float]:
    """What one side did: sums over all rounds, and of the times medians over prompts."""
    rounds, both = rounds_of(generations), list(zip(generations, plain, strict=True))
    return {
        "tokens_per_step": sum(len(cycle.tokens) for cycle in rounds) / len(rounds),
        "read_per_step": sum(cycle.target_tokens for cycle in rounds) / len(rounds),
        "hit_rate": hit_rate(rounds),
        "ms_per_token": statistics.median(one.ms_per_token for one in generations),
        "speedup": statistics.median(other.ms_per_token / one.ms_per_token for one, other in both),
        "step_cost": statistics.median(
            (one.seconds / len(one.rounds)) / (other.seconds / len(other.rounds)) for one, other in both
        ),
        "same_texts": sum(one.tokens == other.tokens for one, other in both) / len(both),
    }


def by_set_and_method(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """`figures` of every prompt set and side; `all` are those of all sets together."""
    together = {
        side: [generation for sides in results.values() for generation in sides[side]]
        for side in next(iter(results.values()))
    }
    return {
        name: {side: figures(generations, sides[PLAIN]) for side, generations in sides.items()}
        for name, sides in {**results, "all": together}.items()
    }


def comparison(target: str, found: dict[str, dict[str, dict[str, float]]], settings: Settings) -> Table:
    """Steps and speed."""
    table = Table(title=f"{target}: tokens per step, and in brackets the speedup by the clock", box=box.MARKDOWN)
    for heading in ("method", *settings.prompt_sets, "tokens read per step", "hit rate", "ms/token", "same text"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for side, overall in found["all"].items():
        cells = [found[name][side] for name in settings.prompt_sets]
        table.add_row(
            side,
            *(f"{cell['tokens_per_step']:.2f} ({cell['speedup']:.2f})" for cell in cells),
            f"{overall['read_per_step']:.1f}",
            "-" if side == PLAIN or side.startswith("Jacobi") else f"{overall['hit_rate']:.0%}",
            f"{overall['ms_per_token']:.2f}",
            f"{overall['same_texts']:.0%}" if settings.temperature == 0 else "-",
        )
    return table


def step_times(target: str, results: Results, overall: dict[str, dict[str, float]]) -> tuple[Table, dict[str, Any]]:
    """Where a step's time goes: a table, and the same as numbers."""
    table = Table(title=f"{target}: what a step costs, and where its time goes (ms)", box=box.MARKDOWN)
    for heading in ("method", "tokens per step", "cost in plain steps", "prepare", "mask", "forward", "judge"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    report: dict[str, Any] = {}
    for side, sums in overall.items():
        rounds = rounds_of([generation for sides in results.values() for generation in sides[side]])
        parts = ["-"] * 4
        if all(isinstance(cycle, LookaheadRound) for cycle in rounds):
            means = LookaheadStatistics.of(rounds)
            report[side] = asdict(means)
            seconds = (means.prepare_seconds, means.mask_seconds, means.forward_seconds, means.judge_seconds)
            parts = [f"{1000 * part:.3f}" for part in seconds]
        table.add_row(side, f"{sums['tokens_per_step']:.2f}", f"{sums['step_cost']:.2f}", *parts)
    return table, report


def main() -> None:
    """Decode, and print."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    console = Console(width=200)
    report: dict[str, Any] = {"settings": {**asdict(settings), "json": str(settings.json)}, "targets": {}}
    for target in settings.targets:
        dtype = getattr(torch, settings.dtype) if settings.dtype else None
        pair = load_pair(DRAFTED.get(target, target), device=settings.device, dtype=dtype)
        results = decode(pair, methods(pair, settings), settings)
        found = by_set_and_method(results)
        times, statistics_of_steps = step_times(target, results, found["all"])
        console.print(comparison(target, found, settings), times)
        report["targets"][target] = {"figures": found, "steps": statistics_of_steps}
        if settings.json:
            write_json(settings.json, report)


if __name__ == "__main__":
    main()
