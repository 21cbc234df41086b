"""Worlds to learn in, and worlds that are kept apart for judging: by pair, hardware, batch size and temperature."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import LatencyProfile, sensible_deployments

from ..profiles import REFERENCES
from ..recordings.find import recorded_workloads
from ..workloads import workload
from .pool import AcceptancePool
from .worlds import BATCH_SIZES, ENGINE_NAMES, Charges, WorldSampler

HELD_OUT_PAIRS: Final = (
    "smollm2-2l",
    "smollm2-4l",
    "smollm2-lookup",
    "smollm2-ngram",
    "tiny-10m-xs",
    "tiny-10m-lookup",
)
HELD_OUT_CLASSES: Final = ("consumer-gpu",)
HELD_OUT_BATCH_SIZES: Final = (4, 32, 256)
HELD_OUT_TEMPERATURES: Final = (0.7,)
_CONTEXTS = 512, 8192
_EVERY = 7
"""One in so many of the sensible deployments is taken: neighbours differ little."""

Axis = Literal["acceptance", "pair", "hardware", "batch size", "temperature", "all"]
AXES: Final[tuple[Axis, ...]] = ("acceptance", "pair", "hardware", "batch size", "temperature", "all")
"""Things that worlds have and no world of training had: other warps only, or a pair, hardware and so on. Pairs and
temperatures that are held out are as they were recorded, without a warp."""


@dataclass(frozen=True)
class _Workloads:
    """Recorded workloads by what they may be used for."""

    training: tuple[str, ...]
    pair: tuple[str, ...]
    temperature: tuple[str, ...]
    both: tuple[str, ...]

    @classmethod
    @functools.cache
    def shipped(cls) -> _Workloads:
        kinds: dict[tuple[bool, bool], list[str]] = {(pair, hot): [] for pair in (False, True) for hot in (False, True)}
        for name in recorded_workloads("speculative"):
            named = workload(name)
            kinds[str(named.pair) in HELD_OUT_PAIRS, named.sampling.temperature in HELD_OUT_TEMPERATURES].append(name)
        return cls(*(tuple(kinds[key]) for key in ((False, False), (True, False), (False, True), (True, True))))


@functools.cache
def charges() -> Charges:
    """Return the costs of all sensible deployments, and of the chains that were measured for the shipped pairs."""
    files = sorted(path for path in REFERENCES.glob("*.json") if ".mixed." not in path.name)  # of one draft each
    pairs = {workload(name).pair for name in recorded_workloads("speculative")}
    loaded = map(LatencyProfile.load, files)
    profiles = [profile for profile in loaded if profile.kind == "chain" and profile.pair in pairs]
    return Charges.of(sensible_deployments(contexts=_CONTEXTS)[::_EVERY], profiles)


def training_workloads() -> tuple[str, ...]:
    """Return the recorded workloads to learn from: those of no pair or temperature that is held out."""
    return _Workloads.shipped().training


def held_out_workloads() -> tuple[str, ...]:
    """Return the recorded workloads that are kept apart: those of a pair or a temperature that is held out."""
    names = _Workloads.shipped()
    return names.pair + names.temperature + names.both


def training_sampler(
    worlds: int,
    seed: int = 0,
    names: Sequence[str] | None = None,
    engines: tuple[str, ...] = ENGINE_NAMES,
    report: Callable[[int], None] = lambda worlds: None,
) -> WorldSampler:
    """Return what draws worlds to learn in.

    Args:
        worlds: acceptance worlds, warped from recorded workloads.
        seed: fixes them.
        names: of the workloads; by default `training_workloads`.
        engines: to draw from.
        report: called with the number of acceptance worlds decoded so far.
    """
    pool = AcceptancePool.warped(names or training_workloads(), worlds, seed, report)
    return WorldSampler(pool, charges(), _trained_on(), _trained_sizes(), engines)


@dataclass(frozen=True)
class KeptApart:
    """Workloads and deployments that the worlds of an axis are drawn from.

    Attributes:
        names: of the recorded workloads.
        warped: whether acceptance is warped from them, or is as it was recorded.
        deployments: mask of those of `charges`.
        batch_sizes: some of `BATCH_SIZES`.
        engines: some of `ENGINE_NAMES`.
    """

    names: tuple[str, ...]
    warped: bool
    deployments: NDArray[np.bool_]
    batch_sizes: tuple[int, ...]
    engines: tuple[str, ...]

    @classmethod
    def on(cls, axis: Axis) -> KeptApart:
        """Return that of an axis."""
        names, deployments, sizes = _Workloads.shipped(), _trained_on(), _trained_sizes()
        recorded = {"pair": names.pair, "temperature": names.temperature, "all": names.both}
        if axis == "pair":
            deployments |= np.isin(charges().labels, HELD_OUT_PAIRS)
        if axis in ("hardware", "all"):
            deployments = np.isin(charges().classes, HELD_OUT_CLASSES)
        if axis in ("batch size", "all"):
            sizes = HELD_OUT_BATCH_SIZES
        # A batch of one is no new batch size, so engines that know no other have no such worlds.
        engines = ("openvino", "vllm") if axis == "batch size" else ENGINE_NAMES
        return cls(recorded.get(axis, names.training), axis not in recorded, deployments, sizes, engines)


def held_out_sampler(axis: Axis, worlds: int = 120, seed: int = 1_000_000) -> WorldSampler:
    """Return what draws worlds to be judged on.

    Args:
        axis: what they have that no world of training had.
        worlds: acceptance worlds, where they are warped.
        seed: fixes them; another one than that of training.
    """
    kept = KeptApart.on(axis)
    recorded = AcceptancePool.recorded
    pool = AcceptancePool.warped(kept.names, worlds, seed) if kept.warped else recorded(kept.names, seed)
    return WorldSampler(pool, charges(), kept.deployments, kept.batch_sizes, kept.engines)


def _trained_on() -> NDArray[np.bool_]:
    table = charges()
    return ~(np.isin(table.classes, HELD_OUT_CLASSES) | np.isin(table.labels, HELD_OUT_PAIRS))


def _trained_sizes() -> tuple[int, ...]:
    return tuple(size for size in BATCH_SIZES if size not in HELD_OUT_BATCH_SIZES)
