"""Independent tasks in processes of their own, here and on Ray, whose workers are killed while they run.

`pytest -n0 -m ray tests/envs/test_workers.py` runs those on Ray; a plain `pytest` does not.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specgym.decoding import run_command
from specgym.envs import Task, WorkerError, on_ray, run_tasks, share_of
from specgym.envs import record as record_module
from specgym.envs.record import RecordSettings
from specgym.envs.record import main as record
from specgym.envs.workloads import Workload, WorkloadError
from tests.helpers.lost_workers import cards_seen, die, killed_worker, load_pair_of, writing

RECORDED = ["--prompts=5", "--tokens=16", "--detour-prompts=2", "--detour-tokens=8", "--draft-length=4", "--threads=1"]
WORKLOADS = ["tiny-3m-1l/prose", "tiny-3m-1l/code"]


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_once(folder: Path) -> list[Task[int]]:
    """Three parts each; the worker of the first is killed after two, that of the second is not."""
    for name in ("a", "b"):
        (folder / name).mkdir()
    return [writing(folder / "a", 3, killed_at=2), writing(folder / "b", 3)]


def test_a_task_goes_on_from_its_files_when_its_worker_is_killed(tmp_path: Path) -> None:
    finished: list[int] = []
    results = run_tasks(killed_once(tmp_path), 1, lambda number, result: finished.append(number))
    assert results == [2, 0]
    assert sorted(finished) == [0, 1]
    assert written(tmp_path / "a") == written(tmp_path / "b") == ["part-0", "part-1", "part-2"]


def test_a_worker_that_is_always_killed_ends_all_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"^deadly: the worker was lost 4 times, .* fewer --jobs"):
        run_tasks([Task("deadly", die, tmp_path)], 1)


def test_what_a_task_raises_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_tasks([writing(tmp_path / "nowhere", 1)], 1)


def test_ray_that_is_not_installed_is_said_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run_command(lambda: record(["tiny/prose", "--out", str(tmp_path / "traces"), "--ray"])) == 2
    assert 'pip install "specgym[ray]"' in capsys.readouterr().err
    assert not (tmp_path / "traces").exists()


@pytest.mark.parametrize("address", ["nonsense", "foo://x:1", "host:port", "ray://host", "http://127.0.0.1:8265"])
def test_what_is_no_address_is_refused_with_those_that_there_are(address: str) -> None:
    with pytest.raises(WorkerError, match=r"takes auto, local, host:port or ray://host:port, got"), on_ray((address,)):
        raise AssertionError("nothing is run")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_refused_before_ray_tries(scheme: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(WorkerError, match=f"nobody answers at {address}"), on_ray((address,)):
            raise AssertionError("nothing is run")


def test_several_addresses_and_devices_that_ray_assigns_are_refused() -> None:
    with pytest.raises(WorkerError, match="one address, or none"), on_ray(("auto", "local")):
        raise AssertionError("nothing is run")
    with pytest.raises(WorkerError, match="leave out --device cuda:1"):
        record(["tiny/prose", "--device", "cuda:1", "--ray"])


def test_a_recording_among_others_is_the_task_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[Task[Any]] = []

    def small(work: Workload, split: str, path: Path, settings: RecordSettings, progress: bool) -> Any:
        assert (settings.prompts, progress) == (2, False)
        path.touch()
        return SimpleNamespace(text=[7], match=np.ones(1), prompts=1)

    def performed(asked: list[Task[Any]], jobs: int, done: Callable[..., None], watch: Callable[[], None]) -> None:
        assert jobs == 3
        tasks.extend(asked)
        watch()
        done(0, asked[0].run(asked[0].folder))

    monkeypatch.setattr(record_module, "run_tasks", performed)
    monkeypatch.setattr(record_module, "record", small)
    arguments = [*WORKLOADS, "--out", str(tmp_path), "--jobs=3", "--splits=train", "--prompts=2"]
    record(arguments)
    file = "tiny-3m-1l_prose.train.npz"
    assert written(tmp_path) == [file]
    assert [task.name for task in tasks] == WORKLOADS
    assert all(task.models for task in tasks)
    assert tasks[0].files == (file, f"{file}.parts")

    tasks.clear()
    record([*arguments, "--threads=2", "--device=cpu"])
    assert [(task.name, task.cpus, task.models) for task in tasks] == [(WORKLOADS[1], 2, False)]


@pytest.mark.ray
@pytest.mark.usefixtures("small_cluster")
def test_a_task_on_ray_goes_on_from_its_files_when_its_worker_is_killed(tmp_path: Path) -> None:
    tasks = killed_once(tmp_path)
    (tmp_path / "b" / "part-0").write_text("0", encoding="utf-8")
    with on_ray(()):
        assert run_tasks(tasks, 1) == [2, 1]
    assert written(tmp_path / "a") == written(tmp_path / "b") == ["part-0", "part-1", "part-2"]


@pytest.mark.ray
@pytest.mark.usefixtures("small_cluster")
def test_a_worker_on_ray_that_is_always_killed_ends_all_with_its_name(tmp_path: Path) -> None:
    with on_ray(()), pytest.raises(WorkerError, match=r"^deadly: the worker was lost 4 times"):
        run_tasks([Task("deadly", die, tmp_path)], 1)


@pytest.mark.ray
@pytest.mark.usefixtures("small_cluster")
def test_tasks_with_models_have_a_gpu_each(tmp_path: Path) -> None:
    with on_ray(()):
        tasks = [Task(str(number), partial(cards_seen, number, tmp_path), models=True) for number in range(2)]
        assert sorted(run_tasks(tasks, 1)) == ["0", "1"]
        assert [share_of("GPU", processes) for processes in (1, 2, 3, 13)] == [1, 1, 0.5, 0.1428]


@pytest.mark.ray
@pytest.mark.usefixtures("small_cluster")
def test_a_task_that_no_node_has_room_for_is_said_to_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def give_up() -> None:
        raise TimeoutError

    with on_ray(()), pytest.raises(TimeoutError):
        run_tasks([replace(writing(tmp_path, 1), name="vast", cpus=64)], 1, watch=give_up)
    assert "vast waits for a node with 64 CPUs; the cluster has none" in caplog.text


@pytest.mark.ray
@pytest.mark.usefixtures("small_cluster")
def test_what_a_node_lacks_is_said_with_its_name(tmp_path: Path) -> None:
    with (
        on_ray(()),
        pytest.raises(WorkloadError, match=f"no workload 'nowhere/prose'.*on node {socket.gethostname()}"),
    ):
        run_tasks([Task("a", partial(load_pair_of, "nowhere/prose"), tmp_path)], 1)


@pytest.mark.ray
@pytest.mark.usefixtures("small_cluster")
def test_recordings_on_ray_are_those_without_it_though_a_worker_is_killed(tmp_path: Path) -> None:
    record([*WORKLOADS, *RECORDED, "--out", str(tmp_path / "here"), "--jobs=2"])
    parts = partial((tmp_path / "there").glob, "*.parts/*-*.npz")
    with killed_worker(lambda: len(list(parts())) >= 2) as killed:
        record([*WORKLOADS, *RECORDED, "--out", str(tmp_path / "there"), "--ray"])
    assert killed
    assert written(tmp_path / "there") == written(tmp_path / "here")
    for path in (tmp_path / "here").iterdir():
        assert (tmp_path / "there" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.ray
@pytest.mark.usefixtures("small_cluster")
def test_a_recording_on_ray_that_is_terminated_keeps_its_parts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "specgym.envs.record", *WORKLOADS, *RECORDED, "--out", str(tmp_path), "--ray"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("*.parts/*-*.npz")):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143
    assert said.endswith("terminated. The same command goes on from the last complete text.\n")
    assert "Traceback" not in said
    # Parts come home once a second, so a workload may be finished, and its parts be one file, when the signal arrives.
    assert [*tmp_path.glob("*.parts/*-*.npz"), *tmp_path.glob("*.npz")]
