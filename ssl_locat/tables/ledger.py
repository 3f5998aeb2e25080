"""A ledger of trainings under fixed caps: what each cost and what it reached, one JSON line for each seed, and the page made from the lines.

A table with a `ledger` section (eval/tables/speedrun*.yaml) appends to its file when all columns of a training are measured, so that a table that is cut short
keeps what it has. Lines of one track compare only where they were evaluated alike: each holds a hash of columns and data sets.

python -m ssl_locat.tables.ledger docs/ledger.jsonl docs/ledger.md     # makes the page's tables anew
"""

import hashlib
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ssl_locat.config.schema import Config
from ssl_locat.errors import ConfigError
from ssl_locat.runs.durable import flush
from ssl_locat.tables.images import seen_by
from ssl_locat.tables.jobs import TrainingJob, jobs
from ssl_locat.tables.schema import TableConfig

NAMES = {"knn": "k-NN", "linear": "the linear classifier", "dense": "dense retrieval"}
SEEDS = 3  # of a row that may count as progress
DEVIATIONS = 2
SAME_COST = 1.05  # lengths are whole steps: a row that costs a hundredth less than a baseline is no cheaper
TOLERANCE = 0.5  # points of the mean by which a cheaper row may lie below what it is compared with
# nothing that is learned depends on them
NOT_HASHED = {
    "run_dir": True,
    "data": {"train", "test", "workers", "make"},
    "checkpoint": True,
    "probes": True,
    "log": True,
    "export": True,
    "seed": True,
}
BEGIN, END = "<!-- ledger: made by ssl_locat/tables/ledger.py -->\n", "<!-- end of the ledger -->\n"


def check_caps(table: TableConfig) -> None:
    """ConfigError for a training that costs more than the ledger's track allows, or that an evaluation on part of a test set would judge."""
    ledger = table.ledger
    if ledger is None:
        return
    if ledger.track != "trial" and (cut := [name for name, data in table.data.items() if data.test_images]):
        raise ConfigError(
            f"data.{cut[0]}.test_images: a ledger's evaluation reads whole test sets. Leave it out, or set ledger.track=trial."
        )
    for job in jobs(table):
        if isinstance(job, TrainingJob):
            images, operations = price(table, job)
            if images > ledger.images or operations > ledger.pflop * 1e15:
                raise ConfigError(
                    f"{job.row}: its training sees {images:,} images and costs {operations / 1e15:.3g} PFLOP; the track {ledger.track} allows {ledger.images:,} "
                    f"and {ledger.pflop:g}. Make it shorter, or smaller."
                )


def price(table: TableConfig, job: TrainingJob) -> tuple[int, float]:
    """(images seen, FLOP) of a training by a recipe, by count: forward and backward passes of both networks, without crops and optimiser."""
    from ssl_locat.pretraining.operations import operations_of_run  # torch

    images = None if job.protocol else seen_by(table, job)
    if images is None:
        raise ConfigError(f"{job.row}: nobody knows how many images it trains on: give data.{job.lacks or 'NAME.train'}.")
    return images, images * operations_of_run(job.config())


def config_hash(config: Config) -> str:
    """Of all that is learned by, the seed apart."""
    return _hash(config.model_dump(mode="json", exclude=NOT_HASHED))  # type: ignore[arg-type]  # pydantic takes nested ones


def evaluation_hash(table: TableConfig) -> str:
    """Of the protocols, their options and the sets' settings; where the sets lie means nothing."""
    from ssl_locat.tables.schema import of_column

    columns = (
        {name: of_column(table.columns[column], {}) for name, column in table.ledger.columns.items()} if table.ledger else {}
    )
    sets = {name: data.model_dump(mode="json", exclude={"train", "test", "cache", "size"}) for name, data in table.data.items()}
    for _, options in columns.values():
        options.pop("workers", None)
    return _hash([columns, sets])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def add_lines(table: TableConfig, numbers: Mapping[tuple[str, Path], dict[str, float]]) -> None:
    """Append a line for each training whose columns are all measured and which the file has not yet; rank 0 calls it after each cell.

    numbers: (row, folder of the training) -> column -> what was measured."""
    ledger = table.ledger
    assert ledger
    wanted = set(ledger.columns.values())
    there = {_key(line) for line in read(Path(ledger.file))}
    for job in jobs(table):
        values = numbers.get((job.row, job.folder), {}) if isinstance(job, TrainingJob) else {}
        if isinstance(job, TrainingJob) and wanted - set(table.rows[job.row].skip) <= set(values):
            line = line_of(table, job, values)
            if _key(line) not in there:
                there.add(_key(line))
                append(Path(ledger.file), line)


def line_of(table: TableConfig, job: TrainingJob, values: dict[str, float]) -> dict[str, Any]:
    """What the ledger says of one training."""
    from ssl_locat.runs.folder import read_config

    assert table.ledger
    config, result = read_config(job.folder), json.loads(job.result.read_text(encoding="utf-8"))
    environment = json.loads((job.folder / "environment.json").read_text(encoding="utf-8"))
    hardware = environment["hardware"]
    images, operations = price(table, job)
    columns: dict[Any, str] = dict(table.ledger.columns)
    whole = not result.get("restarts")  # what a process that was stopped took is not known
    return {
        "track": table.ledger.track,
        "row": job.row,
        "baseline": job.row in table.ledger.baselines,
        "seed": config.seed,
        "commit": environment["commit"],
        "config": config_hash(config),
        "evaluation": evaluation_hash(table),
        "machine": ", ".join(hardware["gpus"])
        or f"{hardware['cpu']} ({', '.join(hardware['instructions'])}), {hardware['threads']} of {hardware['cores']} cores",
        "precision": config.precision,
        "seconds": result.get("seconds") if whole else None,
        "cpu_seconds": result.get("cpu_seconds") if whole else None,
        "images": images,
        "pflop": float(f"{operations / 1e15:.6g}"),
        "judged_by": table.ledger.judged_by,
        **{name: round(values[columns[name]], 3) if columns.get(name) in values else None for name in NAMES},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def append(path: Path, line: dict[str, Any]) -> None:
    """Below what is there, also where a kill cut the last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
    with open(path, "a", encoding="utf-8") as stream:
        stream.write("\n" * bool(cut) + json.dumps(line) + "\n")
    flush(path)


def _key(line: dict[str, Any]) -> tuple:
    return tuple(line.get(name) for name in ("track", "row", "seed", "config", "evaluation"))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger, one for each training; those that a kill cut are left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    # two processes that share a table, and see its last cell at once, both write the training's line
    return list({_key(line): line for line in found}.values())


# --- the page -------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """The seeds of one row: trained and evaluated alike."""

    lines: list[dict[str, Any]]

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return statistics.fmean(values) if values else None

    def deviation(self, name: str) -> float | None:
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else None

    def values(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if line.get(name) is not None]

    @property
    def judged(self) -> list[float]:
        """By what its track is judged, of each seed."""
        return self.values(self.by)

    @property
    def by(self) -> str:
        return str(self.lines[0]["judged_by"])

    @property
    def row(self) -> str:
        return str(self.lines[0]["row"])

    @property
    def baseline(self) -> bool:
        return bool(self.lines[0]["baseline"])


def entries(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[Entry]]:
    """(track, evaluation) -> its rows, cheapest first."""
    grouped: dict[tuple[str, str], dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for line in lines:
        rows = grouped.setdefault((line["track"], line["evaluation"]), {})
        rows.setdefault((line["row"], line["config"]), []).append(line)
    return {key: sorted(map(Entry, rows.values()), key=lambda entry: entry.mean("pflop") or 0.0) for key, rows in grouped.items()}


def progress(entry: Entry, others: Sequence[Entry]) -> str:
    """Whether a row counts: better than every baseline that costs as much or less, by more than two deviations of the noisier of both; or as good as one
    (not more than half a point lower) for fewer FLOP, with three seeds each."""
    if entry.baseline:
        return "baseline"
    if len(entry.judged) < SEEDS:
        return f"no: {len(entry.judged)} of {SEEDS} seeds"
    whole = [other for other in others if other.baseline and len(other.judged) >= SEEDS]
    if not whole:
        return f"no: no baseline of {SEEDS} seeds"
    cost = entry.mean("pflop") or 0.0
    cheaper = [other for other in whole if (other.mean("pflop") or 0.0) <= cost * SAME_COST]
    dearer = [other for other in whole if other not in cheaper]
    if not all(_beyond(entry, other) for other in cheaper):
        return "no: within two deviations of a baseline that costs no more"
    matched = [other for other in dearer if (entry.mean(entry.by) or 0.0) >= (other.mean(entry.by) or 0.0) - TOLERANCE]
    if matched:
        best = max(matched, key=lambda other: other.mean("pflop") or 0.0)
        return f"yes: as {best.row}, for {cost / (best.mean('pflop') or 1.0):.2f} x the FLOP"
    return "yes: better at this cost" if cheaper else "no: cheaper than every baseline, and not as good"


def _beyond(entry: Entry, other: Entry) -> bool:
    margin = DEVIATIONS * max(entry.deviation(entry.by) or 0.0, other.deviation(entry.by) or 0.0)
    return (entry.mean(entry.by) or 0.0) - (other.mean(entry.by) or 0.0) > margin


def equal_cost(entry: Entry, others: Sequence[Entry], cost: str) -> float | None:
    """This row's cost over what the baseline takes to the same value, between two of its lengths straight in the logarithm of the cost; None beyond them."""
    reached = entry.mean(entry.by)
    points = sorted(
        (other.mean(cost) or 0.0, other.mean(entry.by) or 0.0)
        for other in others
        if other.baseline and other.mean(cost) and other.judged
    )
    own = entry.mean(cost)
    if reached is None or own is None:
        return None
    for (low, before), (high, after) in pairwise(points):
        if before <= reached <= after and after > before:
            share = (reached - before) / (after - before)
            return own / math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return None


def fill(page: str, lines: list[dict[str, Any]]) -> str:
    """The page with what is between its two marks made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [section(track, evaluation, rows) for (track, evaluation), rows in entries(lines).items()] or [
        "No training is in the ledger yet."
    ]
    return before + BEGIN + "\n" + "\n\n".join(parts) + "\n\n" + END + after


HEAD = (
    "| row | seeds | images | PFLOP | CPU-s | s | k-NN | linear | dense | FLOP, CPU-s over the baseline's | progress | config, commit, machine |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|---|"
)


def section(track: str, evaluation: str, rows: Sequence[Entry]) -> str:
    text = [f"## {track}", "", f"Evaluated as `{evaluation}`; judged by {NAMES[rows[0].by]}.", "", HEAD]
    for entry in rows:
        first = entry.lines[0]
        factors = [equal_cost(entry, rows, cost) for cost in ("pflop", "cpu_seconds")] if not entry.baseline else []
        commits = ", ".join(dict.fromkeys(f"`{line['commit']}`" for line in entry.lines))
        machines = ", ".join(dict.fromkeys(line["machine"] for line in entry.lines))
        cells = [
            f"{entry.row} ({first['precision']})",
            str(len(entry.lines)),
            f"{entry.mean('images'):,.0f}",
            _shown(entry.mean("pflop")),
            _shown(entry.mean("cpu_seconds")),
            _shown(entry.mean("seconds")),
            *(_measure(entry, name) for name in NAMES),
            ", ".join("-" if factor is None else f"{factor:.2f}" for factor in factors),
            progress(entry, rows),
            f"`{first['config']}`, {commits}, {machines}",
        ]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def _measure(entry: Entry, name: str) -> str:
    mean, deviation = entry.mean(name), entry.deviation(name)
    return "-" if mean is None else f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    results, page = map(Path, sys.argv[1:])
    page.write_text(fill(page.read_text(encoding="utf-8"), read(results)), encoding="utf-8")
