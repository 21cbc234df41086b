"""Where the best thresholds lie, and whether the ranges that the reward prefers are good ones.

Asked of the grids on held-out prompts, for several aims: the reward as given, plain speed, and the fastest setting
under a bound on the divergence.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import traits_of, write_json, write_text
from specgym.envs import RewardSettings, preferred_ranges

from .measurements import Floats, Grid
from .replayed import Problem
from .statistics import rank_correlation

BOUNDS = (0.05, 0.1, 0.2)
"""On the mean divergence, for the aims that ask for the fastest setting under one."""
REWARD, SPEED, BOUNDED = "reward", "speed", "speed, divergence at most "
AIMS = (REWARD, SPEED, *(f"{BOUNDED}{bound:g}" for bound in BOUNDS))
PLATEAU = 0.01
"""The plateau is what loses at most this share of the best."""
TOLERATED = 0.03
"""A range serves an aim if some setting in it loses at most this share of the best."""
PREFERRED: Mapping[str, tuple[float, float]] = preferred_ranges(
    RewardSettings(), traits_of("threshold").knobs_without_pair()
)
"""Shares of a knob's upper end: fallback 0.4 to 0.7, rollback 30 to 70 % of the draft length."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Pattern:
    """One workload and one aim.

    Attributes:
        workload: its name.
        pair: its pair's name.
        aim: one of `AIMS`.
        cost_ratio: what one more drafted token adds to a round, over the time per token of plain decoding.
        temperature: of sampling; 0 when greedy.
        default_acceptance: draft acceptance rate at the setting of the grid nearest to the default, 0 to 1.
        best_acceptance: the same at the best setting.
        fallback: of the best setting.
        rollback: of the best setting, in tokens.
        best: reward of the best setting; its speedup, for the other aims.
        speedup: of the best setting.
        divergence: of the best setting.
        fallback_low: least fallback of the plateau, which is what loses at most `PLATEAU`.
        fallback_high: its largest fallback.
        rollback_low: its least rollback, in tokens.
        rollback_high: its largest rollback, in tokens.
        plateau: its share of the grid.
        inside_loss: share of the best that the best setting within the preferred ranges loses; 1 where none of those
            keeps the bound.
        inside_served: whether that is at most `TOLERATED`.
    """

    workload: str
    pair: str
    aim: str
    cost_ratio: float
    temperature: float
    default_acceptance: float
    best_acceptance: float
    fallback: float
    rollback: float
    best: float
    speedup: float
    divergence: float
    fallback_low: float
    fallback_high: float
    rollback_low: float
    rollback_high: float
    plateau: float
    inside_loss: float
    inside_served: bool


@dataclass(frozen=True)
class Correlation:
    """How the best setting goes with a fact about the workload.

    Attributes:
        aim: one of `AIMS`.
        knob: of the best setting.
        fact: of the workload, an attribute of `Pattern`.
        coefficient: Spearman's, -1 to 1.
        workloads: how many.
    """

    aim: str
    knob: str
    fact: str
    coefficient: float
    workloads: int


def patterns(problems: Sequence[Problem]) -> list[Pattern]:
    """A row for each workload and aim; none for a bound that no setting of the grid keeps.

    Args:
        problems: whose test grids to look at.

    Raises:
        TuningProblemError: a reward is not positive.
    """
    return [row for problem in problems for aim in AIMS if (row := _pattern(problem, aim)) is not None]


def correlations(rows: Sequence[Pattern]) -> list[Correlation]:
    """Of the best fallback and rollback with the acceptance rate at the default and the cost ratio, over workloads.

    Args:
        rows: of `patterns`.
    """
    found = []
    for aim in dict.fromkeys(row.aim for row in rows):
        chosen = [row for row in rows if row.aim == aim]
        for knob in ("fallback", "rollback"):
            for fact in ("default_acceptance", "cost_ratio"):
                values = [[getattr(row, name) for row in chosen] for name in (knob, fact)]
                found.append(Correlation(aim, knob, fact, rank_correlation(*values), len(chosen)))
    return found


def verdict(rows: Sequence[Pattern]) -> str:
    """What the rows show of the preferred ranges, in a few sentences.

    Args:
        rows: of `patterns`.
    """
    if not rows:
        return "There is no workload to look for patterns in."
    workloads = len({row.workload for row in rows})
    low, high = PREFERRED["rollback"]
    sentences = [
        f"The preferred ranges are fallback {PREFERRED['fallback'][0]:g} to {PREFERRED['fallback'][1]:g} and rollback "
        f"{100 * low:.0f} to {100 * high:.0f} % of the draft length."
    ]
    for aim in AIMS:
        sentences.append(_of_aim([row for row in rows if row.aim == aim], aim, workloads))
        if aim == REWARD:
            sentences.append("This reward may itself pay for staying inside, so plain speed is the test of the ranges.")
    strongest = max(correlations(rows), key=lambda each: abs(each.coefficient))
    sentences.append(
        f"The strongest rank correlation of a best threshold is that of {strongest.knob} with "
        f"{strongest.fact.replace('_', ' ')}, {strongest.coefficient:+.2f} over {strongest.workloads} workloads, for "
        f"{strongest.aim}."
    )
    return " ".join(sentences)


def _of_aim(rows: Sequence[Pattern], aim: str, workloads: int) -> str:
    """What the rows of one aim show, of so many workloads in all."""
    if not rows:
        return f"For {aim}: no setting keeps the bound on any of the {workloads} workloads."
    served = sum(row.inside_served for row in rows)
    losses = [100 * row.inside_loss for row in rows]
    fallbacks, rollbacks = [row.fallback for row in rows], [row.rollback for row in rows]
    none = workloads - len(rows)
    return (
        f"For {aim}: they hold a setting within {100 * TOLERATED:.0f} % of the best on {served} of {len(rows)} "
        f"workloads, and staying inside loses {np.mean(losses):.1f} % on average and {max(losses):.1f} % at worst; "
        f"the best fallback is {np.median(fallbacks):.2f} in the median ({min(fallbacks):.2f} to "
        f"{max(fallbacks):.2f}), the best rollback {np.median(rollbacks):g} ({min(rollbacks):g} to {max(rollbacks):g})"
        + (f"; on {none} more no setting keeps the bound." if none else ".")
    )


def to_json(rows: Sequence[Pattern]) -> dict[str, Any]:
    """Rows, correlations and verdict, as ``patterns.json`` holds them; numbers rounded to six digits."""
    return {
        "rows": [_rounded(asdict(row)) for row in rows],
        "correlations": [_rounded(asdict(each)) for each in correlations(rows)],
        "verdict": verdict(rows),
    }


def save(folder: Path, rows: Sequence[Pattern]) -> None:
    """Write ``patterns.json`` and ``patterns.csv``.

    Args:
        folder: created if need be.
        rows: of `patterns`.
    """
    write_json(folder / "patterns.json", to_json(rows))
    lines = io.StringIO()
    writer = csv.DictWriter(lines, [field.name for field in fields(Pattern)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rounded(asdict(row)) for row in rows)
    write_text(folder / "patterns.csv", lines.getvalue())


def _pattern(problem: Problem, aim: str) -> Pattern | None:
    grid = problem.grid()
    value = _aimed(problem, grid, aim)
    if not np.isfinite(value).any():
        return None
    row, column = np.unravel_index(int(np.argmax(value)), value.shape)
    best = float(value[row, column])
    rows, columns = np.nonzero(value >= (1 - PLATEAU) * best)
    inside = float(value[_inside(problem, grid)].max(initial=-np.inf))
    loss = min(1 - inside / best, 1.0)
    default = (
        int(np.abs(grid.fallback - problem.default["fallback"]).argmin()),
        int(np.abs(grid.rollback - problem.default["rollback"]).argmin()),
    )
    acceptance = grid.values["draft_acceptance_rate"]
    return Pattern(
        workload=problem.name,
        pair=problem.pair,
        aim=aim,
        cost_ratio=problem.cost_ratio,
        temperature=problem.temperature,
        default_acceptance=float(acceptance[default]),
        best_acceptance=float(acceptance[row, column]),
        fallback=float(grid.fallback[row]),
        rollback=float(grid.rollback[column]),
        best=best,
        speedup=float(grid.values["speedup"][row, column]),
        divergence=float(grid.values["divergence"][row, column]),
        fallback_low=float(grid.fallback[rows.min()]),
        fallback_high=float(grid.fallback[rows.max()]),
        rollback_low=float(grid.rollback[columns.min()]),
        rollback_high=float(grid.rollback[columns.max()]),
        plateau=len(rows) / value.size,
        inside_loss=loss,
        inside_served=loss <= TOLERATED,
    )


def _aimed(problem: Problem, grid: Grid, aim: str) -> Floats:
    """What each setting of the grid is worth for an aim; minus infinity where it breaks the bound."""
    bound = problem.reward.max_divergence if aim == REWARD else None
    if aim.startswith(BOUNDED):
        bound = float(aim.removeprefix(BOUNDED))
    value = grid.reward if aim == REWARD else grid.values["speedup"]
    return value if bound is None else np.where(grid.values["divergence"] <= bound, value, -np.inf)


def _inside(problem: Problem, grid: Grid) -> NDArray[np.bool_]:
    """Which settings of the grid lie within the preferred ranges."""
    within = []
    for knob, values in (("fallback", grid.fallback), ("rollback", grid.rollback)):
        unit = next(one.high for one in problem.knobs if one.name == knob)
        low, high = (unit * end for end in PREFERRED[knob])
        within.append((low - _ROUNDING <= values) & (values <= high + _ROUNDING))
    return within[0][:, None] & within[1]


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
