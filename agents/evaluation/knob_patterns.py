"""Patterns of good settings: where the best knobs lie, and whether the ranges that a reward prefers are good ones.

Asked of the grids on held-out prompts, for several aims: the reward as given, plain speed, and the fastest setting
under a bound on the divergence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specgym.decoding import write_sealed, write_text

from .replayed import Flags, TuningTask
from .results import to_csv
from .statistics import Floats, Grid, rank_correlation, settings_of

FORMAT = "specgym-patterns-1"
"""Format of ``patterns.json``; earlier files have none, and no checksum."""
BOUNDS = (0.05, 0.1, 0.2)
"""On the mean divergence, for the aims that ask for the fastest setting under one."""
REWARD, SPEED, BOUNDED = "reward", "speed", "speed, divergence at most "
AIMS = (REWARD, SPEED, *(f"{BOUNDED}{bound:g}" for bound in BOUNDS))
PLATEAU = 0.01
"""The plateau is what loses at most this share of the best."""
TOLERATED = 0.03
"""A range serves an aim if some setting in it loses at most this share of the best."""
FACTS = ("default_acceptance", "cost_ratio")
"""Facts about a workload that the best knobs are correlated with, attributes of `Pattern`."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Pattern:
    """The best settings of one workload for one aim.

    Attributes:
        workload: its name.
        pair: its pair's name.
        aim: one of `AIMS`.
        cost_ratio: what one more drafted token adds to a round, over the time per token of plain decoding.
        temperature: of sampling; 0 when greedy.
        default_acceptance: draft acceptance rate at the setting of the grid nearest to the default, 0 to 1.
        best_acceptance: the same at the best setting.
        knobs: the best setting.
        best: reward of the best setting; its speedup, for the other aims.
        speedup: of the best setting.
        divergence: of the best setting.
        ends: least and largest value of each knob on the plateau, which is what loses at most `PLATEAU`.
        plateau: its share of the grid.
        inside_loss: share of the best that the best setting within the preferred ranges loses; 1 where none of those
            keeps the bound; None where no knob has a preferred range.
    """

    workload: str
    pair: str
    aim: str
    cost_ratio: float
    temperature: float
    default_acceptance: float
    best_acceptance: float
    knobs: Mapping[str, float]
    best: float
    speedup: float
    divergence: float
    ends: Mapping[str, tuple[float, float]]
    plateau: float
    inside_loss: float | None

    def row(self) -> dict[str, Any]:
        """One plain value a column, rounded to six digits, as files hold it."""
        ends = {
            f"{name}_{end}": value
            for name, pair in self.ends.items()
            for end, value in zip(("low", "high"), pair, strict=True)
        }
        names = ("workload", "pair", "aim", "cost_ratio", "temperature", "default_acceptance", "best_acceptance")
        columns = {name: getattr(self, name) for name in names} | dict(self.knobs)
        columns |= {name: getattr(self, name) for name in ("best", "speedup", "divergence")}
        columns |= ends | {"plateau": self.plateau}
        if self.inside_loss is not None:
            columns |= {"inside_loss": self.inside_loss, "inside_served": self.inside_loss <= TOLERATED}
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in columns.items()}


def patterns(tasks: Sequence[TuningTask]) -> list[Pattern]:
    """A row for each workload and aim; none for a bound that no setting of the grid keeps, or that all keep as the text
    is always the target's own.

    Args:
        tasks: whose test grids to look at.

    Raises:
        TuningTaskError: a reward is not positive.
    """
    return [
        row
        for task in tasks
        for aim in (AIMS if task.grid().values["divergence"].any() else (REWARD, SPEED))
        if (row := _pattern(task, aim)) is not None
    ]


def correlations(rows: Sequence[Pattern]) -> list[dict[str, Any]]:
    """Spearman's rank correlations of the best knobs with `FACTS` over workloads, by aim, knob and fact."""
    entries = []
    for aim in dict.fromkeys(row.aim for row in rows):
        chosen = [row for row in rows if row.aim == aim]
        for knob in chosen[0].knobs:
            values = [row.knobs[knob] for row in chosen]
            for fact in FACTS:
                coefficient = rank_correlation(values, [getattr(row, fact) for row in chosen])
                entry = {"aim": aim, "knob": knob, "fact": fact, "coefficient": round(coefficient, 6)}
                entries.append({**entry, "workloads": len(chosen)})
    return entries


def verdict(rows: Sequence[Pattern], preferred: Mapping[str, tuple[float, float]]) -> str:
    """Findings of the rows, in a few sentences.

    Args:
        rows: of `patterns`.
        preferred: ranges of knobs by name, in their own units.
    """
    if not rows:
        return "There is no workload to look for patterns in."
    workloads = len({row.workload for row in rows})
    ranges = " and ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in preferred.items())
    sentences = [f"The preferred ranges are {ranges}."] if preferred else []
    strayed = any(row.divergence > 0 or row.aim.startswith(BOUNDED) for row in rows)
    for aim in AIMS if strayed else (REWARD, SPEED):
        sentences.append(_of_aim([row for row in rows if row.aim == aim], aim, workloads))
        if aim == REWARD and preferred:
            sentences.append("This reward may itself pay for staying inside, so plain speed is the test of the ranges.")
    strongest = max(correlations(rows), key=lambda entry: abs(entry["coefficient"]))
    sentences.append(
        f"The strongest rank correlation of a best knob is that of {strongest['knob']} with "
        f"{strongest['fact'].replace('_', ' ')}, {strongest['coefficient']:+.2f} over {strongest['workloads']} "
        f"workloads, for {strongest['aim']}."
    )
    return " ".join(sentences)


def save_patterns(folder: Path, tasks: Sequence[TuningTask]) -> None:
    """Write ``patterns.json`` (rows, correlations and verdict) and ``patterns.csv`` into a folder.

    Raises:
        TuningTaskError: a reward is not positive.
    """
    patterned = patterns(tasks)
    rows = [row.row() for row in patterned]
    summary = verdict(patterned, preferred_ranges(tasks[0]) if tasks else {})
    write_text(folder / "patterns.csv", to_csv(rows))
    write_sealed(
        folder / "patterns.json",
        {"format": FORMAT, "rows": rows, "correlations": correlations(patterned), "verdict": summary},
    )


def preferred_ranges(task: TuningTask) -> dict[str, tuple[float, float]]:
    """Ranges of the knobs that a reward prefers by default, in their own units; empty where there are none."""
    return {
        knob.name: (knob.preferred[0] * knob.high, knob.preferred[1] * knob.high)
        for knob in task.knobs
        if knob.preferred is not None
    }


def _of_aim(rows: Sequence[Pattern], aim: str, workloads: int) -> str:
    """Findings of the rows of one aim, among a number of workloads in all."""
    if not rows:
        return f"For {aim}: no setting keeps the bound on any of the {workloads} workloads."
    parts = []
    losses = [100 * row.inside_loss for row in rows if row.inside_loss is not None]
    if losses:
        served = sum(loss <= 100 * TOLERATED for loss in losses)
        parts.append(
            f"they hold a setting within {100 * TOLERATED:.0f} % of the best on {served} of {len(rows)} workloads, and "
            f"staying inside loses {np.mean(losses):.1f} % on average and {max(losses):.1f} % at worst"
        )
    bests = []
    for name in rows[0].knobs:
        values = [row.knobs[name] for row in rows]
        bests.append(f"the best {name} {np.median(values):.3g} in the median ({min(values):.3g} to {max(values):.3g})")
    parts.append(", ".join(bests))
    none = workloads - len(rows)
    if none:
        parts.append(f"on {none} more no setting keeps the bound")
    return f"For {aim}: {'; '.join(parts)}."


def _pattern(task: TuningTask, aim: str) -> Pattern | None:
    grid = task.grid()
    value = _aimed(task, grid, aim)
    if not np.isfinite(value).any():
        return None
    place = np.unravel_index(int(np.argmax(value)), value.shape)
    best = float(value[place])
    plateau = value >= (1 - PLATEAU) * best
    default = tuple(int(np.abs(axis - task.default[name]).argmin()) for name, axis in grid.axes.items())
    inside = _inside(task, grid)
    acceptance = grid.values["draft_acceptance_rate"]
    members = dict(zip(grid.axes, np.nonzero(plateau), strict=True))
    return Pattern(
        workload=task.name,
        pair=task.pair,
        aim=aim,
        cost_ratio=task.cost_ratio,
        temperature=task.temperature,
        default_acceptance=float(acceptance[default]),
        best_acceptance=float(acceptance[place]),
        knobs=settings_of(grid.axes)[int(np.argmax(value))],
        best=best,
        speedup=float(grid.values["speedup"][place]),
        divergence=float(grid.values["divergence"][place]),
        ends={name: (float(axis[members[name].min()]), float(axis[members[name].max()])) for name, axis in
              grid.axes.items()},
        plateau=float(plateau.mean()),
        inside_loss=None if inside is None else min(1 - float(value[inside].max(initial=-np.inf)) / best, 1.0),
    )  # fmt: skip


def _aimed(task: TuningTask, grid: Grid, aim: str) -> Floats:
    """Worth of each setting of the grid for an aim; minus infinity where it breaks the bound."""
    bound = task.reward.max_divergence if aim == REWARD else None
    if aim.startswith(BOUNDED):
        bound = float(aim.removeprefix(BOUNDED))
    value = grid.reward if aim == REWARD else grid.values["speedup"]
    return value if bound is None else np.where(grid.values["divergence"] <= bound, value, -np.inf)


def _inside(task: TuningTask, grid: Grid) -> Flags | None:
    """Which settings of the grid lie within the preferred ranges; None where there are none."""
    preferred = preferred_ranges(task)
    if not preferred:
        return None
    mask = np.ones(grid.reward.shape, np.bool_)
    for place, (name, axis) in enumerate(grid.axes.items()):
        if name in preferred:
            low, high = preferred[name]
            within = (low - _ROUNDING <= axis) & (axis <= high + _ROUNDING)
            mask &= np.expand_dims(within, [other for other in range(mask.ndim) if other != place])
    return mask
