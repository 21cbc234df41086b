"""Recommended knobs of a policy that moves them: follow it from the defaults until it stays.

Where it stays is what it recommends, or what is better nearby (`nearby`). The state is the knobs and the workload
alone, so no text need be decoded for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specgym.decoding import write_json
from specgym.envs import workload

from ..training.run_folder import RunFileError, read_json
from .knob_policy import ExportedPolicy, KnobRange

FORMAT = "specgym-knobs-1"
STEPS = 200
"""Steps of the deterministic policy, far more than crossing a knob's whole range takes."""
LAST = 40
"""The recommendation is the mean over the last of them, since a policy may settle into a small swing."""


def followed(policy: ExportedPolicy, name: str | None = None) -> list[dict[str, float]]:
    """Path of the deterministic policy over the knobs for a workload, from their defaults, in their own units."""
    values = {knob.name: min(max(knob.default, knob.low), knob.high) for knob in policy.knobs}
    path = []
    for _ in range(STEPS):
        values = policy.step(values, name)
        path.append(values)
    return path


def settle(policy: ExportedPolicy, name: str | None = None) -> dict[str, float]:
    """The knobs where the deterministic policy stays for a workload, in their own units; whole where they must be."""
    path = followed(policy, name)
    return {knob.name: knob.mean([point[knob.name] for point in path[-LAST:]]) for knob in policy.knobs}


def recommend(
    policy: ExportedPolicy,
    workloads: Sequence[str],
    improve: Callable[[str, Mapping[str, float]], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Recommended knobs.

    Args:
        policy: that has learned them.
        workloads: names.
        improve: makes better knobs of a workload from those where the policy stays.

    Returns:
        `workloads`, knobs by workload, and `pairs`, by pair, the mean over the pair's workloads.
    """
    by_workload = {name: settle(policy, name) for name in workloads}
    if improve is not None:
        by_workload = {name: improve(name, values) for name, values in by_workload.items()}
    return {"pairs": by_pair(by_workload, policy.knobs), "workloads": by_workload}


def by_pair(by_workload: Mapping[str, Mapping[str, float]], knobs: Sequence[KnobRange]) -> dict[str, dict[str, float]]:
    """The mean knobs over the workloads of each pair, from those by workload."""
    members: dict[str, list[Mapping[str, float]]] = {}
    for name, values in by_workload.items():
        members.setdefault(str(workload(name).pair), []).append(values)
    return {
        pair: {knob.name: knob.mean([values[knob.name] for values in group]) for knob in knobs}
        for pair, group in members.items()
    }


def save_knobs(path: Path, recommended: Mapping[str, Any]) -> None:
    """Write the result of `recommend` as JSON, atomically."""
    about = (
        "Knobs in their own units. Each workload's are where the deterministic policy stays, followed from the "
        "decoder's defaults, or, where outcomes were replayed, the best recorded setting around that place by the "
        "training prompts; each pair's are the mean over its workloads."
    )
    write_json(path, {"format": FORMAT, "about": about, **recommended})


def load_knobs(path: Path) -> dict[str, Any]:
    """Read what `save_knobs` wrote.

    Raises:
        RunFileError: the file is missing, damaged, or of another kind.
    """
    way_out = "write it again with: python train.py --resume <run>"
    content = read_json(path, way_out)
    if content.get("format") != FORMAT or not all(isinstance(content.get(key), dict) for key in ("pairs", "workloads")):
        raise RunFileError(f"{path} does not hold knobs ({FORMAT}); {way_out}")
    return content
