"""`ssl-locat table TABLE [ROW=MODEL ...] [key=value ...]`: models x protocols, our number beside the published one.

A table's YAML (eval/tables/, schema.py) names data sets, columns (a protocol on one of them, and the metric to show) and rows (models, with
what is published). A row without a MODEL is trained first, as the table's `train` says, and its columns read the weights. Each finished
training and cell is a file below `results`, so that the same command resumes where it stopped; the table is written there as table.md,
table.csv and table.tex. A row's list of models, and a list of seeds, give mean and standard deviation.
"""

import fcntl
import hashlib
import json
import logging
import os
import resource
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ssl_locat.config.models import check_exists
from ssl_locat.config.yaml_files import LoadedYaml
from ssl_locat.errors import ConfigError, DataBudgetExceeded, Diverged, Outage, UserError, did_you_mean
from ssl_locat.evaluation import PROTOCOLS
from ssl_locat.evaluation.evaluate import check_inputs, forget_progress, progress_option, refuse_not_finite, run_protocol
from ssl_locat.evaluation.shared.options import check_arguments
from ssl_locat.runs.durable import write_atomically
from ssl_locat.runs.log import console, progress
from ssl_locat.tables.jobs import Job, Point, TrainingJob, jobs, milestones, training_folder
from ssl_locat.tables.schema import Column, TableConfig, load_table, of_column, of_training, training_of
from ssl_locat.tables.text import Cell, Grid, write_table
from ssl_locat.text.shown import to_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CELL_ERRORS = (UserError, DataBudgetExceeded, Outage, Diverged)  # end a cell, not the table
SECONDS_BETWEEN_LOOKS = 5.0  # at cells that another job measures


def check(name: str, arguments: Sequence[str] = (), model_may_come: bool = False) -> dict[str, Any]:
    """All that can be found wrong before anything is measured; the table as a YAML that says the same, with all options of its columns."""
    table = load_table(name, arguments)
    check_jobs(table, model_may_come)
    resolved = table.model_dump(mode="json")
    for key, column in table.columns.items():
        resolved["columns"][key]["options"] = of_column(column, {})[1]
    if table.train and table.train.protocol:
        resolved["train"]["options"] = of_training(table.train)[1]
    for key, row in table.rows.items():
        # what is not said there comes from the table's: null would take its place
        resolved["rows"][key]["train"] = row.train.model_dump(mode="json", exclude_unset=True) if row.train else None
    return resolved


def check_jobs(table: TableConfig, model_may_come: bool = False) -> None:
    """UserError for the first training or cell, of those not finished, whose model, data or options cannot be used, and for `results` that
    is no folder."""
    results = Path(table.results)
    existing = next(path for path in (results, *results.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "cannot be written" if existing.is_dir() else "is a file"
        raise ConfigError(f"results is {table.results}, but {existing} {problem}. Give a folder, with results=FOLDER.")
    seen = set()
    for job in jobs(table):
        try:
            if isinstance(job, TrainingJob):
                _check_training(job)
                continue
            # once for each model and data set: seeds and options of a column open the same files
            about = json.dumps([job.model, job.protocol, job.options.get("data")], sort_keys=True, default=str)
            if about in seen or finished(cell_file(table, job)):
                continue
            seen.add(about)
            check_arguments(PROTOCOLS[job.protocol], job.options, LoadedYaml(job.protocol, {}))
            check_inputs(job.model, job.protocol, job.options, model_may_come or job.training is not None)
        except UserError as error:
            raise type(error)(f"{where(job)}: {error}") from None
    if table.ledger:
        from ssl_locat.tables.ledger import check_caps

        check_caps(table)


def _check_training(job: TrainingJob) -> None:
    if finished(job.result):
        if not job.folder.is_dir():
            raise UserError(
                f"{job.result} says that it has finished, but its weights, {job.folder}, are gone. Delete that file to train again."
            )
        return
    if job.protocol is None:
        from ssl_locat.pretraining.parts import check as check_run
        from ssl_locat.runs.distributed import world_size

        check_run(job.config(), world_size(), may_write=False)
        return
    check_arguments(PROTOCOLS[job.protocol], job.options, LoadedYaml(job.protocol, {}))
    check_inputs(job.fresh, job.protocol, job.options)
    teacher = (job.options.get("distill") or {}).get("model")
    if teacher:
        check_exists(teacher)


def where(job: TrainingJob | Job) -> str:
    """As messages name it."""
    if isinstance(job, TrainingJob):
        return f"{job.row}, training"
    return f"{job.row}, {job.column}" + ("" if job.step is None else f", step {job.step}")


def cell_file(table: TableConfig, job: Job) -> Path:
    """Where a cell's result is kept: named by all that it depends on."""
    # the order of keys means nothing; options may hold paths and tuples, which JSON has as text and lists
    about = json.dumps([job.identity, job.protocol, job.options], sort_keys=True, default=str)
    return Path(table.results) / "cells" / f"{job.protocol}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


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


class Found:
    """What a table knows so far: the numbers of its cells, and what failed."""

    def __init__(self, table: TableConfig):
        self.table = table
        self.numbers: dict[tuple[str, str], list[float]] = {}
        self.points: list[Point] = []  # of `checkpoints`
        self.of_training: dict[tuple[str, Path], dict[str, float]] = {}  # (row, its folder) -> column -> number
        self.failed: list[tuple[str, Exception]] = []

    def fail(self, job: TrainingJob | Job, error: Exception) -> None:
        self.failed.append((where(job), error))
        log.warning("%s: %s", where(job), error)

    def grid(self) -> Grid:
        return {
            row: {
                column: Cell.of(self.numbers.get((row, column), []), table_row.published.get(column))
                for column in self.table.columns
            }
            for row, table_row in self.table.rows.items()
        }

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """The number of a cell; of checkpoints the table itself shows the last one, `points` has all."""
        value = _number(result, job.column, job.protocol, self.table.columns[job.column])
        if job.step is not None:
            assert job.training and self.table.checkpoints
            self.points.append(Point(job.row, job.training.folder, job.step, job.column, value, result["metrics"]))
            training = training_of(self.table, self.table.rows[job.row])
            if training and job.step != milestones(self.table, training)[-1]:
                return
        elif job.training:
            self.of_training.setdefault((job.row, job.training.folder), {})[job.column] = value
        self.numbers.setdefault((job.row, job.column), []).append(value)

    def write(self) -> str:
        """table.md, table.csv and table.tex as far as it has come; the Markdown."""
        rows = self.table.rows.items()
        notes = [f"{name}: {row.note}" for name, row in rows if row.note]
        notes += [f"{name}: not filled, of stage {row.stage}" for name, row in rows if row.stage > self.table.stage]
        notes += [f"{name}, {column}: not measured, {why}" for name, row in rows for column, why in row.skip.items()]
        messages = [f"{place}: {error}" for place, error in self.failed]
        return write_table(Path(self.table.results), self.table.title, self.table.source, self.grid(), messages, notes)


def measure(table: TableConfig) -> Found:
    """Does all jobs that are not finished; a failing one does not stop the rest, but for the cells that read what was not trained. What
    another job on the same table does is left to it, and waited for at the end.

    Raises the error of a job that failed on one process alone (an image that only it reads): the others wait for it in the middle of the
    work, so that the process must end. Raises Preempted where a signal asks it to stop; what is finished is kept, and what trains resumes.
    """
    from ssl_locat.evaluation.shared.stopping import stop_if_asked, stoppable
    from ssl_locat.runs.distributed import failed_alike, is_main, lost_ranks_named, setup, shutdown
    from ssl_locat.tables.ledger import add_lines

    todo, found = deque(jobs(table)), Found(table)
    trained: dict[Path, Exception | None] = {}  # folders of trainings that have ended, with what ended them
    device, busy = setup(), 0
    try:
        with lost_ranks_named(), stoppable(), progress("table", total=len(todo), unit="jobs") as bar:
            while todo:
                job = todo.popleft()
                stop_if_asked("the table")
                needs = training_folder(job) if isinstance(job, Job) else None
                if needs and trained.get(needs):
                    bar.update()
                    found.fail(job, type(trained[needs])("not measured, as its training failed"))  # type: ignore[misc]
                    continue
                path = job.result if isinstance(job, TrainingJob) else cell_file(table, job)
                state, result, held = claim(path) if needs is None or needs in trained else ("busy", None, None)
                if state == "busy":
                    todo.append(job)
                    busy += 1
                    if busy >= len(todo):  # nothing else is left to do; then all of them are looked at once more
                        time.sleep(SECONDS_BETWEEN_LOOKS)
                        busy = 0
                    continue
                busy = 0
                bar.update()
                try:
                    if isinstance(job, TrainingJob):
                        if result is None:  # "mine"
                            _train(job, device)
                        trained[job.folder] = None
                        continue
                    column = table.columns[job.column]
                    measured = result is None
                    if result is None:
                        result = _measure_cell(path, job, device, column)
                    found.add(job, result)
                    if measured and is_main():
                        found.write()  # a table that takes days is looked at before its end
                    if table.ledger and is_main():
                        add_lines(table, found.of_training)
                except CELL_ERRORS as error:
                    if not failed_alike(path.name):
                        raise type(error)(f"{where(job)}: {error}") from error
                    if isinstance(job, TrainingJob):
                        trained[job.folder] = error
                    found.fail(job, error)
                finally:
                    if held:
                        held.release()
    finally:
        shutdown()
    return found


def _train(job: TrainingJob, device: "torch.device") -> None:
    """Weights in `job.folder`, and then its result; what was begun before resumes."""
    import torch

    from ssl_locat.models.backbone import load_backbone
    from ssl_locat.runs.distributed import barrier, is_main

    log.info("%s: training %s, into %s", job.row, job.fresh, job.folder)
    if job.protocol is None:
        from ssl_locat.pretraining.loop import pretrain

        before = _cpu_seconds()
        summary = pretrain(job.config())
        result = {
            "protocol": "pretrain",
            "model": job.fresh,
            "metrics": {"steps": summary["steps"]},
            "seconds": summary["seconds"],
            "cpu_seconds": round(_cpu_seconds() - before, 1),
            "restarts": summary["restarts"],  # above 0 both are of the last start alone
        }
    else:
        kept = progress_option(job.protocol, job.options, job.folder.with_name(f"{job.folder.name}.progress.safetensors"))
        torch.manual_seed(job.options.get("seed", 0))  # the untrained network, the same on every process and after a stop
        result = run_protocol(
            load_backbone(job.fresh).to(device), job.protocol, job.options | kept | {"export": str(job.folder)}, job.fresh
        )
        barrier()
        if is_main():
            forget_progress(kept.get("resume_file"))
    if is_main():
        write_atomically(job.result, to_json(result, indent=1) + "\n")
    barrier()  # nobody reads the weights before they are whole


def _cpu_seconds() -> float:
    """Of this process and those that it started and that have ended, such as readers of data."""
    return sum(
        used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _measure_cell(path: Path, job: Job, device: "torch.device", column: Column) -> dict[str, Any]:
    """The result of one cell, kept in its file; its training resumes from the file beside."""
    import torch

    from ssl_locat.models.backbone import load_backbone
    from ssl_locat.runs.distributed import barrier, is_main

    progress_kept = progress_option(job.protocol, job.options, path.with_suffix(".progress.safetensors"))
    # as `evaluate` does: an untrained timm:NAME is the same network in each cell and on every process
    torch.manual_seed(job.options.get("seed", 0))
    result = run_protocol(load_backbone(job.model).to(device), job.protocol, job.options | progress_kept, job.model)
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
    """Train and measure what is missing, write table.md, table.csv, table.tex and the figure, show the first; (their folder, the error to
    end with).

    Raises UserError before anything is measured where a model or data set is not there. The error that is returned has the highest exit
    code of what failed; None if nothing did.
    """
    table = load_table(name, arguments)
    check_jobs(table)
    from ssl_locat.runs.distributed import is_main  # torch: after what can be refused without it

    found = measure(table)
    folder = Path(table.results)
    if is_main():
        markdown = found.write()
        files = ["table.csv", "table.tex"]
        if table.figure:
            from ssl_locat.tables.figure import draw

            files += draw(table.figure, found.grid(), folder)
        if table.checkpoints:
            from ssl_locat.tables.checkpoint_files import write_study

            files += write_study(table, table.checkpoints, found.points, folder)
        console().print(markdown, markup=False, soft_wrap=True)
        console().print(f"{folder / 'table.md'}, {', '.join(files)}", markup=False)
    return folder, _worst(found.failed, len(jobs(table)), folder) if found.failed else None


def _worst(failed: list[tuple[str, Exception]], total: int, folder: Path) -> Exception:
    """One error for all that failed, of the kind with the highest exit code."""
    # an outage (4) is worth another try, a mistake (2) is not: whoever requeues must see the former
    place, error = max(failed, key=lambda one: getattr(one[1], "exit_code", 0))
    return type(error)(
        f"{len(failed)} of {total} cells of the table could not be measured; one of them: {place}: {error} All are listed in {folder / 'table.md'}."
    )
