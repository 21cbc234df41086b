"""What a report holds, before any of it is drawn or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Point = tuple[float, float]
"""A setting: fallback and rollback, in their own units."""
Curve = tuple[np.ndarray, np.ndarray]
"""Environment steps and values, both of shape (n,)."""

TABLE, HEAT_MAPS, CURVES, TRANSFER, PATTERNS, HARDWARE = (
    "table",
    "heat_maps",
    "curves",
    "transfer",
    "patterns",
    "hardware",
)
"""Sections that a run may lack: the keys of `Report.missing`."""


@dataclass(frozen=True)
class TableRow:
    """One method on one workload's held-out prompts.

    Attributes:
        workload: its name, or `agents.evaluation.ALL` for the mean over the workloads.
        method: its name, such as ``learned``.
        knobs: those in use, in their own units, `int` where they are whole numbers; may be empty.
        values: by column, in the units of `agents.evaluation.Row`.
        intervals: 95 % intervals (low, high) by column, where there are any.
    """

    workload: str
    method: str
    knobs: Mapping[str, float]
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, eq=False)
class HeatMap:
    """The reward of every setting of a grid on one workload, and how the policy walks over it.

    Attributes:
        workload: its name.
        fallback: the grid's thresholds, increasing, shape (n,), 0 to 1.
        rollback: the grid's thresholds, increasing, shape (m,), in tokens.
        reward: shape (n, m); NaN where a setting was not tried.
        path: the settings that the policy visits, in order; may be empty.
        default: the decoder's default setting.
        recommended: where the policy settles; None where there is no policy.
        best: the grid's best setting.

    Raises:
        ValueError: the shapes do not fit, or a number in `reward` is infinite or none at all is finite.
    """

    workload: str
    fallback: np.ndarray
    rollback: np.ndarray
    reward: np.ndarray
    path: Sequence[Point]
    default: Point
    recommended: Point | None
    best: Point

    def __post_init__(self) -> None:
        shape = (len(self.fallback), len(self.rollback))
        if self.reward.shape != shape or 0 in shape:
            raise ValueError(
                f"the reward of {self.workload} has the shape {self.reward.shape}, but its thresholds make {shape}"
            )
        if np.isinf(self.reward).any() or np.isnan(self.reward).all():
            raise ValueError(f"the reward of {self.workload} must be finite, or NaN where a setting was not tried")
        for name, axis in (("fallback", self.fallback), ("rollback", self.rollback)):
            if not (np.diff(axis) > 0).all():
                raise ValueError(f"the {name} thresholds of {self.workload} must increase")

    def reward_at(self, point: Point) -> float:
        """The reward of the grid's setting next to a point."""
        row = np.abs(self.fallback - point[0]).argmin()
        column = np.abs(self.rollback - point[1]).argmin()
        return float(self.reward[row, column])


@dataclass(frozen=True, eq=False)
class Report:
    """Everything on the page.

    Attributes:
        title: of the page.
        command: the command that wrote the report.
        created: date and time, as text.
        summary: sentences, computed from the rest (`summary.summarise`).
        table: of the held-out prompts; empty where the run has none.
        heat_maps: one a workload; may be empty.
        curves: by TensorBoard tag; may be empty.
        transfer: the content of ``transfer.json``, or None.
        patterns: rows of the analysis of threshold patterns, or None.
        pattern_verdict: what that analysis shows, or nothing.
        settings: of the run, nested.
        hardware: that the table was measured on, nested.
        versions: of the packages that wrote the report, by name.
        missing: for each section that the run lacks, how to make it.
        recommended: knobs, ``{"pairs": {pair: knobs}, "workloads": {workload: knobs}}`` and, where there
            is one for all, ``"universal": {name: knobs}``; or None.
        correlations: rows of rank correlations of good thresholds with the workloads; may be empty.
        made_by: the commands that made what the report shows, by what they made.
    """

    title: str
    command: str
    created: str
    summary: Sequence[str]
    table: Sequence[TableRow]
    heat_maps: Sequence[HeatMap]
    curves: Mapping[str, Curve]
    transfer: Mapping[str, Any] | None
    patterns: Sequence[Mapping[str, Any]] | None
    pattern_verdict: str
    settings: Mapping[str, Any]
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    missing: Mapping[str, str]
    recommended: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None
    correlations: Sequence[Mapping[str, Any]] = ()
    made_by: Mapping[str, str] = field(default_factory=dict)
