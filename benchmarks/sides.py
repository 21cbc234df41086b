"""What comparisons of decoders share: sides that decode the same prompts in turns, and figures of what they did."""

from __future__ import annotations

import keyword
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specgym.decoding import (
    Decoder,
    Generation,
    Pair,
    PromptSet,
    Round,
    Sampling,
    SpeculativeDecoder,
    encode,
    load_pair,
    load_prompts,
    write_json,
)

PLAIN = "autoregressive"
REPETITIVE = "repetitive"
"""An editing task, made here: a block of the code prompts three times, its most frequent name numbered _1, _2, _3, and
then the first line of a fourth copy. What follows is the rest of that copy."""
DRAFTED = {"tiny-10m": "tiny", "tiny-3m": "tiny-3m-1l"}
"""The shipped pair of a target, for the row of speculative decoding."""


@dataclass
class Comparison:
    """What is decoded, and on what."""

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

    def pair(self, target: str) -> Pair:
        """A target, with its draft if there is one."""
        return load_pair(
            DRAFTED.get(target, target),
            device=self.device,
            dtype=getattr(torch, self.dtype) if self.dtype else None,
        )

    def report(self) -> dict[str, Any]:
        """The settings as JSON has them, and room for figures of each target."""
        return {"settings": {**asdict(self), "json": str(self.json)}, "targets": {}}


@dataclass(frozen=True)
class Method:
    """One side of the comparison."""

    name: str
    decoder: Decoder
    knobs: Mapping[str, float] | None = None


Figures = dict[str, float]
"""By name what a side did."""
Results = dict[str, dict[str, list[Generation]]]
"""By prompt set and method, a generation for each prompt."""
Shown = Callable[[str, Sequence[Round], Figures], Mapping[str, str]]
"""Makes further columns of a side, from its name, rounds and figures over all prompt sets."""


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


def decode(pair: Pair, sides: Sequence[Method], settings: Comparison) -> Results:
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


def figures(generations: Sequence[Generation], plain: Sequence[Generation]) -> Figures:
    """What one side did: sums over all rounds, and of the times medians over prompts."""
    rounds, both = rounds_of(generations), list(zip(generations, plain, strict=True))
    return {
        "tokens_per_step": sum(len(cycle.tokens) for cycle in rounds) / len(rounds),
        "read_per_step": sum(cycle.target_tokens for cycle in rounds) / len(rounds),
        "ms_per_token": statistics.median(one.ms_per_token for one in generations),
        "speedup": statistics.median(other.ms_per_token / one.ms_per_token for one, other in both),
        "step_cost": statistics.median(
            (one.seconds / len(one.rounds)) / (other.seconds / len(other.rounds)) for one, other in both
        ),
        "same_texts": sum(one.tokens == other.tokens for one, other in both) / len(both),
    }


def figures_by_set(results: Results) -> dict[str, dict[str, Figures]]:
    """`figures` of every prompt set and side; `all` are those of all sets together."""
    return {
        name: {side: figures(generations, sides[PLAIN]) for side, generations in sides.items()}
        for name, sides in {**results, "all": together(results)}.items()
    }


def together(results: Results) -> dict[str, list[Generation]]:
    """The generations of each side, of all prompt sets."""
    return {
        side: [generation for sides in results.values() for generation in sides[side]]
        for side in next(iter(results.values()))
    }


def drafted(pair: Pair, settings: Comparison) -> list[Method]:
    """Speculative decoding, if the pair has a draft."""
    length = settings.draft_length
    if pair.draft is None:
        return []
    return [Method(f"draft {pair.draft.name} ({length})", SpeculativeDecoder(pair), {"draft_length": length})]


def compared(
    target: str,
    results: Results,
    found: Mapping[str, Mapping[str, Figures]],
    settings: Comparison,
    shown: Shown,
) -> Table:
    """Steps and speed.

    Args:
        target: its name.
        results: what was decoded.
        found: `figures_by_set` of it.
        settings: with which.
        shown: further columns.
    """
    table = Table(title=f"{target}: tokens per step, and in brackets the speedup by the clock", box=box.MARKDOWN)
    more = {
        side: shown(side, rounds_of(generations), found["all"][side]) for side, generations in together(results).items()
    }
    headings = ("tokens read per step", *more[PLAIN], "ms/token", "same text")
    for heading in ("method", *settings.prompt_sets, *headings):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for side, overall in found["all"].items():
        cells = [found[name][side] for name in settings.prompt_sets]
        table.add_row(
            side,
            *(f"{cell['tokens_per_step']:.2f} ({cell['speedup']:.2f})" for cell in cells),
            f"{overall['read_per_step']:.1f}",
            *more[side].values(),
            f"{overall['ms_per_token']:.2f}",
            f"{overall['same_texts']:.0%}" if settings.temperature == 0 else "-",
        )
    return table


def compare(
    settings: Comparison,
    methods: Callable[[Pair], Sequence[Method]],
    shown: Shown,
    details: Callable[[str, Results, Mapping[str, Figures]], tuple[Table, dict[str, Any]]],
) -> None:
    """Decode with all sides, target by target; print two tables of each, and write the figures where that is asked.

    Args:
        settings: what is decoded.
        methods: makes the sides from a pair, plain decoding first.
        shown: further columns of the first table.
        details: the second table, and more for the report, from the target's name, what was decoded, and the figures
            of each side over all prompt sets.
    """
    torch.set_num_threads(settings.threads)
    console, report = Console(width=200), settings.report()
    for target in settings.targets:
        pair = settings.pair(target)
        results = decode(pair, methods(pair), settings)
        found = figures_by_set(results)
        table, more = details(target, results, found["all"])
        console.print(compared(target, results, found, settings, shown), table)
        report["targets"][target] = {"figures": found, **more}
        if settings.json:
            write_json(settings.json, report)
