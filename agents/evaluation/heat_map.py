"""Heat maps: what every setting of a grid is worth on held-out prompts, and the way that a policy takes over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specgym.envs import TraceError

from ..experiments.tune_knobs import ThresholdSettings
from ..export.knob_policy import ExportedPolicy
from ..export.recommend import followed
from ..report.data import HeatMap
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
    settings: ThresholdSettings, policy: ExportedPolicy, recommended: Mapping[str, Mapping[str, float]]
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
                tokens=settings.environment.tokens_per_step,
                draft_length=settings.environment.draft_length,
            )
            maps.append(heat_map(problem, [problem.default, *followed(policy, name)], recommended[name]))
        except (TraceError, TuningProblemError):
            continue
    return maps


def _point(knobs: Mapping[str, float]) -> tuple[float, float]:
    return knobs["fallback"], knobs["rollback"]
