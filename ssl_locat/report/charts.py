"""Curves of the report, as curves.js hands them to uPlot: plain numbers that the page carries, and a table of them for who sees no curves.

A curve of any length is shown as a bounded number of points: means over equal stretches, between their extremes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.text.shown import shown

MAX_POINTS = 1000  # of one curve: more than a chart has pixels for, even when it is zoomed into a few times
MAX_NUMBERS = 150_000  # of all curves of a page: about 1.2 MB


class Line(NamedTuple):
    """One curve. `x` and `y` are of equal length; `name`: the metric it shows; `dashed` marks what it is compared with."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    dashed: bool = False
    dots: bool = False
    name: str = ""


class Mark(NamedTuple):
    """Something at `x`: a line across every chart, or, with `curve` (the name of a metric), a ring on that metric's curves alone."""

    x: float
    label: str
    curve: str = ""


@dataclass
class Chart:
    """Curves over one axis, and what they tell.

    what, good: what is measured, and what one hopes to see. level: a horizontal line (value, label). whole_run: x counts steps or images,
    so that pointing and zooming go together with the other such charts.
    """

    title: str
    what: str
    lines: list[Line]
    xlabel: str
    good: str = ""
    unit: str = ""
    log: bool = False
    level: tuple[float, str] | None = None
    whole_run: bool = True
    marks: list[Mark] = field(default_factory=list)

    def mark(self, x: float, label: str, curve: str = "") -> None:
        """Put a mark on this chart; with `curve` only if it shows that metric."""
        if not curve or any(line.name == curve for line in self.lines):
            self.marks.append(Mark(x, label, curve))

    @property
    def alt(self) -> str:
        """Its curves in a sentence."""
        rows = self.rows()
        spoken = "; ".join(f"{label} from {first} to {last}" for label, first, _, _, last in rows)
        return f"{self.title} over {self.xlabel}: {spoken}."

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(label, first, lowest, highest, last) of each curve."""
        # as many digits as the legend shows under the pointer
        number = "{:.4g}".format
        return [
            (line.label, number(line.y[0]), number(min(line.y)), number(max(line.y)), number(line.y[-1])) for line in self.lines
        ]

    def data(self, max_points: int = MAX_POINTS) -> dict[str, Any]:
        """What curves.js draws; its texts are shown as they stand, never read as HTML."""
        return {
            "lines": [_points(line, max_points, self.log) for line in self.lines],
            "xlabel": shown(self.xlabel),
            "unit": shown(self.unit),
            "log": self.log,
            "level": {"y": self.level[0], "label": shown(self.level[1])} if self.level else None,
            "wholeRun": self.whole_run,
            "marks": [{"x": mark.x, "label": shown(mark.label), "curve": mark.curve} for mark in self.marks],
        }


def points_each(charts: Sequence[Chart]) -> int:
    """How many points a curve may have, so that the page stays small with any number of curves."""
    curves = sum(len(chart.lines) for chart in charts)
    # 4: x, mean, lowest and highest of each stretch
    return max(50, min(MAX_POINTS, MAX_NUMBERS // (4 * max(1, curves))))


def _points(line: Line, most: int, log: bool) -> dict[str, Any]:
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    last = np.append(x[1:] != x[:-1], True)  # of several at one x the last: uPlot wants x to rise
    if log:
        last &= y > 0
    x, y = x[last], y[last]
    found: dict[str, Any] = {
        "label": shown(line.label),
        "name": shown(line.name),
        # eight that the eye keeps apart; further curves begin again
        "color": line.color % 8,
        "dashed": line.dashed,
        "dots": line.dots,
    }
    if len(x) > most:
        # stretches of equal length; their extremes are shown as a band, so that no spike is lost
        parts = np.array_split(np.arange(len(x)), most)
        found |= {"low": _short([y[part].min() for part in parts]), "high": _short([y[part].max() for part in parts])}
        # the middle of a stretch, but the ends of the run: a zoomed chart begins and ends where the run does
        x = np.array([x[part].mean().round() for part in parts])
        x[0], x[-1] = line.x[int(order[0])], line.x[int(order[-1])]
        y = np.array([y[part].mean() for part in parts])
    return found | {"x": _short(x, 12), "y": _short(y)}


def _short(values: Sequence[float] | np.ndarray, digits: int = 5) -> list[float | int]:
    """Rounded: nobody reads more digits off a curve, and each costs a byte."""
    rounded = [float(f"{value:.{digits}g}") for value in values]
    return [int(value) if value.is_integer() and abs(value) < 1e15 else value for value in rounded]
