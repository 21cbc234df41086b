"""Figures of a report as SVG: the reward over knobs, learning curves, and regret on unseen workloads."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from ..evaluation.heat_map import HeatMap, Point
from .content import Curve

Svg = tuple[str, str]
"""A title, and a drawing."""

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, searchable, and sharp in print
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": 9,
    "text.parse_math": False,  # names may hold a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
}
_KNOB = re.compile(r"(?:seed-\d+/)?(knobs/[^/]+)")
_TAG = re.compile(r"<[^>]+>")  # texts hold no bare < or >, they are escaped
_NAME = re.compile(r"""(\bid="|href="#|url\(#)""")
_BLUE, _INK = "#0072b2", "black"
_MARKS = {  # shape, size, colour; dark edges and light faces show on every colour of the map
    "default": ("s", 6.5, "white"),
    "recommended": ("*", 13, "#ff5f00"),
    "grid's best": ("P", 8.5, "#56b4e9"),
}
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
_LEAST_ON_LOG = 0.02
"""Per cent. With a regret below it, or below 0, a logarithmic axis would show mostly noise."""
_CURVES = {
    "reward/total": "Reward",
    "rollout/ep_rew_mean": "Sum of an episode's rewards",
    "decoding/speedup": "Speedup over plain decoding",
    "decoding/divergence": "Divergence from the target (0 to 1)",
    "decoding/draft_acceptance_rate": "Draft acceptance rate (0 to 1)",
    "eval/mean_reward": "Sum of an episode's rewards, held-out prompts",
    "train/learning_rate": "Learning rate",
    "entropy/coefficient": "Entropy coefficient",
    "bound/kept": "Share of workloads under the divergence bound",
    "bound/multiplier": "Multiplier of the divergence bound",
}


def heat_figures(drawn: HeatMap, name: str) -> list[Svg]:
    """The reward over the knobs: a curve of one knob, a map of two, of more a map of every pair of them.

    A map of a pair shows the best reward over the other knobs. The policy's path is a line with dots.

    Args:
        drawn: one workload.
        name: unique among the figures of the page.
    """
    figures = []
    for place, names in enumerate(drawn.views()):

        def draw(axes: Axes, names: tuple[str, ...] = names) -> None:
            _draw_reward(axes, drawn, names)

        title = drawn.workload if len(drawn.axes) < 3 else f"{drawn.workload}: {' and '.join(names)}"
        figures.append((title, _svg(draw, (3.5, 2.75), f"{name}-{place}", describe(drawn))))
    return figures


def describe(drawn: HeatMap) -> str:
    """The settings that matter and their rewards on the grid, in words."""
    names = ", ".join(drawn.axes)
    parts = [
        f"{label} ({', '.join(f'{point[name]:.3g}' for name in drawn.axes)}): {drawn.reward_at(point):.3f}"
        for label, point in _points(drawn)
    ]
    moves = max(len(drawn.path) - 1, 0)
    walk = f" The policy makes {moves} moves." if moves else " No path of a policy is known."
    return f"Reward at ({names}): {'; '.join(parts)}.{walk}"


def heat_legend(name: str) -> str:
    """Explain the line and the marks of the reward over knobs."""

    def draw(axes: Axes) -> None:
        axes.set_axis_off()
        handles = [
            Line2D([], [], linestyle="", marker=shape, markersize=size, color=colour, markeredgecolor=_INK, label=label)
            for label, (shape, size, colour) in _MARKS.items()
        ]
        path = Line2D([], [], color=_INK, linewidth=1.3, marker="o", markersize=3, markerfacecolor="white")
        path.set_label("path of the policy")
        axes.legend(handles=[path, *handles], loc="center", ncols=4, frameon=False, handletextpad=0.4)

    return _svg(draw, (5.2, 0.32), name, "Legend: a line with dots is the path of the policy; a white square is the "
                "default, an orange star the recommended setting, a blue plus the grid's best.")  # fmt: skip


def curve_figures(curves: Mapping[str, Curve]) -> list[Svg]:
    """A small figure for each quantity that was logged at least twice and, if a setting, ever changed.

    The line is the mean over the workloads, or over the policies where several were learned, the band spans the middle
    half of them.
    """
    tags = sorted({knob[1] for name in curves if (knob := _KNOB.fullmatch(name))})
    titles = _CURVES | {tag: f"{tag.removeprefix('knobs/').replace('_', ' ').capitalize()} in use" for tag in tags}
    figures = []
    for tag, title in titles.items():
        parts = [
            curve
            for name, curve in sorted(curves.items())
            if (name.endswith(f"/{tag}") or name.startswith(f"{tag}/")) and len(curve[0]) > 1
        ]
        whole = curves.get(tag)
        if whole is None and parts:
            steps = max((part[0] for part in parts), key=len)
            whole = steps, np.mean(_on(steps, parts), axis=0)
        if whole is None or len(whole[0]) < 2:
            continue
        if tag in ("train/learning_rate", "entropy/coefficient") and np.ptp(whole[1]) == 0:
            continue
        figures.append((title, _curve_figure(title, tag, whole, parts)))
    return figures


def regret_figure(summary: Sequence[Mapping[str, Any]], name: str) -> str:
    """Regret of every method, in per cent of the grid's best, by number of measurements; the band is the first one's.

    Args:
        summary: rows of `comparison.Summary` of one kind of cross-validation, as they are stored.
        name: unique among the figures of the page.
    """
    numbers = sorted({row["measurements"] for row in summary})
    rows = {(row["method"], row["measurements"]): row for row in summary}
    methods = dict.fromkeys(row["method"] for row in summary)
    regret = {
        method: {n: 100 * (1 - rows[method, n]["fraction"]) for n in numbers if (method, n) in rows}
        for method in methods
    }
    order = sorted(methods, key=lambda method: (method != "learned", list(regret[method].values())[-1]))
    ends = (
        f"{method} {min(regret[method].items())[1]:.2g} % to {max(regret[method].items())[1]:.2g} %" for method in order
    )

    def draw(axes: Axes) -> None:
        axes.set_xticks(range(len(numbers)), [f"{number:g}" for number in numbers])
        values = np.array([value for points in regret.values() for value in points.values()])
        if values.min() >= _LEAST_ON_LOG and values.max() > 8 * values.min():
            axes.set_yscale("log")
            axes.set_ylim(values.min() / 1.6, values.max() * 1.6)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_formatter(NullFormatter())
        least = axes.get_ylim()[0] if axes.get_yscale() == "log" else -np.inf
        for method in order:
            colour, line, marker = _LINES.get(method, ("#8c6d1f", "-.", "<"))
            along, strong = [numbers.index(n) for n in regret[method]], method == order[0]
            if strong:
                low, high = ([100 * (1 - rows[method, n][end]) for n in regret[method]] for end in ("high", "low"))
                axes.fill_between(along, np.maximum(low, least), high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                along, list(regret[method].values()), color=colour, linestyle=line, linewidth=2.4 if strong else 1.4,
                marker=marker, markersize=5 if strong else 3.5, label=method, zorder=3 if strong else 2,
            )  # fmt: skip
        axes.set_xlabel("measurements on the unseen workload")
        axes.set_ylabel("regret (% below the grid's best)")
        axes.figure.legend(loc="outside right center", frameon=False)

    return _svg(draw, (6.4, 3.6), name, f"Regret of every method. From {numbers[0]} to {numbers[-1]} measurements: "
                f"{'; '.join(ends)}.")  # fmt: skip


def _svg(draw: Callable[[Axes], None], size: tuple[float, float], name: str, description: str) -> str:
    """A drawing as an ``<svg>`` element for a page, as wide as the page lets it.

    Args:
        draw: draws into the only axes of a figure.
        size: of the figure, in inches.
        name: letters, digits and hyphens; no other figure of the page may have it, since all share one space of ids.
        description: for those who cannot see it.
    """
    buffer = io.StringIO()
    # The salt makes the ids of clip paths and markers the same at every writing.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size)
        draw(figure.subplots())
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", dpi=150, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = _TAG.sub(lambda tag: _NAME.sub(rf"\g<1>{name}-", tag[0]), text)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert box is not None
    width, height = map(float, box.groups())
    opening = (
        f'<svg role="img" aria-label="{html.escape(description)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width: {width * 4 / 3:.0f}px" preserveAspectRatio="xMidYMid meet">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)


def _draw_reward(axes: Axes, drawn: HeatMap, names: tuple[str, ...]) -> None:
    reward, points = drawn.over(*names), _points(drawn)
    if len(names) == 1:
        (name,) = names
        axes.plot(drawn.axes[name], reward, color=_BLUE, linewidth=1.6)
        path = [(point[name], drawn.reward_at(point)) for point in drawn.path]
        marks = [(label, (point[name], drawn.reward_at(point))) for label, point in points]
        axes.set_xlabel(name.replace("_", " "))
        axes.set_ylabel("reward")
    else:
        down, across = names
        axes.grid(False)
        axes.set_facecolor("#d0d0d0")
        cells = axes.pcolormesh(
            drawn.axes[across],
            drawn.axes[down],
            np.ma.masked_invalid(reward),
            cmap="cividis",
            shading="nearest",
            rasterized=True,  # hundreds of paths in each of dozens of figures would make the page too large
        )
        bar = axes.figure.colorbar(cells, ax=axes, pad=0.02, aspect=25)
        bar.set_label("reward")
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(MaxNLocator(5))
        path = [(point[across], point[down]) for point in drawn.path]
        marks = [(label, (point[across], point[down])) for label, point in points]
        axes.set_xlabel(across.replace("_", " "))
        axes.set_ylabel(down.replace("_", " "))
    if len(path) > 1:
        line = np.transpose(path)
        axes.plot(*line, color="white", linewidth=3, zorder=3, solid_joinstyle="round")
        axes.plot(
            *line, color=_INK, linewidth=1.3, marker="o", markersize=2.6, markerfacecolor="white", markeredgewidth=0.6,
            zorder=4,
        )  # fmt: skip
    for label, (x, y) in marks:
        shape, size, colour = _MARKS[label]
        axes.plot(
            x, y, shape, markersize=size, color=colour, markeredgecolor=_INK, markeredgewidth=1, clip_on=False, zorder=5
        )
    whole = all(float(value).is_integer() for value in drawn.axes[names[-1]])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))


def _points(drawn: HeatMap) -> list[tuple[str, Point]]:
    points = {"default": drawn.default, "recommended": drawn.recommended, "grid's best": drawn.best}
    return [(label, point) for label, point in points.items() if point is not None]


def _on(steps: np.ndarray, parts: Sequence[Curve]) -> np.ndarray:
    return np.array([np.interp(steps, *part) for part in parts])


def _curve_figure(title: str, tag: str, whole: Curve, parts: Sequence[Curve]) -> str:
    steps, values = whole
    description = f"{title} by environment steps: from {values[0]:.3g} to {values[-1]:.3g}."

    def draw(axes: Axes) -> None:
        if len(parts) > 1:
            low, high = np.percentile(_on(steps, parts), [25, 75], axis=0)
            axes.fill_between(steps, low, high, color=_BLUE, alpha=0.2, linewidth=0)
        axes.plot(steps, values, color=_BLUE, linewidth=1.6, marker="o" if len(steps) <= 12 else None, markersize=3)
        axes.set_xlabel("environment steps")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if tag == "bound/multiplier" and values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())

    return _svg(draw, (3.5, 2.3), "curve-" + re.sub(r"[^a-z]+", "-", tag), description)
