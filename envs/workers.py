"""Independent tasks in processes of their own, here or on a Ray cluster; what a lost worker was doing is done again.

A task writes its files into a folder and nowhere else. Ray's workers need not share a disk with whoever asked: they
begin with a copy of the task's files, and what they write comes back once a second. So a task that is lost with its
worker goes on elsewhere from its last finished file, and so does a command that is interrupted and given again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from specgym.decoding import replacing

from .ray_cluster import MOST_LOST, cluster, lost_workers, named_node, ray_errors, share_of, warn_unless_roomy

T = TypeVar("T")
Contents = Mapping[str, bytes | None]
"""Files by their name in a folder; None for one that was removed."""

_SECONDS: Final = 1.0  # between two looks at what there is to bring home
_WAY_ON: Final = "what is finished is kept, and the same command goes on from there"
_CANCEL_SECONDS: Final = 10.0
_Done = Callable[[int, T], object]


@dataclass(frozen=True)
class Task(Generic[T]):
    """One of many tasks that do not depend on each other.

    Attributes:
        name: in messages.
        run: picklable; called with a folder if the task has one, else without arguments. Its result is picklable, too.
        folder: where its files go, on the machine of whoever asks; on a Ray cluster `run` is called with another.
        files: names of files and folders in `folder` that are the task's own; None for all that is there.
        models: whether it runs models; on a Ray cluster it then has a GPU to itself, if there are any, and leaves no
            process behind that still holds them.
        cpus: threads that it computes with, at least 1.
    """

    name: str
    run: Callable[..., T]
    folder: Path | None = None
    files: tuple[str, ...] | None = None
    models: bool = False
    cpus: int = 1


def run_tasks(
    tasks: Sequence[Task[T]],
    jobs: int,
    done: _Done[T] = lambda number, result: None,
    watch: Callable[[], object] = lambda: None,
) -> list[T]:
    """Run tasks, each in a process of its own: on Ray within `on_ray`, else here.

    Args:
        tasks: what to do.
        jobs: processes at a time, here. On Ray there are as many as the cluster has room for.
        done: called with a task's place and its result as soon as it is finished and its files are in its folder.
        watch: called about once a second.

    Returns:
        The results, in the order of the tasks.

    Raises:
        WorkerError: workers were lost again and again.
        Exception: whatever a task raised; the others are then given up. What they had finished stays in their folders.
    """
    results: dict[int, T] = {}

    def keep(number: int, result: T) -> None:
        results[number] = result
        done(number, result)

    if cluster() is None:
        _run_here(tasks, jobs, results, keep, watch)
    else:
        _run_on_ray(tasks, keep, watch)
    return [results[number] for number in range(len(tasks))]


def _run_here(
    tasks: Sequence[Task[T]], jobs: int, results: Mapping[int, T], keep: _Done[T], watch: Callable[[], object]
) -> None:
    context = multiprocessing.get_context("spawn")  # a fork of a process in which torch has run can hang
    others = {child.pid for child in multiprocessing.active_children()}
    lost = 0
    while waiting := {number: task for number, task in enumerate(tasks) if number not in results}:
        with ProcessPoolExecutor(min(jobs, len(waiting)), mp_context=context) as pool:
            before = len(results)
            try:
                running = {pool.submit(_run_locally, task): number for number, task in waiting.items()}
                while running:
                    finished, _ = wait(running, _SECONDS, FIRST_COMPLETED)
                    for future in finished:
                        keep(running[future], future.result())
                        del running[future]
                    watch()
            except BrokenProcessPool as error:  # ends all processes of the pool, whichever of them was killed
                lost = 1 if len(results) > before else lost + 1
                if lost > MOST_LOST:
                    raise lost_workers(
                        [task.name for task in waiting.values()], "fewer --jobs need less memory"
                    ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in multiprocessing.active_children():
                    if child.pid not in others:
                        child.terminate()
                raise


def _run_locally(task: Task[T]) -> T:
    """Run a task in a process of the pool. Ctrl-C reaches whoever asked, too, who then ends this one by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return task.run() if task.folder is None else task.run(task.folder)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_on_ray(tasks: Sequence[Task[T]], keep: _Done[T], watch: Callable[[], object]) -> None:
    ray: Any = cluster()
    contents = {number: _contents(task) for number, task in enumerate(tasks) if task.folder is not None}
    shelf = ray.remote(_Shelf).options(num_cpus=0).remote(contents)
    running = {}
    try:
        for number, task in enumerate(tasks):
            gpus = share_of("GPU", 1) if task.models else 0
            warn_unless_roomy(task.name, task.cpus, gpus)
            kind = ray.remote(
                num_cpus=task.cpus,
                num_gpus=gpus,
                max_retries=MOST_LOST,
                max_calls=1 if task.models else 0,
            )
            running[kind(_run_remotely).remote(task, number, shelf, sys.argv)] = number
        while running:
            with ray_errors(ray, "the cluster", _WAY_ON):
                finished, _ = ray.wait(list(running), timeout=_SECONDS)
                _bring_home(ray, shelf, tasks)
            for reference in finished:
                number = running.pop(reference)
                with ray_errors(ray, tasks[number].name, _WAY_ON):
                    keep(number, ray.get(reference))
            watch()
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            for reference in running:
                ray.cancel(reference)  # which interrupts it, so that it sends what it has, and tidies up
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_CANCEL_SECONDS)
            _bring_home(ray, shelf, tasks)
        ray.kill(shelf)


def _run_remotely(task: Task[T], number: int, shelf: Any, arguments: list[str]) -> T:
    """Run a task on a node of the cluster, in a folder of its own."""
    import ray

    sys.argv = arguments  # runs keep the command that made them
    with named_node():
        if task.folder is None:
            return task.run()
        # The same for all workers of a task, so that the next one on a node removes what a killed one has left.
        folder = Path(tempfile.gettempdir()) / f"specgym-{ray.get_runtime_context().get_task_id()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            _write(folder, ray.get(shelf.contents.remote(number)))
            with _mirrored(folder, task.files, lambda news: ray.get(shelf.put.remote(number, news))):
                return task.run(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _Shelf:
    """Files of all tasks on their way between their folders and the workers; an actor, which outlives the workers."""

    def __init__(self, contents: Mapping[int, Mapping[str, bytes]]) -> None:
        self._contents: dict[int, dict[str, bytes]] = {number: dict(files) for number, files in contents.items()}
        self._news: dict[int, dict[str, bytes | None]] = {}

    def contents(self, number: int) -> Contents:
        """Return the files of a task as they are now."""
        return self._contents[number]

    def put(self, number: int, news: Contents) -> None:
        """Take what a worker has written, or removed, since it last did."""
        self._news.setdefault(number, {}).update(news)
        for name, content in news.items():
            self._contents[number].pop(name, None)
            if content is not None:
                self._contents[number][name] = content

    def take(self) -> Mapping[int, Contents]:
        """Return what is new since this was last called, by the number of the task."""
        news, self._news = self._news, {}
        return news


def _bring_home(ray: Any, shelf: Any, tasks: Sequence[Task[Any]]) -> None:
    for number, news in ray.get(shelf.take.remote()).items():
        folder = tasks[number].folder
        assert folder is not None
        _write(folder, news)


def _write(folder: Path, contents: Contents) -> None:
    """Write files, each whole or not at all, before others are removed."""
    for name, content in contents.items():
        if content is not None:
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
    for name, content in contents.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other files are left in one of them
                for parent in (folder / name).relative_to(folder).parents[:-1]:
                    (folder / parent).rmdir()


def _marks(folder: Path, files: Sequence[str] | None) -> dict[str, tuple[int, int]]:
    """Return the time and the size of each of a task's files, by its name in the folder."""
    marks = {}
    for start in [folder] if files is None else [folder / name for name in files]:
        for path in [start] if start.is_file() else start.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                if path.is_file() and path.suffix != ".tmp":  # of `replacing`, which has not finished them
                    stat = path.stat()
                    marks[path.relative_to(folder).as_posix()] = stat.st_mtime_ns, stat.st_size
    return marks


def _contents(task: Task[Any]) -> dict[str, bytes]:
    assert task.folder is not None
    return {name: (task.folder / name).read_bytes() for name in _marks(task.folder, task.files)}


@contextlib.contextmanager
def _mirrored(folder: Path, files: Sequence[str] | None, send: Callable[[Contents], object]) -> Iterator[None]:
    """Send the files that are written or removed inside, about once a second and at the end."""
    sent, over = _marks(folder, files), threading.Event()

    def look() -> None:
        nonlocal sent
        there = _marks(folder, files)
        news: dict[str, bytes | None] = {}
        for name in [name for name, mark in there.items() if sent.get(name) != mark]:
            try:
                news[name] = (folder / name).read_bytes()
            except FileNotFoundError:
                del there[name]
        news |= dict.fromkeys(sent.keys() - there.keys())
        if news:
            send(news)
        sent = there

    def watch() -> None:
        while not over.wait(_SECONDS):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        look()
