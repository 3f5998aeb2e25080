"""A table of ours and published numbers as Markdown, CSV and LaTeX."""

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssl_locat.intervals.figures import one_more_run
from ssl_locat.runs.durable import write_atomically


class Cell(NamedTuple):
    """One number of a table, or what there is of it."""

    mean: float | None  # ours
    std: float | None  # over seeds; None for a single run
    runs: int
    published: float | None

    @classmethod
    def of(cls, values: list[float], published: float | None) -> "Cell":
        """Summary of our runs beside the published number."""
        if not values:
            return cls(None, None, 0, published)
        spread = statistics.stdev(values) if len(values) > 1 else None  # over n - 1: seeds are a sample
        return cls(statistics.fmean(values), spread, len(values), published)

    @property
    def difference(self) -> float | None:
        """Ours minus published."""
        return None if self.mean is None or self.published is None else self.mean - self.published

    @property
    def is_tie(self) -> bool:
        """The published number, one run of theirs, lies where one more run of ours would: no difference to speak of."""
        return self.std is not None and self.difference is not None and abs(self.difference) <= one_more_run(self.std, self.runs)

    def ours(self, plus_minus: str = "±") -> str:
        if self.mean is None:
            return ""
        return f"{self.mean:.2f}" + (f" {plus_minus} {self.std:.2f}" if self.std is not None else "")

    def difference_text(self) -> str:
        return "" if self.difference is None else f"{self.difference:+.2f}" + (" (tie)" if self.is_tie else "")


Grid = dict[str, dict[str, Cell]]  # row -> column -> cell


def columns_of(grid: Grid) -> list[str]:
    return list(next(iter(grid.values()), {}))


def _laid_out(grid: Grid, plus_minus: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows): for each column ours, the published number and the difference, as far as a row has them. Rows of nothing are left out."""
    parts = {}
    for column in columns_of(grid):
        cells = [row[column] for row in grid.values()]
        parts[column] = ["ours"] if any(cell.mean is not None for cell in cells) else []
        parts[column] += ["published"] if any(cell.published is not None for cell in cells) else []
        parts[column] += ["difference"] if any(cell.difference is not None for cell in cells) else []
    header = ["", *(column if part == "ours" else f"{column}, {part}" for column in parts for part in parts[column])]
    rows = []
    for name, row in grid.items():
        shown = [name]
        for column, cell in row.items():
            texts = {
                "ours": cell.ours(plus_minus),
                "published": "" if cell.published is None else f"{cell.published:.2f}",
                "difference": cell.difference_text(),
            }
            shown += [texts[part] for part in parts[column]]
        if any(shown[1:]):
            rows.append(shown)
    return header, rows


def to_markdown(title: str, source: str, grid: Grid, failed: list[str], notes: Sequence[str] = ()) -> str:
    """A title, the table, notes on its rows, the failures."""
    header, rows = _laid_out(grid, "±")
    lines = [f"# {title}", "", *([source, ""] if source else []), markdown_table(header, rows)]
    runs = max((cell.runs for row in grid.values() for cell in row.values()), default=0)
    if runs > 1:
        lines += [
            "",
            f"Mean ± standard deviation over up to {runs} runs; a published number where one more run of ours would lie (95 %) is a tie.",
        ]
    if notes:
        lines += ["", *(f"- {' '.join(note.split())}" for note in notes)]
    if failed:
        lines += ["", "Not measured:", "", *(f"- {' '.join(message.split())}" for message in failed)]
    return "\n".join(lines) + "\n"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Names to the left, numbers to the right."""
    return "\n".join([_line(header), "|---" + "|---:" * (len(header) - 1) + "|", *map(_line, rows)])


def _line(cells: list[str]) -> str:
    """A row of a Markdown table: a bar in a name, or the end of a line, would end its cell."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |"


def to_csv(grid: Grid) -> str:
    """One line for each cell: row, column, mean, std, runs, published, difference."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["row", "column", "mean", "std", "runs", "published", "difference"])
    for row, cells in grid.items():
        for column, cell in cells.items():
            numbers = [cell.mean, cell.std, cell.runs, cell.published, cell.difference]
            writer.writerow([row, column, *("" if value is None else round(value, 6) for value in numbers)])
    return stream.getvalue()


def to_latex(title: str, grid: Grid, notes: Sequence[str] = ()) -> str:
    """The same as a booktabs table."""
    header, rows = _laid_out(grid, r"$\pm$")
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(title)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        " & ".join(map(escape, header)) + r" \\",
        r"\midrule",
        *(" & ".join([escape(row[0]), *row[1:]]) + r" \\" for row in rows),
    ]
    below = [r"\par\footnotesize " + r" \\ ".join(map(escape, notes))] if notes else []
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *below, r"\end{table}"]) + "\n"


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"} | {
    letter: f"\\{letter}" for letter in "&%$#_{}"
}


def escape(text: str) -> str:
    """Text in which no letter has a meaning to LaTeX."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def write_table(folder: Path, title: str, source: str, grid: Grid, failed: list[str], notes: Sequence[str] = ()) -> str:
    """table.md, table.csv and table.tex in `folder`; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown = to_markdown(title, source, grid, failed, notes)
    for name, text in (("table.md", markdown), ("table.csv", to_csv(grid)), ("table.tex", to_latex(title, grid, notes))):
        write_atomically(folder / name, text)
    return markdown
