"""Accuracy against mIoU with an arrow from each vanilla model to its LocAt twin (the paper's figure 2), drawn from a table's cells."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

from ssl_locat.runs.durable import write_atomically
from ssl_locat.tables.schema import Figure
from ssl_locat.tables.text import Grid

COLUMNS = ("from", "to", "numbers", "x_from", "y_from", "x_to", "y_to")


class Arrow(NamedTuple):
    source: str  # rows
    target: str
    numbers: str  # "ours" or "published"
    start: tuple[float, float]  # (x, y) of the vanilla model
    end: tuple[float, float]  # of its twin


def arrows(figure: Figure, grid: Grid) -> list[Arrow]:
    """Of our numbers and of the published ones, for every pair of rows that has all four."""
    found = []
    for source in grid:
        target = source + figure.twin
        if target not in grid:
            continue
        for numbers in ("published", "ours"):
            ends = [
                [cell.published if numbers == "published" else cell.mean for cell in (grid[row][figure.x], grid[row][figure.y])]
                for row in (source, target)
            ]
            (x, y), (x_twin, y_twin) = ends
            if x is not None and y is not None and x_twin is not None and y_twin is not None:
                found.append(Arrow(source, target, numbers, (x, y), (x_twin, y_twin)))
    return found


def draw(figure: Figure, grid: Grid, folder: Path) -> list[str]:
    """figure.csv, figure.png and figure.svg in `folder`; their names."""
    from matplotlib.figure import Figure as Canvas

    found = arrows(figure, grid)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([*arrow[:3], *(round(value, 6) for value in (*arrow.start, *arrow.end))] for arrow in found)
    write_atomically(folder / "figure.csv", stream.getvalue())
    canvas = Canvas(figsize=(6.4, 4.8), layout="constrained")
    axis = canvas.subplots()
    colours = {source: f"C{number % 10}" for number, source in enumerate(dict.fromkeys(arrow.source for arrow in found))}
    for arrow in found:
        ours, colour = arrow.numbers == "ours", colours[arrow.source]
        # published ones stand behind, faint, where ours are there to be looked at
        faint = 1.0 if ours or not any(other.numbers == "ours" for other in found) else 0.35
        line = {"arrowstyle": "->", "color": colour, "alpha": faint, "linestyle": "-" if ours else "--"}
        axis.annotate("", xy=arrow.end, xytext=arrow.start, arrowprops=line)
        xs, ys = zip(arrow.start, arrow.end, strict=True)
        axis.scatter(
            xs, ys, marker="o" if ours else "s", facecolors=[colour if ours else "white", colour], edgecolors=colour, alpha=faint
        )
        axis.annotate(arrow.source, arrow.end, xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour, alpha=faint)
    axis.set(xlabel=figure.x, ylabel=figure.y, title=f"Arrows lead to{figure.twin}; dashed: published, solid: ours")
    names = ["figure.csv"]
    for kind in ("png", "svg"):
        canvas.savefig(folder / f"figure.{kind}", dpi=150)
        names.append(f"figure.{kind}")
    return names
