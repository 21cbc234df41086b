"""Lookahead decoding's pool options, each beside the default at the same knobs.

    python -m benchmarks.lookahead_pool                              # both presets and shipped targets, 20 minutes
    python -m benchmarks.lookahead_pool --targets tiny-3m --prompts 1 --presets small
    python -m benchmarks.lookahead_pool --only ranking min_acceptance guesses

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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.compare_decoders import PLAIN, Comparison, Figures, decode, rounds_of, table_of, together
from specgym.decoding import (
    AutoregressiveDecoder,
    LatencyProfile,
    LookaheadDecoder,
    LookaheadStatistics,
    Pair,
    PoolSettings,
    Preset,
    Retention,
    Round,
    Sampling,
    Side,
    measured,
    write_json,
)
from specgym.envs import Workload, profile_of

DEFAULT = "default"
CONTROL = "guesses"
PAYS = 0.99


@dataclass
class Settings(Comparison):
    """Compare the options of the n-gram pool. Drafts are not used."""

    presets: tuple[Preset, ...] = ("small", "large")
    """Knobs: window, n-gram size and guesses are (5, 3, 5) and (15, 5, 15)."""
    prompt_sets: tuple[str, ...] = ("prose", "code", "definitions", "chat")
    """Prompt sets for `load_prompts`, and `repetitive`."""
    prompts: int = 4
    """Test prompts of a set."""
    tokens: int = 256
    """Tokens generated for a prompt, so many that the pool has something to forget."""
    few: int = 4
    """N-grams kept for a token where the ways of retaining them are compared."""
    horizon: int = 128
    """Horizon of the sliding retention, in tokens."""
    reference: bool = False
    """Charge time by the reference profiles that ship, where there are some, instead of measuring this machine."""
    chunks: tuple[int, ...] = (64, 128)
    """Tokens of a chunk, where each has a pool of its own."""
    window: int | None = None
    """Columns of the window; by default those of the preset."""
    ngram: int | None = None
    """Tokens of an n-gram, likewise."""
    only: tuple[str, ...] = ()
    """Beginnings of the names of options to compare, besides `default`; by default all."""


class Option(NamedTuple):
    """A row of the comparison."""

    pool: PoolSettings
    guesses: int | None = None
    """Value of the knob; None for that of the preset."""


Blocks = dict[str, dict[str, dict[str, Figures]]]
"""Figures by block, option and prompt set; `all` are those of all sets together."""


def options(settings: Settings) -> dict[str, dict[str, Option]]:
    """Options by block and name; the others of a block are compared with its first."""
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
        **{f"chunk_tokens {tokens}": replace(default, chunk_tokens=tokens) for tokens in settings.chunks},
    }
    learned = replace(default, ranking="learned")
    ranked = {
        "ranking learned": Option(learned),
        **{f"ranking learned, guesses {count}": Option(learned, count) for count in (1, 2, 3)},
        **{
            f"ranking learned, min_acceptance {least}": Option(replace(learned, min_acceptance=least))
            for least in (0.1, 0.2, 0.3)
        },
    }
    controls = {f"{CONTROL} {count}": Option(default, count) for count in (1, 2, 3, 4)}
    retained = {
        f"retention {name}, {settings.few} a token": Option(replace(little, retention=name))
        for name in get_args(Retention)
    }
    blocks = {
        "choice": {**{name: Option(pool) for name, pool in choice.items()}, **ranked, **controls},
        "retention": retained,
    }
    if not settings.only:
        return blocks
    chosen = {
        block: {name: option for name, option in choices.items() if name.startswith((DEFAULT, *settings.only))}
        for block, choices in blocks.items()
    }
    return {block: choices for block, choices in chosen.items() if choices}


def figures(rounds: Sequence[Round], profile: LatencyProfile) -> Figures:
    """Figures of an option."""
    means = LookaheadStatistics.of(rounds)
    tokens = sum(len(round_.tokens) for round_ in rounds)
    return {
        "tokens_per_step": means.step_compression,
        "guesses_per_step": means.guesses,
        "read_per_step": means.tokens_read,
        "hit_rate": means.hit_rate,
        "pool_size": means.pool_size,
        "ms_per_token": 1000 * profile.charge(rounds) / tokens,
    }


def compare(pair: Pair, preset: Preset, settings: Settings) -> Blocks:
    """Compute `figures` of every option.

    Raises:
        RuntimeError: an option changed a greedy text in float32.
    """
    sampling = Sampling(temperature=settings.temperature)
    if settings.reference:
        profile = profile_of(Workload(pair.target.name, settings.prompt_sets[0], sampling), None, replayed=True,
                             decoder="lookahead")  # fmt: skip
    else:
        profile = measured(pair, "lookahead", sampling=sampling)
    blocks: Blocks = {}
    for block, choices in options(settings).items():
        sides = {PLAIN: Side(AutoregressiveDecoder(pair))}
        for name, option in choices.items():
            values = {"window": settings.window, "ngram": settings.ngram, "guesses": option.guesses}
            knobs = {knob: value for knob, value in values.items() if value is not None}
            sides[name] = Side(LookaheadDecoder(pair, preset=preset, pool=option.pool), knobs)
        results = decode(pair, sides, settings)
        blocks[block] = {
            name: {
                prompts: figures(rounds_of(generations[name]), profile)
                for prompts, generations in {**results, "all": together(results)}.items()
            }
            for name in choices
        }
    return blocks


def render(title: str, blocks: Blocks) -> Table:
    """Table of all options, and in brackets their change from the first of their block."""
    control = {name: sums["all"] for name, sums in blocks["choice"].items() if name.startswith((DEFAULT, CONTROL))}
    table = table_of("option", "tokens per step", "guesses a step", "tokens read a step", "n-grams in the pool",
                     "charged time", "pays", "against fewer guesses", title=title)  # fmt: skip
    for choices in blocks.values():
        first = next(iter(choices.values()))["all"]
        for number, (option, by_set) in enumerate(choices.items()):
            row = by_set["all"]
            change = {key: row[key] / first[key] - 1 for key in ("tokens_per_step", "read_per_step")}
            of_first = {key: f" ({value:+.1%})" if number else "" for key, value in change.items()}
            table.add_row(
                option,
                f"{row['tokens_per_step']:.3f}{of_first['tokens_per_step']}",
                f"{row['guesses_per_step']:.2f}",
                f"{row['read_per_step']:.1f}{of_first['read_per_step']}",
                f"{row['pool_size']:.0f}",
                f"{row['ms_per_token'] / first['ms_per_token']:.3f}",
                "" if number == 0 else "yes" if row["ms_per_token"] < PAYS * first["ms_per_token"] else "no",
                "" if option in control else against([*control.values()], row),
            )
    return table


def against(control: Sequence[Figures], row: Figures) -> str:
    """Tokens per step against a control that reads as much; a dash where no control reads so few or many."""
    known = sorted((sums["read_per_step"], sums["tokens_per_step"]) for sums in control)
    read = [pair[0] for pair in known]
    if not read[0] <= row["read_per_step"] <= read[-1]:
        return "-"
    expected = float(np.interp(row["read_per_step"], read, [pair[1] for pair in known]))
    return f"{row['tokens_per_step'] / expected - 1:+.1%}"


def main() -> None:
    """Decode, and print."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    console, report = Console(width=200), settings.report()
    for target in settings.targets:
        pair = settings.pair(target)
        report["targets"][target] = {}
        for preset in settings.presets:
            blocks = compare(pair, preset, settings)
            console.print(render(f"{target}, the {preset} preset", blocks))
            report["targets"][target][preset] = blocks
            if settings.json:
                write_json(settings.json, report)


if __name__ == "__main__":
    main()
