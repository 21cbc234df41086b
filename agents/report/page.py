"""The report as one HTML page that needs nothing else, and its tables as files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from specgym.decoding import write_text

from ..evaluation.heat_map import save_missing_heat_maps
from ..experiments.experiment import load_settings
from ..training.console import console, quieten
from ..training.run_folder import RunFolder, this_command
from .curve_figures import curve_figures
from .data import Report
from .gather import gather
from .heat_figures import describe, heat_legend, heat_map
from .regret_figures import duels, method_curves, overview
from .summary import KINDS
from .tables import NAMES, flat_tables, to_csv
from .views import generic_view, kinds, nested_view, recommended_view, results_view, transfer_views

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
    console.print(f"The report is in {path}, its tables in {path.parent / 'report'}.", soft_wrap=True)
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
    page = rendered(report)
    tables = flat_tables(report)
    for name in NAMES:
        path = folder / TABLES / f"{name}.csv"
        if name in tables:
            write_text(path, to_csv(tables[name]))
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
        "hardware": report.hardware,
        "versions": dict(report.versions),
        "missing": dict(report.missing),
        "protocol": (report.transfer or {}).get("protocol", {}),
        "tables": tables,
    }
    write_text(folder / TABLES / CONTENT, json.dumps(content, ensure_ascii=False) + "\n")
    write_text(folder / PAGE, page)
    return folder / PAGE


def rendered(report: Report) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["bound"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        results=results_view(report.table) if report.table else None,
        recommended=recommended_view(report.recommended) if report.recommended else None,
        heat_legend=Markup(heat_legend("heat-legend")),
        heat_maps=[
            {"title": found.workload, "words": describe(found), "svg": Markup(heat_map(found, f"heat-{place}"))}
            for place, found in enumerate(report.heat_maps)
        ],
        curves=[{"title": drawn.title, "svg": Markup(drawn.svg)} for drawn in curve_figures(report.curves)],
        transfer=[_transfer(report.transfer, kind, place) for place, kind in enumerate(kinds(report))]
        if report.transfer
        else [],
        protocol=nested_view(report.transfer["protocol"], "How the methods were compared.")
        if report.transfer and report.transfer.get("protocol")
        else None,
        patterns=generic_view(report.patterns, "Where the best settings lie.") if report.patterns else None,
        correlations=generic_view(report.correlations, "Rank correlations of the best settings with the workload.")
        if report.correlations
        else None,
        settings=nested_view(report.settings, "Settings of the run."),
        hardware=nested_view(report.hardware, "Hardware on which the table was measured.") if report.hardware else None,
        versions=nested_view(report.versions, "Versions of what wrote this report."),
    )


def _transfer(transfer: Mapping[str, Any], kind: str, place: int) -> dict[str, Any]:
    """What the page shows of one kind of cross-validation."""
    curves = method_curves(transfer["summary"], kind)
    name = f"regret-{place}"
    several = len({number for curve in curves for number in np.unique(curve.measurements)}) > 1
    return {
        "words": KINDS.get(kind, kind),
        "first": curves[0].method,
        "overview": Markup(overview(curves, name)) if several else None,
        "duels": [{"title": other, "svg": Markup(svg)} for other, svg in duels(curves, name)] if several else [],
        "views": transfer_views(transfer, kind),
    }
