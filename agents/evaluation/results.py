"""The table of an experiment: workloads by methods, how it is shown, stored, read and compared."""

from __future__ import annotations

import csv
import io
import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from specgym.decoding import write_sealed

from ..training.run_folder import RunFileError, read_json
from ..training.settings_io import TABLE_FORMAT, Number, current_table, decoded
from .statistics import interval

ALL = "all workloads"
"""`Row.workload` of the means over the workloads."""
PLAIN = "plain"
"""`Row.method` of the target alone."""
LEARNED = "learned"
"""`Row.method` of what was learned."""
RECOMMENDED = "recommended"
"""`Row.method` of the setting to use, where one was searched for."""
RESAMPLES = 1000
SAME = 1e-6
"""Relative difference below which a figure counts as reproduced. Divergences are sums of float32 numbers, whose last
digits depend on where tensors lie in memory; seen were differences of 6e-9."""
_OTHER_KEYS = ("workload", "method", "rule", "knobs", "intervals", "by_seed", "scored")
_MANY_COLUMNS = 9
"""Columns from which on they stand closer, so that a terminal of 100 characters has room for them."""
_RULE_WIDTH = 11
"""Characters in a line of a rule that stands among knobs, whose column would be wider otherwise."""


@dataclass(frozen=True)
class Row:
    """One method on one workload, or on all.

    Attributes:
        workload: its name, or `ALL` for the mean over the workloads.
        method: its name, such as `LEARNED`.
        knobs: settings in use, in their own units, `int` where they are whole numbers; may be empty.
        values: numbers by column; `ResultTable.columns` names those that are shown.
        intervals: 95 % intervals (low, high), by column, where there are any.
        rule: the method's rule in words, where it has no knobs.
        by_seed: the first column of every learned policy, in the order of the seeds, where there are several.
        scored: which of its texts were compared with references, and how, in a sentence; empty where none were.
    """

    workload: str
    method: str
    knobs: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    rule: str = ""
    by_seed: tuple[float, ...] = ()
    scored: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the columns stand beside the names."""
        return {
            "workload": self.workload,
            "method": self.method,
            **({"rule": self.rule} if self.rule else {}),
            "knobs": dict(self.knobs),
            **self.values,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            **({"by_seed": list(self.by_seed)} if self.by_seed else {}),
            **({"scored": self.scored} if self.scored else {}),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Row:
        """Read what `to_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            str(row["workload"]),
            str(row["method"]),
            decoded(Mapping[str, Number], row["knobs"], "knobs"),
            {name: float(value) for name, value in row.items() if name not in _OTHER_KEYS},
            {name: (float(low), float(high)) for name, (low, high) in row["intervals"].items()},
            str(row.get("rule", "")),
            tuple(float(value) for value in row.get("by_seed", ())),
            str(row.get("scored", "")),
        )

    def flat(self) -> dict[str, Any]:
        """One plain value a column, for CSV; the ends of an interval as ``<column>_low`` and ``<column>_high``."""
        ends = {
            f"{column}_{end}": value
            for column, interval in self.intervals.items()
            for end, value in zip(("low", "high"), interval, strict=True)
        }
        rule = {"rule": self.rule} if self.rule else {}
        return {"workload": self.workload, "method": self.method, **rule, **self.knobs, **self.values, **ends}


class Column(NamedTuple):
    """A column of numbers, as `ResultTable.render` shows it."""

    name: str
    """Key of `Row.values`."""
    heading: str
    form: str = ".2f"
    """Format specification."""
    interval: bool = False
    """Show half the width of the 95 % interval after ±."""
    methods: tuple[str, ...] = ()
    """Methods whose numbers stand side by side in the one line of a workload; empty for a line a method."""


@dataclass(frozen=True)
class ResultTable:
    """Rows by workload and method, with what a reader needs to know about them.

    Attributes:
        rows: in order; those of a workload stand together.
        columns: what is shown. Where they name methods, each workload has one line, else each method has one.
        compared: columns that are the same whenever the run is judged again on the same machine.
        verdict: what was learned and which setting to use, in one line or several.
        caption: explanation below the table.
        notes: sentences on this very run that follow the caption, and are stored.
        hardware: the machine that made the numbers.
        protocol: how they were made.
        command: the command that made a stored table.
    """

    rows: Sequence[Row]
    columns: Sequence[Column] = ()
    compared: Sequence[str] = ()
    verdict: str = ""
    caption: str = ""
    hardware: Mapping[str, Any] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    notes: Sequence[str] = ()

    def by_workload(self) -> dict[str, dict[str, Row]]:
        """Rows by workload and method, in their order."""
        groups: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            groups.setdefault(row.workload, {})[row.method] = row
        return groups

    def render(self, title: str) -> Table:
        """A table for the terminal."""
        room = len(self.columns) < _MANY_COLUMNS
        padding = (0, int(room), 0, 0)
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=padding, pad_edge=False)
        wide = any(column.methods for column in self.columns)
        table.add_column("workload" if wide else "workload\n  method", min_width=14, max_width=26, overflow="fold")
        names = next((",\n".join(row.knobs) for row in self.rows if row.knobs), "")
        if names or not wide:
            table.add_column(f"{LEARNED}\n{names}" if wide else names or "rule", justify="right", no_wrap=True)
        for column in self.columns:
            table.add_column(column.heading, justify="right", no_wrap=True)
        for name, methods in self.by_workload().items():
            if table.rows and (not wide or name == ALL):
                table.add_section()
            if wide:
                cells = (_cell(methods, column) for column in self.columns)
                table.add_row(name, *([_setting_of(methods.get(LEARNED))] if names else []), *cells)
                continue
            table.add_row(name)
            for method, row in methods.items():
                cells = (_cell({method: row}, column) for column in self.columns)
                setting = _setting_of(row, _RULE_WIDTH if names else None)
                table.add_row(
                    f"  {method}", setting, *cells, style="bold" if method in (LEARNED, RECOMMENDED) else None
                )
        table.caption = " ".join([self.caption, *self.notes])
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": TABLE_FORMAT,
            "command": self.command,
            "hardware": dict(self.hardware),
            "protocol": {**self.protocol, "charged": list(self.compared)},
            "rows": [row.to_json() for row in self.rows],
            "verdict": self.verdict,
            **({"notes": list(self.notes)} if self.notes else {}),
        }

    def save(self, path: Path, command: str) -> None:
        """Write the table and the command that made it as JSON, atomically."""
        write_sealed(path, replace(self, command=command).to_json())

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ResultTable:
        """Read what `to_json` gave, in this version or an earlier one. Without `columns`: those are not stored.

        Raises:
            ValueError: the content is something else.
        """
        content = current_table(content)
        try:
            protocol = dict(content.get("protocol", {}))
            return cls(
                [Row.from_json(row) for row in content["rows"]],
                compared=tuple(map(str, protocol.pop("charged", ()))),
                verdict=str(content.get("verdict", "")),
                hardware=dict(content["hardware"]),
                protocol=protocol,
                command=str(content["command"]),
                notes=tuple(map(str, content.get("notes", ()))),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"damaged ({type(error).__name__}: {error})") from error

    @classmethod
    def load(cls, path: Path, way_out: str = "write it again with: python train.py --resume <run>") -> ResultTable:
        """Read a stored table.

        Args:
            path: the file.
            way_out: what to do where it is missing or damaged, as the end of a sentence.

        Raises:
            RunFileError: the file is missing, damaged, or holds something else.
        """
        content = read_json(path, way_out, TABLE_FORMAT)
        try:
            return cls.from_json(content)
        except ValueError as error:
            raise RunFileError(f"{path} does not hold a table: {error}; {way_out}") from error

    def differences(self, stored: ResultTable) -> list[str]:
        """Differences of the compared columns from a stored table's, one line each; none if it is reproduced."""
        before = {(row.workload, row.method): row.values for row in stored.rows}
        # A table of an earlier version has not every column of this one.
        compared = [name for name in self.compared if name in (stored.compared or self.compared)]
        lines = []
        for row in self.rows:
            values = before.get((row.workload, row.method))
            if values is None:
                lines.append(f"{row.workload}, {row.method}: not in the stored table")
                continue
            for column in (name for name in compared if name in row.values):
                old, new = values.get(column), row.values[column]
                if old is None or abs(old - new) > SAME * max(1.0, abs(new)):
                    lines.append(f"{row.workload}, {row.method}: {column} was {old}, is {new}")
        return lines

    def to_csv(self) -> str:
        """All rows and columns, nothing rounded."""
        return to_csv([row.flat() for row in self.rows])


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a head; empty where a row has no value."""
    buffer = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def mean_rows(rows: Sequence[Row]) -> list[Row]:
    """A row of means over the workloads for each method; none where there is but one workload.

    A column that some workloads lack is the mean over the others.
    """
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row.method, []).append(row)
    if len({row.workload for row in rows}) < 2:
        return []
    means = []
    for method, same in methods.items():
        values: dict[str, list[float]] = {}
        for row in same:
            for name, value in row.values.items():
                values.setdefault(name, []).append(value)
        means.append(Row(ALL, method, values={name: float(np.mean(known)) for name, known in values.items()}))
    return means


def resampled(prompts: int) -> NDArray[np.int64]:
    """Places of some prompts, each once, and below them resamples for a bootstrap, shape (1 + resamples, prompts).

    There are no resamples of a single prompt.
    """
    once = np.arange(prompts)[None]
    if prompts < 2:
        return once
    return np.concatenate([once, np.random.default_rng(0).integers(prompts, size=(RESAMPLES, prompts))])


def with_intervals(
    columns: Mapping[str, NDArray[np.float64]],
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Numbers by column and their 95 % intervals, where there are resamples.

    Args:
        columns: numbers of each row of `resampled`, by column.
    """
    values = {name: float(column[0]) for name, column in columns.items()}
    return values, {name: interval(column[1:]) for name, column in columns.items() if len(column) > 1}


def kept_bound(rows: Sequence[Row], bound: float) -> str:
    """A sentence on which workloads the learned settings keep a bound on the divergence."""
    learned = [row for row in rows if row.method == LEARNED and row.workload != ALL]
    broken = [row.workload for row in learned if row.values["divergence"] > bound]
    kept = f"{len(learned) - len(broken)} of {len(learned)} workloads"
    sentence = f" The bound of {bound:g} on the divergence is kept on the held-out prompts of {kept}"
    return sentence + (f", not on {', '.join(broken)}." if broken else ".")


def machine() -> dict[str, Any]:
    """The machine that this runs on, beside what a model says of its device."""
    return {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cell(methods: Mapping[str, Row], column: Column) -> str:
    texts = []
    for row in [methods[name] for name in column.methods if name in methods] if column.methods else methods.values():
        value = row.values.get(column.name)
        text = "-" if value is None else format(value, column.form)
        if column.interval and column.name in row.intervals:
            low, high = row.intervals[column.name]
            text += f"±{format((high - low) / 2, column.form.lstrip('+'))}"
        texts.append(text)
    return "  ".join(texts)


def _setting_of(row: Row | None, width: int | None = None) -> str:
    """Knobs, or the rule, of a row in one cell; lines of a rule have at most `width` characters."""
    if row is None:
        return "-"
    values = (str(value) if isinstance(value, int) else f"{value:.2f}" for value in row.knobs.values())
    rule = "\n".join(textwrap.wrap(row.rule, width)) if width else row.rule
    return ", ".join(values) or rule or "-"
