"""The best single setting of each decoder over all shipped workloads, and what it loses on each pair.

    python -m benchmarks.universal_settings
    python -m benchmarks.universal_settings lookahead

The setting is chosen on training prompts and judged on held-out ones, by replay: of a decoder with preferred ranges by
the default reward, of others, such as exact speculative decoding, by their speedup alone. *Best of each workload* are
the settings that are best on all training prompts of a workload: what no search on those prompts can expect to beat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specgym.agents import losses, tasks_of, tuner_settings, universal_setting
from specgym.decoding import decoder_names
from specgym.envs import recorded_workloads


@dataclass
class Settings:
    """Find the best single setting of decoders."""

    decoders: tyro.conf.Positional[tuple[str, ...]] = tuple(filter(recorded_workloads, decoder_names()))
    """Registered names. Defaults to all decoders whose recordings ship."""


def by_pair(loss: Mapping[str, float]) -> dict[str, float]:
    """Means over the workloads of each pair."""
    members: dict[str, list[float]] = {}
    for name, value in loss.items():
        members.setdefault(name.partition("/")[0], []).append(value)
    return {pair: float(np.mean(values)) for pair, values in members.items()}


def loss_columns(decoder: str) -> dict[str, dict[str, float]]:
    """Losses on every workload's held-out prompts, by the heading of a column and by workload."""
    tasks = tasks_of(tuner_settings(decoder))
    for task in track(tasks, f"Grids of {decoder}"):
        task.grid("train")
    setting = universal_setting(tasks)
    values = ", ".join(f"{name} {value:.3g}" for name, value in setting.items())
    best = {task.name: 1 - float(task.worth([task.grid("train").best]).fraction[0]) for task in tasks}
    return {f"{decoder}: {values}": losses(tasks, setting), f"{decoder}: best of each workload": best}


def main() -> None:
    """Print the settings and a table."""
    chosen = tyro.cli(Settings, prog="python -m benchmarks.universal_settings", description=__doc__)
    columns = {heading: loss for decoder in chosen.decoders for heading, loss in loss_columns(decoder).items()}
    pairs = {heading: by_pair(loss) for heading, loss in columns.items()}
    table = Table(title="Mean loss on held-out prompts, as a share of the best setting", title_justify="left")
    for heading in ("pair", *columns):
        table.add_column(heading, justify="left" if heading == "pair" else "right")
    for pair in dict.fromkeys(pair for losses_of in pairs.values() for pair in losses_of):
        table.add_row(pair, *(f"{100 * pairs[h][pair]:.1f} %" if pair in pairs[h] else "-" for h in columns))
    table.add_row("all workloads", *(f"{100 * np.mean(list(loss.values())):.1f} %" for loss in columns.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
