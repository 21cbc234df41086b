"""The folder of a run of learning to stop, and what a run learns from: traces, and what time is charged by."""

from __future__ import annotations

import re
import time
from pathlib import Path

from specgym.decoding import LatencyProfile, ModelDrafter, ModelShape, Pair, Sampling, measure, measured, roofline
from specgym.envs import workload

from ..experiments.stop_drafts import StoppingSettings
from ..export.knob_policy import DESCRIPTION_FILE, WEIGHTS_FILE
from .console import console

_ROOFLINE_CONTEXT = 512


class StoppingRun:
    """Paths within ``runs/<name>/``.

    ====================================================  ==========================================================
    ``settings.json``                                     the exact configuration
    ``seed-<n>/policy.zip``                               a learned policy for Stable-Baselines3
    ``seed-<n>/policy.safetensors``, ``policy.json``      the same policy without any framework (`ExportedStopRule`)
    ``table.json``                                        the comparison on test prompts
    ``latency/``                                          the latency profile that each workload's time is charged by
    ``tensorboard/seed-<n>/``                             event files
    ====================================================  ==========================================================
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.table = path / "table.json"

    def policy_folder(self, seed: int) -> Path:
        """Where the policy of a seed is kept."""
        return self.path / f"seed-{seed}"

    def policy(self, seed: int) -> Path:
        """The policy of a seed for Stable-Baselines3."""
        return self.policy_folder(seed) / "policy.zip"

    def learned(self, seed: int) -> bool:
        """Whether the policy of a seed is complete."""
        folder = self.policy_folder(seed)
        return all(file.is_file() for file in (self.policy(seed), folder / WEIGHTS_FILE, folder / DESCRIPTION_FILE))

    def tensorboard(self, seed: int) -> Path:
        """Where the event files of a seed are kept."""
        return self.path / "tensorboard" / f"seed-{seed}"

    def profiles(self, settings: StoppingSettings) -> list[LatencyProfile]:
        """The latency profile of every workload: the one kept here, or else a new one, which is then kept.

        Loads the pairs of new ones; errors as for `load_pair`, `roofline` and `LatencyProfile.load`.
        """
        profiles = []
        # Workloads that share a pair share its profile, or noise would tell them apart.
        new: dict[tuple[str, Sampling], LatencyProfile] = {}
        for place, name in enumerate(settings.workloads):
            path = self.path / "latency" / f"{place}-{re.sub(r'[^A-Za-z0-9.@-]+', '_', name)[-80:]}.json"
            if not path.is_file():
                started = time.perf_counter()
                key = str(workload(name).pair), workload(name).sampling
                if key not in new:
                    new[key] = new_profile(settings, name, refresh=settings.refresh_latency)
                new[key].save(path)
                _tell(name, new[key], time.perf_counter() - started)
            profiles.append(LatencyProfile.load(path))
        return profiles


def new_profile(settings: StoppingSettings, name: str, refresh: bool = False) -> LatencyProfile:
    """What the time of a workload is charged by, at all of the run's batch sizes.

    Args:
        settings: of the run.
        name: of the workload.
        refresh: measure it now, even if the cache has it.
    """
    found = workload(name)
    pair = found.load()
    if settings.hardware is not None:
        return _computed(settings, pair)
    if settings.batch_sizes == (1,):
        return measured(pair, refresh=refresh, sampling=found.sampling)
    return measure(
        pair,
        max_draft_length=settings.max_draft_length,
        sampling=found.sampling,
        batch_sizes=settings.batch_sizes,
    )


def _computed(settings: StoppingSettings, pair: Pair) -> LatencyProfile:
    assert settings.hardware is not None
    draft = ModelShape.of(pair.draft.model.model, name="draft") if isinstance(pair.draft, ModelDrafter) else None
    return roofline(
        ModelShape.of(pair.target.model, name="target"),
        draft,
        settings.hardware,
        max_draft_length=settings.max_draft_length,
        batch_sizes=settings.batch_sizes,
        contexts=(_ROOFLINE_CONTEXT,),
        pair=pair.name,
    )


def _tell(name: str, profile: LatencyProfile, seconds: float) -> None:
    console.print(
        f"  {name}: {1000 * profile.autoregressive_seconds:.2f} ms/token plain, one more drafted token costs "
        f"{profile.marginal_cost():.2f} of that ({seconds:.0f} s)",
        highlight=False,
        soft_wrap=True,
    )
