"""One pass over a dataset in order, for what reads each sample once: features, tests, labels.

Like the training stream it reads in large ranges, ahead of the decoding, in threads of every worker; unlike it, it ends, and a damaged
sample keeps its place: the caller learns of it, and the rest is read as if nothing had been.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.data.stores.store import stop_waiting_when
from ssl_locat.data.stream.prepared import prepared, read_again
from ssl_locat.data.stream.workers import (
    Failure,
    StuckWorker,
    Watch,
    as_is,
    context,
    next_of,
    start_worker,
    starting,
    stop_workers,
)
from ssl_locat.errors import DataBudgetExceeded, DataError, Outage, UserError

READ_BYTES = 3 << 20  # of one range read
AHEAD_BYTES = 32 << 20  # read ahead by each worker, besides the batch that it decodes
_THREADS, _LOCAL_THREADS = 32, 4


class Unread(NamedTuple):
    """Stands where a damaged sample should be."""

    index: int  # type: ignore[assignment]  # in the dataset; hides tuple.index, which nobody calls
    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}."


class _Batches(IterableDataset):
    """What runs in a worker: batch k belongs to worker k % workers."""

    def __init__(self, dataset: Dataset, indices: np.ndarray, prepare: Callable, collate: Callable, batch_size: int):
        self.dataset, self.indices, self.prepare, self.collate = dataset, indices, prepare, collate
        self.batch_size = batch_size
        self.watch: Watch | None = None  # of the workers
        self.per_read = max(1, int(READ_BYTES / max(1, dataset.mean_bytes))) if dataset.by_range else 1

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        batches = iter(range(number * self.batch_size, len(self.indices), stride * self.batch_size))
        stopped = threading.Event()
        threads = _THREADS if self.dataset.remote else _LOCAL_THREADS
        pool = ThreadPoolExecutor(threads, "read", initializer=stop_waiting_when, initargs=(stopped,))
        ahead = 1 + int(AHEAD_BYTES / max(1, self.batch_size * self.dataset.mean_bytes))
        try:
            waiting = deque(self._request(pool, start) for start in islice(batches, min(ahead, 16)))
            while waiting:
                reads = waiting.popleft()
                waiting.extend(self._request(pool, start) for start in islice(batches, 1))
                yield self.collate(
                    [self._item(worker, index, entry) for first, read in reads for index, entry in _told(first, read)]
                )
        except (UserError, Outage, DataBudgetExceeded) as error:
            if worker is None:
                raise
            yield Failure(error)
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _request(self, pool: ThreadPoolExecutor, start: int) -> list[tuple[int, Any]]:
        """(first index, its read) of the runs of neighbours in a batch."""
        wanted = self.indices[start : start + self.batch_size]
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        pieces = [run[at : at + self.per_read] for run in runs for at in range(0, len(run), self.per_read)]
        return [(int(piece[0]), pool.submit(self.dataset.fetch, int(piece[0]), int(piece[-1]) + 1)) for piece in pieces]

    def _item(self, worker: Any, index: int, entry: Any) -> Any:
        if worker:
            assert self.watch is not None  # made where workers are
            self.watch.begin(worker.id, index, 0)
        found = prepared(self.dataset.parse(entry), self.prepare, index, lambda: read_again(self.dataset, index))
        return Unread(index, found.shard, found.key, found.reason) if isinstance(found, Damage) else found[1]


def _told(first: int, read: Future) -> Iterator[tuple[int, Any]]:
    return enumerate(read.result(), start=first)


def read_in_order(
    dataset: Dataset,
    indices: np.ndarray,
    prepare: Callable[[RawSample, int], Any],
    collate: Callable[[list], Any],
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """`collate([prepare(sample, index), ...])` of each `batch_size` of `indices`, in their order; a damaged sample is an `Unread`.

    `prepare` and `collate` run in the workers, and are pickled for them where CUDA is in use (a process that holds it must not fork).
    Raises UserError and Outage as the dataset and `prepare` do.
    """
    source = _Batches(dataset, np.asarray(indices, dtype=np.int64), prepare, collate, batch_size)
    workers = min(workers, -(-len(source.indices) // batch_size))  # one without a batch would only start
    options: dict[str, Any] = {}
    stopping = None
    if workers:
        method = context()
        processes = torch.multiprocessing.get_context(method)
        stopping, source.watch = processes.Event(), Watch(processes, workers)
        options = {
            "num_workers": workers,
            "multiprocessing_context": method,
            "worker_init_fn": partial(start_worker, stopping, os.getpid()),
            "timeout": 2 * dataset.store.budget_seconds + 120,
        }
    # a generator of its own: starting must not draw from the caller's
    options |= {"generator": torch.Generator(), "pin_memory": pin_memory}
    with starting():
        batches = iter(DataLoader(source, batch_size=None, collate_fn=as_is, in_order=True, **options))
    try:
        for _ in range(0, len(source.indices), batch_size):
            yield next_of(batches, source.watch)
    except StuckWorker as stuck:
        raw = dataset.read(stuck.sample[0], stuck.sample[0] + 1)[0]
        raise DataError(
            f"{raw.shard}: {raw.key} took more than {stuck.seconds:g} s of CPU time to decode: convert the image, or remove it from the data."
        ) from None
    finally:
        if stopping is not None:
            stop_workers(batches, stopping)
