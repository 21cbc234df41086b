"""Recommendations of a tuner for pairs it never saw, decoded live.

    python train.py --tuner --name tuner && python evaluate.py runs/tuner --transfer
    python -m benchmarks.tuner_live runs/tuner

For every shipped tiny pair: the tuner of the fold that left the pair out takes eight measurements on training prompts
by replay. Its recommendation, the best single setting over the other pairs and the decoder's default then decode
held-out prompts live, on this machine, beside plain decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specgym.agents import (
    LearnedSearcher,
    LearnedTuner,
    Row,
    Transfer,
    TunerSettings,
    contenders,
    judge_live,
    load_settings,
    tasks_of,
)
from specgym.decoding import build_decoder
from specgym.envs import profile_of, workload


@dataclass
class Settings:
    """Decode live what a tuner recommends."""

    run: tyro.conf.Positional[Path]
    """Folder of a run of train.py --tuner that was cross-validated with --transfer."""
    prompt_sets: tuple[str, ...] = ("prose", "code")
    """Prompt sets of each pair."""
    seed: int = 0
    """Random seed of the trainings and the measurements."""
    prompts: int = 8
    """Held-out prompts of each workload, at most."""


def measured(settings: TunerSettings, name: str, knobs: dict[str, float], prompts: int) -> dict[str, Row]:
    """The rows of a workload by method, with some knobs as the learned ones."""
    chosen = workload(name)
    decoder = build_decoder(settings.decoder, chosen.load(), **settings.options)
    profile = profile_of(chosen, None, replayed=False, decoder=decoder)
    rows = judge_live(
        chosen, contenders(decoder, knobs), profile, settings.bounded_reward, prompts=prompts,
        max_new_tokens=settings.max_new_tokens, seeds=(0,),
    )  # fmt: skip
    return {row.method: row for row in rows}


def main() -> None:
    """Decode, and print a table."""
    chosen = tyro.cli(Settings, prog="python -m benchmarks.tuner_live", description=__doc__)
    torch.set_num_threads(1)
    settings = load_settings(chosen.run / "settings.json")
    folds = [fold for fold in Transfer.load(chosen.run / "transfer.json").folds if fold.kind == "pair"]
    table = Table(title="Held-out prompts, decoded live: default, single setting, learned", title_justify="left")
    for heading in ("workload", "learned", "reward", "speedup, charged", "speedup, by the clock", "divergence"):
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    sums: dict[str, list[list[float]]] = {}
    cases = [
        (fold, f"{fold.left_out}/{prompts}")
        for fold in folds
        for prompts in chosen.prompt_sets
        if fold.left_out.startswith("tiny")
    ]
    for fold, name in track(cases, "Decoding"):
        tuner = LearnedTuner.load(chosen.run / "folds" / f"without-pair-{fold.left_out}" / f"seed-{chosen.seed}")
        (task,) = tasks_of(settings, [name])
        knobs = LearnedSearcher(tuner, task).session(settings.measurements, chosen.seed)[-1]
        learned = measured(settings, name, knobs, chosen.prompts)
        single = measured(settings, name, fold.universal, chosen.prompts)
        rows = learned["default"], single["learned"], learned["learned"]
        cells = []
        for column in ("reward", "speedup", "wall_speedup", "divergence"):
            values = [row.values[column] for row in rows]
            sums.setdefault(column, []).append(values)
            cells.append("  ".join(f"{value:.2f}" for value in values))
        table.add_row(name, ", ".join(f"{value:.3g}" for value in knobs.values()), *cells)
    means = ["  ".join(f"{value:.2f}" for value in np.mean(values, axis=0)) for values in sums.values()]
    table.add_row("mean", "", *means)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
