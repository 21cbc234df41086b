"""Agreement of simulated worlds with exact replay, where a world is a recorded workload as it is.

    python -m benchmarks.worlds_agreement
    python -m benchmarks.worlds_agreement --workloads tiny/prose smollm2-4l/code --replays 8

Both sides have the held-out texts of a trace and the pair's reference profile, and the stop rules of two engines. What
differs: a world draws every token's verdict once, before all settings, takes drafts as equally long each, and charges
them by the longest; sampled texts go on as recorded. *Lost* is the replayed speedup of the setting that is best in the
world, short of the best one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specgym.agents import rank_correlation
from specgym.decoding import write_json
from specgym.envs import (
    ENGINE_NAMES,
    AcceptancePool,
    Charges,
    Trace,
    Worlds,
    find_recording,
    profile_of,
    recorded_workloads,
    replay_backend,
    setting_of,
    workload,
)

DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
THRESHOLDS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)
GRID = np.array([(length, threshold) for threshold in THRESHOLDS for length in DRAFT_LENGTHS])
ENGINES = ("transformers", "llama.cpp")


@dataclass
class Settings:
    """Compare worlds with replay."""

    workloads: tuple[str, ...] = recorded_workloads("speculative")
    """Workloads whose traces ship."""
    replays: int = 4
    """Replays of a prompt and setting."""
    json: Path | None = None
    """File to write the figures of all settings to, too."""


def of_world(name: str, engine: str) -> NDArray[np.float64]:
    """Speedups in the world of a workload as it was recorded, shape (settings,)."""
    pool = AcceptancePool.recorded([name])
    charges = Charges.of([], [profile_of(workload(name), None, replayed=True).at()])
    where = np.flatnonzero(pool.before == (engine == "llama.cpp"))
    alone, nothing = np.ones(1, np.int64), np.zeros(1, np.int64)
    costs = charges.costs(nothing, nothing)
    world = Worlds(pool, where, alone * ENGINE_NAMES.index(engine), alone, nothing, np.zeros(1), costs)
    speedups: NDArray[np.float64] = world.speedups()[0, setting_of(*GRID.T)].astype(np.float64)
    return speedups


def replayed(name: str, engine: str, replays: int) -> NDArray[np.float64]:
    """Speedups of replaying the same texts, shape (settings,)."""
    trace, _ = find_recording("speculative", None, name, "test")
    assert isinstance(trace, Trace)
    options = {"stop": engine}
    backend = replay_backend("speculative", name, None, split="test", max_new_tokens=trace.info.tokens, options=options)
    prompts = np.tile(backend.prompts[0], replays)
    speedups = []
    for number, (length, threshold) in enumerate(GRID.tolist()):
        values = {"draft_length": length, "stop_threshold": threshold, "min_draft_length": 0.0}
        knobs = {knob.name: np.full(len(prompts), values[knob.name]) for knob in backend.knobs}
        sums = backend.decode(prompts, np.zeros(len(prompts), np.int64), knobs, np.random.default_rng(number))
        seconds = backend.profiles[0].autoregressive_seconds * sums.tokens.sum()
        speedups.append(float(seconds / sums.seconds.sum()))
    return np.array(speedups)


def main() -> None:
    """Compare, print, and write."""
    settings = tyro.cli(Settings, description=__doc__)
    table = Table(title=f"{len(GRID)} settings of {' and '.join(ENGINES)}, held-out texts")
    for heading in ("workload", "speedup off by, mean", "greatest", "rank correlation", "lost"):
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    report = {}
    for name in track(settings.workloads):
        world, replay = (np.concatenate(sides) for sides in zip(*(
            (of_world(name, engine), replayed(name, engine, settings.replays)) for engine in ENGINES
        ), strict=True))  # fmt: skip
        off = np.abs(world / replay - 1)
        by_engine = zip(np.split(world, 2), np.split(replay, 2), strict=True)
        lost = max(1 - theirs[ours.argmax()] / theirs.max() for ours, theirs in by_engine)
        table.add_row(
            name, f"{off.mean():.1%}", f"{off.max():.1%}", f"{rank_correlation(world, replay):.3f}", f"{lost:.1%}"
        )
        report[name] = {"world": world.tolist(), "replay": replay.tolist()}
        if settings.json:
            write_json(settings.json, report)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
