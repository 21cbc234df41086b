"""Pipelined decoding against decoding in turns: by the clock, as its profile predicts, and on two accelerators.

    python -m benchmarks.pipeline tiny smollm2-4l                  # on this machine, with the same cores
    python -m benchmarks.pipeline --hardware h100-sxm a100-80gb-sxm l4      # by computed profiles, from recordings

All numbers are over plain decoding. On this machine every setting decodes the same held-out prompts by turns, the
median over texts; *charged* are the same rounds by latency profiles that are measured here (`CostProbe.overlaps`), so
that one sees whether those would have told. In brackets the quartiles.

On accelerators the draft has one of its own and the target another. How often tokens are accepted comes from the
recording of a workload, seconds from the shapes of the models (`roofline`).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.batches import prompts_of
from specgym.decoding import (
    MODEL_SHAPES,
    AutoregressiveDecoder,
    Decoder,
    LatencyProfile,
    PipelinedDecoder,
    Sampling,
    SpeculativeDecoder,
    load_pair,
    measured,
    roofline,
)
from specgym.envs import replay_backend

_SHAPES = (("opt-6.7b", "opt-125m"), ("llama-3.1-8b", "llama-3.2-1b"), ("llama-3.1-70b", "llama-3.2-1b"))
"""Targets and drafts on accelerators."""
Setting = tuple[str, Mapping[str, float]]
"""A decoder and its knobs."""


@dataclass
class Settings:
    """Compare pipelined decoding with decoding in turns."""

    pairs: tyro.conf.Positional[tuple[str, ...]] = ("tiny",)
    """Pairs that draft with a model; on this machine."""
    hardware: tuple[str, ...] = ()
    """Accelerators, in place of this machine."""
    recordings: tuple[str, ...] = ("smollm2-4l/definitions", "tiny/code")
    """Workloads whose recorded acceptance stands for that of pairs on accelerators."""
    lengths: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    """Draft lengths, in tokens."""
    prompts: int = 8
    """Held-out prompts, of the pair's sets by turns."""
    tokens: int = 64
    """Tokens of each text."""
    temperature: float = 0.0
    """Sampling temperature."""
    threads: int = 2
    """Torch's; a pipelined target leaves one of them to the draft."""
    turns: int = 2
    """Turns in which everything is decoded once."""


def settings_of(lengths: Sequence[int]) -> list[Setting]:
    """Everything that is compared with plain decoding."""
    turns: list[Setting] = [("speculative", {"draft_length": length}) for length in lengths]
    return turns + [
        ("pipelined", {"draft_length": length, "pre_verify": pre_verify}) for pre_verify in (1, 0) for length in lengths
    ]


def _words(setting: Setting) -> str:
    knobs = setting[1]
    way = "in turns" if setting[0] == "speculative" else "pipelined" if knobs["pre_verify"] else "pipelined, waiting"
    return f"{way}, {knobs['draft_length']}"


def show_here(name: str, settings: Settings, console: Console) -> None:
    """Decode by the clock, and print the table of a pair."""
    pair = load_pair(name)
    decoders: dict[str, Decoder[Any]] = {"speculative": SpeculativeDecoder(pair), "pipelined": PipelinedDecoder(pair)}
    plain = AutoregressiveDecoder(pair)
    sampling = Sampling(settings.temperature)
    profiles = {
        "speculative": measured(pair, refresh=True, sampling=sampling),
        "pipelined": measured(pair, decoders["pipelined"], refresh=True, sampling=sampling),
    }
    compared = settings_of(settings.lengths)
    seconds = defaultdict[int, list[float]](list)
    charged = defaultdict[int, list[float]](list)
    rounds = defaultdict[int, list[float]](list)
    options: Any = {"max_new_tokens": settings.tokens, "sampling": sampling, "seed": 0}
    for turn in range(settings.turns + 1):  # the first warms up
        with pair.capturing(after=1 if turn == 0 else 2**62):
            for prompt in prompts_of(pair, name, settings.prompts):
                stock = plain.generate(prompt, **options).ms_per_token
                for number, (decoder, knobs) in enumerate(compared):
                    text = decoders[decoder].generate(prompt, knobs=knobs, **options)
                    if turn:
                        seconds[number].append(stock / text.ms_per_token)
                        profile = profiles[decoder]
                        expected = profile.charge(text.rounds) / len(text.tokens)
                        charged[number].append(profile.autoregressive_seconds / expected)
                        rounds[number].append(text.mean_acceptance_length)
    table = Table(title=f"{name}: speedup over plain decoding, {settings.threads} threads")
    for heading in ("setting", "tokens a round", "by the clock", "charged"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for number, setting in enumerate(compared):
        low, middle, high = statistics.quantiles(seconds[number], n=4)
        clock = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        figures = (statistics.fmean(rounds[number]), statistics.median(charged[number]))
        table.add_row(_words(setting), f"{figures[0]:.2f}", clock, f"{figures[1]:.2f}")
    console.print(table)


def show_elsewhere(hardware: str, recording: str, settings: Settings, table: Table) -> None:
    """Replay a recording by computed profiles, chosen by its training prompts and reported on the others."""
    for target, draft in _SHAPES:
        shapes = MODEL_SHAPES[target], MODEL_SHAPES[draft]
        best: dict[str, tuple[float, Setting]] = {}
        for setting in settings_of(settings.lengths):
            decoder, knobs = setting
            profile = roofline(*shapes, hardware, decoder=decoder, contexts=(512,))
            speedup = _replayed(decoder, knobs, recording, "train", profile)
            if decoder not in best or speedup > best[decoder][0]:
                best[decoder] = speedup, setting
        speedups = {
            decoder: _replayed(
                decoder, setting[1], recording, "test", roofline(*shapes, hardware, decoder=decoder, contexts=(512,))
            )
            for decoder, (_, setting) in best.items()
        }
        profile = roofline(*shapes, hardware, contexts=(512,))
        table.add_row(
            hardware,
            f"{target} + {draft}",
            recording,
            f"{profile.draft(1) / profile.autoregressive_seconds:.2f}",
            *(f"{speedups[name]:.2f} ({_words(best[name][1])})" for name in ("speculative", "pipelined")),
            f"{speedups['pipelined'] / speedups['speculative']:.2f}",
        )


def _replayed(decoder: str, knobs: Mapping[str, float], recording: str, split: Any, profile: LatencyProfile) -> float:
    """Speedup of a setting over all recorded prompts."""
    backend = replay_backend(
        decoder, recording, None, split=split, profile=profile, max_new_tokens=32, max_draft_length=8
    )
    prompts = np.tile(backend.prompts[0], 20)
    every = {knob.name: np.full(len(prompts), float(knobs.get(knob.name, knob.default))) for knob in backend.knobs}
    metrics = backend.decode(prompts, np.zeros(len(prompts), np.int64), every, np.random.default_rng(0))
    return float(metrics.plain_seconds.sum() / metrics.seconds.sum())


def main() -> None:
    """Run the command."""
    settings = tyro.cli(Settings, description=__doc__)
    console = Console(width=150)
    if settings.hardware:
        table = Table(title="speedup over plain decoding: one device in turns, two devices pipelined")
        for heading in ("device", "pair", "acceptance of", "draft / target", "in turns", "pipelined", "gain"):
            table.add_column(heading)
        for hardware in settings.hardware:
            for recording in settings.recordings:
                show_elsewhere(hardware, recording, settings, table)
        console.print(table)
        return
    torch.set_num_threads(settings.threads)
    for name in settings.pairs:
        show_here(name, settings, console)


if __name__ == "__main__":
    main()
