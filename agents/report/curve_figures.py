"""Learning curves: the mean over the workloads, and how far the workloads spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from .data import Curve
from .svg import inline, styled

_SHOWN = {
    "reward/total": "Reward",
    "decoding/speedup": "Speedup over plain decoding",
    "decoding/divergence": "Divergence from the target (0 to 1)",
    "decoding/draft_acceptance_rate": "Draft acceptance rate (0 to 1)",
    "eval/mean_reward": "Sum of an episode's rewards, held-out prompts",
    "knobs/fallback": "Fallback threshold in use",
    "knobs/rollback": "Rollback threshold in use (tokens)",
    "train/learning_rate": "Learning rate",
    "entropy/coefficient": "Entropy coefficient",
    "bound/kept": "Share of workloads under the divergence bound",
    "bound/multiplier": "Multiplier of the divergence bound",
}
_LEAST_STEPS = 2


@dataclass(frozen=True)
class CurveFigure:
    """A drawing, and what it shows in words."""

    title: str
    svg: str


def curve_figures(curves: Mapping[str, Curve]) -> list[CurveFigure]:
    """One small figure for each quantity that was logged at least twice and, if a setting, ever changed."""
    found = []
    tags = [tag for tag in sorted(curves) if tag.startswith("knobs/") and tag not in _SHOWN]
    own = {tag: f"{tag.removeprefix('knobs/').replace('_', ' ').capitalize()} in use" for tag in tags}
    for tag, title in (_SHOWN | own).items():
        parts = [curve for name, curve in sorted(curves.items()) if _is_part(name, tag) and len(curve[0]) > 1]
        whole = curves.get(tag)
        if whole is None and parts:
            steps = parts[int(np.argmax([len(part[0]) for part in parts]))][0]
            whole = steps, np.mean(_on(steps, parts), axis=0)
        if whole is None or len(whole[0]) < _LEAST_STEPS:
            continue
        if tag in ("train/learning_rate", "entropy/coefficient") and np.ptp(whole[1]) == 0:
            continue
        found.append(CurveFigure(title, _drawn(title, tag, whole, parts)))
    return found


def _is_part(name: str, tag: str) -> bool:
    """Whether a curve is that of one workload, for a quantity."""
    return (name.startswith("workload/") and name.endswith(f"/{tag}")) or name.startswith(f"{tag}/")


def _on(steps: np.ndarray, parts: list[Curve]) -> np.ndarray:
    return np.array([np.interp(steps, part[0], part[1]) for part in parts])


def _drawn(title: str, tag: str, whole: Curve, parts: list[Curve]) -> str:
    steps, values = whole
    with styled():
        figure = Figure(figsize=(3.5, 2.3))
        axes = figure.subplots()
        told = f"{title} by environment steps: from {values[0]:.3g} to {values[-1]:.3g}."
        if len(parts) > 1:
            low, high = np.percentile(_on(steps, parts), [25, 75], axis=0)
            axes.fill_between(steps, low, high, color="#0072b2", alpha=0.2, linewidth=0)
            told += f" The middle half of the workloads ends between {low[-1]:.3g} and {high[-1]:.3g}."
        marker = "o" if len(steps) <= 12 else None
        axes.plot(steps, values, color="#0072b2", linewidth=1.6, marker=marker, markersize=3)
        axes.set_xlabel("environment steps")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if tag == "bound/multiplier" and values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        return inline(figure, "curve-" + tag.replace("/", "-").replace("_", "-"), told)
