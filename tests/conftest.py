"""The smallest things that the tests need: random models of every architecture, and toy models that are tables.

The process that hands the tests to others reads this file too, so torch and transformers are imported where they are
needed.
"""

from __future__ import annotations

import atexit
import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too; before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SPECGYM_TIMING_REPEATS", "3")  # latency profiles that only have to be there
os.environ.setdefault("SPECGYM_TIMING_TRIES", "1")  # and not to be right on a busy machine

import pytest

from specgym.decoding.files import cache_folder
from tests.helpers.warm_python import WarmPython

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specgym.decoding.models.joint.passes import Answer, JoinedPasses, Request
    from tests.helpers.table_models import TableModel


def pytest_configure(config: pytest.Config) -> None:
    """Keep what tests measure in a cache of their own: three repeats on a busy machine are no latency to decode by.

    Models, which are large, are the user's.
    """
    if hasattr(config, "workerinput"):  # the process that handed the tests over has made it
        return
    models = cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix="specgym-tests-")
    atexit.register(scratch.cleanup)
    Path(scratch.name, "models").symlink_to(models, target_is_directory=True)
    os.environ["SPECGYM_CACHE"] = scratch.name


def pytest_collection_finish() -> None:
    """Quiet transformers, and leave what was imported out of later collections, which take half a second of a test."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # the heap is large, and most of it lives to the end


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower with more threads, and several test runs may share the machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Server of processes that need not import torch first."""
    server = WarmPython()
    yield server
    server.close()


@pytest.fixture(scope="session")
def small_cluster() -> Iterator[None]:
    """Ray on this machine, with two workers, and two GPUs as far as Ray knows."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
        ray.init("local", num_cpus=2, num_gpus=2, **quiet)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """`random_model`."""
    from tests.helpers.random_models import random_model

    return random_model


@pytest.fixture(scope="session")
def make_noisy() -> Callable[..., PreTrainedModel]:
    """`noisy_copy`."""
    from tests.helpers.random_models import noisy_copy

    return noisy_copy


@pytest.fixture(scope="session")
def make_table() -> Callable[..., TableModel]:
    """A `TableModel` over a `random_table`: arguments of `random_table`, then those of `TableModel` by name."""
    from tests.helpers.table_models import TableModel, random_table

    def make(vocabulary: int, seed: int, spread: float = 1.0, **more: Any) -> TableModel:
        return TableModel(random_table(vocabulary, seed, spread), **more)

    return make


@pytest.fixture(scope="session")
def table_of() -> type[TableModel]:
    """The class `TableModel` itself."""
    from tests.helpers.table_models import TableModel

    return TableModel


@pytest.fixture
def joint_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of texts that were read in one pass each, as they come."""
    from specgym.decoding.models.joint.passes import JoinedPasses

    counts: list[int] = []
    read = JoinedPasses.read

    def counted(self: JoinedPasses, requests: Sequence[Request]) -> list[Answer]:
        counts.append(len(requests))
        return read(self, requests)

    monkeypatch.setattr(JoinedPasses, "read", counted)
    return counts
