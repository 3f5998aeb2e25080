"""The pictures of `checkpoints.py`: what each column says along the runs, and which measure goes with which task."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Canvas

from ssl_locat.tables.checkpoints import Line, Run

KINDS = ("png", "svg")


def draw_curves(runs: Sequence[Run], columns: Sequence[str], folder: Path) -> list[str]:
    """checkpoints.png and .svg: a panel for each column; a row of the table is a colour, faint lines are its runs, the thick one their mean."""
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    canvas = Canvas(figsize=(4.2 * across, 3.0 * down), layout="constrained")
    panels = np.atleast_1d(canvas.subplots(down, across)).ravel()
    rows = list(dict.fromkeys(run.row for run in runs))
    for panel, column in zip(panels, columns, strict=False):
        for number, row in enumerate(rows):
            own = [run for run in runs if run.row == row]
            for run in own:
                panel.plot(run.steps, run.values[column], color=f"C{number}", alpha=0.3, linewidth=0.8)
            if len({tuple(run.steps) for run in own}) == 1:  # a run that is not whole yet has no place in a mean
                panel.plot(
                    own[0].steps, np.mean([run.values[column] for run in own], axis=0), color=f"C{number}", linewidth=2, label=row
                )
        panel.set(title=column, xlabel="step")
        panel.grid(alpha=0.3)
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    panels[0].legend(fontsize=7)
    return _save(canvas, folder, "checkpoints")


def draw_correlations(lines: Sequence[Line], measures: Sequence[str], targets: Sequence[str], folder: Path) -> list[str]:
    """correlations.png and .svg: a panel for each task, a bar with its interval for each measure."""
    if not lines:
        return []
    canvas = Canvas(figsize=(3.0 * len(targets) + 1.5, 0.35 * len(measures) + 1.2), layout="constrained")
    panels = np.atleast_1d(canvas.subplots(1, len(targets), sharey=True))
    for panel, target in zip(panels, targets, strict=True):
        here = [line for line in lines if line.target == target]
        places = [measures.index(line.what) for line in here]
        # inside the limits of a correlation, so that an end may lie on its mean
        reach = [[line.found.value - line.found.low for line in here], [line.found.high - line.found.value for line in here]]
        panel.barh(places, [line.found.value for line in here], xerr=np.clip(reach, 0, None), color="C0", alpha=0.7, capsize=2)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set(title=target, xlim=(-1.05, 1.05))
        panel.set_yticks(range(len(measures)), measures)
    panels[0].invert_yaxis()
    return _save(canvas, folder, "correlations")


def _save(canvas: Canvas, folder: Path, stem: str) -> list[str]:
    for kind in KINDS:
        canvas.savefig(folder / f"{stem}.{kind}", dpi=120)
    return [f"{stem}.{kind}" for kind in KINDS]
