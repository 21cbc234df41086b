"""The report as one HTML page that needs nothing else, and its tables as files beside it.

Tables of a report's page: rounded, with intervals, the best in bold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from specgym.decoding import write_text

from ..evaluation.heat_map import save_missing_heat_maps
from ..evaluation.results import ALL, LEARNED, RECOMMENDED, Row, to_csv
from ..evaluation.unseen.transfer import LEVEL
from ..experiments.experiment import load_settings
from ..training.run_folder import RunFolder, console, quieten, this_command
from .content import Report, flattened, gather
from .figures import curve_figures, describe, heat_figures, heat_legend, regret_figure
from .summary import BEST, KINDS

_COLUMNS = {  # heading, digits
    "ms_per_token": ("ms per token", 2),
    "speedup": ("speedup", 2),
    "draft_acceptance_rate": ("acceptance rate", 3),
    "mean_acceptance_length": ("tokens per round", 2),
    "divergence": ("divergence", 3),
    "target_tokens_per_token": ("tokens read per token", 2),
    "reward": ("reward", 3),
    "perplexity": ("perplexity under the target", 2),
    "equal_texts": ("texts equal to the target's", 3),
    "bleu": ("BLEU", 1),
    "bleu_change": ("BLEU: change from plain", 1),
    "rouge1": ("ROUGE-1", 1),
    "rouge2": ("ROUGE-2", 1),
    "rougeL": ("ROUGE-L", 1),
    "rougeL_change": ("ROUGE-L: change from plain", 1),
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
    """True for a list of values by long names."""


def results_view(rows: Sequence[Row], caption: str = "") -> View:
    """Every method on every workload's held-out prompts, the means over the workloads first.

    Args:
        rows: of the table.
        caption: how they were measured, where that was not by latency profiles.
    """
    knobs, values = _names(row.knobs for row in rows), _names(row.values for row in rows)
    known = [name for name in _COLUMNS if name in values]
    values = [*known, *(name for name in values if name not in known)]
    rules, aim = any(row.rule for row in rows), next((name for name in ("reward", "speedup") if name in values), "")
    by_workload: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.workload != ALL):
        by_workload.setdefault(row.workload, []).append(row)
    groups = []
    for workload, members in by_workload.items():
        highest = max((row.values.get(aim, -math.inf) for row in members if row.method != BEST), default=-math.inf)
        groups.append(
            Group(
                workload,
                [
                    [
                        Cell(row.method, strong=row.method in (LEARNED, RECOMMENDED), number=False),
                        *([Cell(row.rule or ABSENT.text, number=False)] if rules else []),
                        *(_knob(row.knobs, knob) for knob in knobs),
                        *(_value(row, name, name == aim and row.values.get(name) == highest) for name in values),
                    ]
                    for row in members
                ],
            )
        )
    charged = (
        "Time is charged by latency profiles, except in columns of the clock. Speedup is over plain decoding, by the "
        "target alone."
    )
    caption = (
        f"Held-out prompts. Below a number stands its 95 % interval over prompts. {caption or charged} The highest "
        f"{aim} of each workload is bold."
    )
    headings = (_COLUMNS[name][0] if name in _COLUMNS else name.replace("_", " ") for name in values)
    return View(caption, ["method", *(["rule"] if rules else []), *knobs, *headings], groups)


def recommended_view(recommended: Mapping[str, Mapping[str, Mapping[str, float]]]) -> View:
    """The recommended knobs of every pair, of each of its workloads and, where there is one, for all of them."""
    titles = {"pairs": "pairs of models (mean over their workloads)", "universal": "one for all"}
    knobs = _names(values for group in recommended.values() for values in group.values())
    caption = "Recommended knobs, in their own units"
    if "universal" in recommended:
        caption += (
            "; in the last group one setting for all workloads (universal), and in the last column the share of the "
            "grid's best reward that it loses"
        )
    groups = [
        Group(
            titles.get(kind, kind),
            [[Cell(name, number=False), *(_knob(values, knob, 3) for knob in knobs)] for name, values in group.items()],
        )
        for kind, group in recommended.items()
        if group  # a pair has no knobs where plain decoding is better on all its workloads
    ]
    if not all(set(values) - {"lost_by_universal"} for group in recommended.values() for values in group.values()):
        caption += "; none where plain decoding is better"
    return View(caption + ".", ["", *(knob.replace("_", " ") for knob in knobs)], groups)


def transfer_views(transfer: Mapping[str, Any], kind: str) -> list[View]:
    """Results of each method on unseen workloads: by measurements, by what was left out, tests, settings."""
    summary, results, tests, folds = (
        [row for row in transfer[part] if row["kind"] == kind] for part in ("summary", "results", "tests", "folds")
    )
    most = max(row["measurements"] for row in summary)
    last = sorted((row for row in summary if row["measurements"] == most), key=lambda row: -row["fraction"])
    methods, left_out = [row["method"] for row in last], KINDS.get(kind, kind)
    views = [
        _pivot(
            f"Share of the best reward on the grid that each method reaches on workloads whose {left_out} was left "
            "out, in per cent, by number of measurements. Below stands the 95 % interval. The best of each column is "
            "bold.",
            {(row["method"], f"{row['measurements']:g} measured"): row for row in summary},
            methods,
            [f"{number:g} measured" for number in sorted({row["measurements"] for row in summary})],
        )
    ]
    shares: dict[tuple[str, str], list[float]] = {}
    for row in results:
        if row["measurements"] == most:
            shares.setdefault((row["method"], row["left_out"]), []).append(row["fraction"])
    if shares:
        views.append(
            _pivot(
                f"The same after {most:g} measurements for each {left_out} that was left out: means over its workloads "
                "and over seeds.",
                {key: {"fraction": float(np.mean(values))} for key, values in shares.items()},
                methods,
                list(dict.fromkeys(key[1] for key in shares)),
            )
        )
    if tests:
        caption = (
            f"Paired tests over pairs of models, leaving one {left_out} out. The difference is a share of the grid's "
            "best, with its 95 % interval from low to high; above 0 the method is better than what it is tested "
            f"against. p adjusted is corrected for the number of tests; differences below {LEVEL} are significant."
        )
        views.append(generic_view([_without_kind(row) for row in tests], caption))
    if folds:
        caption = f"The best single setting for all other workloads (universal), by {left_out} left out."
        columns = [
            {"left_out": fold["left_out"], "its workloads": len(fold["workloads"]), **fold["universal"]}
            for fold in folds
        ]
        views.append(generic_view(columns, caption))
    return views


def generic_view(stored: Sequence[Mapping[str, Any]], caption: str) -> View:
    """Rows of any kind, as they are stored; names that stand in words get spaces."""
    rows = [flattened(row) for row in stored]
    names = _names(rows)
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    return View(caption, [name.replace("_", " ").replace(".", ": ") for name in names], [Group("", cells)])


def nested_view(content: Mapping[str, Any], caption: str) -> View:
    """Settings or the like, one dotted name a row."""
    rows = [[Cell(name, number=False), Cell(_cell(value).text, number=False)] for name, value in
            flattened(content).items()]  # fmt: skip
    return View(caption, ["name", "value"], [Group("", rows)], names=True)


def _pivot(
    caption: str, points: Mapping[tuple[str, str], Mapping[str, Any]], methods: Sequence[str], columns: Sequence[str]
) -> View:
    """Shares of the best in per cent, a row a method; the best of each column is bold."""
    best = {column: max(points[key]["fraction"] for key in points if key[1] == column) for column in columns}
    rows = []
    for method in methods:
        cells = [Cell(method, strong=method == LEARNED, number=False)]
        for column in columns:
            point = points.get((method, column))
            if point is None:
                cells.append(ABSENT)
                continue
            note = f"{100 * point['low']:.1f} to {100 * point['high']:.1f}" if "low" in point else ""
            cells.append(Cell(f"{100 * point['fraction']:.1f}", note, point["fraction"] == best[column]))
        rows.append(cells)
    return View(caption, ["method", *columns], [Group("", rows)])


def _names(rows: Any) -> list[str]:
    """The names of all columns, in the order in which rows bring them."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _without_kind(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "kind"}


def _value(row: Row, name: str, strong: bool) -> Cell:
    if name not in row.values:
        return ABSENT
    digits = _COLUMNS[name][1] if name in _COLUMNS else 3
    note = ""
    if name in row.intervals:
        low, high = row.intervals[name]
        note = f"{low:.{digits}f} to {high:.{digits}f}"
    return Cell(f"{row.values[name]:.{digits}f}", note, strong)


def _knob(knobs: Mapping[str, float], name: str, digits: int = 2) -> Cell:
    if name not in knobs:
        return ABSENT
    value = knobs[name]
    return Cell(str(value) if isinstance(value, int) else f"{value:.{digits}f}")


def _cell(value: Any) -> Cell:
    if value is None or value == "":
        return ABSENT
    if isinstance(value, bool):
        return Cell("yes" if value else "no", number=False)
    return Cell(f"{value:.4g}" if isinstance(value, float) else str(value), number=isinstance(value, int | float))


FORMAT = "specgym-report-1"
PAGE, TABLES, CONTENT = "report.html", "report", "report.json"


def report_run(folder: Path) -> Path:
    """Write the report of a run, and say where it is.

    Returns:
        The path of the page.

    Raises:
        RunFileError: the folder is not that of a run, or a file in it is damaged.
    """
    quieten()
    run, command = RunFolder.existing(folder), this_command()
    with console.status("Drawing"):
        save_missing_heat_maps(run, load_settings(run.settings), command)
        path = write_report(gather(folder, command), folder)
    console.print(f"The report is in {path}, its tables in {path.parent / TABLES}.", soft_wrap=True)
    return path


def write_report(report: Report, folder: Path) -> Path:
    """Write ``report.html``, ``report/report.json`` and a ``report/<table>.csv`` for each table that there is.

    Every file is written under another name and then renamed, the page last. Tables of an earlier report that this one
    does not have are removed.

    Args:
        report: what to write.
        folder: of the run.

    Returns:
        The path of the page.
    """
    page, tables = rendered(report), report.flat_tables()
    for name, rows in tables.items():
        path = folder / TABLES / f"{name}.csv"
        if rows:
            write_text(path, to_csv(rows))
        else:
            path.unlink(missing_ok=True)
    content = {
        "format": FORMAT,
        "title": report.title,
        "command": report.command,
        "created": report.created,
        "made_by": dict(report.made_by),
        "summary": list(report.summary),
        "verdict": report.table.verdict,
        "notes": list(report.table.notes),
        "pattern_verdict": report.pattern_verdict,
        "settings": report.settings,
        "hardware": report.table.hardware,
        "versions": dict(report.versions),
        "missing": dict(report.missing),
        "protocol": (report.transfer or {}).get("protocol", {}),
        "tables": {name: rows for name, rows in tables.items() if rows},
    }
    write_text(folder / TABLES / CONTENT, json.dumps(content, ensure_ascii=False) + "\n")
    write_text(folder / PAGE, page)
    return folder / PAGE


def rendered(report: Report) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["bound"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    transfer, hardware = report.transfer or {}, report.table.hardware
    return template.render(
        report=report,
        results=results_view(report.table.rows, report.table.caption) if report.table.rows else None,
        recommended=recommended_view(report.recommended) if report.recommended else None,
        heat_legend=Markup(heat_legend("heat-legend")),
        heat_maps=[
            {"title": title, "words": describe(drawn), "svg": Markup(svg)}
            for place, drawn in enumerate(report.heat_maps)
            for title, svg in heat_figures(drawn, f"heat-{place}")
        ],
        curves=[{"title": title, "svg": Markup(svg)} for title, svg in curve_figures(report.curves)],
        transfer=[_transfer(report, kind, place) for place, kind in enumerate(report.kinds())],
        protocol=nested_view(transfer["protocol"], "How the methods were compared.")
        if transfer.get("protocol")
        else None,
        patterns=generic_view(report.patterns, "Where the best settings lie.") if report.patterns else None,
        correlations=generic_view(report.correlations, "Rank correlations of the best settings with the workload.")
        if report.correlations
        else None,
        settings=nested_view(report.settings, "Settings of the run."),
        hardware=nested_view(hardware, "Hardware on which the table was measured.") if hardware else None,
        versions=nested_view(report.versions, "Versions of what wrote this report."),
    )


def _transfer(report: Report, kind: str, place: int) -> dict[str, Any]:
    """The page's part on one kind of cross-validation."""
    assert report.transfer is not None
    summary = [row for row in report.transfer["summary"] if row["kind"] == kind]
    several = len({row["measurements"] for row in summary}) > 1
    return {
        "words": KINDS.get(kind, kind),
        "overview": Markup(regret_figure(summary, f"regret-{place}")) if several else None,
        "views": transfer_views(report.transfer, kind),
    }
