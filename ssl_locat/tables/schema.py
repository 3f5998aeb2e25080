"""What a table's YAML (eval/tables/) says; jobs.py has what follows from it.

Reading it imports no torch. Columns and trainings name protocols of eval/ and recipes of configs/pretrain; all of their options can be
changed in the table, by row too, and on the command line (`train.options.epochs=1`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ssl_locat.config.data_section import Cache, DataSpec
from ssl_locat.config.schema import Section, load, parse
from ssl_locat.config.signatures import keyword_names
from ssl_locat.config.yaml_files import LoadedYaml, load_yaml
from ssl_locat.errors import ConfigError, did_you_mean
from ssl_locat.evaluation import PROTOCOLS
from ssl_locat.evaluation.evaluate import pop_protocol
from ssl_locat.evaluation.shared.options import check_arguments
from ssl_locat.runs.best import BETTER, better


class Sizes(Section):
    """How many images a published set has, for `--dry-run` where the set itself is not here."""

    train: int = Field(gt=0)
    test: int = Field(gt=0)


class TableData(Section):
    """A data set of a table; null where the user has yet to say where it lies."""

    train: DataSpec | None = None
    test: DataSpec | None = None
    layout: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    num_classes: int | None = None
    ignore_index: int | None = None
    reduce_zero_label: bool | None = None
    train_images: int | None = Field(default=None, gt=0, description="how many of train, chosen by their keys; null: all")
    test_images: int | None = Field(default=None, gt=0, description="likewise of test")
    max_bad: float | None = Field(default=None, ge=0, le=1)
    retry_minutes: float | None = Field(default=None, gt=0)
    cache: Cache | None = None
    image_key: str | None = None
    label_key: str | None = None
    mask_key: str | None = None
    size: Sizes | None = Field(default=None, description="images of the published set; of one that is here they are counted")

    @property
    def given(self) -> dict[str, Any]:
        """As a protocol takes it."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"size"})


class Column(Section):
    protocol: str = Field(description="name of a YAML in eval/, or a path")
    metric: str = Field(description="which of the protocol's metrics is shown")
    data: str | None = Field(default=None, description="one of the table's data sets")
    options: dict[str, Any] = Field(default={}, description="keys of the protocol that differ from its YAML")
    seeds: list[int] | None = Field(default=None, description="run once with each")
    fresh: bool = Field(default=False, description="of the row's `fresh` model (untrained), for protocols that train or count it")
    factor: float = Field(default=1.0, description="the metric is multiplied by this: 1e-6 shows millions")


class Training(Section):
    """How rows without a MODEL get their weights: trained once for each row and seed, read by all columns that are not `fresh`."""

    protocol: str | None = Field(default=None, description="a YAML of eval/ that trains a classifier and exports it: supervised")
    recipe: str | None = Field(default=None, description="or a YAML of configs/pretrain, whose teacher is read")
    data: str | None = Field(default=None, description="one of the table's data sets")
    options: dict[str, Any] = Field(default={}, description="keys of the protocol or recipe that differ from its YAML")
    seeds: list[int] | None = Field(default=None, description="train once with each")


class Row(Section):
    model: str | list[str] | None = Field(
        default=None,
        description="MODEL, or several that differ by seed; null: trained as `train` says, or published numbers only",
    )
    fresh: str | None = Field(default=None, description="the untrained model, timm:NAME")
    train: Training | None = Field(default=None, description="what this row's training changes of the table's")
    published: dict[str, float] = Field(default={}, description="column -> number in the paper")
    options: dict[str, dict[str, Any]] = Field(default={}, description="column -> keys of its protocol that this row changes")
    skip: dict[str, str] = Field(default={}, description="column -> why it is not measured in this row; printed below the table")
    note: str | None = Field(default=None, description="printed below the table: what is ours in this row, or why it is empty")
    stage: int = Field(default=1, gt=0, description="rows of later stages than the table's `stage` are left unfilled, and named")


class Figure(Section):
    """One column against another, an arrow from each row to its twin."""

    x: str
    y: str
    twin: str = Field(default=" + LocAt", description="the row of this ending is where the arrow from the row without it leads")


class Checkpoints(Section):
    """Every column is measured on milestones of each training: which of them would a measure choose, and how good is that one?"""

    count: int = Field(gt=3, description="how many of each run, evenly over its optim.total_steps")
    measures: list[str] = Field(description="columns that need no labels: each chooses a checkpoint; the training loss is added")
    targets: list[str] = Field(description="columns that say how good a checkpoint is")
    balanced: str | None = Field(default=None, description="the column of DSE, which is read with the paper's lambda, too")
    twin: str = Field(default=" + LocAt", description="the row of this ending is compared with the row without it, seed by seed")


class Ledger(Section):
    """What the trainings of this table cost and reached, a JSON line for each (ledger.py); those that cost more than the track allows are refused."""

    file: str = Field(description="JSON lines, appended to")
    track: str = Field(description="name of the task; `trial` may be evaluated on part of a test set")
    pflop: float = Field(gt=0, description="10^15 operations of a training, at most, by count (`table --dry-run`)")
    images: int = Field(gt=0, description="images that a training sees, at most, repeated ones too")
    columns: dict[Literal["knn", "linear", "dense"], str] = Field(description="which column is which")
    judged_by: Literal["knn", "linear", "dense"] = Field(default="knn", description="which of them says what is progress")
    baselines: list[str] = Field(default=[], description="rows that others are compared with: one recipe at several lengths")


class TableConfig(Section):
    title: str
    source: str = ""
    results: str = Field(description="folder of the finished cells, of what is trained, and of the table")
    trained: str | None = Field(
        default=None,
        description="folder of what is trained, which tables may share: each training is made once; default: results/trained",
    )
    data: dict[str, TableData] = Field(default={})
    train: Training | None = Field(default=None, description="how rows without a MODEL get their weights")
    columns: dict[str, Column]
    rows: dict[str, Row]
    stage: int = Field(default=1, gt=0, description="up to which stage rows are filled")
    checkpoints: Checkpoints | None = Field(default=None, description="measure checkpoints of each training, not its end alone")
    ledger: Ledger | None = Field(default=None, description="keep what trainings cost and reached")
    figure: Figure | None = Field(default=None, description="drawn from the cells: figure.png, figure.svg, figure.csv")


def load_table(name: str, arguments: Sequence[str] = ()) -> TableConfig:
    """A shipped table or a path; arguments are ROW=MODEL (repeat it for several seeds), key.sub=value, or a MODEL that becomes a row."""
    # read twice: only the table tells which of the arguments name its rows and which its keys
    loaded = load_yaml(name, "eval/tables")
    rows = loaded.data.get("rows")
    rows = rows if isinstance(rows, dict) else {}
    models: dict[str, list[str]] = {}
    overrides = []
    for argument in arguments:
        head, equals, tail = argument.partition("=")
        if equals and head in rows:
            models.setdefault(head, []).append(tail)
        elif equals and head.split(".")[0] in TableConfig.model_fields:
            overrides.append(argument)
        elif equals and "/" not in head and ":" not in head:
            raise ConfigError(f"{argument!r}: {head!r} is no row of {name}.{did_you_mean(head, rows)} Rows: {', '.join(rows)}.")
        else:
            models.setdefault(Path(argument).name, []).append(argument)
    loaded = load_yaml(name, "eval/tables", overrides)
    if models and loaded.data.get("rows") is None:
        loaded.data["rows"] = {}
    rows = loaded.data.get("rows")
    for row, found in models.items():
        # what is no mapping stays, for the schema to name
        if isinstance(rows, dict) and isinstance(rows.get(row), dict | None):
            rows[row] = {**(rows.get(row) or {}), "model": found}
    table = parse(TableConfig, loaded)
    _check_names(table, loaded)
    return table


def _check_names(table: TableConfig, loaded: LoadedYaml) -> None:
    """Names that refer to each other, and every column's and training's options against what they go to."""
    for name, column in table.columns.items():
        _check_known(column.data, table.data, ("columns", name, "data"), loaded)
        protocol, _ = of_column(column, {})
        check_arguments(PROTOCOLS[protocol], column.options, loaded, ("columns", name, "options"))
        for key, option in (("data", "data"), ("seeds", "seed")):
            if getattr(column, key) and option not in (keyword_names(PROTOCOLS[protocol]) or [option]):
                raise ConfigError(
                    f"{loaded.place(('columns', name, key))}: columns.{name}.{key} is given, but {protocol} takes no {option}. Leave it out."
                )
    for name, row in table.rows.items():
        for section in ("published", "options", "skip"):
            for key in getattr(row, section):
                _check_known(key, table.columns, ("rows", name, section, key), loaded, f"rows.{name}.{section} names the column")
        for key, options in row.options.items():
            protocol, _ = of_column(table.columns[key], {})
            check_arguments(PROTOCOLS[protocol], options, loaded, ("rows", name, "options", key))
        _check_training(table, name, loaded)
    for axis in ("x", "y") if table.figure else ():
        _check_known(getattr(table.figure, axis), table.columns, ("figure", axis), loaded)
    if table.checkpoints:
        _check_checkpoints(table, table.checkpoints, loaded)
    if table.ledger:
        for measure, shown in table.ledger.columns.items():
            _check_known(shown, table.columns, ("ledger", "columns", measure), loaded)
        for base in table.ledger.baselines:
            _check_known(base, table.rows, ("ledger", "baselines"), loaded)


def _check_checkpoints(table: TableConfig, wanted: Checkpoints, loaded: LoadedYaml) -> None:
    for key in ("measures", "targets"):
        for name in getattr(wanted, key):
            _check_known(name, table.columns, ("checkpoints", key), loaded)
            if not better(table.columns[name].metric):
                raise ConfigError(
                    f"{loaded.place(('checkpoints', key))}: of {table.columns[name].metric}, the metric of {name}, nobody knows which "
                    f"values are good.{did_you_mean(table.columns[name].metric, BETTER)} Known: {', '.join(BETTER)}."
                )
    if wanted.balanced and (wanted.balanced not in wanted.measures or table.columns[wanted.balanced].metric != "dse"):
        raise ConfigError(
            f"{loaded.place(('checkpoints', 'balanced'))}: checkpoints.balanced is {wanted.balanced!r}; expected one of "
            "checkpoints.measures whose metric is dse."
        )
    for name, row in table.rows.items():
        training = training_of(table, row)
        if row.model or training is None or not training.recipe:
            raise ConfigError(
                f"{loaded.place(('rows', name))}: checkpoints are measured of trainings by a recipe (train.recipe); {name} has "
                + ("a MODEL." if row.model else "none.")
            )
        config = load(training.recipe, overrides(training.options))
        if any(stage.batch_size for stage in config.crops.stages):
            raise ConfigError(
                f"{loaded.place(('rows', name))}: checkpoints are measured at even steps of one batch size; leave batch_size out of crops.stages."
            )
        steps = config.optim.total_steps
        if steps is None or steps < wanted.count:
            raise ConfigError(
                f"{loaded.place(('checkpoints', 'count'))}: checkpoints.count is {wanted.count}, of which {name} needs as many steps or more, "
                f"given as train.options.optim.total_steps (now {steps}): where they lie must be known before a training begins."
            )


def _check_known(name: str | None, known: dict, key: tuple, loaded: LoadedYaml, what: str = "") -> None:
    if name is not None and name not in known:
        what = what or f"{'.'.join(map(str, key))} is"
        raise ConfigError(f"{loaded.place(key)}: {what} {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}")


def _check_training(table: TableConfig, name: str, loaded: LoadedYaml) -> None:
    """What `train` says for one row."""
    key: tuple = ("rows", name, "train") if table.rows[name].train else ("train",)
    training = training_of(table, table.rows[name])
    if training is None or not (training.recipe or table.rows[name].fresh):
        return  # nothing to train: published numbers, or a MODEL to come
    _check_known(training.data, table.data, (*key, "data"), loaded)
    if training.recipe:
        load(training.recipe, overrides(training.options))
        return
    protocol, _ = of_training(training)
    target = PROTOCOLS[protocol]
    if "export" not in (keyword_names(target) or []):
        trainers = [known for known, where in PROTOCOLS.items() if "export" in (keyword_names(where) or [])]
        raise ConfigError(
            f"{loaded.place((*key, 'protocol'))}: train.protocol is {training.protocol!r}, which exports no weights; expected a YAML of "
            f"{' or '.join(trainers)}, or a recipe of pretraining (train.recipe)."
        )
    for section, given in ((("train", "options"), table.train), (("rows", name, "train", "options"), table.rows[name].train)):
        check_arguments(target, given.options if given else {}, loaded, section)


def of_column(column: Column, row_options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(protocol, options) of a column, the row's own on top."""
    loaded = load_yaml(column.protocol, "eval")
    protocol = pop_protocol(loaded)
    check_arguments(PROTOCOLS[protocol], loaded.data, loaded)
    return protocol, {**loaded.data, **column.options, **row_options}


def of_training(training: Training) -> tuple[str, dict[str, Any]]:
    """(protocol, options) of a training by a protocol."""
    loaded = load_yaml(training.protocol or "supervised", "eval")
    return pop_protocol(loaded), {**loaded.data, **training.options}


def training_of(table: TableConfig, row: Row) -> Training | None:
    """How a row is trained: the table's way, with what the row changes."""
    if not row.train:
        return table.train
    below, above = ({**part, "options": flat(part.get("options", {}))} for part in (
        table.train.model_dump(exclude_unset=True) if table.train else {}, row.train.model_dump(exclude_unset=True)
    ))  # fmt: skip
    for name, other in (("protocol", "recipe"), ("recipe", "protocol")):
        if above.get(name) and below.get(other):  # of the other kind, whose options these are not
            below = {"data": below.get("data")}
    return Training(**{**below, **above, "options": nested({**below.get("options", {}), **above["options"]})})


def flat(options: dict[str, Any]) -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}: keys that can be laid over others one by one."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        inside = {f"{key}.{name}": item for name, item in flat(value).items()} if isinstance(value, dict) and value else {}
        found |= inside or {key: value}
    return found


def nested(options: dict[str, Any]) -> dict[str, Any]:
    """The way back."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        *parents, last = key.split(".")
        at = found
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    return found


def overrides(options: dict[str, Any]) -> list[str]:
    """As a command line has them; JSON is YAML, so that text and lists arrive as they are."""
    return [f"{key}={json.dumps(value)}" for key, value in flat(options).items()]
