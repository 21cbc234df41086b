"""The report as one HTML page that needs nothing else, and its tables as files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from specgym.decoding import write_text

from ..evaluation.heat_map import save_missing_heat_maps
from ..evaluation.results import to_csv
from ..experiments.experiment import load_settings
from ..training.console import console, quieten
from ..training.run_folder import RunFolder, this_command
from .content import Report, gather
from .figures import curve_figures, describe, heat_figures, heat_legend, regret_figure
from .html_tables import generic_view, nested_view, recommended_view, results_view, transfer_views
from .summary import KINDS

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
        results=results_view(report.table.rows) if report.table.rows else None,
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
