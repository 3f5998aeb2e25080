"""`ssl-locat table TABLE [ROW=MODEL ...] [key=value ...]`: models x protocols, our number beside the published one.

A table's YAML (eval/tables/) names data sets, columns (a protocol on one of them, and the metric to show) and rows (models, with what is
published). Each finished cell is a file below `results`, so that the same command resumes where it stopped; the table is written there as
table.md, table.csv and table.tex. A row's list of models, and a column's list of seeds, give mean and standard deviation.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ssl_locat.config.schema import DataSpec, Section, parse
from ssl_locat.config.signatures import keyword_names
from ssl_locat.config.yaml_files import LoadedYaml, load_yaml
from ssl_locat.errors import ConfigError, UserError, did_you_mean
from ssl_locat.evaluation import PROTOCOLS
from ssl_locat.evaluation.evaluate import check_inputs, pop_protocol, run_protocol
from ssl_locat.evaluation.shared.options import check_arguments
from ssl_locat.evaluation.table_text import Cell, write_table
from ssl_locat.runs.folder import write_atomically
from ssl_locat.runs.log import console, progress, say
from ssl_locat.text.shown import to_json

log = logging.getLogger(__name__)


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
    image_key: str | None = None
    label_key: str | None = None
    mask_key: str | None = None


class Column(Section):
    protocol: str = Field(description="name of a YAML in eval/, or a path")
    metric: str = Field(description="which of the protocol's metrics is shown")
    data: str | None = Field(default=None, description="one of the table's data sets")
    options: dict[str, Any] = Field(default={}, description="keys of the protocol that differ from its YAML")
    seeds: list[int] | None = Field(default=None, description="run once with each")
    fresh: bool = Field(default=False, description="of the row's `fresh` model (untrained), for protocols that train it")
    factor: float = Field(default=1.0, description="the metric is multiplied by this: 1e-6 shows millions")


class Row(Section):
    model: str | list[str] | None = Field(
        default=None, description="MODEL, or several that differ by seed; null: published numbers only"
    )
    fresh: str | None = Field(default=None, description="the untrained model, timm:NAME")
    published: dict[str, float] = Field(default={}, description="column -> number in the paper")
    options: dict[str, dict[str, Any]] = Field(default={}, description="column -> keys of its protocol that this row changes")


class TableConfig(Section):
    title: str
    source: str = ""
    results: str = Field(description="folder of the finished cells and of the table")
    data: dict[str, TableData] = Field(default={})
    columns: dict[str, Column]
    rows: dict[str, Row]


def load_table(name: str, arguments: Sequence[str] = ()) -> TableConfig:
    """A shipped table or a path; arguments are ROW=MODEL (repeat it for several seeds), key.sub=value, or a MODEL that becomes a row."""
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
    _check(table, loaded)
    return table


def _check(table: TableConfig, loaded: LoadedYaml) -> None:
    """Names that refer to each other, and every column's options against its protocol's signature."""
    for name, column in table.columns.items():
        if column.data is not None and column.data not in table.data:
            raise ConfigError(
                f"{loaded.place(('columns', name, 'data'))}: columns.{name}.data is {column.data!r}; known: {', '.join(table.data)}."
                f"{did_you_mean(column.data, table.data)}"
            )
        protocol, _ = _protocol(column, {})
        check_arguments(PROTOCOLS[protocol], column.options, loaded, ("columns", name, "options"))
        for key, option in (("data", "data"), ("seeds", "seed")):
            if getattr(column, key) and option not in (keyword_names(PROTOCOLS[protocol]) or [option]):
                raise ConfigError(
                    f"{loaded.place(('columns', name, key))}: columns.{name}.{key} is given, but {protocol} takes no {option}. Leave it out."
                )
    for name, row in table.rows.items():
        for section in ("published", "options"):
            for column in getattr(row, section):
                if column not in table.columns:
                    raise ConfigError(
                        f"{loaded.place(('rows', name, section, column))}: rows.{name}.{section} names the column {column!r}; "
                        f"known: {', '.join(table.columns)}.{did_you_mean(column, table.columns)}"
                    )
        for column, options in row.options.items():
            protocol, _ = _protocol(table.columns[column], {})
            check_arguments(PROTOCOLS[protocol], options, loaded, ("rows", name, "options", column))


def _protocol(column: Column, row_options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(protocol, options) of a column, the row's own on top."""
    loaded = load_yaml(column.protocol, "eval")
    protocol = pop_protocol(loaded)
    check_arguments(PROTOCOLS[protocol], loaded.data, loaded)
    return protocol, {**loaded.data, **column.options, **row_options}


def cells(table: TableConfig) -> Iterator[tuple[str, str, str, str, dict[str, Any]]]:
    """(row, column, MODEL, protocol, options) of every run that the table asks for and that can be made."""
    for row_name, row in table.rows.items():
        trained = [row.model] if isinstance(row.model, str) else row.model or []
        for column_name, column in table.columns.items():
            models = ([row.fresh] if row.fresh else []) if column.fresh else trained
            protocol, options = _protocol(column, row.options.get(column_name, {}))
            if column.data is not None:
                given = table.data[column.data].model_dump(mode="json", exclude_none=True)
                options["data"] = {**{k: v for k, v in (options.get("data") or {}).items() if v is not None}, **given}
                if "test" not in given:
                    continue  # the user has not said where this set lies
            for model in models:
                for seed in column.seeds or [None]:
                    yield row_name, column_name, model, protocol, options if seed is None else {**options, "seed": seed}


def check(name: str, arguments: Sequence[str] = (), model_may_come: bool = False) -> dict[str, Any]:
    """All that can be found wrong before anything is measured; the table as a YAML that says the same, with all options of its columns."""
    table = load_table(name, arguments)
    check_cells(table, model_may_come)
    resolved = table.model_dump(mode="json")
    for key, column in table.columns.items():
        resolved["columns"][key]["options"] = _protocol(column, {})[1]
    return resolved


def check_cells(table: TableConfig, model_may_come: bool = False) -> None:
    """UserError for the first cell, of those not finished, whose model, data or options cannot be used, and for `results` that is no folder."""
    results = Path(table.results)
    existing = next(path for path in (results, *results.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "cannot be written" if existing.is_dir() else "is a file"
        raise ConfigError(f"results is {table.results}, but {existing} {problem}. Give a folder, with results=FOLDER.")
    seen = set()
    for row, column, model, protocol, options in cells(table):
        about = json.dumps([model, protocol, options.get("data")], sort_keys=True, default=str)
        if about in seen or finished(cell_file(table, model, protocol, options)):
            continue
        seen.add(about)
        try:
            check_arguments(PROTOCOLS[protocol], options, LoadedYaml(protocol, {}))
            check_inputs(model, protocol, options, model_may_come)
        except UserError as error:
            raise type(error)(f"{row}, {column}: {error}") from None


def dry_run(name: str, arguments: Sequence[str] = ()) -> None:
    """Check everything and list the cells: those at hand, and those that would be measured."""
    check(name, arguments)
    table = load_table(name, arguments)
    for row, column, model, protocol, options in cells(table):
        state = "done" if finished(cell_file(table, model, protocol, options)) else "to do"
        say(f"{state:<6} {row}, {column}: {protocol} of {model}")


def fingerprint(model: str) -> str:
    """MODEL and what it holds now: a run that went on, or a replaced export, is evaluated anew."""
    path = Path(model.partition("?")[0])
    if not path.exists():
        return model
    newest = [*sorted(path.glob("checkpoints/step_*"))[-1:], *path.glob("model.safetensors"), *([path] if path.is_file() else [])]
    marks = [f"{item.name} {int(item.stat().st_mtime)}" for item in newest]
    return " ".join([str(path.resolve()), model.partition("?")[2], *marks])


def cell_file(table: TableConfig, model: str, protocol: str, options: dict[str, Any]) -> Path:
    """Where a cell's result is kept: named by all that it depends on."""
    about = json.dumps([fingerprint(model), protocol, options], sort_keys=True, default=str)
    return Path(table.results) / "cells" / f"{protocol}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def finished(path: Path) -> dict[str, Any] | None:
    """The result that a cell's file holds; None where there is none, or none that can be read: then it is measured again."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        result = None
    if isinstance(result, dict) and isinstance(result.get("metrics"), dict):
        return result
    log.warning("%s: not the result of a cell; it is measured again", path)
    return None


def measure(table: TableConfig) -> tuple[dict[tuple[str, str], list[float]], list[str]]:
    """(row, column) -> our numbers, and the messages of the cells that failed. Runs what is not finished; a failing cell does not stop the rest."""
    import torch

    from ssl_locat.models.backbone import load_backbone
    from ssl_locat.runs.distributed import barrier, is_main, setup, shutdown

    wanted = list(cells(table))
    found: dict[tuple[str, str], list[float]] = {}
    failed: list[str] = []
    device = setup()
    try:
        with progress("table", total=len(wanted), unit="cells") as bar:
            for row, column, model, protocol, options in wanted:
                path = cell_file(table, model, protocol, options)
                barrier()
                result = finished(path)
                if result is None:
                    try:
                        torch.manual_seed(options.get("seed", 0))
                        result = run_protocol(load_backbone(model).to(device), protocol, options, model)
                    except UserError as error:
                        failed.append(f"{row}, {column}: {error}")
                        log.warning("%s, %s: %s", row, column, error)
                        continue
                    barrier()
                    if is_main():
                        path.parent.mkdir(parents=True, exist_ok=True)
                        write_atomically(path, to_json(result, indent=1) + "\n")
                metric = table.columns[column].metric
                if metric not in result["metrics"]:
                    known = result["metrics"]
                    raise ConfigError(
                        f"columns.{column}.metric is {metric!r}; {protocol} gave {', '.join(known)}.{did_you_mean(metric, known)}"
                    )
                found.setdefault((row, column), []).append(result["metrics"][metric] * table.columns[column].factor)
                bar.update()
    finally:
        shutdown()
    return found, failed


def run(name: str, arguments: Sequence[str] = ()) -> Path:
    """Measure what is missing, write table.md, table.csv and table.tex, show the first; the folder they are in.

    Raises UserError before anything is measured where a model or data set is not there, and at the end if every cell failed.
    """
    table = load_table(name, arguments)
    check_cells(table)
    found, failed = measure(table)
    grid = {
        row: {column: Cell.of(found.get((row, column), []), table.rows[row].published.get(column)) for column in table.columns}
        for row in table.rows
    }
    folder = Path(table.results)
    from ssl_locat.runs.distributed import is_main

    if is_main():
        markdown = write_table(folder, table.title, table.source, grid, failed)
        console().print(markdown, markup=False, soft_wrap=True)
        console().print(f"{folder / 'table.md'}, table.csv, table.tex", markup=False)
    if failed and not found:
        raise UserError(
            f"no cell of the table could be measured; the first: {failed[0]} All are listed in {folder / 'table.md'}."
        )
    return folder
