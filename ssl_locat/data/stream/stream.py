"""The training stream: endless micro-batches of this rank, in an order that depends on nothing but the plan.

    stream = TrainStream(datasets, plan, prepare, collate, start_samples=samples_seen, global_batch_size=1024, ...)
    for batch in stream: ...

Progress is one integer, the samples that all ranks have consumed. Workers hold no state: each computes whole micro-batches from their
positions. Damaged samples are replaced by the next good one of their window, so that batches keep their shape for any world size.
"""

import logging
import os
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ssl_locat.data.shards.index import Dataset
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.data.stores.store import stop_waiting_when
from ssl_locat.data.stream.plan import Plan, Slot, micro_batch_size
from ssl_locat.data.stream.quarantine import Quarantine, QuarantineEntry
from ssl_locat.data.stream.workers import Failure, as_is, next_of, start_worker, starting, stop_workers
from ssl_locat.data.stream.workers import context as workers_context
from ssl_locat.errors import EXPECTED, CorruptSample, DataBudgetExceeded, Outage, UserError

log = logging.getLogger(__name__)

_THREADS = 32  # concurrent reads of one worker from a remote store: enough for full chunks at 50 ms to the first byte
_LOCAL_THREADS = 4
_SUBSTITUTE_WINDOWS = 8
# A reading thread that has bytes must not wait 5 ms (Python's default) for a busy main thread to let go of the interpreter, once per call.
_SWITCH_SECONDS = 0.0005


class Batch(NamedTuple):
    """One micro-batch. A named tuple, so that the loader can pin the payload's memory."""

    payload: Any  # what `collate` returned
    positions: np.ndarray  # int64 [b], in the stream
    keys: list[str]  # of the samples used: a substitute shows its own
    seconds: float  # that a worker spent on it
    damaged: list[QuarantineEntry]  # met for this batch


class _Window:
    """The samples of one window, being read."""

    def __init__(self, samples: np.ndarray, dataset: Dataset, pool: ThreadPoolExecutor):
        self.samples, self.dataset = samples, dataset
        self.followed = False
        ordered = np.sort(samples)
        borders = np.concatenate(([0], np.flatnonzero(np.diff(ordered) != 1) + 1, [len(ordered)]))
        starts = ordered[borders[:-1]]
        runs = np.searchsorted(starts, samples, side="right") - 1
        self.places = list(zip(runs.tolist(), (samples - starts[runs]).tolist(), strict=True))  # (read, entry) of each sample
        lengths = np.diff(borders)
        # parsing waits until a sample is used: before a first batch, whole windows are read
        self.reads: list[Future] = [
            pool.submit(dataset.fetch, start, start + length)
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        self.entries: list[list | None] = [None] * len(self.reads)  # of the reads waited for

    def __getitem__(self, offset: int) -> RawSample | Damage:
        read, entry = self.places[offset]
        entries = self.entries[read]
        if entries is None:
            entries = self.entries[read] = self.reads[read].result()
        return self.dataset.parse(entries[entry])


class Reader:
    """Samples by position, reading ahead: the windows a process works on, at most two for each of its lanes and datasets."""

    def __init__(self, datasets: Sequence[Dataset], plan: Plan, prepare: Callable[[RawSample, int], Any]):
        self.datasets, self.plan, self.prepare = datasets, plan, prepare
        remote = any(dataset.remote for dataset in datasets)
        self.stopped = threading.Event()
        self.pool = ThreadPoolExecutor(
            _THREADS if remote else _LOCAL_THREADS, "read", initializer=stop_waiting_when, initargs=(self.stopped,)
        )
        self.windows: dict[tuple[int, int], dict[tuple, _Window]] = {}  # (dataset, lane) -> its current and next window

    def close(self) -> None:
        self.stopped.set()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def request(self, name: tuple[int, int, int, int]) -> _Window:
        """The window (dataset, epoch, lane, number); its reads start on first touch."""
        lane = self.windows.setdefault((name[0], name[2]), {})
        if name not in lane:
            lane[name] = _Window(self.plan.window_samples(*name), self.datasets[name[0]], self.pool)
        return lane[name]

    def _enter(self, slot: Slot) -> _Window:
        """The slot's window; those before it are dropped."""
        window, lane = self.request(slot[:4]), self.windows[slot.dataset, slot.lane]
        while next(iter(lane)) != slot[:4]:
            del lane[next(iter(lane))]
        return window

    def _follow(self, slot: Slot, window: _Window) -> None:
        """Request the window after this one, early in its use. Lanes take turns, as they all move at the same pace: no rush, no pause."""
        if slot.offset >= len(window.samples) * slot.lane // (2 * self.plan.lanes):
            window.followed = True
            self.request(self.plan.following(slot))

    def take(self, position: int, damaged: list[QuarantineEntry]) -> tuple[str, Any]:
        """(key, prepared sample) at a position; what is damaged is added to the list and replaced by the next good sample."""
        positions = range(position, position + 1)
        return self.take_all(positions, self.plan.slots(positions), damaged)[0]

    def take_all(self, positions: range, slots: list[Slot], damaged: list[QuarantineEntry]) -> list[tuple[str, Any]]:
        """`take` for each position of a batch, quicker: runs of positions share a window."""
        found: list[tuple[str, Any]] = []
        name, window = None, None
        for position, slot, seed in zip(positions, slots, self.plan.augment_seeds(positions), strict=True):
            if slot[:4] != name:
                name, window = slot[:4], self._enter(slot)
            if not window.followed:
                self._follow(slot, window)
            raw = window[slot.offset]
            if isinstance(raw, RawSample):
                with suppress(CorruptSample):
                    found.append((raw.key, self.prepare(raw, seed)))
                    continue
            found.append(self._search(position, slot, seed, damaged))
        return found

    def _search(self, position: int, slot: Slot, seed: int, damaged: list[QuarantineEntry]) -> tuple[str, Any]:
        dataset = self.datasets[slot.dataset]
        for number, raw in self._from(slot):
            if isinstance(raw, RawSample):
                try:
                    return raw.key, self.prepare(raw, seed)
                except CorruptSample as error:
                    raw = Damage(raw.key, raw.shard, error.reason)
            damaged.append(QuarantineEntry(position, dataset.name, int(number), raw.shard, raw.key, raw.reason))
        raise DataBudgetExceeded(
            f"all {len(damaged)} samples tried for position {position} are damaged; the last: {raw.shard} {raw.key}: {raw.reason}. "
            "'ssl-locat shards check' lists all damage."
        )

    def _from(self, slot: Slot) -> Iterator[tuple[int, RawSample | Damage]]:
        """(number in the dataset, sample) at a slot, then what may stand in for it: the rest of its window, and the lane's next windows.

        The same for every world size, since it depends on the plan and the data only.
        """
        window = self.request(slot[:4])
        count = len(window.samples)
        for step in range(count):
            offset = (slot.offset + step) % count
            yield window.samples[offset], window[offset]
        for _ in range(_SUBSTITUTE_WINDOWS):  # a window may lie in one shard that is gone
            slot = Slot(*self.plan.following(slot), 0)
            window = self.request(slot[:4])
            for offset in range(len(window.samples)):
                yield window.samples[offset], window[offset]


class _MicroBatches(IterableDataset):
    """What runs in a worker: micro-batch k of this rank belongs to worker k % workers."""

    def __init__(self, datasets, plan, prepare, collate, start: int, micro_batch: int, rank: int, world_size: int):
        self.arguments = (datasets, plan, prepare)
        self.collate, self.start = collate, start
        self.micro_batch, self.rank, self.world_size = micro_batch, rank, world_size

    def positions(self, number: int) -> range:
        first = self.start + (number * self.world_size + self.rank) * self.micro_batch
        return range(first, first + self.micro_batch)

    def __iter__(self) -> Iterator[Batch | Failure]:
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        reader = Reader(*self.arguments)
        switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(switch_seconds, _SWITCH_SECONDS))
        ahead = reader.plan.slots(self.positions(number))
        try:
            while True:
                slots, ahead = ahead, reader.plan.slots(self.positions(number + stride))
                for name in dict.fromkeys(slot[:4] for slot in slots + ahead):
                    reader.request(name)  # the next batch keeps the pool busy while this one is decoded
                began = time.perf_counter()
                damaged: list[QuarantineEntry] = []
                taken = reader.take_all(self.positions(number), slots, damaged)
                payload = self.collate([sample for _, sample in taken])
                if worker is not None:
                    _check_shared_memory(payload)
                keys = [key for key, _ in taken]
                positions = np.array(self.positions(number), dtype=np.int64)
                yield Batch(payload, positions, keys, time.perf_counter() - began, damaged)
                number += stride
        except (UserError, Outage, DataBudgetExceeded) as error:
            if worker is None:
                raise
            yield Failure(error)
        finally:
            sys.setswitchinterval(switch_seconds)
            reader.close()


def _check_shared_memory(payload) -> None:
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


def _tensor_bytes(payload) -> int:
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
        workers: processes of this rank; 0 works in the trainer's own process, in the same order.
        max_bad, quarantine_path: see `Quarantine`.
        pin_memory: copy payloads to page-locked memory, for quicker transfers to a GPU.
        prefetch: batches per worker held ready.
        context: how workers start; default: fork while CUDA is not in use, else forkserver.

    Raises while iterating: DataBudgetExceeded, Outage (also when a worker was killed), UserError (also when shared memory is full).
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
        max_bad: float = 0.001,
        quarantine_path: Path | None = None,
        pin_memory: bool = False,
        prefetch: int = 2,
        context: str | None = None,
    ):
        micro_batch = micro_batch_size(global_batch_size, world_size, accumulate_steps)
        self.plan, self.start_samples, self.workers = plan, start_samples, workers
        self.world_size, self.micro_batch = world_size, micro_batch
        self.quarantine = Quarantine(Path(quarantine_path) if quarantine_path else None, max_bad, sum(plan.sizes))
        self._listed = len(self.quarantine.known) if rank == 0 else 0  # of earlier runs: one rank counts them
        self._source = _MicroBatches(datasets, plan, prepare, collate, start_samples, micro_batch, rank, world_size)
        self._context = context or workers_context()
        self._loader_options = {"pin_memory": pin_memory}
        if workers:
            self._stopping = torch.multiprocessing.get_context(self._context).Event()
            self._loader_options |= {
                "num_workers": workers,
                "prefetch_factor": prefetch,
                "multiprocessing_context": self._context,
                "worker_init_fn": partial(start_worker, self._stopping, os.getpid()),
                "timeout": 2 * max(dataset.store.budget_seconds for dataset in datasets) + 120,
            }
        self._batches: Iterator | None = None
        self._reader: Reader | None = None
        readers = plan.readers_per_lane(micro_batch, world_size, workers)
        if readers > 1.5 and any(dataset.remote for dataset in datasets):
            log.warning(
                "each part of the data is read by %.1f workers, so traffic is that much higher than it need be: choose another number of "
                "workers (data.workers), or start a new run with these batch and world sizes",
                readers,
            )

    @property
    def quarantined(self) -> int:
        """Samples that this rank added to the quarantine, and rank 0 those of earlier starts too: summed over ranks, the total."""
        return self._listed + self.quarantine.added

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is None:
            self._batches = self._start()
        consumed = self.start_samples
        while True:
            batch = self._next()
            consumed += self.micro_batch * self.world_size
            if batch.damaged:
                self.quarantine.add(batch.damaged)
                self.quarantine.check_budget(consumed)
            yield batch

    def _start(self) -> Iterator:
        with starting():
            # a generator of its own: starting must not draw from the trainer's, whose numbers a resumed run draws again
            options = {"generator": torch.Generator(), **self._loader_options}
            batches = iter(DataLoader(self._source, batch_size=None, collate_fn=as_is, in_order=True, **options))
        if self.workers:  # also when the trainer forgets or fails: workers that ignore SIGTERM must be told
            self._close = weakref.finalize(self, stop_workers, batches, self._stopping)
        return batches

    def _next(self) -> Batch:
        try:
            return next_of(self._batches)
        except EXPECTED:
            self.close()
            raise

    def take(self, position: int) -> tuple[str, Any]:
        """(key, prepared sample) at one position, read in this process: what a batch that went wrong was made of."""
        if self._reader is None:
            self._reader = Reader(*self._source.arguments)
        return self._reader.take(position, [])

    def close(self) -> None:
        """Stop the workers."""
        if self._batches is not None and self.workers:
            self._close()
        self._batches = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()
