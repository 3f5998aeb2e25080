"""Which checkpoint? What a table with `checkpoints` says of the milestones of its trainings (checkpoint_files.py writes it).

For each measure that needs no labels: does it rank a run's checkpoints as a task with labels does (Spearman's correlation), and how much worse than
the run's best checkpoint is the one that it would choose? For each row: when was it best, how much had it lost at its end, and is that
another thing with LocAt (its twin of the same seed)? Everything is a mean over runs with the 95 % interval of Student's t; a difference whose
interval holds 0 is a tie. A correlation is taken within one run: measures of different networks do not compare (docs/label-free.md).
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_locat.intervals.figures import of_runs
from ssl_locat.intervals.paired import Interval
from ssl_locat.label_free.dse import DSE, balanced_dse
from ssl_locat.runs.best import goodness
from ssl_locat.runs.log import read_jsonl
from ssl_locat.tables.jobs import Point, trainings
from ssl_locat.tables.schema import Checkpoints, TableConfig

LOSS = "training loss"  # what people look at; lower is better
LAST, ANY = "the last one", "any, by lot"  # choices without a measure
SMOOTH = 3  # checkpoints whose mean says how good a run was there: the best of twenty noisy values flatters the peak
ALL = "all runs"


class Run(NamedTuple):
    """One training: the steps S at which it was measured, and what each column says of them (a larger value is the better one in `good`)."""

    row: str
    seed: int
    steps: list[int]
    values: dict[str, np.ndarray]  # column -> [S], as measured
    good: dict[str, np.ndarray]  # column -> [S], higher is better


class Line(NamedTuple):
    """One statement with its interval, over so many runs."""

    row: str
    what: str  # a measure, or a choice
    target: str
    found: Interval
    runs: int


def balanced_name(wanted: Checkpoints) -> str:
    return f"{wanted.balanced} (lambda of the run)"


def collect(table: TableConfig, wanted: Checkpoints, points: Iterable[Point]) -> list[Run]:
    """Runs in the order of the table's rows; a value that is not there is NaN."""
    found: dict[tuple[str, Path], dict[tuple[int, str], Point]] = {}
    for point in points:
        found.setdefault((point.row, point.run), {})[point.step, point.column] = point
    # by the training, not by its place among what was measured: of twins either may lack a seed
    seeds = {(row, job.folder): job.options.get("seed", 0) for row in {row for row, _ in found} for job in trainings(table, row)}
    runs: list[Run] = []
    for (row, folder), of_run in found.items():
        steps = sorted({step for step, _ in of_run})
        values, good = {}, {}
        for name in dict.fromkeys([*wanted.measures, *wanted.targets]):
            here = [of_run.get((step, name)) for step in steps]
            values[name] = np.array([point.value if point else np.nan for point in here])
            metric = table.columns[name].metric
            good[name] = np.array([goodness(metric, value) for value in values[name]])
            if name == wanted.balanced and all(here):
                parts = [
                    DSE(*(point.metrics[f"dse{key}"] for key in ("", "_inter", "_intra_1", "_intra_8", "_dim")))
                    for point in here
                    if point
                ]
                values[balanced_name(wanted)] = good[balanced_name(wanted)] = np.array(balanced_dse(parts))
        values[LOSS] = training_loss(folder, steps)
        good[LOSS] = -values[LOSS]
        runs.append(Run(row, seeds[row, folder], steps, values, good))
    return runs


def training_loss(folder: Path, steps: Sequence[int]) -> np.ndarray:
    """[S]: the mean loss of the steps up to each of these, since the one before; NaN where the run wrote none."""
    records = [
        (record["step"], record["loss"]) for record in read_jsonl(folder / "metrics.jsonl") if record.get("loss") is not None
    ]
    means = []
    for begin, end in zip([0, *steps], steps, strict=False):
        inside = [loss for step, loss in records if begin < step <= end]
        means.append(float(np.mean(inside)) if inside else np.nan)
    return np.array(means)


def correlations(runs: Sequence[Run], measures: Sequence[str], targets: Sequence[str]) -> list[Line]:
    """Spearman's correlation over the checkpoints of each run, by row and over all; ties have their mean rank."""
    found = []
    for measure in measures:
        for target in targets:
            of_run = {(run.row, run.seed): spearman(run.good[measure], run.good[target]) for run in runs if measure in run.good}
            found += _by_row(of_run, measure, target, low=-1.0, high=1.0)
    return found


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Of two [S]; NaN where one is not known or never changes."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()) or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    import torch
    from torchmetrics.functional import spearman_corrcoef

    return float(spearman_corrcoef(torch.from_numpy(first), torch.from_numpy(second)))


def losses(runs: Sequence[Run], measures: Sequence[str], targets: Sequence[str]) -> list[Line]:
    """How many points of the target the chosen checkpoint lacks to the run's best one, 0 or more; beside the last one and one drawn by lot."""
    found = []
    for choice in (*measures, LAST, ANY):
        for target in targets:
            of_run = {}
            for run in runs:
                reached, by = run.good[target], run.good.get(choice)
                if not np.isfinite(reached).all() or (by is not None and not np.isfinite(by).all()):
                    continue
                if by is None and choice not in (LAST, ANY):
                    continue
                value = reached[-1] if choice == LAST else reached.mean() if by is None else reached[int(by.argmax())]
                of_run[run.row, run.seed] = float(reached.max() - value)
            found += _by_row(of_run, choice, target, low=0.0)
    return found


def decay(runs: Sequence[Run], targets: Sequence[str]) -> list[Line]:
    """By row: where in the run it was best, in per cent of its steps, what it reached there, and what it had lost at the end."""
    found = []
    for target in targets:
        for part, what in enumerate((BEST_AT, BEST, LOST)):
            of_run = {(run.row, run.seed): peak(run, target)[part] for run in runs if np.isfinite(run.good[target]).all()}
            within = {"low": 0.0, "high": 100.0} if what == BEST_AT else {}  # no run was best before its begin or after its end
            found += [line for line in _by_row(of_run, what, target, **within) if line.row != ALL]
    return found


BEST_AT, BEST, LOST = "best at, % of the run", "best", "lost since"


def peak(run: Run, target: str) -> tuple[float, float, float]:
    """(per cent of the run at which it was best, the value there, how much less it was at the end), each a mean of neighbouring checkpoints."""
    good = np.convolve(run.good[target], np.ones(SMOOTH) / SMOOTH, mode="valid")
    place = int(good.argmax())
    middle = run.steps[place + SMOOTH // 2]
    return 100 * middle / run.steps[-1], float(good[place]), float(good[place] - good[-1])


def twins(runs: Sequence[Run], targets: Sequence[str], twin: str) -> list[Line]:
    """The same of the row with LocAt minus the row without it, seed by seed."""
    known = {(run.row, run.seed): run for run in runs}
    found = []
    for target in targets:
        for what, part in ((BEST_AT, 0), (BEST, 1), (LOST, 2)):
            pairs = {
                (run.row, run.seed): peak(other, target)[part] - peak(run, target)[part]
                for run in runs
                if (other := known.get((run.row + twin, run.seed)))
                and np.isfinite(run.good[target]).all()
                and np.isfinite(other.good[target]).all()
            }
            found += [line._replace(row=f"{line.row}:{twin}") for line in _by_row(pairs, what, target)]
    return found


def _by_row(
    of_run: dict[tuple[str, int], float], what: str, target: str, low: float = -math.inf, high: float = math.inf
) -> list[Line]:
    """One line for each row, and one for all runs where there are several rows; runs without a number are left out."""
    of_run = {key: value for key, value in of_run.items() if math.isfinite(value)}
    rows = list(dict.fromkeys(row for row, _ in of_run))
    found = []
    for row in [*rows, *([ALL] if len(rows) > 1 else [])]:
        values = [value for (own, _), value in of_run.items() if row in (own, ALL)]
        mean, least, most = of_runs(values)
        found.append(Line(row, what, target, Interval(mean, max(low, least), min(high, most)), len(values)))
    return found
