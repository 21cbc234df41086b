"""Everything that a run's folder holds, read into a report; what it lacks is listed with the way to make it."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import time
from pathlib import Path
from typing import Any

from specgym import __version__

from ..evaluation.results import ResultTable
from ..experiments.experiment import load_settings
from ..export.recommend import load_knobs
from ..training.run_folder import RunFileError, RunFolder, read_json
from .data import CURVES, HARDWARE, HEAT_MAPS, PATTERNS, TABLE, TRANSFER, HeatMap, Report, TableRow
from .events import read_curves
from .heat_maps import load_heat_maps
from .summary import summarise

TRANSFER_FORMAT = "specgym-transfer-1"
HEAT_MAPS_FILE, TRANSFER_FILE, PATTERNS_FILE = "heat_maps.json", "transfer.json", "patterns.json"
THRESHOLDS_WAYS = {
    TABLE: "python train.py --resume {run}",
    HEAT_MAPS: "python evaluate.py {run} --report",
    CURVES: "python train.py --resume {run} --total-timesteps <more>",
    TRANSFER: "python train.py --tuner",
    PATTERNS: "python train.py --tuner",
    HARDWARE: "python train.py --resume {run}",
}
"""The command that makes each section of a run; some belong to another kind of run alone."""
TUNED_WAYS = {section: THRESHOLDS_WAYS[section] for section in (TABLE, CURVES, HARDWARE)}
"""The same for runs of other decoders, whose reports have no section on pairs of thresholds."""
TUNER_WAYS = {
    TABLE: "python train.py --resume {run}",
    HEAT_MAPS: "python evaluate.py {run}",
    CURVES: "python train.py --resume {run} --total-timesteps <more>",
    TRANSFER: "python evaluate.py {run} --transfer",
    PATTERNS: "python evaluate.py {run}",
    HARDWARE: "python train.py --resume {run}",
}
"""The same for runs of ``train.py --tuner``."""
PACKAGES = ("torch", "transformers", "stable-baselines3", "gymnasium", "numpy", "matplotlib")
_TRANSFER_KEYS = {
    "folds": ("kind", "left_out", "workloads", "universal"),
    "results": ("kind", "left_out", "workload", "pair", "method", "seed", "measurements", "knobs", "reward", "best",
                "fraction", "speedup", "divergence", "kept"),
    "summary": ("kind", "method", "measurements", "fraction", "low", "high", "within"),
    "tests": ("kind", "measurements", "method", "against", "difference", "low", "high", "p", "p_adjusted", "wins",
              "units"),
}  # fmt: skip


def gather(run_folder: Path, command: str) -> Report:
    """Read a run's folder.

    Args:
        run_folder: as `train.py` wrote it, with or without what other commands have added.
        command: the one that asked for the report.

    Raises:
        RunFileError: it is not the folder of a run that tunes a decoder, or a file in it is damaged; the message names
            the file.
    """
    run = RunFolder.existing(run_folder)
    stored = read_json(run.settings, "copy it from a backup, or train anew")
    settings = load_settings(run.settings)
    subject, chosen = "stopping of drafts", TUNED_WAYS
    if settings.EXPERIMENT == "tune-knobs":
        subject, chosen = settings.knobs_together, THRESHOLDS_WAYS if settings.decoder == "threshold" else TUNED_WAYS
    elif settings.EXPERIMENT == "tune-unseen":
        subject, chosen = "thresholds", TUNER_WAYS
    ways = {section: way.format(run=shlex.quote(run_folder.as_posix())) for section, way in chosen.items()}
    if not isinstance(stored.get("settings"), dict):
        raise RunFileError(f"{run.settings} does not hold the settings of a run; copy it from a backup, or train anew")
    made_by = {"the run": str(stored.get("command", ""))}
    missing: dict[str, str] = {}

    table: list[TableRow] = []
    hardware: dict[str, Any] = {}
    if run.table.is_file():
        table, hardware, made_by["the table"] = _read_table(run.table, _write_again(ways[TABLE]))
    recommended = _recommended(run.knobs) if run.knobs.is_file() else None
    maps: list[HeatMap] = []
    if (path := run.path / HEAT_MAPS_FILE).is_file():
        maps, made_by["the heat maps"] = load_heat_maps(path, _write_again(ways[HEAT_MAPS]))
    transfer = None
    if (path := run.path / TRANSFER_FILE).is_file():
        transfer = _read_transfer(path, _write_again(ways[TRANSFER]))
        made_by["the generalisation tables"] = str(transfer.get("command", ""))
    patterns: list[dict[str, Any]] | None = None
    correlations: list[dict[str, Any]] = []
    verdict = ""
    if (path := run.path / PATTERNS_FILE).is_file():
        patterns, correlations, verdict = _read_patterns(path, _write_again(ways[PATTERNS]))
    curves = read_curves(run.tensorboard)
    found = {TABLE: table, HEAT_MAPS: maps, CURVES: curves, TRANSFER: transfer, PATTERNS: patterns, HARDWARE: hardware}
    for section, content in found.items():
        if not content and section in ways:
            missing[section] = ways[section]
    return Report(
        title=f"{subject[0].upper()}{subject[1:]} learned in {run.path.resolve().name}",
        command=command,
        created=time.strftime("%Y-%m-%d %H:%M %Z").strip(),
        summary=summarise(table, maps, transfer, subject),
        table=table,
        heat_maps=maps,
        curves=curves,
        transfer=transfer,
        patterns=patterns,
        pattern_verdict=verdict,
        settings=stored["settings"],
        hardware=hardware,
        versions=_versions(),
        missing=missing,
        recommended=recommended,
        correlations=correlations,
        made_by={what: how for what, how in made_by.items() if how},
    )


def _write_again(way: str) -> str:
    return f"remove it and write it again with: {way}"


def _read_table(path: Path, way_out: str) -> tuple[list[TableRow], dict[str, Any], str]:
    table = ResultTable.load(path, way_out)
    rows = [TableRow(row.workload, row.method, row.knobs, row.values, row.intervals) for row in table.rows]
    return rows, dict(table.hardware), table.command


def _read_transfer(path: Path, way_out: str) -> dict[str, Any]:
    content = read_json(path, way_out)
    if content.get("format") != TRANSFER_FORMAT:
        raise RunFileError(f"{path} does not hold a comparison on unseen workloads ({TRANSFER_FORMAT}); {way_out}")
    for part, keys in _TRANSFER_KEYS.items():
        rows = content.get(part)
        if not isinstance(rows, list):
            raise RunFileError(f"{path} is damaged ({part!r} is not a list); {way_out}")
        for place, row in enumerate(rows):
            lacking = [key for key in keys if not isinstance(row, dict) or key not in row]
            if lacking:
                raise RunFileError(f"{path} is damaged ({part}[{place}] lacks {lacking[0]!r}); {way_out}")
            texts = [key for key in ("fraction", "low", "high", "measurements") if isinstance(row.get(key), str)]
            if texts:
                raise RunFileError(f"{path} is damaged ({part}[{place}].{texts[0]} is no number); {way_out}")
    return content


def _read_patterns(path: Path, way_out: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    content = read_json(path, way_out)
    rows, correlations, verdict = content.get("rows"), content.get("correlations", []), content.get("verdict", "")
    if not (
        isinstance(rows, list)
        and isinstance(correlations, list)
        and all(isinstance(row, dict) for row in [*rows, *correlations])
        and isinstance(verdict, str)
    ):
        raise RunFileError(f"{path} does not hold rows of threshold patterns and a verdict; {way_out}")
    return rows, correlations, verdict


def _recommended(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    stored = load_knobs(path)
    found = {kind: stored[kind] for kind in ("pairs", "workloads")}
    if isinstance(stored.get("universal"), dict):
        found["universal"] = {"universal": stored["universal"]}
        losses = stored.get("loss", {})
        found["workloads"] = {
            name: knobs | ({"lost_by_universal": losses[name]} if name in losses else {})
            for name, knobs in found["workloads"].items()
        }
    return found


def _versions() -> dict[str, str]:
    found = {"specgym": __version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}
