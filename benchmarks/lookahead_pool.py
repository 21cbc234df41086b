"""Lookahead decoding's pool options, each beside the default at the same knobs.

    python -m benchmarks.lookahead_pool                              # both presets and shipped targets, 20 minutes
    python -m benchmarks.lookahead_pool --targets tiny-3m --prompts 1 --presets small

No option changes the text, so what counts is how many steps it takes, and what those read. Neither depends on how busy
the machine is. The times are charged by a latency profile of Lookahead rounds, measured once for this machine: each
round costs what rounds that read as many tokens cost, and choosing guesses is not in that. In brackets is the change
from the first row of the block. `pays`: at least 1 % faster than that, by the charge.

How n-grams are retained only matters where there is no room for all: there, each token keeps `--few` n-grams.

The rows named after a number of guesses are the control: the default pool, of which the knob lets only the latest
n-grams be verified. `against fewer guesses` compares tokens per step with those of a control that reads as much, by
straight lines between the controls: an option that chooses well is above 0.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.sides import encoded
from specgym.decoding import (
    LatencyProfile,
    LookaheadDecoder,
    LookaheadStatistics,
    Pair,
    PoolSettings,
    Preset,
    Retention,
    Round,
    Sampling,
    load_pair,
    measured,
    write_json,
)

DEFAULT = "default"
CONTROL = "guesses"
PAYS = 0.99


@dataclass
class Settings:
    """Compare the options of the n-gram pool."""

    targets: tuple[str, ...] = ("tiny-10m", "tiny-3m")
    """What `load_pair` takes; drafts are not used."""
    presets: tuple[Preset, ...] = ("small", "large")
    """Knobs: window, n-gram size and guesses are (5, 3, 5) and (15, 5, 15)."""
    prompt_sets: tuple[str, ...] = ("prose", "code", "definitions", "chat")
    """What `load_prompts` takes, and `repetitive`."""
    prompts: int = 4
    """Test prompts of each set."""
    tokens: int = 256
    """Generated for each, so that the pool has something to forget."""
    few: int = 4
    """N-grams kept for each token where the ways of retaining them are compared."""
    horizon: int = 128
    """Of the sliding retention, in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    threads: int = 1
    """torch's, on a CPU."""
    json: Path | None = None
    """Where to write the figures, those of each prompt set too."""


class Option(NamedTuple):
    """One row of the comparison."""

    pool: PoolSettings
    guesses: int | None = None
    """Of the knob; None for the preset's."""


Figures = dict[str, dict[str, dict[str, dict[str, float]]]]
"""By block, option and prompt set; `all` are those of all sets together."""


def options(settings: Settings) -> dict[str, dict[str, Option]]:
    """By block and name; a block's first is what its others are compared with."""
    default = PoolSettings()
    little = replace(default, per_key=settings.few, horizon=settings.horizon)
    choice = {
        DEFAULT: default,
        "seeds nothing": replace(default, seeds="nothing"),
        "seeds prompt": replace(default, seeds="prompt"),
        **{f"top_share {share}": replace(default, top_share=share) for share in (0.5, 0.8, 0.95)},
        **{f"max_overlap {share}": replace(default, max_overlap=share) for share in (0.25, 0.5)},
        **{f"min_acceptance {least}": replace(default, min_acceptance=least) for least in (0.1, 0.3, 0.5)},
        "top_share 0.8, max_overlap 0.5, min_acceptance 0.3": replace(
            default, top_share=0.8, max_overlap=0.5, min_acceptance=0.3
        ),
    }
    controls = {f"{CONTROL} {count}": Option(default, count) for count in (1, 2, 3, 4)}
    retained = {
        f"retention {name}, {settings.few} a token": Option(replace(little, retention=name))
        for name in get_args(Retention)
    }
    return {
        "choice": {**{name: Option(pool) for name, pool in choice.items()}, **controls},
        "retention": retained,
    }


def decode(
    pair: Pair, option: Option, preset: Preset, prompts: Sequence[Sequence[int]], settings: Settings
) -> tuple[list[Round], int]:
    """The rounds of all prompts with one option, and a checksum of the texts."""
    decoder = LookaheadDecoder(pair, preset=preset, pool=option.pool)
    knobs = None if option.guesses is None else {"guesses": option.guesses}
    sampling = Sampling(temperature=settings.temperature)
    rounds: list[Round] = []
    checksum = 0
    for seed, prompt in enumerate(prompts):
        generation = decoder.generate(prompt, max_new_tokens=settings.tokens, sampling=sampling, seed=seed, knobs=knobs)
        rounds += generation.rounds
        checksum = zlib.crc32(str(generation.tokens).encode(), checksum)
    return rounds, checksum


def figures(rounds: Sequence[Round], profile: LatencyProfile) -> dict[str, float]:
    """What an option comes to."""
    means = LookaheadStatistics.of(rounds)
    tokens = sum(len(cycle.tokens) for cycle in rounds)
    return {
        "tokens_per_step": means.step_compression,
        "guesses_per_step": means.guesses,
        "read_per_step": means.tokens_read,
        "hit_rate": means.hit_rate,
        "pool_size": means.pool_size,
        "ms_per_token": 1000 * profile.charge(rounds) / tokens,
    }


def compare(pair: Pair, preset: Preset, settings: Settings) -> Figures:
    """`figures` of every option.

    Raises:
        RuntimeError: an option changed a greedy text in float32.
    """
    sampling = Sampling(temperature=settings.temperature)
    profile = measured(pair, sampling=sampling, rounds="lookahead")
    prompts = {name: encoded(pair, name, settings.prompts, settings.tokens) for name in settings.prompt_sets}
    texts: dict[str, int] = {}
    found: Figures = {}
    exact = sampling.greedy and next(pair.target.model.parameters()).dtype == torch.float32
    for block, choices in options(settings).items():
        found[block] = {}
        for name_of_option, option in track(choices.items(), f"{pair.name}, {preset}, {block}", transient=True):
            together: list[Round] = []
            by_set: dict[str, dict[str, float]] = {}
            for name in settings.prompt_sets:
                rounds, checksum = decode(pair, option, preset, prompts[name], settings)
                if exact and texts.setdefault(name, checksum) != checksum:
                    raise RuntimeError(f"{name_of_option!r} changed the greedy text of {name!r} on {pair.name}: a bug")
                by_set[name] = figures(rounds, profile)
                together += rounds
            found[block][name_of_option] = {**by_set, "all": figures(together, profile)}
    return found


def table_of(title: str, found: Figures) -> Table:
    """Every option, and in brackets its change from the first of its block."""
    control = {name: sums["all"] for name, sums in found["choice"].items() if name.startswith((DEFAULT, CONTROL))}
    table = Table(title=title, box=box.MARKDOWN)
    for heading in ("option", "tokens per step", "guesses a step", "tokens read a step", "n-grams in the pool",
                    "charged ms/token", "pays", "against fewer guesses"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("option", "pays") else "right", no_wrap=True)
    for choices in found.values():
        first = next(iter(choices.values()))["all"]
        for number, (option, by_set) in enumerate(choices.items()):
            own = by_set["all"]
            change = {key: own[key] / first[key] - 1 for key in ("tokens_per_step", "read_per_step", "ms_per_token")}
            of_first = {key: f" ({value:+.1%})" if number else "" for key, value in change.items()}
            table.add_row(
                option,
                f"{own['tokens_per_step']:.3f}{of_first['tokens_per_step']}",
                f"{own['guesses_per_step']:.2f}",
                f"{own['read_per_step']:.1f}{of_first['read_per_step']}",
                f"{own['pool_size']:.0f}",
                f"{own['ms_per_token']:.2f}{of_first['ms_per_token']}",
                "" if number == 0 else "yes" if own["ms_per_token"] < PAYS * first["ms_per_token"] else "no",
                "" if option in control else against([*control.values()], own),
            )
    return table


def against(control: Sequence[dict[str, float]], own: dict[str, float]) -> str:
    """Tokens per step compared with those of a control that reads as much; a dash where none reads so few or many."""
    known = sorted((sums["read_per_step"], sums["tokens_per_step"]) for sums in control)
    read = [pair[0] for pair in known]
    if not read[0] <= own["read_per_step"] <= read[-1]:
        return "-"
    expected = float(np.interp(own["read_per_step"], read, [pair[1] for pair in known]))
    return f"{own['tokens_per_step'] / expected - 1:+.1%}"


def main() -> None:
    """Decode, and print."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    console = Console(width=200)
    report: dict[str, Any] = {"settings": {**asdict(settings), "json": str(settings.json)}, "targets": {}}
    for target in settings.targets:
        pair = load_pair(target)
        report["targets"][target] = {}
        for preset in settings.presets:
            found = compare(pair, preset, settings)
            console.print(table_of(f"{target}, the {preset} preset", found))
            report["targets"][target][preset] = found
            if settings.json:
                write_json(settings.json, report)


if __name__ == "__main__":
    main()
