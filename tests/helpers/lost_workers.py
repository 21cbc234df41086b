"""Tasks whose worker is killed while they run."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

from specgym.envs import Task, workload


def write_parts(parts: int, killed_at: int | None, home: Path, folder: Path) -> int:
    """Write parts one after another, each once; the worker is killed, once, before the part named.

    Args:
        parts: how many.
        killed_at: part before which the worker is killed, once those before it are at home.
        home: where the parts are to be in the end; the next worker finds there that one was killed.
        folder: where to write.

    Returns:
        The part that this worker began with.
    """
    began = len(list(folder.glob("part-*")))
    killed = home.with_name(f"{home.name}-killed")
    for number in range(began, parts):
        if number == killed_at and not killed.exists():
            while not all((home / f"part-{before}").is_file() for before in range(number)):
                time.sleep(0.01)
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / f"part-{number}").write_text(str(number), encoding="utf-8")
    return began


def die(folder: Path) -> None:
    """Kill the worker, whoever it is."""
    os.kill(os.getpid(), signal.SIGKILL)


def writing(home: Path, parts: int, killed_at: int | None = None) -> Task[int]:
    """Task of `write_parts`, named after its folder."""
    return Task(home.name, partial(write_parts, parts, killed_at, home), home)


def load_pair_of(name: str, folder: Path) -> None:
    """Load the pair of a workload."""
    workload(name).load()
