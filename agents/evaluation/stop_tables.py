"""The comparison as a table for people, as a file, and as the sentences that say what it shows."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from specgym import __version__
from specgym.decoding import LatencyProfile, write_json

from ..experiments.stop_drafts import StoppingSettings
from ..training.files import RunFileError, read_json
from .stop_results import ALL, GAP, METHODS, RATIO, SIMPLE, Row

FORMAT = "specgym-stopping-table-1"
LEAST_RATIO, LEAST_RATIO_EACH, LEAST_GAP = 1.03, 0.99, 0.30
"""What learning is meant to reach: over the best fixed length on average and on every workload, and of the gap."""


def rendered(rows: Sequence[Row], title: str) -> Table:
    """A rich table with a line for each workload; half the width of the 95 % interval follows a number after ±."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("workload", min_width=14, max_width=26, overflow="fold")
    for heading in ("plain", "fixed", "confi-\ndence", "en-\ntropy", "pro-\nduct", "bandit", "learned", "oracle",
                    "learned\n/ fixed", "gap\nclosed"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True, style="bold" if heading == "learned" else None)
    several = len({row.batch_size for row in rows if row.workload != ALL}) > 1
    for by_method in grouped(rows):
        learned = by_method["learned"]
        if learned.workload == ALL:
            table.add_section()
        name = "mean" if learned.workload == ALL else learned.workload
        table.add_row(
            f"{name} x {learned.batch_size}" if several and learned.batch_size else name,
            *(f"{by_method[method].values['throughput']:.3f}" for method in METHODS[:6]),
            _with_interval(learned, "throughput"),
            f"{by_method['oracle'].values['throughput']:.3f}",
            _with_interval(learned, RATIO),
            f"{learned.values[GAP]:.0%}",
        )
    table.caption = (
        "Tokens over seconds, relative to plain decoding, by replay of the test prompts. Fixed lengths and thresholds "
        "are the best ones on the training prompts; the bandit has decoded those once. Learned is the mean over the "
        "seeds. ± is half a 95 % interval over prompts and seeds."
    )
    return table


def grouped(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """The rows by workload and batch size, in their order, each by method."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.workload, row.batch_size), {})[row.method] = row
    return list(found.values())


def verdict(rows: Sequence[Row]) -> str:
    """Whether learning reaches what it is meant to, where and by how much it falls short, and what does better."""
    *points, mean = grouped(rows)
    learned = mean["learned"].values
    worst = min(points, key=lambda point: point["learned"].values[RATIO])["learned"]
    short = []
    if learned[RATIO] < LEAST_RATIO:
        short.append(f"the mean is {LEAST_RATIO - learned[RATIO]:.3f} below {LEAST_RATIO:.2f}")
    low = sorted(
        (row.values[RATIO], _place(row)) for row in (point["learned"] for point in points)
        if row.values[RATIO] < LEAST_RATIO_EACH
    )  # fmt: skip
    if low:
        short.append(f"below {LEAST_RATIO_EACH:.2f}: " + ", ".join(f"{name} ({ratio:.3f})" for ratio, name in low))
    if learned[GAP] < LEAST_GAP:
        short.append(f"of the gap to the oracle {LEAST_GAP:.0%} was wanted")
    sentence = (
        f"Learned stopping has {learned[RATIO]:.3f} times the throughput of the best fixed length on average, at least "
        f"{worst.values[RATIO]:.3f} times ({_place(worst)}), and closes {learned[GAP]:.0%} of the gap to the oracle. "
    )
    sentence += f"It falls short: {'; '.join(short)}." if short else "All targets are met."
    best = max(SIMPLE[1:], key=lambda method: mean[method].values["throughput"])
    if round(mean[best].values["throughput"] - learned["throughput"], 3) > 0:
        sentence += (
            f" A simple rule is better on average: {best}, {mean[best].values['throughput']:.3f} against "
            f"{learned['throughput']:.3f}."
        )
    beaten = []
    for point in points:
        ahead, method = max((point[name].values["throughput"], name) for name in SIMPLE)
        if round(ahead - point["learned"].values["throughput"], 3) > 0:
            beaten.append(f"{_place(point['learned'])} ({point[method].rule}, {ahead:.3f})")
    if beaten:
        sentence += f" A rule chosen for the workload beats the learned policy on {', '.join(beaten)}."
    return sentence


def save_rows(
    path: Path, rows: Sequence[Row], settings: StoppingSettings, profiles: Sequence[LatencyProfile], command: str
) -> None:
    """Write the table as JSON, atomically, with the command, the hardware and the protocol that made it."""
    content = {
        "format": FORMAT,
        "command": command,
        "hardware": {
            "charged": {name: profile.hardware for name, profile in zip(settings.workloads, profiles, strict=True)},
            "replayed on": {
                "cores": os.cpu_count(),
                "system": f"{platform.system()} {platform.machine()}",
                "python": platform.python_version(),
                "numpy": np.__version__,
                "torch": torch.__version__,
                "specgym": __version__,
            },
        },
        "protocol": {
            "throughput": "all tokens over all seconds, relative to plain decoding, by replay of all test prompts",
            "chosen": "fixed lengths and thresholds on the training prompts, by throughput; the bandit decoded those "
            "once before; the oracle knows what will be accepted",
            "tokens": settings.tokens,
            "passes": f"1 where greedy, {settings.comparison.passes} where sampled",
            "seeds": list(settings.seeds),
            "intervals": f"95 %, bootstrap with {settings.comparison.resamples} resamples over prompts, and for "
            "learned policies over seeds",
        },
        "rows": [row_to_json(row) for row in rows],
        "verdict": verdict(rows),
    }
    write_json(path, content)


def row_to_json(row: Row) -> dict[str, Any]:
    """A row as plain JSON values."""
    return {
        "workload": row.workload,
        "batch_size": row.batch_size,
        "method": row.method,
        "rule": row.rule,
        **row.values,
        "intervals": {name: list(ends) for name, ends in row.intervals.items()},
        **({"by_seed": list(row.by_seed)} if row.by_seed else {}),
    }


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a stored table, as `row_to_json` made them.

    Raises:
        RunFileError: the table is missing, damaged, or of another kind.
    """
    way_out = "write it again with: python train.py --resume <run>"
    content = read_json(path, way_out)
    stored = content.get("rows")
    if content.get("format") != FORMAT or not isinstance(stored, list):
        raise RunFileError(f"{path} does not hold a table of stop rules ({FORMAT}); {way_out}")
    return stored


def differences(rows: Sequence[Row], path: Path) -> list[str]:
    """Where throughputs differ from a stored table's, one line each; none if it is reproduced.

    Raises:
        RunFileError: as for `load_rows`.
    """
    key = ("workload", "batch_size", "method")
    stored: Mapping[tuple[Any, ...], dict[str, Any]] = {
        tuple(row.get(name) for name in key): row for row in load_rows(path)
    }
    found = []
    for row in rows:
        before = stored.get((row.workload, row.batch_size, row.method))
        old, new = None if before is None else before.get("throughput"), row.values["throughput"]
        if old is None:
            found.append(f"{_place(row)}, {row.method}: not in {path}")
        elif abs(old - new) > 1e-9 * abs(new):
            found.append(f"{_place(row)}, {row.method}: throughput was {old}, is {new}")
    return found


def _place(row: Row) -> str:
    return row.workload if row.batch_size in (0, 1) else f"{row.workload} x {row.batch_size}"


def _with_interval(row: Row, column: str) -> str:
    low, high = row.intervals[column]
    return f"{row.values[column]:.3f}±{(high - low) / 2:.3f}"
