"""Charts of the report: matplotlib draws SVG, CSS colours it, so that one drawing serves dark and light.

Colours are placeholders while drawing, and CSS variables afterwards. Text stays text: it can be searched, selected and enlarged.
"""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ssl_locat.text.shown import shown

MAX_POINTS = 400  # a curve of more is shown as means over equal stretches, between their extremes

_INK = "#010203"
_SERIES = [f"#0000{index:02x}" for index in range(0x10, 0x18)]
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "path.simplify_threshold": 0.5,
}


class Line(NamedTuple):
    """One curve. `x` and `y` are of equal length; `dashed` marks what it is compared with."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    dashed: bool = False
    dots: bool = False


class Mark(NamedTuple):
    """Something that happened at `x`."""

    x: float
    kind: str


def chart(
    name: str, lines: list[Line], *, xlabel: str, ylabel: str, log: bool = False, level: tuple[float, str] | None = None, marks=()
) -> str:
    """An inline SVG. `name` is unique on the page; `level`: a horizontal line (value, label); `marks`: vertical ones."""
    with rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(6.4, 2.9), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        for line in lines:
            _curve(axes, line)
        if level:
            axes.axhline(level[0], color=_INK, alpha=0.5, linewidth=1, linestyle=":")
            axes.annotate(
                _plain(level[1]),
                (1, level[0]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=9,
                alpha=0.8,
            )
        for number, kind in enumerate(dict.fromkeys(mark.kind for mark in marks)):
            at = [mark.x for mark in marks if mark.kind == kind]
            color, height = _SERIES[7 - number % 4], 1 - 0.09 * (number % 4)
            axes.vlines(at, 0, 1, transform=axes.get_xaxis_transform(), color=color, linewidth=1, alpha=0.7)
            axes.annotate(_plain(kind), (at[0], height), xycoords=("data", "axes fraction"), fontsize=8, color=color, va="top")
        if log:
            axes.set_yscale("log")
        axes.set_xlabel(_plain(xlabel))
        axes.set_ylabel(_plain(ylabel))
        axes.grid(True)
        axes.margins(x=0.01)
        if len(lines) > 1:
            axes.legend(fontsize=9, frameon=False, loc="best")
        return _svg(figure, name)


def _plain(label: str) -> str:
    """A label as it stands: between two "$" matplotlib would read a formula, and some characters no SVG may hold."""
    return shown(label).replace("$", r"\$")


def _curve(axes, line: Line) -> None:
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    color, style = _SERIES[line.color % len(_SERIES)], "--" if line.dashed else "-"
    if len(x) > MAX_POINTS:
        parts = np.array_split(np.arange(len(x)), MAX_POINTS)
        low, high = (np.array([extreme(y[part]) for part in parts]) for extreme in (np.nanmin, np.nanmax))
        x, y = (np.array([np.nanmean(values[part]) for part in parts]) for values in (x, y))
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(
        x,
        y,
        color=color,
        linestyle=style,
        linewidth=1.6,
        marker="o" if line.dots else None,
        markersize=4,
        label=_plain(line.label),
    )


def _svg(figure: Figure, name: str) -> str:
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:)?href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = svg.replace(_INK, "currentColor")
    for index, color in enumerate(_SERIES):
        svg = svg.replace(color, f"var(--series-{index})")
    return re.sub(r"\n\s*", "\n", svg)
