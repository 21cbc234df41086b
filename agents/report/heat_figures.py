"""Heat maps of the reward over the two thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .data import HeatMap, Point
from .svg import inline, styled

_HALO, _INK = "white", "black"
_MARKS = {  # shape, size, colour; dark edges and light faces show on every colour of the map
    "default": ("s", 6.5, "white"),
    "recommended": ("*", 13, "#ff5f00"),
    "grid's best": ("P", 8.5, "#56b4e9"),
}


def heat_map(found: HeatMap, name: str) -> str:
    """The reward by colour, the policy's path as a line with dots, and the settings that matter as marks."""
    with styled():
        figure = Figure(figsize=(3.5, 2.75))
        axes = figure.subplots()
        axes.grid(False)
        axes.set_facecolor("#d0d0d0")
        cells = axes.pcolormesh(
            found.rollback,
            found.fallback,
            np.ma.masked_invalid(found.reward),
            cmap="cividis",
            shading="nearest",
            rasterized=True,  # hundreds of paths in each of dozens of figures would make the page too large
        )
        bar = figure.colorbar(cells, ax=axes, pad=0.02, aspect=25)
        bar.set_label("reward")
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(MaxNLocator(5))
        _draw_path(axes, found.path)
        for label, point in _points(found):
            shape, size, colour = _MARKS[label]
            axes.plot(
                point[1], point[0], shape, markersize=size, color=colour, markeredgecolor=_INK, markeredgewidth=1,
                clip_on=False, zorder=5,
            )  # fmt: skip
        axes.set_xlabel("rollback (tokens)")
        axes.set_ylabel("fallback (probability)")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return inline(figure, name, describe(found))


def describe(found: HeatMap) -> str:
    """The settings that matter and their rewards on the grid, in words."""
    told = [
        f"{label} ({point[0]:.2f}, {point[1]:.1f}): {found.reward_at(point):.3f}" for label, point in _points(found)
    ]
    moves = max(len(found.path) - 1, 0)
    walk = f" The policy makes {moves} moves." if moves else " No path of a policy is known."
    return f"Reward at (fallback, rollback): {'; '.join(told)}.{walk}"


def heat_legend(name: str) -> str:
    """What the line and the marks of every heat map mean."""
    with styled():
        figure = Figure(figsize=(5.2, 0.32))
        handles = [
            Line2D([], [], linestyle="", marker=shape, markersize=size, color=colour, markeredgecolor=_INK, label=label)
            for label, (shape, size, colour) in _MARKS.items()
        ]
        path = Line2D([], [], color=_INK, linewidth=1.3, marker="o", markersize=3, markerfacecolor=_HALO)
        path.set_label("path of the policy")
        figure.legend(handles=[path, *handles], loc="center", ncols=4, frameon=False, handletextpad=0.4)
        return inline(figure, name, "Legend: a line with dots is the path of the policy; a white square is the "
                      "default, an orange star the recommended setting, a blue plus the grid's best.")  # fmt: skip


def _draw_path(axes: Axes, path: Sequence[Point]) -> None:
    if len(path) < 2:
        return
    fallback, rollback = zip(*path, strict=True)
    axes.plot(rollback, fallback, color=_HALO, linewidth=3, zorder=3, solid_joinstyle="round")
    axes.plot(
        rollback, fallback, color=_INK, linewidth=1.3, marker="o", markersize=2.6, markerfacecolor=_HALO,
        markeredgewidth=0.6, zorder=4,
    )  # fmt: skip


def _points(found: HeatMap) -> list[tuple[str, Point]]:
    points = [("default", found.default), ("grid's best", found.best)]
    return points if found.recommended is None else [*points[:1], ("recommended", found.recommended), *points[1:]]
