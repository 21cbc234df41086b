"""The tables of a report as people read them: rounded, with intervals, the best in bold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.results import ALL
from .data import Report, TableRow
from .summary import BEST, KINDS, LEARNED, SIGNIFICANT
from .tables import columns, flattened

_COLUMNS = {  # heading, digits
    "ms_per_token": ("ms per token", 2),
    "speedup": ("speedup", 2),
    "draft_acceptance_rate": ("acceptance rate", 3),
    "mean_acceptance_length": ("tokens per round", 2),
    "divergence": ("divergence", 3),
    "target_tokens_per_token": ("tokens read per token", 2),
    "reward": ("reward", 3),
    "share_of_best": ("share of the grid's best", 3),
    "wall_ms_per_token": ("clock: ms per token", 2),
    "wall_speedup": ("clock: speedup", 2),
}


@dataclass(frozen=True)
class Cell:
    """A text, with a smaller one beneath it; numbers stand to the right."""

    text: str
    note: str = ""
    strong: bool = False
    number: bool = True


ABSENT = Cell("-")


@dataclass(frozen=True)
class Group:
    """Rows that belong together and are printed on one page; a title, or none."""

    title: str
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class View:
    """A table for the page."""

    caption: str
    head: Sequence[str]
    groups: Sequence[Group]
    names: bool = False
    """Whether it lists values by long names."""


def results_view(table: Sequence[TableRow]) -> View:
    """Every method on every workload's held-out prompts."""
    knobs = columns([row.knobs for row in table])
    values = [name for name in _COLUMNS if any(name in row.values for row in table)]
    by_workload: dict[str, list[TableRow]] = {}
    for row in sorted(table, key=lambda row: row.workload != ALL):  # the means stand first
        by_workload.setdefault(row.workload, []).append(row)
    groups = []
    for workload, rows in by_workload.items():
        highest = max((row.values.get("reward", -math.inf) for row in rows if row.method != BEST), default=-math.inf)
        groups.append(
            Group(
                workload,
                [
                    [
                        Cell(row.method, strong=row.method == LEARNED, number=False),
                        *(_knob(row.knobs, knob, 2) for knob in knobs),
                        *(_value(row, name, name == "reward" and row.values.get(name) == highest) for name in values),
                    ]
                    for row in rows
                ],
            )
        )
    caption = (
        "Held-out prompts. Below a number stands its 95 % interval over prompts. Time is charged by latency profiles, "
        "except in columns of the clock. Speedup is over plain (autoregressive) decoding. The highest reward of each "
        "workload is bold."
    )
    return View(caption, ["method", *knobs, *(_COLUMNS[name][0] for name in values)], groups)


def recommended_view(recommended: Mapping[str, Mapping[str, Mapping[str, float]]]) -> View:
    """The recommended knobs of every pair, and of each of its workloads."""
    knobs = columns([values for group in recommended.values() for values in group.values()])
    titles = {
        "pairs": "pairs of models (mean over their workloads)",
        "workloads": "workloads",
        "universal": "one for all",
    }
    return View(
        "Recommended knobs, in their own units; in the last group one setting for all workloads (universal), and "
        "in the last column the share of the grid's best reward that it loses."
        if "universal" in recommended
        else "Recommended knobs, in their own units.",
        ["", *(knob.replace("_", " ") for knob in knobs)],
        [
            Group(
                titles.get(kind, kind),
                [
                    [Cell(name, number=False), *(_knob(values, knob, 3) for knob in knobs)]
                    for name, values in group.items()
                ],
            )
            for kind, group in recommended.items()
        ],
    )  # fmt: skip


def transfer_views(transfer: Mapping[str, Any], kind: str) -> list[View]:
    """How well each method serves unseen workloads: by measurements, by what was left out, tests, settings."""
    summary = [row for row in transfer["summary"] if row["kind"] == kind]
    results = [row for row in transfer["results"] if row["kind"] == kind]
    tests = [row for row in transfer["tests"] if row["kind"] == kind]
    folds = [fold for fold in transfer["folds"] if fold["kind"] == kind]
    views = [_summary_view(summary, kind)]
    if results:
        views.append(_left_out_view(results, [row["method"] for row in _ordered(summary)], kind))
    if tests:
        views.append(_tests_view(tests, kind))
    if folds:
        views.append(_folds_view(folds, kind))
    return views


def _ordered(summary: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows at the most measurements, best first."""
    most = max(row["measurements"] for row in summary)
    return sorted((row for row in summary if row["measurements"] == most), key=lambda row: -row["fraction"])


def _summary_view(summary: Sequence[Mapping[str, Any]], kind: str) -> View:
    numbers = sorted({row["measurements"] for row in summary})
    best = {number: max(row["fraction"] for row in summary if row["measurements"] == number) for number in numbers}
    rows = []
    for last in _ordered(summary):
        of = {row["measurements"]: row for row in summary if row["method"] == last["method"]}
        cells = [
            Cell(_percent(of[number]["fraction"]), _interval(of[number]), of[number]["fraction"] == best[number])
            if number in of else ABSENT
            for number in numbers
        ]  # fmt: skip
        rows.append([_method(last["method"]), *cells, Cell(_percent(last["within"]))])
    caption = (
        f"Share of the best reward on the grid that each method reaches on workloads whose {KINDS.get(kind, kind)} was "
        f"left out, by number of measurements. Below stands the 95 % interval. The best of each column is bold. The "
        f"last column: the share of pairs on which it comes within 3 % of the grid's best after {numbers[-1]:g}."
    )
    return View(caption, ["method", *(f"{number:g} measured" for number in numbers), "within 3 %"], [Group("", rows)])


def _left_out_view(results: Sequence[Mapping[str, Any]], methods: Sequence[str], kind: str) -> View:
    most = max(row["measurements"] for row in results)
    shares: dict[str, dict[str, list[float]]] = {}
    for row in results:
        if row["measurements"] == most:
            shares.setdefault(row["left_out"], {}).setdefault(row["method"], []).append(row["fraction"])
    rows = []
    for left_out, by_method in shares.items():
        means = {method: float(np.mean(values)) for method, values in by_method.items()}
        best = max(means.values())
        cells = [
            Cell(f"{100 * means[name]:.1f}", "", means[name] == best) if name in means else ABSENT for name in methods
        ]
        rows.append([Cell(left_out, number=False), *cells])  # fmt: skip
    caption = (
        f"The same after {most:g} measurements for each {KINDS.get(kind, kind)} that was left out, in per cent: means "
        "over its workloads and over seeds. The best of each row is bold."
    )
    return View(caption, ["left out", *methods], [Group("", rows)])


def _tests_view(tests: Sequence[Mapping[str, Any]], kind: str) -> View:
    rows = [
        [
            Cell(f"{test['measurements']:g}"),
            Cell(f"{test['method']} against {test['against']}", number=False),
            Cell(f"{100 * test['difference']:+.2f}", f"{100 * test['low']:+.2f} to {100 * test['high']:+.2f}"),
            Cell(_small(test["p"])),
            Cell(_small(test["p_adjusted"]), strong=test["p_adjusted"] < SIGNIFICANT),
            Cell(f"{test['wins'] * test['units']:.0f} of {test['units']:g} pairs"),
        ]
        for test in tests
    ]
    caption = (
        f"Paired tests over pairs of models, leaving one {KINDS.get(kind, kind)} out. The difference is in percentage "
        f"points of the grid's best, with its 95 % interval; above 0 the first method is better. Corrected p values "
        f"below {SIGNIFICANT} are bold."
    )
    return View(caption, ["measured", "methods", "difference", "p", "p, corrected", "first is better"],
                [Group("", rows)])  # fmt: skip


def _folds_view(folds: Sequence[Mapping[str, Any]], kind: str) -> View:
    knobs = columns([fold["universal"] for fold in folds])
    rows = [
        [
            Cell(str(fold["left_out"]), number=False),
            Cell(f"{len(fold['workloads'])}"),
            *(_knob(fold["universal"], knob, 2) for knob in knobs),
        ]
        for fold in folds
    ]
    caption = f"The best single setting for all other workloads (universal), by {KINDS.get(kind, kind)} left out."
    return View(caption, ["left out", "its workloads", *knobs], [Group("", rows)])


def generic_view(stored: Sequence[Mapping[str, Any]], caption: str) -> View:
    """Rows of any kind, as they are stored; names that stand in words get spaces."""
    rows = [flattened(row) for row in stored]
    names = columns(rows)
    return View(
        caption,
        [name.replace("_", " ").replace(".", ": ") for name in names],
        [Group("", [[_any(row.get(name)) for name in names] for row in rows])],
    )


def nested_view(content: Mapping[str, Any], caption: str) -> View:
    """Settings or the like, one dotted name a row."""
    rows = [[Cell(name, number=False), Cell(_told(value), number=False)] for name, value in flattened(content).items()]
    return View(caption, ["name", "value"], [Group("", rows)], names=True)


def kinds(report: Report) -> list[str]:
    """What was left out in turn, in the order of the comparison."""
    return list(dict.fromkeys(row["kind"] for row in report.transfer["summary"])) if report.transfer else []


def _value(row: TableRow, name: str, strong: bool) -> Cell:
    if name not in row.values:
        return ABSENT
    digits = _COLUMNS[name][1]
    note = ""
    if name in row.intervals:
        low, high = row.intervals[name]
        note = f"{low:.{digits}f} to {high:.{digits}f}"
    return Cell(f"{row.values[name]:.{digits}f}", note, strong)


def _knob(knobs: Mapping[str, float], name: str, digits: int) -> Cell:
    if name not in knobs:
        return ABSENT
    value = knobs[name]
    return Cell(str(value) if isinstance(value, int) else f"{value:.{digits}f}")


def _method(name: str) -> Cell:
    return Cell(name, strong=name == LEARNED, number=False)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(row: Mapping[str, Any]) -> str:
    return f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"


def _small(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _any(value: Any) -> Cell:
    return Cell(_told(value), number=isinstance(value, int | float) and not isinstance(value, bool))


def _told(value: Any) -> str:
    if value is None or value == "":
        return ABSENT.text
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
