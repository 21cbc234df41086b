"""Private memory of live environments, with the models loaded before they are forked and without.

    python -m benchmarks.shared_weights                        # Linux only

Four environments of one pair, each in a process of its own. *Loaded before* is how `train.py` starts them; *each its
own* is the same with a fork server that was started empty. Private memory is what `/proc/<pid>/smaps_rollup` says.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.forkserver
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from specgym.agents import default_settings, training_environments
from specgym.envs import profile_of, workload


@dataclass
class Settings:
    """Compare the memory of environments."""

    pair: str = "tiny"
    """A shipped pair."""
    way: str = ""
    """Used by the benchmark itself, which measures every way in a process of its own."""


WAYS = ("each its own", "loaded before")


def private_megabytes(process: int) -> float:
    """Private memory of a process in megabytes."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def measured(pair: str, way: str) -> list[float]:
    """Private megabytes of each of four environments that have taken two steps."""
    if way == "each its own":
        multiprocessing.set_forkserver_preload(["specgym.agents.training.environments", "specgym.envs.tuning.env"])
        multiprocessing.forkserver.ensure_running()
    names = tuple(f"{pair}/{prompts}" for prompts in ("prose", "code", "definitions", "chat"))
    settings = default_settings("threshold", workloads=names, environment={"max_new_tokens": 8})
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "latency.json"
        profile_of(workload(names[0]), None, replayed=True).save(profile)
        environments = training_environments(settings, [profile] * len(names))
        environments.reset()
        for _ in range(2):
            environments.step(np.zeros((len(names), 2), np.float32))
        processes = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
        result = [private_megabytes(process) for process in processes]
        environments.close()
    return result


def main() -> None:
    """Measure both ways, each in a process of its own, and print them."""
    chosen = tyro.cli(Settings, prog="python -m benchmarks.shared_weights", description=__doc__)
    if chosen.way:
        print(json.dumps(measured(chosen.pair, chosen.way)))
        return
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.shared_weights", "--pair", chosen.pair, "--way", way]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result = json.loads(shown.splitlines()[-1])
        print(f"{chosen.pair}, {way}: {', '.join(f'{value:.0f}' for value in result)} MB private to each environment")


if __name__ == "__main__":
    main()
