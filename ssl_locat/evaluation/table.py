"""`ssl-locat table TABLE [ROW=MODEL ...] [key=value ...]`: models x protocols, our number beside the published one.

A table's YAML (eval/tables/) names data sets, columns (a protocol on one of them, and the metric to show) and rows (models, with what is
published). Each finished cell is a file below `results`, so that the same command resumes where it stopped; the table is written there as
table.md, table.csv and table.tex. A row's list of models, and a column's list of seeds, give mean and standard deviation.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import Field

from ssl_locat.config.schema import Cache, DataSpec, Section, parse
from ssl_locat.config.signatures import keyword_names
from ssl_locat.config.yaml_files import LoadedYaml, load_yaml
from ssl_locat.errors import ConfigError, DataBudgetExceeded, Diverged, Outage, UserError, did_you_mean
from ssl_locat.evaluation import PROTOCOLS
from ssl_locat.evaluation.evaluate import (
    check_inputs,
    fingerprint,
    forget_progress,
    pop_protocol,
    progress_option,
    refuse_not_finite,
    run_protocol,
)
from ssl_locat.evaluation.shared.options import check_arguments
from ssl_locat.evaluation.table_text import Cell, write_table
from ssl_locat.runs.durable import write_atomically
from ssl_locat.runs.log import console, progress, say
from ssl_locat.text.shown import to_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CELL_ERRORS = (UserError, DataBudgetExceeded, Outage, Diverged)  # end a cell, not the table
SECONDS_BETWEEN_LOOKS = 5.0  # at cells that another job measures


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
            for key in getattr(row, section):
                if key not in table.columns:
                    raise ConfigError(
                        f"{loaded.place(('rows', name, section, key))}: rows.{name}.{section} names the column {key!r}; "
                        f"known: {', '.join(table.columns)}.{did_you_mean(key, table.columns)}"
                    )
        for key, options in row.options.items():
            protocol, _ = _protocol(table.columns[key], {})
            check_arguments(PROTOCOLS[protocol], options, loaded, ("rows", name, "options", key))


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
            # supervised training starts from the untrained twin of the row, every other protocol from its trained model
            models = ([row.fresh] if row.fresh else []) if column.fresh else trained
            protocol, options = _protocol(column, row.options.get(column_name, {}))
            if column.data is not None:
                given = table.data[column.data].model_dump(mode="json", exclude_none=True)
                options["data"] = {**{k: v for k, v in (options.get("data") or {}).items() if v is not None}, **given}
                if "test" not in given:
                    continue  # the user has not said where this set lies
            for model in models:
                seeds: Sequence[int | None] = column.seeds or [None]
                for seed in seeds:
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
        # once for each model and data set: seeds and options of a column open the same files
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


def cell_file(table: TableConfig, model: str, protocol: str, options: dict[str, Any]) -> Path:
    """Where a cell's result is kept: named by all that it depends on."""
    # the order of keys means nothing; options may hold paths and tuples, which JSON has as text and lists
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


class Claim:
    """A cell that this job measures, and no other that works on the same table: the kernel frees the claim when the process ends."""

    def __init__(self, cell: Path):
        self.cell = cell
        self.lock: TextIO | None = None

    def take(self) -> bool:
        """False while another job measures the cell."""
        self.cell.parent.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.cell.with_suffix(".lock"), "a")  # noqa: SIM115  held until `release`
        try:
            # not waiting: what another job measures is passed over, and something else measured meanwhile
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            return False
        return True

    def release(self) -> None:
        # whoever waits looks for the result once more before measuring, so that the file may go
        self.cell.with_suffix(".lock").unlink(missing_ok=True)
        assert self.lock is not None  # taken
        self.lock.close()


def claim(path: Path) -> tuple[str, dict[str, Any] | None, Claim | None]:
    """("done", result), ("busy", None) or ("mine", None) on every process alike; rank 0 holds the claim."""
    from ssl_locat.runs.distributed import broadcast_object, is_main

    state, result, held = "busy", None, None
    if is_main():
        result = finished(path)
        held = Claim(path)
        if result is None and held.take():
            result, state = finished(path), "mine"  # another job may have finished it a moment ago
            if result is not None:
                held.release()
        if result is not None:
            state = "done"
    # one process looks: files may be there for one node a moment before they are for another
    state, result = broadcast_object([state, result])
    return state, result, held if state == "mine" else None


def measure(table: TableConfig) -> tuple[dict[tuple[str, str], list[float]], list[tuple[str, Exception]]]:
    """(row, column) -> our numbers, and (where, error) of the cells that failed. Runs what is not finished; a failing cell does not stop
    the rest. Cells that another job on the same table measures are left to it, and waited for at the end.

    Raises the error of a cell that failed on one process alone (an image that only it reads): the others wait for it in the middle of the
    cell, so that the job must end. Raises Preempted where a signal asks it to stop; finished cells are kept, and what trains resumes.
    """
    from ssl_locat.evaluation.shared.stopping import stop_if_asked, stoppable
    from ssl_locat.runs.distributed import failed_alike, lost_ranks_named, setup, shutdown

    todo = deque(cells(table))
    found: dict[tuple[str, str], list[float]] = {}
    failed: list[tuple[str, Exception]] = []
    device, busy = setup(), 0
    try:
        with lost_ranks_named(), stoppable(), progress("table", total=len(todo), unit="cells") as bar:
            while todo:
                row, column, model, protocol, options = cell = todo.popleft()
                path = cell_file(table, model, protocol, options)
                stop_if_asked("the table")
                state, result, held = claim(path)
                if state == "busy":
                    todo.append(cell)
                    busy += 1
                    if busy >= len(todo):  # nothing else is left to do
                        time.sleep(SECONDS_BETWEEN_LOOKS)
                    continue
                busy = 0
                bar.update()
                try:
                    if result is None:  # "mine"
                        result = _measure_cell(path, model, protocol, options, device, table.columns[column])
                    found.setdefault((row, column), []).append(_number(result, column, protocol, table.columns[column]))
                except CELL_ERRORS as error:
                    if not failed_alike(path.name):
                        raise type(error)(f"{row}, {column}: {error}") from error
                    failed.append((f"{row}, {column}", error))
                    log.warning("%s, %s: %s", row, column, error)
                finally:
                    if held:
                        held.release()
    finally:
        shutdown()
    return found, failed


def _measure_cell(
    path: Path, model: str, protocol: str, options: dict[str, Any], device: "torch.device", column: Column
) -> dict[str, Any]:
    """The result of one cell, kept in its file; its training resumes from the file beside."""
    import torch

    from ssl_locat.models.backbone import load_backbone
    from ssl_locat.runs.distributed import barrier, is_main

    progress_kept = progress_option(protocol, options, path.with_suffix(".progress.safetensors"))
    # as `evaluate` does: an untrained timm:NAME is the same network in each cell and on every process
    torch.manual_seed(options.get("seed", 0))
    result = run_protocol(load_backbone(model).to(device), protocol, options | progress_kept, model)
    barrier()
    if is_main():
        if result["metrics"].get(column.metric, 0) is not None:  # a number that is none is no result: it is measured again
            write_atomically(path, to_json(result, indent=1) + "\n")
        forget_progress(progress_kept.get("resume_file"))
    return result


def _number(result: dict[str, Any], name: str, protocol: str, column: Column) -> float:
    known = result["metrics"]
    if column.metric not in known:
        raise ConfigError(
            f"columns.{name}.metric is {column.metric!r}; {protocol} gave {', '.join(known)}.{did_you_mean(column.metric, known)}"
        )
    if known[column.metric] is None:
        refuse_not_finite(result)
    return known[column.metric] * column.factor


def run(name: str, arguments: Sequence[str] = ()) -> tuple[Path, Exception | None]:
    """Measure what is missing, write table.md, table.csv and table.tex, show the first; (their folder, the error to end with).

    Raises UserError before anything is measured where a model or data set is not there. The error that is returned has the highest exit
    code of the cells that failed; None if none did.
    """
    table = load_table(name, arguments)
    check_cells(table)
    from ssl_locat.runs.distributed import is_main  # torch: after what can be refused without it

    found, failed = measure(table)
    grid = {
        row: {column: Cell.of(found.get((row, column), []), table.rows[row].published.get(column)) for column in table.columns}
        for row in table.rows
    }
    folder = Path(table.results)
    if is_main():
        markdown = write_table(folder, table.title, table.source, grid, [f"{where}: {error}" for where, error in failed])
        console().print(markdown, markup=False, soft_wrap=True)
        console().print(f"{folder / 'table.md'}, table.csv, table.tex", markup=False)
    return folder, _worst(failed, len(list(cells(table))), folder) if failed else None


def _worst(failed: list[tuple[str, Exception]], total: int, folder: Path) -> Exception:
    """One error for all cells that failed, of the kind with the highest exit code."""
    # an outage (4) is worth another try, a mistake (2) is not: whoever requeues must see the former
    where, error = max(failed, key=lambda one: getattr(one[1], "exit_code", 0))
    return type(error)(
        f"{len(failed)} of {total} cells of the table could not be measured; one of them: {where}: {error} All are listed in {folder / 'table.md'}."
    )
