"""Heat maps: the reward of every setting of a grid on held-out prompts, and a policy's way over it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specgym.decoding import write_sealed
from specgym.envs import TraceError

from ..experiments.experiment import RunSettings
from ..experiments.tune_knobs_settings import KnobSettings
from ..export.knob_policy import ExportedPolicy
from ..export.recommend import followed, load_knobs
from ..training.environments import recording_path
from ..training.run_folder import RunFileError, RunFolder, read_json
from .replayed import TuningTask, TuningTaskError
from .statistics import Floats, settings_of

FORMAT = "specgym-heat-maps-3"
_EARLIER = ("specgym-heat-maps-2", "specgym-heat-maps-1")  # have no checksum
_OTHER_KEYS = ("workload", "axes", "reward", "path", "default", "recommended", "best")

Point = Mapping[str, float]
"""A setting: values of all knobs by name, in their own units."""


@dataclass(frozen=True, eq=False)
class HeatMap:
    """The reward of every setting of a grid on one workload, and how the policy walks over it.

    Attributes:
        workload: its name.
        axes: increasing values of every knob, by name.
        reward: with an axis for each knob, in their order; NaN where a setting was not tried.
        path: the settings that the policy visits, in order; may be empty.
        default: the decoder's default setting.
        recommended: where the policy settles; None where there is no policy.
        best: the grid's best setting.

    Raises:
        ValueError: the shapes do not fit, or a number in `reward` is infinite or none at all is finite.
    """

    workload: str
    axes: Mapping[str, Floats]
    reward: Floats
    path: Sequence[Point]
    default: Point
    recommended: Point | None
    best: Point

    def __post_init__(self) -> None:
        shape = tuple(len(axis) for axis in self.axes.values())
        if self.reward.shape != shape or 0 in shape or not shape:
            raise ValueError(
                f"the reward of {self.workload} has the shape {self.reward.shape}, but its knobs make {shape}"
            )
        if np.isinf(self.reward).any() or np.isnan(self.reward).all():
            raise ValueError(f"the reward of {self.workload} must be finite, or NaN where a setting was not tried")
        for name, axis in self.axes.items():
            if not (np.diff(axis) > 0).all():
                raise ValueError(f"the values of {name} of {self.workload} must increase")

    def reward_at(self, point: Point) -> float:
        """The reward of the grid's setting next to a point."""
        place = tuple(int(np.abs(axis - point[name]).argmin()) for name, axis in self.axes.items())
        return float(self.reward[place])

    def over(self, *names: str) -> Floats:
        """The reward over some knobs, each in the order of `axes`, with the others where it is best."""
        others = tuple(place for place, name in enumerate(self.axes) if name not in names)
        return np.fmax.reduce(self.reward, axis=others) if others else self.reward

    def views(self) -> list[tuple[str, ...]]:
        """Knobs to draw together: the only one, or every pair of them."""
        return list(itertools.combinations(self.axes, min(2, len(self.axes))))

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for every setting: the workload, the knobs and the reward."""
        return [
            {"workload": self.workload, **setting, "reward": None if np.isnan(reward) else reward}
            for setting, reward in zip(settings_of(self.axes), self.reward.ravel().tolist(), strict=True)
        ]


def heat_map(task: TuningTask, path: Sequence[Point], recommended: Point) -> HeatMap:
    """The heat map of a workload.

    Args:
        task: the workload.
        path: settings that the policy visits, in order.
        recommended: the setting that it recommends.
    """
    grid = task.grid()
    return HeatMap(task.name, grid.axes, grid.reward, [dict(point) for point in path], task.default, recommended,
                   grid.best)  # fmt: skip


def save_heat_maps(path: Path, maps: Sequence[HeatMap], command: str) -> None:
    """Write heat maps as JSON, atomically, with the command that made them."""
    write_sealed(path, {"format": FORMAT, "command": command, "maps": [_to_json(drawn) for drawn in maps]})


def load_heat_maps(path: Path, way_out: str) -> tuple[list[HeatMap], str]:
    """Read what `save_heat_maps` wrote, in this version or an earlier one: the maps, and the command that made them.

    Raises:
        RunFileError: the file is missing, damaged, or of another kind.
    """
    content = read_json(path, way_out, FORMAT)
    maps = content.get("maps")
    if content.get("format") not in (FORMAT, *_EARLIER) or not isinstance(maps, list):
        raise RunFileError(f"{path} does not hold heat maps ({FORMAT}); {way_out}")
    try:
        return [_from_json(entry) for entry in maps], str(content.get("command", ""))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RunFileError(f"{path} is damaged ({type(error).__name__}: {error}); {way_out}") from error


def save_missing_heat_maps(run: RunFolder, settings: RunSettings, command: str) -> None:
    """Write heat maps into the folder of a run of a decoder's knobs that has none, where its workloads replay."""
    path = run.path / "heat_maps.json"
    if path.is_file() or not run.knobs.is_file() or not isinstance(settings, KnobSettings):
        return
    policy, recommended = ExportedPolicy.load(run.first_policy), load_knobs(run.knobs, settings.workloads)["workloads"]
    maps = heat_maps_of(settings, policy, recommended)
    if maps:
        save_heat_maps(path, maps, command)


def heat_maps_of(settings: KnobSettings, policy: ExportedPolicy, recommended: Mapping[str, Point]) -> list[HeatMap]:
    """Heat maps of a run, by replay, for those of its workloads whose recordings are there.

    Args:
        settings: of the run.
        policy: that it has learned.
        recommended: knobs by workload.
    """
    maps = []
    for name in settings.workloads:
        try:
            task = TuningTask(
                name,
                settings.reward,
                settings.decoder,
                options=settings.decoder_options,
                max_new_tokens=settings.environment.max_new_tokens,
                train=recording_path(settings, name, "train"),
                test=recording_path(settings, name, "test"),
            )
            maps.append(heat_map(task, [task.default, *followed(policy, name)], recommended[name]))
        except (TraceError, TuningTaskError):
            continue
    return maps


def _to_json(drawn: HeatMap) -> dict[str, Any]:
    def values(point: Point) -> list[float]:
        return [float(point[name]) for name in drawn.axes]

    return {
        "workload": drawn.workload,
        "axes": {name: axis.tolist() for name, axis in drawn.axes.items()},
        "reward": _without_nan(drawn.reward.tolist()),
        "path": [values(point) for point in drawn.path],
        "default": values(drawn.default),
        "recommended": None if drawn.recommended is None else values(drawn.recommended),
        "best": values(drawn.best),
    }


def _without_nan(value: Any) -> Any:
    """Nested lists of numbers, with None for NaN, which JSON does not have."""
    return [_without_nan(entry) for entry in value] if isinstance(value, list) else None if value != value else value


def _from_json(entry: dict[str, Any]) -> HeatMap:
    # The earlier format had the axes beside the other keys, in the order of the knobs.
    stored = entry.get("axes") or {name: axis for name, axis in entry.items() if name not in _OTHER_KEYS}
    axes = {name: np.array(axis, np.float64) for name, axis in stored.items()}

    def point(values: Sequence[float]) -> dict[str, float]:
        return {name: float(value) for name, value in zip(axes, values, strict=True)}

    return HeatMap(
        workload=str(entry["workload"]),
        axes=axes,
        reward=np.array(entry["reward"], np.float64),  # null becomes NaN
        path=[point(values) for values in entry["path"]],
        default=point(entry["default"]),
        recommended=None if entry["recommended"] is None else point(entry["recommended"]),
        best=point(entry["best"]),
    )
