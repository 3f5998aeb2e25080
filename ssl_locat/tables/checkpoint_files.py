"""What `checkpoints.py` found, as files: checkpoints.csv (raw), correlations.csv, choices.csv, decay.csv, checkpoints.md and the pictures."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from ssl_locat.runs.durable import write_atomically
from ssl_locat.tables.checkpoints import (
    ALL,
    LOSS,
    Line,
    Run,
    balanced_name,
    collect,
    correlations,
    decay,
    losses,
    twins,
)
from ssl_locat.tables.jobs import Point
from ssl_locat.tables.schema import Checkpoints, TableConfig
from ssl_locat.tables.text import markdown_table


def write_study(table: TableConfig, wanted: Checkpoints, points: Sequence[Point], folder: Path) -> list[str]:
    """checkpoints.csv (raw), correlations.csv, choices.csv, decay.csv, checkpoints.md and the pictures, in `folder`; their names.

    A run of which a checkpoint is missing is in checkpoints.csv alone.
    """
    runs = collect(table, wanted, points)
    measures = [*wanted.measures, *([balanced_name(wanted)] if wanted.balanced else []), LOSS]
    correlated, chosen = correlations(runs, measures, wanted.targets), losses(runs, measures, wanted.targets)
    fallen, compared = decay(runs, wanted.targets), twins(runs, wanted.targets, wanted.twin)
    header = ("row", "seed", "step", "column", "value")
    raw = [
        (run.row, run.seed, step, name, round(float(value), 6))
        for run in runs
        for name, values in run.values.items()
        for step, value in zip(run.steps, values, strict=True)
        if math.isfinite(value)
    ]
    _write_csv(folder / "checkpoints.csv", header, raw)
    for name, lines in (("correlations", correlated), ("choices", chosen), ("decay", [*fallen, *compared])):
        rows = [(*line[:3], *(round(float(end), 6) for end in line.found), line.runs) for line in lines]
        _write_csv(folder / f"{name}.csv", ("row", "what", "target", "mean", "low", "high", "runs"), rows)
    write_atomically(folder / "checkpoints.md", _markdown(table, wanted, runs, correlated, chosen, fallen, compared))
    from ssl_locat.tables.checkpoint_pictures import draw_correlations, draw_curves  # matplotlib takes a second

    names = ["checkpoints.md", "checkpoints.csv", "correlations.csv", "choices.csv", "decay.csv"]
    if runs:
        names += draw_curves(runs, [*wanted.targets, *wanted.measures], folder)
        names += draw_correlations([line for line in correlated if line.row == ALL], measures, wanted.targets, folder)
    return names


def _markdown(
    table: TableConfig,
    wanted: Checkpoints,
    runs: list[Run],
    correlated: list[Line],
    chosen: list[Line],
    fallen: list[Line],
    compared: list[Line],
) -> str:
    names = list(dict.fromkeys(run.row for run in runs))
    parts = [
        f"# {table.title}",
        f"{len(runs)} runs ({', '.join(names) or 'none yet'}), {wanted.count} checkpoints each. Means over runs; in brackets the 95 % interval "
        "(Student's t over runs). A difference whose interval holds 0 is a tie.",
    ]
    if empty := [name for name in table.rows if name not in names]:
        parts.append(f"Not filled: {', '.join(empty)}.")
    several = len(names) > 1
    for title, lines, form in (
        ("Does a measure rank a run's checkpoints as the task does? (Spearman)", correlated, "{:+.2f}"),
        ("What does the checkpoint that it chooses lack to the best one? (points)", chosen, "{:.2f}"),
    ):
        parts += [
            f"## {title}",
            _grid([line for line in lines if line.row == (ALL if several else line.row)], wanted.targets, form),
        ]
        if several:
            for name in names:
                parts += [f"### {name}", _grid([line for line in lines if line.row == name], wanted.targets, form)]
    parts.append("## Does it decay?")
    parts += [
        part
        for name in names
        for part in (f"### {name}", _grid([line for line in fallen if line.row == name], wanted.targets, "{:.2f}"))
    ]
    if compared:
        parts.append("## With LocAt, minus without")
        for name in dict.fromkeys(line.row for line in compared):
            parts += [f"### {name}", _grid([line for line in compared if line.row == name], wanted.targets, "{:+.2f}", ties=True)]
    return "\n\n".join(parts) + "\n"


def _grid(lines: list[Line], targets: Sequence[str], form: str, ties: bool = False) -> str:
    """One row for each measure, choice or quantity, one column for each target."""
    rows = []
    for what in dict.fromkeys(line.what for line in lines):
        cells = []
        for target in targets:
            line = next((line for line in lines if (line.what, line.target) == (what, target)), None)
            cells.append(
                ""
                if line is None
                else in_words(line, form) + (" (tie)" if ties and line.found.low <= 0 <= line.found.high else "")
            )
        rows.append([what, *cells])
    return markdown_table(["", *targets], rows)


def in_words(line: Line, form: str) -> str:
    """0.71 (0.55 to 0.87); of one run the number alone."""
    value, low, high = (form.format(end) for end in line.found)
    return f"{value} ({low} to {high})" if line.runs > 1 else value


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, stream.getvalue())
