"""The tables of a report as flat rows, for CSV and JSON: nothing rounded, one value a column."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .data import Report

FlatRow = dict[str, Any]
NAMES = (
    "table", "recommended", "heat_maps", "policy_paths", "curves", "transfer_summary", "transfer_tests",
    "transfer_folds", "transfer_results", "patterns", "correlations",
)  # fmt: skip
"""Every table that a report may have."""


def flat_tables(report: Report) -> dict[str, list[FlatRow]]:
    """The tables that a report has, by one of `NAMES`."""
    transfer = report.transfer or {}
    tables: dict[str, Iterable[FlatRow]] = {
        "table": (_table_row(row) for row in report.table),
        "recommended": (
            {"of": kind.removesuffix("s"), "name": name, **knobs}
            for kind, group in (report.recommended or {}).items()
            for name, knobs in group.items()
        ),
        "heat_maps": (
            {"workload": found.workload, "fallback": fallback, "rollback": rollback, "reward": _number(reward)}
            for found in report.heat_maps
            for fallback, rewards in zip(found.fallback.tolist(), found.reward, strict=True)
            for rollback, reward in zip(found.rollback.tolist(), rewards, strict=True)
        ),
        "policy_paths": (
            {"workload": found.workload, "step": step, "fallback": fallback, "rollback": rollback}
            for found in report.heat_maps
            for step, (fallback, rollback) in enumerate(found.path)
        ),
        "curves": (
            {"tag": tag, "step": _number(step), "value": _number(value)}
            for tag, (steps, values) in report.curves.items()
            for step, value in zip(steps, values, strict=True)
        ),
        **{
            f"transfer_{part}": (flattened(row) for row in transfer.get(part, ()))
            for part in ("summary", "tests", "folds", "results")
        },
        "patterns": (flattened(row) for row in report.patterns or ()),
        "correlations": (flattened(row) for row in report.correlations),
    }  # fmt: skip
    made = {name: list(tables[name]) for name in NAMES}
    return {name: rows for name, rows in made.items() if rows}


def flattened(row: Mapping[str, Any]) -> FlatRow:
    """A row with nested objects under dotted names, and lists of plain values as one text."""
    found: FlatRow = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": entry for inner, entry in flattened(value).items()}
        elif isinstance(value, list | tuple):
            found[name] = ", ".join(str(entry) for entry in value)
        else:
            found[name] = value
    return found


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all columns, in the order in which rows bring them."""
    return list(dict.fromkeys(name for row in rows for name in row))


def to_csv(rows: Sequence[FlatRow]) -> str:
    """Rows as CSV with a head; empty where a row has no value."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _table_row(row: Any) -> FlatRow:
    ends = {
        f"{column}_{end}": value
        for column, interval in row.intervals.items()
        for end, value in zip(("low", "high"), interval, strict=True)
    }
    return {"workload": row.workload, "method": row.method, **row.knobs, **row.values, **ends}


def _number(value: np.float64) -> float | int | None:
    """A plain number; a whole one without its point, and nothing for NaN."""
    if math.isnan(value):
        return None
    return int(value) if float(value).is_integer() else float(value)
