"""Raw samples of one rank, in the order of the plan: each window is read once, ahead of its use, within a budget of memory.

A planner walks the positions of the rank's micro-batches and requests each window where it is first needed, so that the reads come back
in the order in which they are used. It stops where the budget is full or it is far enough ahead, and moves on as samples are taken.
Several micro-batches may be taken at once, each by a thread of its own: that is how one reader serves many decoding workers.
"""

import threading
from collections import deque
from collections.abc import Iterator, MutableSequence, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, groupby
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.data.stores.store import stop_waiting_when
from ssl_locat.data.stream.plan import Plan

_THREADS = 32  # concurrent reads of a rank from a remote store: enough for full chunks at 50 ms to the first byte
_LOCAL_THREADS = 4  # more would compete for the interpreter
_TOGETHER = 256 << 10  # bytes of samples that are handed on at once
_AHEAD = 2048  # samples: at 3,000 images/s two thirds of a second, which covers a store's slow answers
_RAMP = 4  # a stream that took k batches reads k / 4 ahead: a short one, or a first batch after resuming, reads little in vain


class ReadCounts(NamedTuple):
    """What a rank's stream has read so far."""

    fetched: int  # samples, each time that one was read
    used: int  # samples handed out
    bytes: int  # of the samples fetched
    requests: int  # range reads; of a folder's images, groups of neighbours
    peak: int  # most bytes of raw samples in memory at any time, those being read included
    dropped: (
        int  # samples that were read and not needed: other ranks' in a window of this one, or those before a resumed position
    )


class Share(NamedTuple):
    """Which positions of the stream are a rank's: `share(k)` are those of its micro-batch k, `accumulate_steps` of them a step.

    later: (position, micro-batch from there on) where the batch size changes on the way, in order; each lies at the end of a step.
    """

    start: int
    micro_batch: int
    rank: int
    world_size: int
    later: tuple[tuple[int, int], ...] = ()

    def __call__(self, number: int) -> range:
        start, size = self.start, self.micro_batch
        for position, other in self.later:
            before = (position - start) // (size * self.world_size)  # micro-batches of a rank up to there
            if number < before:
                break
            number, start, size = number - before, position, other
        first = start + (number * self.world_size + self.rank) * size
        return range(first, first + size)

    @property
    def smallest(self) -> int:
        """Of the micro-batches."""
        return min(self.micro_batch, *(size for _, size in self.later)) if self.later else self.micro_batch


class _Window:
    """The samples of one window, being read."""

    def __init__(self, name: tuple, samples: np.ndarray):
        self.name = name
        ordered = np.sort(samples)
        borders = np.concatenate(([0], np.flatnonzero(np.diff(ordered) != 1) + 1, [len(ordered)]))
        starts = ordered[borders[:-1]]
        runs = np.searchsorted(starts, samples, side="right") - 1
        self.places = list(zip(runs.tolist(), (samples - starts[runs]).tolist(), strict=True))  # (read, entry) of each sample
        self.ranges = [(start, start + length) for start, length in zip(starts.tolist(), np.diff(borders).tolist(), strict=True)]
        self.reads: list[Future] = []
        self.held = 0  # bytes that count against the budget: expected ones while being read, then those not yet taken
        self.planned = self.taken = 0  # samples; what another rank takes of a window is never planned here
        self.left = self.dropped = False  # left: the planner is past it


class ReadAhead:
    """The raw entries of a rank's micro-batches. Thread-safe.

    Args:
        share: the rank's micro-batches.
        memory_bytes: raw samples held at most, read and not yet taken. A micro-batch that nobody else's reading delays gets what it
            needs in any case, so that a budget smaller than one window of each lane slows nothing down but is exceeded.
        counts: six integers to keep `ReadCounts` in, shared with another process perhaps.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: Plan,
        share: Share,
        memory_bytes: int,
        counts: MutableSequence[int] | None = None,
    ):
        self.datasets, self.plan, self.share, self.memory_bytes = datasets, plan, share, memory_bytes
        self.counts = counts if counts is not None else [0] * len(ReadCounts._fields)
        self.stopped = threading.Event()
        remote = any(dataset.remote for dataset in datasets)
        threads = _THREADS if remote else _LOCAL_THREADS
        self.pool = ThreadPoolExecutor(threads, "read", initializer=stop_waiting_when, initargs=(self.stopped,))
        pool = plan.lanes * plan.window / share.world_size  # samples in the windows of this rank's lanes
        self._ahead = max(1, round(max(pool / 2, _AHEAD) / share.smallest))  # micro-batches
        self._changed = threading.Condition()  # guards all below
        self._walk = self._planned_runs()
        self._next = next(self._walk)  # the first run not planned yet
        self._coming: _Window | None = None  # the window that it needs, if there was no room for it yet
        self._current: dict[tuple[int, int], _Window] = {}  # (dataset, lane) -> the window that its planned positions end in
        self._runs: dict[int, deque[tuple[_Window, list[int]]]] = {}  # micro-batch -> what is planned and not taken of it
        self._oldest, self._newest = 0, 0  # micro-batches: not taken to its end, and begun
        self._done: set[int] = set()  # taken to their ends, after the oldest that is not
        self._held = 0

    def close(self) -> None:
        self.stopped.set()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def batch(self, number: int) -> Iterator[tuple[int, list]]:
        """(dataset, entries for its `parse`) of a micro-batch, in the order of its positions, a run of neighbours at a time.

        Raises what reading raised: Outage, UserError.
        """
        missing = len(self.share(number))
        with self._changed:
            self._newest = max(self._newest, number)
        while missing:
            with self._changed:
                while not self._runs.get(number):
                    self._advance()
                    if not self._runs.get(number):
                        self._changed.wait()
                dataset, taken = self._take(self._runs[number])
            # waits for the store, outside the lock
            reads = [(window, window.reads[read].result(), entry) for window, read, entry in taken]
            run = [entries[entry] for _, entries, entry in reads]
            missing -= len(run)
            with self._changed:
                for window, entries, entry in reads:
                    self._release(window, entries, entry)
                if not missing:
                    self._finish(number)
                self._advance()
            yield dataset, run

    # below, the lock is held ------------------------------------------------------------------------------------------------

    def _take(self, runs: deque) -> tuple[int, list[tuple[_Window, int, int]]]:
        """(dataset, (window, read, entry) of each sample) of the next runs, together while they are small: the lock costs as much as a few
        small samples."""
        dataset, size = runs[0][0].name[0], 0.0
        taken: list[tuple[_Window, int, int]] = []
        while runs and runs[0][0].name[0] == dataset and (not taken or size < _TOGETHER):
            window, offsets = runs.popleft()
            taken += [(window, *window.places[offset]) for offset in offsets]
            size += len(offsets) * self.datasets[dataset].mean_bytes
        return dataset, taken

    def _planned_runs(self) -> Iterator[tuple[int, tuple, list[int]]]:
        """(micro-batch, window, offsets in it) of neighbours in a window, without end."""
        for number in count():
            slots = self.plan.slots(self.share(number))
            for name, run in groupby(slots, key=lambda slot: slot[:4]):
                yield number, name, [slot.offset for slot in run]

    def _advance(self) -> None:
        """Plan, and request what it needs, as far as may be."""
        while True:
            number, name, offsets = self._next
            if number > self._newest + 1 + min(self._ahead, self._oldest // _RAMP):
                return
            lane = name[0], name[2]
            window = self._current.get(lane)
            if window is None or window.name != name:
                if self._coming is None:
                    self._coming = _Window(name, self.plan.window_samples(*name))
                    self._coming.held = round(len(self._coming.places) * self.datasets[name[0]].mean_bytes)
                if self._held + self._coming.held > self.memory_bytes and number > self._oldest:
                    return
                if window is not None:
                    window.left = True
                    self._drop(window)
                window, self._coming = self._coming, None
                self._current[lane] = window
                self._request(window)
            window.planned += len(offsets)
            self._runs.setdefault(number, deque()).append((window, offsets))
            self._next = next(self._walk)
            self._changed.notify_all()

    def _request(self, window: _Window) -> None:
        self._hold(window.held)
        dataset = self.datasets[window.name[0]]
        window.reads = [self.pool.submit(self._fetch, window, dataset, *limits) for limits in window.ranges]

    def _release(self, window: _Window, entries: list, entry: int) -> None:
        freed = entry_bytes(entries[entry])
        entries[entry] = None
        window.held -= freed
        self._held -= freed
        window.taken += 1
        self.counts[1] += 1
        if window.left:
            self._drop(window)

    def _drop(self, window: _Window) -> None:
        """Forget a window of which nothing more is needed; other ranks' samples, or those before a resumed position, remain in it."""
        if window.left and window.taken == window.planned and not window.dropped:
            window.dropped = True
            for read in window.reads:
                read.cancel()
            self._hold(-window.held)
            self.counts[5] += len(window.places) - window.taken

    def _finish(self, number: int) -> None:
        del self._runs[number]
        self._done.add(number)
        while self._oldest in self._done:
            self._done.remove(self._oldest)
            self._oldest += 1
        self._changed.notify_all()

    def _hold(self, size: int) -> None:
        self._held += size
        self.counts[4] = max(self.counts[4], self._held)

    # in the pool's threads --------------------------------------------------------------------------------------------------

    def _fetch(self, window: _Window, dataset: Dataset, start: int, stop: int) -> list:
        entries = [_alone(entry) for entry in dataset.fetch(start, stop)]
        size = sum(map(entry_bytes, entries))
        with self._changed:
            self.counts[0] += stop - start
            self.counts[2] += size
            self.counts[3] += 1
            if not window.dropped:
                surplus = size - round((stop - start) * dataset.mean_bytes)
                window.held += surplus
                self._hold(surplus)
        return entries


def _alone(entry: Any) -> Any:
    """A shard's entry with bytes of its own: those of a whole range would stay until its last sample is used."""
    if isinstance(entry, RawSample | Damage):
        return entry
    data, start, end, crc, shard = entry
    return bytes(memoryview(data)[start:end]), 0, end - start, crc, shard


def entry_bytes(entry: Any) -> int:
    if isinstance(entry, Damage):
        return 0
    return sum(map(len, entry.members.values())) if isinstance(entry, RawSample) else entry[2] - entry[1]
