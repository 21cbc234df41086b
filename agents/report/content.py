"""Content of a report: everything that a run's folder holds, and for what it lacks the command that makes it."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import re
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specgym import __version__

from ..evaluation.heat_map import HeatMap, load_heat_maps
from ..evaluation.knob_patterns import FORMAT as PATTERNS_FORMAT
from ..evaluation.results import ResultTable
from ..evaluation.unseen.transfer import EARLIER as EARLIER_TRANSFER
from ..evaluation.unseen.transfer import FORMAT as TRANSFER_FORMAT
from ..experiments.experiment import load_settings
from ..export.recommend import load_knobs
from ..training.run_folder import RunFileError, RunFolder, read_json
from ..training.settings_io import SETTINGS_FORMAT
from .summary import summarise

TABLE, HEAT_MAPS, CURVES, TRANSFER, PATTERNS, HARDWARE = (
    "table", "heat_maps", "curves", "transfer", "patterns", "hardware"
)  # fmt: skip
"""Sections that a run may lack: the keys of `Report.missing`."""
_NUMBERS = ("fraction", "low", "high", "within", "measurements")
LONGEST_CURVE = 500
"""Points of a curve: a longer one is averaged over blocks of equal length."""

Curve = tuple[np.ndarray, np.ndarray]
"""Environment steps and values, both of shape (n,)."""
FlatRow = dict[str, Any]

_WAYS = {
    TABLE: "python train.py --resume {run}",
    CURVES: "python train.py --resume {run} --total-timesteps <more>",
    HARDWARE: "python train.py --resume {run}",
}
"""The command that makes each section of a run."""
_FURTHER_WAYS = {
    "tune-knobs": {
        HEAT_MAPS: "python evaluate.py {run} --report",
        TRANSFER: "python train.py --tuner",
        PATTERNS: "python train.py --tuner",
    },
    "tune-unseen": {
        HEAT_MAPS: "python train.py --resume {run}",
        TRANSFER: "python evaluate.py {run} --transfer",
        PATTERNS: "python train.py --resume {run}",
    },
}
"""Commands for sections that only some experiments have, by `RunSettings.EXPERIMENT`."""
_PACKAGES = ("torch", "transformers", "stable-baselines3", "gymnasium", "numpy", "matplotlib")
_TRANSFER_KEYS = {
    "folds": ("kind", "left_out", "workloads", "universal"),
    "results": ("kind", "left_out", "workload", "pair", "method", "seed", "measurements", "knobs", "reward", "best",
                "fraction", "speedup", "divergence", "kept"),
    "summary": ("kind", "method", "measurements", "fraction", "low", "high", "within"),
    "tests": ("kind", "measurements", "method", "against", "difference", "low", "high", "p", "p_adjusted", "wins",
              "units"),
}  # fmt: skip
_OVERALL = re.compile(r"(reward|decoding|knobs|policy|eval|rollout|plateau|entropy|bound|train)/[^/]+")
_BY_WORKLOAD = re.compile(
    r"workload/.+/(reward/total|decoding/(speedup|divergence|draft_acceptance_rate))|bound/multiplier/.+"
)


@dataclass(frozen=True, eq=False)
class Report:
    """Everything on the page.

    Attributes:
        title: of the page.
        command: the command that wrote the report.
        created: date and time, as text.
        summary: sentences, computed from the rest (`summary.summarise`).
        table: of the held-out prompts; without rows where the run has none.
        heat_maps: one a workload; may be empty.
        curves: by TensorBoard tag; may be empty.
        transfer: the content of ``transfer.json``, or None.
        patterns: rows of the analysis of good settings, or None.
        correlations: rows of rank correlations of good settings with the workloads; may be empty.
        pattern_verdict: what that analysis shows, or nothing.
        recommended: knobs, ``{"pairs": {pair: knobs}, "workloads": {workload: knobs}}`` and, where there is one for
            all, ``"universal": {name: knobs}``; or None.
        settings: of the run, nested.
        versions: of the packages that wrote the report, by name.
        missing: for each section that the run lacks, how to make it.
        made_by: the commands that made what the report shows, by what they made.
    """

    title: str
    command: str
    created: str
    summary: Sequence[str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    missing: Mapping[str, str]
    table: ResultTable = field(default_factory=lambda: ResultTable([]))
    heat_maps: Sequence[HeatMap] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    transfer: Mapping[str, Any] | None = None
    patterns: Sequence[Mapping[str, Any]] | None = None
    correlations: Sequence[Mapping[str, Any]] = ()
    pattern_verdict: str = ""
    recommended: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None
    made_by: Mapping[str, str] = field(default_factory=dict)

    def kinds(self) -> list[str]:
        """Kinds of things left out, in the order of the comparison."""
        return list(dict.fromkeys(row["kind"] for row in self.transfer["summary"])) if self.transfer else []

    def flat_tables(self) -> dict[str, list[FlatRow]]:
        """All tables that there are, as flat rows for CSV and JSON: nothing rounded, one value a column."""
        transfer = self.transfer or {}
        tables: dict[str, Iterable[FlatRow]] = {
            "table": (row.flat() for row in self.table.rows),
            "recommended": (
                {"of": kind.removesuffix("s"), "name": name, **knobs}
                for kind, group in (self.recommended or {}).items()
                for name, knobs in group.items()
            ),
            "heat_maps": (row for drawn in self.heat_maps for row in drawn.rows()),
            "policy_paths": (
                {"workload": drawn.workload, "step": step, **point}
                for drawn in self.heat_maps
                for step, point in enumerate(drawn.path)
            ),
            "curves": (
                {"tag": tag, "step": int(step), "value": value}
                for tag, (steps, values) in self.curves.items()
                for step, value in zip(steps.tolist(), values.tolist(), strict=True)
            ),
            **{
                f"transfer_{part}": (flattened(row) for row in transfer.get(part, ()))
                for part in ("summary", "tests", "folds", "results")
            },
            "patterns": (flattened(row) for row in self.patterns or ()),
            "correlations": (flattened(row) for row in self.correlations),
        }
        return {name: list(rows) for name, rows in tables.items()}


def gather(run_folder: Path, command: str) -> Report:
    """Read a run's folder.

    Args:
        run_folder: as `train.py` wrote it, with or without what other commands have added.
        command: the one that asked for the report.

    Raises:
        RunFileError: it is not the folder of a run, or a file in it is damaged; the message names the file.
    """
    run = RunFolder.existing(run_folder)
    settings = load_settings(run.settings)
    stored = read_json(run.settings, "copy it from a backup, or train anew", SETTINGS_FORMAT)
    ways = {
        section: way.format(run=shlex.quote(run_folder.as_posix()))
        for section, way in (_WAYS | _FURTHER_WAYS.get(settings.EXPERIMENT, {})).items()
    }
    made_by = {"the run": str(stored.get("command", ""))}
    sections: dict[str, Any] = {CURVES: read_curves(run.tensorboard), HARDWARE: None}
    if run.table.is_file():
        table = ResultTable.load(run.table, _again(ways[TABLE]))
        sections |= {TABLE: table, HARDWARE: table.hardware}
        made_by["the table"] = table.command
    if (path := run.path / "heat_maps.json").is_file():
        sections[HEAT_MAPS], made_by["the heat maps"] = load_heat_maps(path, _again(ways.get(HEAT_MAPS, "")))
    if (path := run.path / "transfer.json").is_file():
        sections[TRANSFER] = _read_transfer(path, _again(ways.get(TRANSFER, "")))
        made_by["the generalisation tables"] = str(sections[TRANSFER].get("command", ""))
    correlations: list[dict[str, Any]] = []
    pattern_verdict = ""
    if (path := run.path / "patterns.json").is_file():
        sections[PATTERNS], correlations, pattern_verdict = _read_patterns(path, _again(ways.get(PATTERNS, "")))
    table, maps = sections.get(TABLE, ResultTable([])), sections.get(HEAT_MAPS, [])
    try:
        summary = summarise(table, maps, sections.get(TRANSFER), subject(settings))
    except (KeyError, TypeError) as error:  # rows that their writer never wrote
        raise RunFileError(f"the files of {run.path} do not fit each other: a row lacks {error}") from error
    return Report(
        title=f"{subject(settings).capitalize()} learned in {run.path.resolve().name}",
        command=command,
        created=time.strftime("%Y-%m-%d %H:%M %Z").strip(),
        summary=summary,
        settings=stored["settings"],
        versions=versions(),
        missing={section: way for section, way in ways.items() if not sections.get(section)},
        table=table,
        heat_maps=maps,
        curves=sections[CURVES],
        transfer=sections.get(TRANSFER),
        patterns=sections.get(PATTERNS),
        correlations=correlations,
        pattern_verdict=pattern_verdict,
        recommended=_recommended(run.knobs) if run.knobs.is_file() else None,
        made_by={what: how for what, how in made_by.items() if how},
    )


def subject(settings: Any) -> str:
    """Subject of a run, in words."""
    if hasattr(settings, "decoder"):
        return f"{settings.decoder} knobs"
    return {"choose-drafts": "choice of drafts"}.get(settings.EXPERIMENT, "stopping of drafts")


def flattened(row: Mapping[str, Any]) -> FlatRow:
    """A row with nested objects under dotted names, and lists of plain values as one text."""
    flat: FlatRow = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": entry for inner, entry in flattened(value).items()}
        else:
            flat[name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return flat


def read_curves(folder: Path) -> dict[str, Curve]:
    """The scalars in TensorBoard's event files that say how learning went, by tag; none where there is no such file.

    A value logged twice for a step (by a run that was resumed) counts as it was logged last. Curves of several
    policies, which have a folder each, have the folder's name before their tag.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # a run that was resumed is told of as out of order

    curves = {}
    for file in sorted({path.parent for path in folder.glob("**/events.out.tfevents.*")}):
        prefix = "" if file == folder else f"{file.relative_to(folder).as_posix()}/"
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in sorted(events.Tags()["scalars"]):
            if _OVERALL.fullmatch(tag) or _BY_WORKLOAD.fullmatch(tag):
                last = {event.step: event.value for event in events.Scalars(tag)}
                points = np.array([(step, last[step]) for step in sorted(last)], np.float64)
                points = points[np.isfinite(points[:, 1])]
                if len(points):
                    curves[prefix + tag] = shortened(points[:, 0], points[:, 1])
    return curves


def shortened(steps: np.ndarray, values: np.ndarray, longest: int = LONGEST_CURVE) -> Curve:
    """A curve of at most `longest` points: means over blocks where there are more, placed at their last step."""
    if len(steps) <= longest:
        return steps, values
    starts = np.linspace(0, len(steps), longest, endpoint=False).astype(np.int64)
    ends = np.append(starts[1:], len(steps))
    return steps[ends - 1], np.add.reduceat(values, starts) / (ends - starts)


def _again(way: str) -> str:
    return f"remove it and write it again with: {way}" if way else "remove it"


def _read_transfer(path: Path, way_out: str) -> dict[str, Any]:
    content = read_json(path, way_out, TRANSFER_FORMAT)
    if content.get("format") not in (TRANSFER_FORMAT, EARLIER_TRANSFER):
        raise RunFileError(f"{path} does not hold a comparison on unseen workloads ({TRANSFER_FORMAT}); {way_out}")
    for part, keys in _TRANSFER_KEYS.items():
        rows = content.get(part)
        if not isinstance(rows, list):
            raise RunFileError(f"{path} is damaged ({part!r} is not a list); {way_out}")
        for place, row in enumerate(rows):
            lacking = [key for key in keys if not isinstance(row, dict) or key not in row]
            if lacking:
                raise RunFileError(f"{path} is damaged ({part}[{place}] lacks {lacking[0]!r}); {way_out}")
            others = [key for key in _NUMBERS if key in row and not isinstance(row[key], int | float)]
            if others:
                raise RunFileError(f"{path} is damaged ({part}[{place}].{others[0]} is no number); {way_out}")
    return content


def _read_patterns(path: Path, way_out: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    content = read_json(path, way_out, PATTERNS_FORMAT)
    rows, correlations, verdict = content.get("rows"), content.get("correlations", []), content.get("verdict", "")
    if not (
        isinstance(rows, list)
        and isinstance(correlations, list)
        and all(isinstance(row, dict) for row in [*rows, *correlations])
        and isinstance(verdict, str)
    ):
        raise RunFileError(f"{path} does not hold rows of patterns and a verdict; {way_out}")
    return rows, correlations, verdict


def _recommended(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    stored = load_knobs(path)
    groups = {
        kind: {name: knobs or {} for name, knobs in stored[kind].items()}  # none where plain decoding is better
        for kind in ("pairs", "workloads")
    }
    if isinstance(stored.get("universal"), dict):
        groups["universal"] = {"universal": stored["universal"]}
        of_pairs = stored.get("by_pair", {})
        losses = stored.get("loss", {}) | {pair: values["universal_loss"] for pair, values in of_pairs.items()}
        for kind in ("pairs", "workloads"):
            groups[kind] = {
                name: groups[kind].get(name, {}) | ({"lost_by_universal": losses[name]} if name in losses else {})
                for name in (dict.fromkeys([*groups[kind], *of_pairs]) if kind == "pairs" else groups[kind])
            }
    return groups


def versions() -> dict[str, str]:
    """Return the versions of the packages that write a report, by name."""
    ours = {"specgym": __version__, "python": platform.python_version()}
    return ours | {name: importlib.metadata.version(name) for name in _PACKAGES}
