"""The list of damaged samples of a run, `quarantine.jsonl`, and the budget that they must stay within.

Each damaged sample is listed once, whichever rank meets it, in whichever pass, over any number of restarts.
"""

import fcntl
import json
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ssl_locat.errors import DataBudgetExceeded
from ssl_locat.text.shown import to_json

STUCK = "took more CPU time than any image may"  # begins the reason of a sample that is not tried again, by any later start
TOLERATED = 10  # corrupt samples that stop no run: the share of a handful says nothing yet


class QuarantineEntry(NamedTuple):
    """One damaged sample, as a worker met it."""

    position: int  # in the stream
    dataset: str
    index: int  # type: ignore[assignment]  # in the dataset; a tuple has a method of this name, which nobody calls here
    shard: str
    key: str
    error: str


class Quarantine:
    """Appends to `path` (None: counts only) and checks the budget.

    Args:
        max_bad: tolerated share of damaged samples among those of the data that were read so far. 0 tolerates none at all; any other
            share is checked only once more than TOLERATED samples were corrupt.
        total: samples of all datasets.
    """

    def __init__(self, path: Path | None, max_bad: float, total: int):
        self.path, self.max_bad, self.total = path, max_bad, total
        self.known: set[tuple[str, int]] = set()
        self.stuck: set[tuple[str, int]] = set()  # of these, those that ended a worker
        self.added = 0  # by this process
        self._read_up_to = 0
        if path and path.exists():
            with open(path, "rb") as file:
                self._catch_up(file)

    def add(self, found: list[QuarantineEntry]) -> None:
        """List those that are new."""
        # a stand-in may be sought at many positions of one batch, and meet the same damage each time
        distinct = {(entry.dataset, entry.index): entry for entry in reversed(found)}.values()
        new = [entry for entry in distinct if (entry.dataset, entry.index) not in self.known]
        if not new:
            return
        if self.path is None:
            self._count(new)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)  # other ranks append too, from other nodes perhaps
            partial = self._catch_up(file)
            new = [entry for entry in new if (entry.dataset, entry.index) not in self.known]
            names = ("position", "dataset", "index", "shard", "key", "error")
            lines = [to_json({name: getattr(entry, name) for name in names}) + "\n" for entry in new]
            file.write(b"\n" * bool(partial) + "".join(lines).encode())
            self._count(new)

    def check_budget(self, samples_read: int) -> None:
        """Raises DataBudgetExceeded if too many of the data seen so far were corrupt; `samples_read`: positions, by all ranks."""
        corrupt, seen = len(self.known), min(self.total, max(1, samples_read))
        if corrupt <= (TOLERATED if self.max_bad > 0 else 0) or corrupt <= self.max_bad * seen:
            return
        raise DataBudgetExceeded(
            f"{corrupt} of about {seen} samples are damaged ({100 * corrupt / seen:.2g} %), data.max_bad allows {100 * self.max_bad:.2g} %. They are "
            f"listed in {self.path or 'no file'}, with the reason of each. Replace or remove them, or raise data.max_bad."
        )

    def _count(self, new: list[QuarantineEntry]) -> None:
        self.known.update((entry.dataset, entry.index) for entry in new)
        self.added += len(new)

    def _catch_up(self, file: BinaryIO) -> bytes:
        """Take in the lines appended since; returns what follows the last whole line (a kill may cut one short)."""
        file.seek(self._read_up_to)
        lines, newline, partial = file.read().rpartition(b"\n")
        self._read_up_to += len(lines) + len(newline)
        for line in lines.split(b"\n"):
            try:
                entry = json.loads(line)
                self.known.add((entry["dataset"], entry["index"]))
                if entry["error"].startswith(STUCK):
                    self.stuck.add((entry["dataset"], entry["index"]))
            except (ValueError, KeyError):
                continue
        return partial
