"""Heat maps: what every setting of a grid is worth on held-out prompts, and the way that a policy takes over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specgym.envs import TraceError

from ..experiments.settings import RunSettings
from ..experiments.tune_knobs_settings import KnobSettings
from ..export.knob_policy import ExportedPolicy
from ..export.recommend import followed, load_knobs
from ..report.data import HeatMap
from ..report.heat_maps import save_heat_maps
from ..training.run_folder import RunFolder
from .replayed import Problem, TuningProblemError


def heat_map(problem: Problem, path: Sequence[Mapping[str, float]], recommended: Mapping[str, float]) -> HeatMap:
    """The heat map of a workload.

    Args:
        problem: the workload.
        path: settings that the policy visits, in order, by knob.
        recommended: what it recommends.
    """
    grid = problem.grid()
    return HeatMap(
        problem.name,
        grid.fallback,
        grid.rollback,
        grid.reward,
        [_point(knobs) for knobs in path],
        _point(problem.default),
        _point(recommended),
        _point(grid.best),
    )


def heat_maps_of(
    settings: KnobSettings, policy: ExportedPolicy, recommended: Mapping[str, Mapping[str, float]]
) -> list[HeatMap]:
    """Heat maps of a run of thresholds, by replay, for those of its workloads whose traces ship.

    Args:
        settings: of the run.
        policy: that it has learned.
        recommended: thresholds by workload.
    """
    maps = []
    for name in settings.workloads:
        try:
            problem = Problem(
                name,
                settings.reward,
                tokens=settings.environment.max_new_tokens,
                draft_length=settings.decoder_options["max_draft_length"],
            )
            maps.append(heat_map(problem, [problem.default, *followed(policy, name)], recommended[name]))
        except (TraceError, TuningProblemError):
            continue
    return maps


def save_missing_heat_maps(run: RunFolder, settings: RunSettings, command: str) -> None:
    """Write heat maps into the folder of a run of thresholds that has none, where traces ship for its workloads."""
    path = run.path / "heat_maps.json"
    if path.is_file() or not run.knobs.is_file():
        return
    if not isinstance(settings, KnobSettings) or settings.decoder != "threshold":
        return
    maps = heat_maps_of(settings, ExportedPolicy.load(run.path), load_knobs(run.knobs)["workloads"])
    if maps:
        save_heat_maps(path, maps, command)


def _point(knobs: Mapping[str, float]) -> tuple[float, float]:
    return knobs["fallback"], knobs["rollback"]
