"""Regret against the number of measurements: how far below the grid's best each method stays on unseen workloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from .svg import inline, styled

_LINES = {  # colour, line, marker; "from universal" has the colour of its method and a broken line
    "learned": ("#d55e00", "-", "o"),
    "universal": ("#000000", (0, (5, 2)), "s"),
    "default": ("#767676", (0, (1, 1.5)), "X"),
    "random": ("#56b4e9", "-", "^"),
    "sobol": ("#0072b2", (0, (4, 1.5, 1, 1.5)), "v"),
    "tpe": ("#009e73", "-", "D"),
    "tpe from universal": ("#009e73", (0, (3, 2)), "D"),
    "cma-es": ("#cc79a7", (0, (6, 1.5, 1, 1.5)), "P"),
    "gp": ("#6a3d9a", "-", "h"),
    "gp from universal": ("#6a3d9a", (0, (3, 2)), "h"),
}
_OTHERS = [("#8c6d1f", "-.", "<"), ("#4d4d4d", ":", ">"), ("#1b6b6b", "--", "p"), ("#a03050", "-", "d")]
_LEAST_ON_LOG = 0.02
"""Per cent. With a regret below it, or below 0, a logarithmic axis would show mostly noise."""


@dataclass(frozen=True)
class MethodCurve:
    """Regret of one method, in per cent of the grid's best: arrays of shape (n,), by number of measurements."""

    method: str
    measurements: np.ndarray
    regret: np.ndarray
    low: np.ndarray
    high: np.ndarray


def method_curves(summary: Sequence[Mapping[str, Any]], kind: str) -> list[MethodCurve]:
    """The methods of one kind of cross-validation, the learned one first, then by how they end."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary:
        if row["kind"] == kind:
            rows.setdefault(row["method"], []).append(row)
    found = []
    for method, points in rows.items():
        points = sorted(points, key=lambda row: row["measurements"])
        measurements, fraction, low, high = (
            np.array([row[name] for row in points], np.float64) for name in ("measurements", "fraction", "low", "high")
        )
        found.append(MethodCurve(method, measurements, 100 * (1 - fraction), 100 * (1 - high), 100 * (1 - low)))
    return sorted(found, key=lambda curve: (curve.method != "learned", curve.regret[-1]))


def overview(curves: Sequence[MethodCurve], name: str) -> str:
    """All methods in one drawing, labelled at their ends; the band is that of the first."""
    with styled():
        figure = Figure(figsize=(5.6, 3.6))
        axes = figure.subplots()
        places = _axis(axes, curves)
        for curve in reversed(curves):
            _line(axes, curve, places, band=curve is curves[0])
        _label_ends(axes, curves, places)
        axes.set_xlabel("measurements on the unseen workload")
        axes.set_ylabel("regret (% below the grid's best)")
        return inline(figure, name, "Regret of every method. " + _told(curves))


def duels(curves: Sequence[MethodCurve], name: str) -> list[tuple[str, str]]:
    """The first method against each of the others, all on the same axes: (the other's name, drawing)."""
    first, *others = curves
    drawn = []
    with styled():
        for place, other in enumerate(others):
            figure = Figure(figsize=(2.7, 2.1))
            axes = figure.subplots()
            places = _axis(axes, curves)
            for curve in (other, first):
                _line(axes, curve, places, band=True)
            axes.set_xlabel("measurements")
            axes.set_ylabel("regret (%)")
            drawn.append((other.method, inline(figure, f"{name}-{place}", _told([first, other]))))
    return drawn


def _style(method: str) -> tuple[str, Any, str]:
    return _LINES.get(method) or _OTHERS[sum(method.encode()) % len(_OTHERS)]


def _axis(axes: Axes, curves: Sequence[MethodCurve]) -> dict[float, int]:
    """Even steps for 0, 1, 2, 4, 8 ...; a logarithmic regret where that separates the methods. Returns the places."""
    numbers = sorted({number for curve in curves for number in curve.measurements})
    axes.set_xticks(range(len(numbers)), [f"{number:g}" for number in numbers])
    axes.set_xlim(-0.25, len(numbers) - 0.75)
    regrets = np.concatenate([curve.regret for curve in curves])
    if regrets.min() >= _LEAST_ON_LOG and regrets.max() > 8 * regrets.min():
        axes.set_yscale("log")
        axes.set_ylim(regrets.min() / 1.6, regrets.max() * 1.6)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        lows, highs = (np.concatenate([getattr(curve, end) for curve in curves]) for end in ("low", "high"))
        axes.set_ylim(min(0.0, float(lows.min())), float(highs.max()) * 1.05)
    return {number: place for place, number in enumerate(numbers)}


def _line(axes: Axes, curve: MethodCurve, places: Mapping[float, int], band: bool) -> None:
    colour, line, marker = _style(curve.method)
    along = [places[number] for number in curve.measurements]
    if band:
        least = axes.get_ylim()[0]  # a logarithmic axis has no place for an end below 0
        axes.fill_between(along, np.maximum(curve.low, least), curve.high, color=colour, alpha=0.15, linewidth=0)
    strong = curve.method == "learned"
    axes.plot(
        along, curve.regret, color=colour, linestyle=line, linewidth=2.4 if strong else 1.4, marker=marker,
        markersize=5 if strong else 3.5,
    )  # fmt: skip


def _label_ends(axes: Axes, curves: Sequence[MethodCurve], places: Mapping[float, int]) -> None:
    """Names at the right end of the lines, moved apart where they would overlap, each with a line to its own."""
    to_axes = (axes.transScale + axes.transLimits).transform
    ends = sorted((float(to_axes((0, curve.regret[-1]))[1]), number) for number, curve in enumerate(curves))
    gap = 0.062
    heights = [end for end, _ in ends]
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + gap)
    over = max(heights[-1] - 1.0, 0.0)
    for place in reversed(range(len(heights))):
        ceiling = heights[place + 1] - gap if place + 1 < len(heights) else heights[place] - over
        heights[place] = min(heights[place], ceiling)
    for (end, number), height in zip(ends, heights, strict=True):
        curve = curves[number]
        colour, line, _ = _style(curve.method)
        last = float(axes.transLimits.transform((places[curve.measurements[-1]], 0))[0])
        axes.plot(
            [last + 0.02, 1.06, 1.09], [end, height, height], transform=axes.transAxes, color=colour, linewidth=1,
            linestyle=line, clip_on=False,
        )  # fmt: skip
        axes.text(
            1.1, height, curve.method, transform=axes.transAxes, va="center", fontsize=8.5, color="#222222",
            fontweight="bold" if curve.method == "learned" else "normal",
        )  # fmt: skip


def _told(curves: Sequence[MethodCurve]) -> str:
    ends = (f"{curve.method} {curve.regret[0]:.2g} % to {curve.regret[-1]:.2g} %" for curve in curves)
    return f"From {curves[0].measurements[0]:g} to {curves[0].measurements[-1]:g} measurements: {'; '.join(ends)}."
