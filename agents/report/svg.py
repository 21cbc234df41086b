"""Matplotlib figures as SVG that stands inside an HTML page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

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
_TAG = re.compile(r"<[^>]+>")  # texts hold no bare < or >, they are escaped
_NAME = re.compile(r"""(\bid="|href="#|url\(#)""")


@contextmanager
def styled() -> Iterator[None]:
    """Draw within this, and turn the figure into text there too."""
    with matplotlib.rc_context(_STYLE):
        yield


def inline(figure: Figure, name: str, description: str, dpi: int = 150) -> str:
    """A figure as an ``<svg>`` element for a page, as wide as the page lets it.

    Args:
        figure: drawn within `styled`.
        name: letters, digits and hyphens; no other figure of the page may have it, since all share one space of ids.
        description: what it shows, for those who cannot see it.
        dpi: of the parts that are kept as pixels.
    """
    buffer = io.StringIO()
    # The salt makes the ids of clip paths and markers the same at every writing.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", dpi=dpi, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = _TAG.sub(lambda tag: _NAME.sub(rf"\g<1>{name}-", tag[0]), text)
    width, height = (float(value) for value in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())  # type: ignore[union-attr]
    opening = (
        f'<svg role="img" aria-label="{html.escape(description)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width: {width * 4 / 3:.0f}px" preserveAspectRatio="xMidYMid meet">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
