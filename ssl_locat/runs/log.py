"""What a run tells people and scripts: progress bars, log lines, metrics.jsonl, events.jsonl, TensorBoard, wandb, mlflow.

Imports no torch, so that the command line stays quick; tensors are recognised by their methods. Everything goes to stderr: stdout
belongs to `--json`. Only rank 0 writes, but for warnings and faults, which every rank reports under its own name.
"""

import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ssl_locat.errors import ConfigError, Diverged, Outage, Preempted, did_you_mean
from ssl_locat.runs.durable import flush, flush_folder
from ssl_locat.runs.trackers import TRACKERS, Tracker
from ssl_locat.text.shown import printable, redact, redacted, shown, to_json

if TYPE_CHECKING:  # rich is a third of the time that `--help` takes: it is imported by what shows something
    from rich.console import Console
    from rich.progress import Progress

_PLAIN_EVERY_SECONDS = (5, 60)  # first plain progress line after 5 s, then ever more seldom, at least one a minute

_quiet = False
_live: "Progress | None" = None  # the bar on screen; an inner progress() becomes a second line of it


def _rank() -> int:
    """Rank from the launcher's environment: known before the process group exists, and after it is gone."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


class _Formatter(logging.Formatter):
    """Records without credentials and control characters; a name or an error in them forges no second line."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            # numbers stay numbers, for %d and %.1f
            safe = tuple(arg if isinstance(arg, int | float) else shown(arg) for arg in record.args)
            # a copy: other handlers get the record as it was made
            record = logging.makeLogRecord(record.__dict__ | {"args": safe})
        return printable(redact(super().format(record)))


def say(text: str, file: TextIO | None = None) -> None:
    """Text for people on stdout (or `file`). Names need not be UTF-8, and a terminal may know ASCII only: what it cannot show is shown by
    its number."""
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    print(printable(redact(text)).encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


@cache
def console() -> "Console":
    """The one console, on stderr. rich respects NO_COLOR; bars and log lines share it, so as not to overwrite each other."""
    from rich.console import Console

    class Redacting(Console):
        """Whatever text it is given, in tables too, comes out without credentials and control characters."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(printable(redact(text)), **options)

    found = Redacting(stderr=True)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = 160  # a log file has no width; rich takes 80, which breaks tables
    return found


def next_steps(*commands: str) -> None:
    """What a command says at its end on rank 0, unless `--quiet`: what people do then."""
    if not (_quiet or _rank()):
        console().print(
            "\n".join(["Next:", *(f"  {command}" for command in commands)]), markup=False, highlight=False, soft_wrap=True
        )


def setup(quiet: bool = False, verbose: bool = False) -> None:
    """Configure logging for a command: info on rank 0, warnings with rank and host elsewhere; `quiet` keeps warnings only."""
    global _quiet
    _quiet = quiet
    rank = _rank()
    level = logging.DEBUG if verbose else logging.WARNING if quiet or rank else logging.INFO
    prefix = f"[rank {rank} on {socket.gethostname()}] " if "RANK" in os.environ and rank else ""
    if console().is_terminal:
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(console=console(), show_path=False, markup=False, log_time_format="%H:%M:%S")
        handler.setFormatter(_Formatter(prefix + "%(message)s"))
    else:  # one event per line, never wrapped: people grep it
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    if logging.lastResort is not None:  # prints what other packages warn about
        logging.lastResort.setFormatter(_Formatter())
    logger = logging.getLogger("ssl_locat")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    # else a root handler, of whatever library configured one, prints each line again
    logger.propagate = False


# --- progress ---------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """'4 s', '3 min 20 s', '2 h 05 min', '3 d 4 h': two units are enough for people."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


class _Bar:
    """Counts, and words the count. The rate is that of the work alone: without the first update, which waits for workers, caches and compilers, and
    without pauses (probes, checkpoints). The ETA adds the pauses that are still to come."""

    def __init__(self, description: str, total: int | None, unit: str, start: int):
        self.description, self.total, self.unit = description, total, unit
        self.start, self.done = start, start
        self.fields: dict[str, float | str] = {}
        self.began = time.monotonic()
        self.counted_from: int | None = None  # what was done when the rate's clock began
        self.pauses: dict[str, tuple[int, float]] = {}  # kind -> its period, and the seconds of the last one
        self.work: Callable[[int], float] = float  # what so many cost, where they differ: the ETA goes by it

    def pause(self, seconds: float, kind: str = "", every: int | None = None) -> None:
        """Time that was no work: kept out of the rate. `every`: this kind of pause comes again at each multiple of it, and at the end."""
        # the clock of the rate stands still meanwhile
        self.began += seconds
        if every:
            self.pauses[kind] = every, seconds

    def update(self, n: int = 1, **fields: float | str) -> None:
        """`n` more done; `fields` (loss=2.31) stay shown until replaced. Floats, no device tensors: showing must not wait."""
        self.done += n
        # not at the end: a count of one has no rate but that of its slow first step
        if self.counted_from is None and self.done != self.total:
            self.counted_from, self.began = self.done, time.monotonic()
        self.fields.update(fields)
        self.show()

    def show(self) -> None: ...

    def finish(self) -> None: ...

    def words(self) -> str:
        elapsed = time.monotonic() - self.began
        from_here = self.start if self.counted_from is None else self.counted_from
        rate = (self.done - from_here) / elapsed if elapsed > 0 else 0.0
        parts = [f"{self.done}" + (f"/{self.total}" if self.total else "") + (f" {self.unit}" if self.unit else "")]
        parts += [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in self.fields.items()]
        if rate > 0:
            unit = self.unit or "it"
            parts.append(f"{rate:.3g} {unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{unit.removesuffix('s')}")
            if self.total and self.done < self.total:
                left = self.work(self.total) - self.work(self.done)
                seconds = elapsed * left / (self.work(self.done) - self.work(from_here))
                parts.append(f"ETA {duration(seconds + self._pauses_to_come(self.total))}")
        return "  ".join(parts)

    def _pauses_to_come(self, total: int) -> float:
        """Seconds: of each kind, one at every multiple of its period that is left, and one at the end where that is none."""
        return sum(
            seconds * (total // every - self.done // every + bool(total % every)) for every, seconds in self.pauses.values()
        )


class _RichBar(_Bar):
    def __init__(self, live: "Progress", description: str, total: int | None, unit: str, start: int):
        super().__init__(description, total, unit, start)
        self.live = live
        self.task = live.add_task(self.description, total=self.total, completed=self.done, words="")

    def show(self) -> None:
        self.live.update(self.task, completed=self.done, words=self.words())

    def finish(self) -> None:
        if self.live is _live and len(self.live.tasks) > 1:
            self.live.remove_task(self.task)  # an inner bar leaves the outer one alone on the screen


class _PlainBar(_Bar):
    """For log files: a line after 5 s, then at doubling intervals up to a minute, and one at the end if there was any."""

    def __init__(self, description: str, total: int | None, unit: str, start: int):
        super().__init__(description, total, unit, start)
        self.interval, self.longest = _PLAIN_EVERY_SECONDS
        self.last, self.lines = self.began, 0

    def show(self) -> None:
        now = time.monotonic()
        if now - self.last >= self.interval:
            self._line()
            self.last, self.interval = now, min(2 * self.interval, self.longest)

    def finish(self) -> None:
        if self.lines:
            self._line()

    def _line(self) -> None:
        say(f"{self.description}: {self.words()}", sys.stderr)
        self.lines += 1


@contextmanager
def progress(description: str, total: int | None = None, unit: str = "", start: int = 0) -> Iterator[_Bar]:
    """Show how far a long command is: a bar on a terminal, sparse lines elsewhere, nothing with `--quiet` or off rank 0.

    `total=None` when unknown; `start`: what an earlier run had done already (it counts as done, not towards the rate).

        with progress("indexing", total=len(urls), unit="shards") as bar:
            for url in urls:
                bar.update(samples=len(index(url)))
    """
    global _live
    if _quiet or _rank():
        yield _Bar(description, total, unit, start)
        return
    if not console().is_terminal:
        plain = _PlainBar(description, total, unit, start)
        try:
            yield plain
        finally:
            plain.finish()
        return
    # rich shows one live display at a time
    live, outermost = _live, _live is None
    if live is None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[words]}"))
        live = _live = Progress(*columns, console=console(), refresh_per_second=4)
        live.start()
    bar = _RichBar(live, description, total, unit, start)
    try:
        yield bar
    finally:
        bar.finish()
        if outermost:
            live.stop()
            _live = None


# --- numbers and events -----------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> list[dict]:
    """Every whole line of a .jsonl file, [] if there is none. What a kill or a full disk cut off is left out."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    # what follows the last line end is empty, or half a line
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line) if line else None
        except ValueError:
            record = None
            logging.getLogger(__name__).warning("%s: line %d cannot be read and is left out", path, number)
        if isinstance(record, dict):
            records.append(record)
    return records


def _append(path: Path, records: list[dict]) -> None:
    """One write of whole lines, so that a kill cuts at most the last one, and `tail -f` sees whole ones. A line that was cut off is ended."""
    with open(path, "ab+") as file:
        # the offset of a file opened for appending is its end
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")
        file.write("".join(to_json(record, allow_nan=False) + "\n" for record in records).encode())


def _drop_after(path: Path, step: int) -> None:
    """Rewrite metrics.jsonl without the lines after `step`: the resumed run writes those again, and the file must add up."""
    if path.exists():
        kept = [record for record in read_jsonl(path) if record["step"] <= step]
        beside = path.with_suffix(".tmp")
        beside.unlink(missing_ok=True)
        _append(beside, kept)
        flush(beside)
        os.replace(beside, path)
        flush_folder(path.parent)


class EventLog:
    """`events.jsonl`: what happened (start, resume, preempt, save, probe, warning, ...), one flat object per line, never rewritten."""

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / "events.jsonl"

    def add(self, kind: str, **fields: str | int | float | bool | list | None) -> None:
        """Append {"time": UTC in ISO 8601, "kind", **fields}. Rank 0 only; give `step`, if there is one, for the report."""
        if not _rank():
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            _append(self.path, [{"time": now, "kind": kind, **{name: _finite(value) for name, value in fields.items()}}])

    @contextmanager
    def ending(self) -> Iterator[None]:
        """An error that leaves the block is told as the last event, "outage" or "fault", which `doctor RUN` reads. Preempted and Diverged
        are not: who raises those has told more."""
        try:
            yield
        except (Preempted, Diverged):
            raise
        except BaseException as error:
            outage = isinstance(error, Outage)
            with suppress(OSError):  # a full disk, a deleted folder: the error itself is what people must see
                self.add("outage" if outage else "fault", message=str(error) if outage else f"{type(error).__name__}: {error}")
            raise


class MetricsLog:
    """`metrics.jsonl`, TensorBoard and other trackers behind one `add` that never waits for the GPU.

    Values may be device tensors of one element: they stay where they are until `every_steps` calls have come together, then cross in
    one transfer. Call `flush()` before a checkpoint is saved: what a resumed run does not compute again must be in the file.

    Args:
        every_steps: how many `add`s make one transfer.
        resume_step: the step resumed from (0: a new run). Lines after it are dropped, since they will be written again.
        trackers: names from TRACKERS, beside TensorBoard. They stay offline unless their own environment variables say otherwise.
        config: the resolved config as plain values, shown by the trackers.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        every_steps: int = 10,
        resume_step: int = 0,
        tensorboard: bool = True,
        trackers: tuple[str, ...] = (),
        config: dict | None = None,
    ):
        self.path = Path(run_dir) / "metrics.jsonl"
        self.every_steps = every_steps
        self._pending: list[dict] = []
        self._trackers: list[Tracker] = []
        if _rank():
            return
        _drop_after(self.path, resume_step)
        for name in [*(["tensorboard"] if tensorboard else []), *trackers]:
            if name not in TRACKERS:
                raise ConfigError(f"tracker {name!r} is unknown; known: {', '.join(TRACKERS)}.{did_you_mean(name, TRACKERS)}")
            self._trackers.append(TRACKERS[name](Path(run_dir), resume_step, redacted(config or {})))

    def add(self, step: int, samples_seen: int, **values: Any) -> list[dict]:
        """Note one step's numbers (float, int, or a tensor of one element). Returns the records that this call wrote, as plain
        floats: mostly none, every `every_steps` calls that many."""
        if _rank():
            return []
        # tensors as they are: reading one here would wait for the step
        self._pending.append({"step": step, "samples_seen": samples_seen, "time": round(time.time(), 3), **values})
        return self.flush() if len(self._pending) >= self.every_steps else []

    def flush(self) -> list[dict]:
        """Write what is pending, and return it."""
        records, self._pending = _to_host(self._pending), []
        if records:
            _append(self.path, [{name: _finite(value) for name, value in record.items()} for record in records])
            for record in records:
                values = {name: value for name, value in record.items() if name not in ("step", "time")}
                for tracker in self._trackers:
                    tracker.log(record["step"], values)
        return records

    def close(self) -> None:
        self.flush()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _to_host(records: list[dict]) -> list[dict]:
    """The records with every tensor replaced by its float, all of them moved in one transfer per device."""
    places = [(record, name) for record in records for name, value in record.items() if hasattr(value, "detach")]
    if not places:
        return records
    import torch

    # loss and metrics may be on a GPU, counts on the CPU: one stacked transfer each
    by_device: dict = {}
    for record, name in places:
        by_device.setdefault(record[name].device, []).append((record, name))
    for group in by_device.values():
        # double holds every float32 and every count exactly, so that equal runs give equal files
        numbers = torch.stack([record[name].detach().reshape(()).double() for record, name in group]).tolist()
        for (record, name), number in zip(group, numbers, strict=True):
            record[name] = number
    return records
