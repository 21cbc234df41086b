"""Heat maps of the reward as a file of the run: ``heat_maps.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specgym.decoding import write_json

from ..training.run_folder import RunFileError, read_json
from .data import HeatMap, Point

FORMAT = "specgym-heat-maps-1"


def save_heat_maps(path: Path, maps: Sequence[HeatMap], command: str) -> None:
    """Write heat maps as JSON, atomically, with the command that made them."""
    write_json(path, {"format": FORMAT, "command": command, "maps": [_to_json(found) for found in maps]})


def load_heat_maps(path: Path, way_out: str) -> tuple[list[HeatMap], str]:
    """Read what `save_heat_maps` wrote: the maps, and the command that made them.

    Raises:
        RunFileError: the file is missing, damaged, or of another kind.
    """
    content = read_json(path, way_out)
    maps = content.get("maps")
    if content.get("format") != FORMAT or not isinstance(maps, list):
        raise RunFileError(f"{path} does not hold heat maps ({FORMAT}); {way_out}")
    try:
        return [_from_json(entry) for entry in maps], str(content.get("command", ""))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunFileError(f"{path} is damaged ({type(error).__name__}: {error}); {way_out}") from error


def _to_json(found: HeatMap) -> dict[str, Any]:
    return {
        "workload": found.workload,
        "fallback": [float(value) for value in found.fallback],
        "rollback": [float(value) for value in found.rollback],
        "reward": [[None if math.isnan(value) else float(value) for value in row] for row in found.reward],
        "path": [list(point) for point in found.path],
        "default": list(found.default),
        "recommended": None if found.recommended is None else list(found.recommended),
        "best": list(found.best),
    }


def _from_json(entry: dict[str, Any]) -> HeatMap:
    return HeatMap(
        workload=str(entry["workload"]),
        fallback=np.array(entry["fallback"], np.float64),
        rollback=np.array(entry["rollback"], np.float64),
        reward=np.array(entry["reward"], np.float64),  # null becomes NaN
        path=[_point(point) for point in entry["path"]],
        default=_point(entry["default"]),
        recommended=None if entry["recommended"] is None else _point(entry["recommended"]),
        best=_point(entry["best"]),
    )


def _point(values: Sequence[float]) -> Point:
    fallback, rollback = values
    return float(fallback), float(rollback)
