"""The folder of a run: what lies where, and which latency profiles its times are charged by."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from specgym.decoding import LatencyProfile, Sampling, measured
from specgym.envs import workload

from ..experiments.settings import TrainSettings
from .console import console
from .files import RunFileError


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads, and put the number back afterwards; 0 leaves it alone."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class RunFolder:
    """Paths within ``runs/<name>/``.

    ==========================================  ============================================================
    ``settings.json``                           the exact configuration
    ``policy.zip``, ``vecnormalize.pkl``        the learned policy for Stable-Baselines3
    ``policy.safetensors``, ``policy.json``     the same policy without any framework (`export.ExportedPolicy`)
    ``knobs.json``                              the recommended knobs
    ``table.json``                              the table on held-out prompts
    ``latency/``                                the latency profile that each workload's time is charged by
    ``checkpoints/``                            what ``--resume`` continues from
    ``tensorboard/``                            event files
    ==========================================  ============================================================
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.policy = path / "policy.zip"
        self.vecnormalize = path / "vecnormalize.pkl"
        self.knobs = path / "knobs.json"
        self.table = path / "table.json"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder of a run that has been started.

        Raises:
            RunFileError: there is none.
        """
        run = cls(path)
        if not run.settings.is_file():
            others = sorted(found.parent.as_posix() for found in path.parent.glob("*/settings.json"))
            hint = f"; there are: {', '.join(others[:8])}" if others else ""
            raise RunFileError(f"{path} is not the folder of a run (it has no settings.json){hint}")
        return run

    def profile_paths(self, settings: TrainSettings) -> list[Path]:
        """Where the latency profile of every workload is kept."""
        return [
            self.path / "latency" / f"{place}-{re.sub(r'[^A-Za-z0-9.@-]+', '_', name)}.json"
            for place, name in enumerate(settings.workloads)
        ]

    def measure_profiles(self, settings: TrainSettings) -> list[Path]:
        """Keep a latency profile for every workload that has none yet, measured once for this hardware.

        Loads every pair into this process; errors as for `load_pair`, `load_prompts` and `LatencyProfile.load`.
        """
        paths = self.profile_paths(settings)
        refreshed: set[tuple[int, Sampling]] = set()
        for name, path in zip(settings.workloads, paths, strict=True):
            found = workload(name)
            pair = found.load()
            found.prompt_ids("train"), found.prompt_ids("test")  # what is wrong with them shows here, in one process
            if path.is_file():
                LatencyProfile.load(path)
                continue
            started = time.perf_counter()
            key = id(pair), found.sampling
            profile = measured(
                pair,
                settings.decoder_name,
                settings.refresh_latency and key not in refreshed,
                sampling=found.sampling,
            )
            refreshed.add(key)
            profile.save(path)
            console.print(
                f"  {name}: {1000 * profile.autoregressive_seconds:.2f} ms/token plain, {_rounds(profile)} "
                f"({time.perf_counter() - started:.0f} s)",
                highlight=False,
                soft_wrap=True,
            )
        return paths


def _rounds(profile: LatencyProfile) -> str:
    """What two rounds cost, in words."""
    if profile.kind == "chain":
        return f"a round of 4 drafted {1000 * profile.round(4):.2f} ms, of 16 {1000 * profile.round(16):.2f} ms"
    return (
        f"a {profile.kind} round that reads 16 tokens {1000 * profile.target(16):.2f} ms, 64 "
        f"{1000 * profile.target(64):.2f} ms"
    )
