"""The training stream: endless micro-batches of this rank, in an order that depends on nothing but the plan.

    stream = TrainStream(datasets, plan, prepare, collate, start_samples=samples_seen, global_batch_size=1024, ...)
    for batch in stream: ...

Progress is one integer, the samples that all ranks have consumed. Workers hold no state: each computes whole micro-batches, of raw samples
that one process reads for all of them. Damaged samples are replaced by the next good one of their window, so that batches keep their shape
for any world size.
"""

import logging
import os
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.data.stream.plan import MEMORY_BYTES, Plan, Slot, micro_batch_size
from ssl_locat.data.stream.prepared import prepared, read_again
from ssl_locat.data.stream.quarantine import STUCK, Quarantine, QuarantineEntry
from ssl_locat.data.stream.read_ahead import ReadAhead, ReadCounts, Share
from ssl_locat.data.stream.reader_process import SWITCH_SECONDS, ReaderProcess, Received
from ssl_locat.data.stream.workers import Failure, StuckWorker, Watch, as_is, next_of, start_worker, starting, stop_workers
from ssl_locat.data.stream.workers import context as workers_context
from ssl_locat.errors import EXPECTED, DataBudgetExceeded, DataError, Outage, UserError

log = logging.getLogger(__name__)

_SUBSTITUTE_WINDOWS = 8
_OWN = -1  # in place of a sample's number: the position's own


class Part(NamedTuple):
    """The stream from a position on, where batches have another size there, or samples are prepared in another way."""

    first: int  # position; where a step begins
    global_batch_size: int
    prepare: Callable[[RawSample, int], Any]
    collate: Callable[[list], Any]


class Batch(NamedTuple):
    """One micro-batch. A named tuple, so that the loader can pin the payload's memory."""

    payload: Any  # what `collate` returned
    positions: np.ndarray  # int64 [b], in the stream
    keys: list[str]  # of the samples used: a substitute shows its own
    seconds: float  # that a worker spent on it
    damaged: list[QuarantineEntry]  # met for this batch


def part_at(parts: Sequence[Part], position: int) -> Part:
    """The one that a position lies in; before all of them the first."""
    return next((part for part in reversed(parts) if part.first <= position), parts[0])


def _untold(position: int, number: int) -> None:
    """What `Samples` tells before each sample, where nobody watches."""


class Samples:
    """Prepared samples: parsed, decoded and cut; what is damaged is replaced by the next good sample of its window.

    parts: how samples are prepared, from which position on. stuck: (dataset's name, number) of samples that are not to be tried. begin: told before each its position, and its number if it stands
    in for another.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: Plan,
        parts: Sequence[Part],
        stuck: Collection[tuple[str, int]] = (),
        begin: Callable[[int, int], None] = _untold,
    ):
        self.datasets, self.plan, self.parts = datasets, plan, parts
        self.stuck, self.begin = stuck, begin

    def take(self, position: int, damaged: list[QuarantineEntry]) -> tuple[str, Any]:
        """(key, prepared sample) at one position, read for itself alone; what is damaged is added to the list."""
        dataset, number, _ = self.plan.locate(position)
        raw = self.datasets[dataset].read(number, number + 1)[0]
        return self._prepared(position, raw, self.plan.augment_seed(position), damaged)

    def take_all(
        self, positions: range, runs: Iterator[tuple[int, list]], damaged: list[QuarantineEntry]
    ) -> list[tuple[str, Any]]:
        """`take` for each position of a micro-batch, whose raw entries come in `runs` of (dataset, entries)."""
        raw = (self.datasets[number].parse(entry) for number, entries in runs for entry in entries)
        seeds = self.plan.augment_seeds(positions)
        return [self._prepared(*one, damaged) for one in zip(positions, raw, seeds, strict=True)]

    def _prepared(self, position: int, raw: RawSample | Damage, seed: int, damaged: list[QuarantineEntry]) -> tuple[str, Any]:
        self.begin(position, _OWN)
        if self.stuck:
            dataset, number, _ = self.plan.locate(position)
            raw = self._unless_stuck(self.datasets[dataset], number, raw)
        prepare = part_at(self.parts, position).prepare
        found = prepared(raw, prepare, seed, lambda: self._again(position))
        return self._search(position, found, seed, damaged) if isinstance(found, Damage) else found

    def _again(self, position: int) -> RawSample | Damage | None:
        dataset, number, _ = self.plan.locate(position)
        return read_again(self.datasets[dataset], number)

    def _unless_stuck(self, dataset: Dataset, number: int, raw: RawSample | Damage) -> RawSample | Damage:
        return Damage(raw.key, raw.shard, STUCK) if (dataset.name, number) in self.stuck else raw

    def _search(self, position: int, damage: Damage, seed: int, damaged: list[QuarantineEntry]) -> tuple[str, Any]:
        """What stands in for a damaged sample: the rest of its window, and then the lane's next windows, one by one.

        The same for every world size, since it depends on the plan and the data only. Each candidate is a read of its own: what was read
        ahead is promised to other positions, and damage is rare.
        """
        slot = self.plan.slot(position)
        dataset, prepare = self.datasets[slot.dataset], part_at(self.parts, position).prepare
        for tried, number in enumerate(self._candidates(slot)):
            if tried:  # the first is the damaged one
                self.begin(position, number)
                raw = self._unless_stuck(dataset, number, dataset.read(number, number + 1)[0])
                found = prepared(raw, prepare, seed, partial(read_again, dataset, number))
                if not isinstance(found, Damage):
                    return found
                damage = found
            damaged.append(QuarantineEntry(position, dataset.name, number, damage.shard, damage.key, damage.reason))
        raise DataBudgetExceeded(
            f"all {len(damaged)} samples tried for position {position} are damaged; the last: {damage.shard} {damage.key}: {damage.reason}. "
            + ("'ssl-locat shards check' lists all damage." if dataset.by_range else "Replace or remove such files.")
        )

    def _candidates(self, slot: Slot) -> Iterator[int]:
        numbers = self.plan.window_samples(*slot[:4]).tolist()
        yield from numbers[slot.offset :] + numbers[: slot.offset]
        for _ in range(_SUBSTITUTE_WINDOWS):  # a window may lie in one shard that is gone
            slot = Slot(*self.plan.following(slot), 0)
            yield from self.plan.window_samples(*slot[:4]).tolist()


class _MicroBatches(IterableDataset):
    """What runs in a worker: micro-batch k of this rank belongs to worker k % workers. Without workers it reads for itself."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: Plan,
        parts: Sequence[Part],
        share: Share,
        memory_bytes: int,
    ):
        self.datasets, self.plan, self.parts = datasets, plan, parts
        self.share, self.memory_bytes = share, memory_bytes
        self.connections: list = []  # one for each worker, set before they start
        self.counts: Any = [0] * len(ReadCounts._fields)
        self.stuck: Collection[tuple[str, int]] = ()
        self.watch: Watch | None = None  # of the workers

    def __iter__(self) -> Iterator[Batch | Failure]:
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        begin = partial(self.watch.begin, worker.id) if worker and self.watch else _untold
        samples = Samples(self.datasets, self.plan, self.parts, self.stuck, begin)
        raw = (
            Received(self.connections[worker.id], self.share)
            if worker
            else ReadAhead(self.datasets, self.plan, self.share, self.memory_bytes, self.counts)
        )
        switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(switch_seconds, SWITCH_SECONDS))
        try:
            while True:
                began, positions = time.perf_counter(), self.share(number)
                damaged: list[QuarantineEntry] = []
                taken = samples.take_all(positions, raw.batch(number), damaged)
                payload = part_at(self.parts, positions.start).collate([sample for _, sample in taken])
                if worker is not None:
                    _check_shared_memory(payload)
                keys = [key for key, _ in taken]
                yield Batch(payload, np.array(positions, dtype=np.int64), keys, time.perf_counter() - began, damaged)
                number += stride
        except (UserError, Outage, DataBudgetExceeded) as error:
            if worker is None:
                raise
            yield Failure(error)
        finally:
            sys.setswitchinterval(switch_seconds)
            raw.close()


def _stop_helpers(batches: Any, reader: ReaderProcess, stopping: Any) -> None:
    stop_workers(batches, stopping)
    reader.stop()


def _check_shared_memory(payload: Any) -> None:
    """Raise UserError if a batch does not fit: torch would lose it in a thread of the worker, and the trainer would wait for ever."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:  # not Linux
        return
    needed = _tensor_bytes(payload)
    if needed > free:
        raise UserError(
            f"/dev/shm has {free >> 20} MB left, one batch of a data worker needs {needed >> 20} MB. Enlarge it (docker run --shm-size=16g; "
            "mount -o remount,size=16g /dev/shm), or lower data.workers or the batch size per GPU."
        )


def _tensor_bytes(payload: Any) -> int:
    if isinstance(payload, torch.Tensor):
        return payload.nbytes
    parts = payload.values() if isinstance(payload, dict) else payload if isinstance(payload, list | tuple) else ()
    return sum(map(_tensor_bytes, parts))


class TrainStream:
    """Endless micro-batches of one rank, `accumulate_steps` of them per optimiser step.

    Step t of the run covers positions start_samples + t * global_batch_size onwards; micro-batch a of rank r holds the slice
    (a * world_size + r) of it. Use as a context manager, or call `close`.

    Args:
        prepare: (RawSample, seed) -> sample; runs in workers, may raise CorruptSample.
        collate: list of samples -> payload; runs in workers.
        start_samples: positions consumed so far by all ranks: the whole state of the stream.
        workers: processes of this rank that decode, beside one that reads for them; 0 does both in the trainer's own process, in the same
            order.
        memory_bytes: raw samples that this rank holds at most, read and not yet decoded.
        max_bad, quarantine_path: see `Quarantine`.
        pin_memory: copy payloads to page-locked memory, for quicker transfers to a GPU.
        prefetch: batches per worker held ready.
        context: how workers start; default: fork while CUDA is not in use, else forkserver.
        later: parts of the stream with other batch sizes, or prepared otherwise, in their order; each begins where a step does.

    Raises while iterating: DataBudgetExceeded, Outage (also when a worker was killed, or ended in the middle of a sample that took too long),
    UserError (also when shared memory is full).
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: Plan,
        prepare: Callable[[RawSample, int], Any],
        collate: Callable[[list], Any],
        *,
        start_samples: int,
        global_batch_size: int,
        accumulate_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        memory_bytes: int = MEMORY_BYTES,
        max_bad: float = 0.001,
        quarantine_path: Path | None = None,
        pin_memory: bool = False,
        prefetch: int = 2,
        context: str | None = None,
        later: Sequence[Part] = (),
    ):
        parts = [Part(start_samples, global_batch_size, prepare, collate), *later]
        sizes = [micro_batch_size(part.global_batch_size, world_size, accumulate_steps) for part in parts]
        for before, part in pairwise(parts):  # else ranks would share a step unevenly
            assert part.first > before.first and (part.first - before.first) % before.global_batch_size == 0
        self.plan, self.start_samples, self.workers = plan, start_samples, workers
        self.world_size = world_size
        self.quarantine = Quarantine(Path(quarantine_path) if quarantine_path else None, max_bad, sum(plan.sizes))
        self._listed = len(self.quarantine.known) if rank == 0 else 0  # of earlier runs: one rank counts them
        changes = tuple((part.first, size) for part, size in zip(later, sizes[1:], strict=True))
        share = Share(start_samples, sizes[0], rank, world_size, changes)
        self._source = _MicroBatches(datasets, plan, parts, share, memory_bytes)
        self._source.stuck = frozenset(self.quarantine.stuck)
        self._context = context or workers_context()
        self._loader_options: dict[str, Any] = {"pin_memory": pin_memory}
        if workers:
            processes = torch.multiprocessing.get_context(self._context)
            self._stopping, self._source.watch = processes.Event(), Watch(processes, workers)
            self._loader_options |= {
                "num_workers": workers,
                "prefetch_factor": prefetch,
                "multiprocessing_context": self._context,
                "worker_init_fn": partial(start_worker, self._stopping, os.getpid()),
                "timeout": 2 * max(dataset.store.budget_seconds for dataset in datasets) + 120,
            }
        self._batches: Iterator | None = None
        readers = max(plan.readers_per_lane(size, world_size, workers) for size in dict.fromkeys(sizes))
        if readers > 1.05 and rank == 0:
            log.warning(
                "each part of the data is read by %.1f ranks, so traffic is that much higher than it need be: choose a number of ranks and "
                "optim.accumulate_steps with which a multiple of %d samples goes to each, or start a new run with these sizes",
                readers,
                plan.unit,
            )

    @property
    def quarantined(self) -> int:
        """Samples that this rank added to the quarantine, and rank 0 those of earlier starts too: summed over ranks, the total."""
        return self._listed + self.quarantine.added

    @property
    def counts(self) -> ReadCounts:
        """What this rank has read so far, but for the substitutes of damaged samples."""
        return ReadCounts(*self._source.counts)

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is None:
            self._batches = self._start()
        consumed = self.start_samples
        while True:
            batch = self._next()
            consumed += len(batch.positions) * self.world_size
            if batch.damaged:
                self.quarantine.add(batch.damaged)
                self.quarantine.check_budget(consumed)
            yield batch

    def _start(self) -> Iterator:
        with starting():
            reader = self._start_reader() if self.workers else None
            # a generator of its own: starting must not draw from the trainer's, whose numbers a resumed run draws again
            options: dict[str, Any] = {"generator": torch.Generator(), **self._loader_options}
            batches = iter(DataLoader(self._source, batch_size=None, collate_fn=as_is, in_order=True, **options))
        if reader:  # also when the trainer forgets or fails: processes that ignore SIGTERM must be told
            reader.close_connections()
            self._close = weakref.finalize(self, _stop_helpers, batches, reader, self._stopping)
        return batches

    def _start_reader(self) -> ReaderProcess:
        source = self._source
        context = torch.multiprocessing.get_context(self._context)
        parts = (source.datasets, source.plan, source.share, source.memory_bytes)
        reader = ReaderProcess(*parts, self.workers, context, self._stopping)
        source.connections, source.counts = reader.connections, reader.counts
        return reader

    def _next(self) -> Batch:
        assert self._batches is not None  # __iter__ has started them
        try:
            batch: Batch = next_of(self._batches, self._source.watch)
            return batch
        except StuckWorker as stuck:
            self.close()
            raise self._left_out(*stuck.sample, stuck.seconds) from None
        except EXPECTED:
            self.close()
            raise

    def _left_out(self, position: int, number: int, seconds: float) -> UserError | Outage:
        """List the sample that ended a worker; the error that says so. All ranks leave it out from their next start on, as if it were damaged:
        were it left out at once, ranks and restarts would see other orders."""
        place, own, _ = self.plan.locate(position)
        dataset = self._source.datasets[place]
        number = own if number == _OWN else number
        raw = dataset.read(number, number + 1)[0]
        entry = QuarantineEntry(position, dataset.name, number, raw.shard, raw.key, f"{STUCK} ({seconds:g} s)")
        said = f"{raw.shard}: {raw.key} took more than {seconds:g} s of CPU time to decode"
        if self.quarantine.path is None:
            return DataError(f"{said}: convert the image, or remove it from the data.")
        self.quarantine.add([entry])
        return Outage(f"{said}. It is listed in {self.quarantine.path}, and left out from now on: start the same command again.")

    def take(self, position: int) -> tuple[str, Any]:
        """(key, prepared sample) at one position, read in this process."""
        return Samples(self._source.datasets, self.plan, self._source.parts).take(position, [])

    def again(self, positions: Sequence[int]) -> tuple[list[str], Any]:
        """(keys, payload) of a micro-batch, read once more in this process: what a batch that went wrong was made of."""
        taken = [self.take(position) for position in positions]
        collate = part_at(self._source.parts, positions[0]).collate
        return [key for key, _ in taken], collate([sample for _, sample in taken])

    def close(self) -> None:
        """Stop the workers."""
        if self._batches is not None and self.workers:
            self._close()
        self._batches = None

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
