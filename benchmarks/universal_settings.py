"""The best single setting of each decoder over all shipped workloads, and what it loses on each pair.

    python -m benchmarks.universal_settings

The setting is chosen on training prompts and judged on held-out ones, by replay: of threshold decoding by the default
reward, of exact speculative decoding by its speedup alone, since its text is the target's whatever the draft length.
*Each one's own best* are the thresholds that are best on all training prompts of a workload: what no search on those
prompts can expect to beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specgym.agents import TunerSettings, losses, problems_of, universal_setting
from specgym.decoding import Split
from specgym.envs import replay_backend


@dataclass
class Settings:
    """Compare single settings with the best of every workload."""

    workloads: tuple[str, ...] = TunerSettings.workloads
    """Recorded workloads."""


LENGTHS = np.arange(1, 17)
PASSES = 16


def speedups(name: str, split: Split, tokens: int = 48) -> NDArray[np.float64]:
    """Of exact speculative decoding over plain decoding, by draft length, shape (16,)."""
    replay = replay_backend("speculative", name, None, split=split, max_new_tokens=tokens)
    prompts = np.tile(replay.prompts[0], PASSES if "@" in name else 1)
    workloads = np.zeros(len(prompts), np.int64)
    speeds = []
    for length in LENGTHS:
        knobs = {"draft_length": np.full(len(prompts), float(length))}
        texts = replay.decode(prompts, workloads, knobs, np.random.default_rng(0))
        speeds.append(texts.pooled(len(prompts)).speedup[0])
    return np.array(speeds)


def by_pair(loss: Mapping[str, float]) -> dict[str, float]:
    """Means over the workloads of each pair."""
    members: dict[str, list[float]] = {}
    for name, value in loss.items():
        members.setdefault(name.partition("/")[0], []).append(value)
    return {pair: float(np.mean(values)) for pair, values in members.items()}


def universal_length(names: Sequence[str]) -> tuple[int, dict[str, float]]:
    """The best single draft length on training prompts, and what it loses on the held-out ones of each workload."""
    train = {name: speedups(name, "train") for name in names}
    place = int(np.argmax(np.mean([values / values.max() for values in train.values()], axis=0)))
    test = {name: speedups(name, "test") for name in track(names, "Draft lengths")}
    return int(LENGTHS[place]), {name: float(1 - values[place] / values.max()) for name, values in test.items()}


def main() -> None:
    """Print the settings and a table."""
    chosen = tyro.cli(Settings, description=__doc__)
    settings = replace(TunerSettings(), workloads=chosen.workloads)
    problems = problems_of(settings)
    thresholds = universal_setting(problems)
    of_thresholds = losses(problems, thresholds)
    own = {problem.name: 1 - float(problem.worth([problem.train_grid().best]).fraction[0]) for problem in problems}
    length, of_length = universal_length(settings.workloads)
    setting = ", ".join(f"{name} {value:.2f}" for name, value in thresholds.items())
    table = Table(title="Mean loss on held-out prompts, as a share of the best setting", title_justify="left")
    for heading in ("pair", f"thresholds: {setting}", "each one's own best", f"exact: draft length {length}"):
        table.add_column(heading, justify="left" if heading == "pair" else "right")
    columns = by_pair(of_thresholds), by_pair(own), by_pair(of_length)
    for pair in columns[0]:
        table.add_row(pair, *(f"{100 * column[pair]:.1f} %" for column in columns))
    table.add_row(
        "all workloads", *(f"{100 * np.mean(list(o.values())):.1f} %" for o in (of_thresholds, own, of_length))
    )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
