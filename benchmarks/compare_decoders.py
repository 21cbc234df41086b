"""Comparison of decoders: options, decoding in turns, figures, and tables."""

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
    Side,
    SpeculativeDecoder,
    decode_in_turns,
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
    """Options of a comparison."""

    targets: tuple[str, ...] = ("tiny-10m", "tiny-3m")
    """Targets for `load_pair`. With target+draft, or where a draft ships for the target, that draft is compared too."""
    prompt_sets: tuple[str, ...] = ("prose", "code", "definitions", "chat", REPETITIVE)
    """Prompt sets for `load_prompts`, and `repetitive`."""
    prompts: int = 8
    """Test prompts of a set."""
    tokens: int = 64
    """Tokens generated for a prompt."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    draft_length: int = 2
    """Tokens drafted by a draft model; 2 or 3 is best for the shipped ones on a CPU (docs/draft-length.md)."""
    device: str | None = None
    """Device of the models; by default CUDA if there is any."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; by default float32 on a CPU and bfloat16 elsewhere."""
    threads: int = 1
    """Threads of torch, on a CPU."""
    json: Path | None = None
    """File to write the figures to, with those of every prompt set."""

    def pair(self, target: str) -> Pair:
        """A target, with its draft if there is one."""
        return load_pair(
            DRAFTED.get(target, target),
            device=self.device,
            dtype=getattr(torch, self.dtype) if self.dtype else None,
        )

    def report(self) -> dict[str, Any]:
        """Start a report: the settings as JSON, and room for figures by target."""
        return {"settings": {**asdict(self), "json": str(self.json)}, "targets": {}}


Methods = Mapping[str, Side]
"""Rows of the comparison by name, plain decoding first."""
Figures = dict[str, float]
"""Figures of a method by name."""
Results = dict[str, dict[str, list[Generation]]]
"""Generations of all prompts, by prompt set and method."""
Shown = Callable[[str, Sequence[Round], Figures], Mapping[str, str]]
"""Maker of further columns from a method's name, rounds and figures over all prompt sets."""


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


def decode(pair: Pair, methods: Methods, settings: Comparison) -> Results:
    """Decode every prompt by all methods, in turns.

    Raises:
        RuntimeError: a greedy text in float32 of a method that is lossless is not that of plain decoding.
    """
    sampling = Sampling(temperature=settings.temperature)
    exact = sampling.greedy and next(pair.target.model.parameters()).dtype == torch.float32
    results: Results = {}
    for name in settings.prompt_sets:
        prompts = encoded(pair, name, settings.prompts, settings.tokens)
        turns = decode_in_turns(methods, prompts, max_new_tokens=settings.tokens, sampling=sampling)
        by_prompt = list(track(turns, f"{pair.name}, {name}", total=len(prompts), transient=True))
        results[name] = {method: [generations[method] for generations in by_prompt] for method in methods}
        lossless = [method for method, side in methods.items() if exact and keeps_texts(side)]
        for method, generations in ((method, results[name][method]) for method in lossless):
            for number, (mine, plain) in enumerate(zip(generations, results[name][PLAIN], strict=True)):
                if mine.tokens != plain.tokens:
                    raise RuntimeError(
                        f"{method} on {pair.name} gave another text than plain decoding for test prompt {number} of "
                        f"{name!r}; that is a bug of the decoder, or the target's two best tokens are as good as equal"
                    )
    return results


def keeps_texts(side: Side) -> bool:
    """True if a method's texts are the target's own: always, or with its knobs."""
    decoder = side.decoder
    if not isinstance(decoder, Decoder) or decoder.lossless:
        return True
    knobs, at = decoder.resolve_knobs(side.knobs), decoder.lossless_at or {}
    return bool(at) and all(knobs[name] == value for name, value in at.items())


def rounds_of(generations: Sequence[Generation]) -> list[Round]:
    """Rounds of all generations together."""
    return [round_ for generation in generations for round_ in generation.rounds]


def figures(generations: Sequence[Generation], plain: Sequence[Generation]) -> Figures:
    """Figures of a method: sums over all rounds, and medians of times over prompts."""
    rounds, both = rounds_of(generations), list(zip(generations, plain, strict=True))
    return {
        "tokens_per_step": sum(len(round_.tokens) for round_ in rounds) / len(rounds),
        "read_per_step": sum(round_.target_tokens for round_ in rounds) / len(rounds),
        "ms_per_token": statistics.median(mine.ms_per_token for mine in generations),
        "speedup": statistics.median(other.ms_per_token / mine.ms_per_token for mine, other in both),
        "step_cost": statistics.median(
            (mine.seconds / len(mine.rounds)) / (other.seconds / len(other.rounds)) for mine, other in both
        ),
        "same_texts": sum(mine.tokens == other.tokens for mine, other in both) / len(both),
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


def drafted(pair: Pair, settings: Comparison) -> dict[str, Side]:
    """Speculative decoding, if the pair has a draft."""
    length = settings.draft_length
    if pair.draft is None:
        return {}
    return {f"draft {pair.draft.name} ({length})": Side(SpeculativeDecoder(pair), {"draft_length": length})}


def table_of(*headings: str, title: str = "") -> Table:
    """An empty Markdown table, its first column aligned left, the others right."""
    table = Table(title=title, box=box.MARKDOWN)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def speeds(target: str, results: Results, by_set: Mapping[str, Mapping[str, Figures]], settings: Comparison,
           shown: Shown) -> Table:  # fmt: skip
    """Table of steps and speed.

    Args:
        target: name of the target.
        results: generations.
        by_set: `figures_by_set` of them.
        settings: options of the comparison.
        shown: further columns.
    """
    more = {
        method: shown(method, rounds_of(generations), by_set["all"][method])
        for method, generations in together(results).items()
    }
    table = table_of(
        "method", *settings.prompt_sets, "tokens read per step", *more[PLAIN], "time / plain", "same text",
        title=f"{target}: tokens per step, and in brackets the speedup by the clock",
    )  # fmt: skip
    for method, overall in by_set["all"].items():
        cells = [by_set[name][method] for name in settings.prompt_sets]
        table.add_row(
            method,
            *(f"{cell['tokens_per_step']:.2f} ({cell['speedup']:.2f})" for cell in cells),
            f"{overall['read_per_step']:.1f}",
            *more[method].values(),
            f"{overall['ms_per_token'] / by_set['all'][PLAIN]['ms_per_token']:.2f}",
            f"{overall['same_texts']:.0%}" if settings.temperature == 0 else "-",
        )
    return table


def compare(
    settings: Comparison,
    methods: Callable[[Pair], Methods],
    shown: Shown,
    details: Callable[[str, Results, Mapping[str, Figures]], tuple[Table, dict[str, Any]]],
) -> None:
    """Decode with all methods, target by target; print two tables a target, and write the figures if asked to.

    Args:
        settings: options.
        methods: makes the methods from a pair, plain decoding first.
        shown: further columns of the first table.
        details: makes the second table, and more for the report, from the target's name, the generations, and the
            figures of all methods over all prompt sets.
    """
    torch.set_num_threads(settings.threads)
    console, report = Console(width=200), settings.report()
    for target in settings.targets:
        pair = settings.pair(target)
        results = decode(pair, methods(pair), settings)
        by_set = figures_by_set(results)
        table, more = details(target, results, by_set["all"])
        console.print(speeds(target, results, by_set, settings, shown), table)
        report["targets"][target] = {"figures": by_set, **more}
        if settings.json:
            write_json(settings.json, report)
