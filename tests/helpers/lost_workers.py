"""Tasks whose worker is killed while they run, on this machine or on a Ray cluster of it; and tasks without workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

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


def cards_seen(number: int, meeting: Path) -> str:
    """Return the GPUs that a worker sees, while another of two looks, too."""
    (meeting / str(number)).touch()
    while len(list(meeting.iterdir())) < 2:
        time.sleep(0.01)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def load_pair_of(name: str, folder: Path) -> None:
    """Load the pair of a workload."""
    workload(name).load()


def kill_worker(name: str) -> int | None:
    """Kill one of Ray's workers whose name begins like this, of which Linux keeps 15 letters; return its number."""
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith(name):
            process.kill()
            process.wait()
            return process.pid
    return None


@contextmanager
def killed_worker(due: Callable[[], bool]) -> Iterator[list[int]]:
    """Kill one of Ray's workers that run tasks once it is due, which is asked a few times a second.

    The list has the number of its process then.
    """
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not killed and not over.wait(0.2):
            if due() and (process := kill_worker("ray::_run_remo")) is not None:
                killed.append(process)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield killed
    finally:
        over.set()
        watcher.join()


def run_here(tasks: list[Task[Any]], jobs: int, done: Callable[[int, Any], object]) -> list[Any]:
    """Do what `run_tasks` does, in this process."""
    results = []
    for number, task in enumerate(tasks):
        results.append(task.run() if task.folder is None else task.run(task.folder))
        done(number, results[-1])
    return results
