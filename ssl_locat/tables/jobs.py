"""What a table asks to be done, in the order in which it is done: trainings of rows without weights, and cells.

Each job's name holds all that its result depends on, so that a table resumes job by job, and two tables may share a training.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssl_locat.config.schema import Config, load
from ssl_locat.config.schema import Data as RunData
from ssl_locat.evaluation.evaluate import fingerprint
from ssl_locat.tables.schema import TableConfig, TableData, Training, flat, of_column, of_training, overrides, training_of


class TrainingJob(NamedTuple):
    """One training that columns read."""

    row: str
    fresh: str  # the untrained MODEL; of a recipe its name
    protocol: str | None  # None: a recipe
    options: dict[str, Any]  # the protocol's, with its data; of a recipe the keys that differ from its YAML
    folder: Path  # where the weights will lie: a MODEL; its name tells all that they depend on
    lacks: str = ""  # the data set that is not given

    @property
    def result(self) -> Path:
        """Written when it has finished."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def config(self) -> Config:
        """Of a recipe, resolved."""
        return load(self.fresh, overrides({**self.options, "run_dir": str(self.folder)}))


class Job(NamedTuple):
    """One run of a protocol: a cell, or one of several that a cell is the mean of."""

    row: str
    column: str
    model: str
    protocol: str
    options: dict[str, Any]
    training: TrainingJob | None = None  # whose weights `model` is
    lacks: str = ""
    step: int | None = None  # of the training's milestone that is measured; None: its end

    @property
    def identity(self) -> str:
        """The model as far as the number depends on it."""
        if self.training is None:
            return fingerprint(self.model)
        return self.training.folder.name + ("" if self.step is None else f"@{self.step}")


class Point(NamedTuple):
    """What one column says of one checkpoint."""

    row: str
    run: Path  # folder of the training
    step: int
    column: str
    value: float
    metrics: dict[str, float]  # all that the protocol gave


def trainings(table: TableConfig, row_name: str) -> list[TrainingJob]:
    """What must be trained for a row that comes without a MODEL."""
    row = table.rows[row_name]
    training = training_of(table, row)
    if row.model or training is None or not (row.fresh or training.recipe):
        return []
    data = table.data[training.data] if training.data else TableData()
    lacks = f"data.{training.data}.train" if training.data and not (data.train and data.test) else ""
    found = []
    seeds: Sequence[int | None] = training.seeds or [None]
    for seed in seeds:
        if training.recipe:
            source, protocol, options = training.recipe, None, flat(training.options)
            options |= {f"data.{key}": value for key, value in data.given.items() if key in RunData.model_fields}
            if table.checkpoints:
                # `every_steps` saves, the other keeps
                options |= dict.fromkeys(
                    ("checkpoint.every_steps", "checkpoint.milestone_every_steps"), milestones(table, training)[0]
                )
        else:
            assert row.fresh  # see above
            source = row.fresh
            protocol, options = of_training(training)
            options["data"] = _joined(options.get("data"), data.given)
        options |= {} if seed is None else {"seed": seed}
        about = json.dumps([source, protocol, options], sort_keys=True, default=str)
        # by the model, not by the row: tables that share the folder call the same training differently
        stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(source.removeprefix("timm:")).stem).strip("-")[:60]
        name = f"{stem}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
        found.append(
            TrainingJob(row_name, source, protocol, options, Path(table.trained or f"{table.results}/trained", name), lacks)
        )
    return found


def milestones(table: TableConfig, training: Training) -> list[int]:
    """The steps of a training at which checkpoints are measured: `checkpoints.count` of them, evenly; what is left over comes before its end."""
    assert table.checkpoints and training.recipe  # checked by `load_table`
    steps = load(training.recipe, overrides(training.options)).optim.total_steps
    assert steps
    every = steps // table.checkpoints.count
    return [every * number for number in range(1, table.checkpoints.count + 1)]


def _joined(own: dict | None, given: dict[str, Any]) -> dict[str, Any]:
    """A protocol's `data` of its YAML, with a table's data set on top; one that numbers its classes itself has no layout of the YAML's."""
    own = {
        key: value for key, value in (own or {}).items() if value is not None and not (key == "layout" and "num_classes" in given)
    }
    return {**own, **given}


def all_jobs(table: TableConfig) -> Iterator[TrainingJob | Job]:
    """Every training and every cell's runs, also those whose data set is not given (`lacks`); a training before the cells that read it."""
    for row_name, row in table.rows.items():
        if row.stage > table.stage:
            continue
        trained = trainings(table, row_name)
        yield from trained
        models: list[tuple[str, TrainingJob | None, int | None]] = [(str(job.folder), job, None) for job in trained]
        if table.checkpoints and (training := training_of(table, row)):
            steps = milestones(table, training)
            # as `runs/checkpoint.py` names them
            models = [(str(job.folder / "checkpoints" / f"step_{step:08d}"), job, step) for job in trained for step in steps]
        if row.model:
            models = [(model, None, None) for model in ([row.model] if isinstance(row.model, str) else row.model)]
        for column_name, column in table.columns.items():
            if column_name in row.skip:
                continue
            protocol, options = of_column(column, row.options.get(column_name, {}))
            lacks = ""
            if column.data is not None:
                data = table.data[column.data]
                options["data"] = _joined(options.get("data"), data.given)
                lacks = "" if data.test else f"data.{column.data}.test"
            # what trains or counts starts from the untrained twin of the row, every other protocol from its trained model
            fresh: list[tuple[str, TrainingJob | None, int | None]] = [(row.fresh, None, None)] if row.fresh else []
            seeds: Sequence[int | None] = column.seeds or [None]
            for model, job, step in fresh if column.fresh else models:
                for seed in seeds:
                    chosen = options if seed is None else {**options, "seed": seed}
                    yield Job(row_name, column_name, model, protocol, chosen, job, lacks or (job.lacks if job else ""), step)


def jobs(table: TableConfig) -> list[TrainingJob | Job]:
    """Those that can be done; a training that no cell reads is not. Seed by seed: every row has one training, measured in all columns, before any has
    its second, so that a table that is stopped shows whole rows of fewer seeds."""
    possible = [job for job in all_jobs(table) if not job.lacks]
    read = {job.training.folder for job in possible if isinstance(job, Job) and job.training}
    turn: dict[Path | None, int] = {None: 0}  # training -> its place among those of its row
    seen: Counter[str] = Counter()  # of each row
    for job in possible:
        if isinstance(job, TrainingJob):
            turn.setdefault(job.folder, seen[job.row])  # two rows may read the same
            seen[job.row] += 1
    return sorted(
        (job for job in possible if isinstance(job, Job) or job.folder in read), key=lambda job: turn[training_folder(job)]
    )


def training_folder(job: TrainingJob | Job) -> Path | None:
    """Of the training that a job is, or reads."""
    if isinstance(job, TrainingJob):
        return job.folder
    return job.training.folder if job.training else None


def cells(table: TableConfig) -> list[Job]:
    """Every run of a protocol that the table asks for and that can be made."""
    return [job for job in jobs(table) if isinstance(job, Job)]
