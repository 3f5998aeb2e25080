"""Worker processes that load data: how they start, what signals do to them, and how they end."""

import ctypes
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from ssl_locat.errors import Outage

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
MOST_WORKERS = 16  # of one process, where nobody chose
# Of one sample. Headers bound the work of every image that is decoded (images/headers.py; the slowest takes some seconds), so this is for
# what nobody thought of. CPU time, not the clock's: a busy machine ends no worker that an idle one would not.
CPU_SECONDS = 120.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_OWN_PAGES = 256 << 10  # bytes; measured: with 1 MiB a worker still grew by 1 to 3 MB with each batch
_KEPT_AT_END = 64 << 20  # bytes of free heap; glibc's 128 kB would ask the system anew for every image


def large_blocks_apart() -> None:
    """Have glibc map large blocks apart from its heap, so that they go back to the system when they are freed.

    By itself it counts as large what is larger than the largest such block freed so far (up to 32 MiB). Batches then lie on the heap, small
    freed blocks, which glibc keeps aside for reuse, cut the holes that they leave, and the next batch goes to the end: a worker of `linear`
    grew by 12 MB with each batch of 1024 images of 32 pixels, to 5.3 GB in an epoch of 1.28 million images. CPU time of decoding and
    cutting photographs of 500 x 375 is the same with and without.
    """
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_AT_END)


class Failure(NamedTuple):
    """An expected error on its way from a worker to the trainer; torch would wrap it into a page of traces."""

    error: Exception


class StuckWorker(Exception):
    """A worker was ended after so many seconds of CPU time in the middle of a sample: `sample` as it was told to `Watch.begin`."""

    def __init__(self, sample: tuple[int, int], seconds: float):
        super().__init__()
        self.sample, self.seconds = sample, seconds


class Watch:
    """What each worker has in hand, in memory shared with the trainer, and a timer that ends the worker which does not come to its end.

    The timer is the kernel's: a decoder that loops in C holds the interpreter, and no handler or thread of Python would run.
    """

    def __init__(self, context: Any, workers: int):
        self.seconds = CPU_SECONDS
        self._samples = context.RawArray("q", 2 * workers)

    def begin(self, worker: int, *sample: int) -> None:
        """In the worker, before each sample, named by two numbers."""
        self._samples[2 * worker : 2 * worker + 2] = sample
        signal.setitimer(signal.ITIMER_PROF, self.seconds)

    def stuck(self, batches: Any) -> tuple[int, int] | None:
        """The sample of a worker that the timer ended."""
        for worker, process in enumerate(batches._workers):
            if process.exitcode == -signal.SIGPROF:
                position, number = self._samples[2 * worker : 2 * worker + 2]
                return position, number
        return None


def as_is(batch: Any) -> Any:
    """In place of torch's conversion of arrays and tuples."""
    return batch


def context() -> str:
    """How workers start: a process that holds CUDA must not be forked."""
    return "forkserver" if torch.cuda.is_initialized() or not hasattr(os, "fork") else "fork"


def choose_workers(asked: int | None) -> int:
    """Workers of this process: as many as asked for, or its share of the cores that this node lets it use."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # the trainer needs a core for itself
    return 0 if share < 2 else min(share, MOST_WORKERS)


def start_worker(stopping: Any, trainer: int, worker: int) -> None:
    """Signals reach the whole process group (Ctrl-C, Slurm's warnings), but only the trainer decides when its workers stop."""

    def terminate(*_: object) -> None:
        if stopping.is_set() or os.getppid() != trainer:
            os._exit(0)

    for name in _SIGNALS:
        signal.signal(name, terminate if name == signal.SIGTERM else signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    large_blocks_apart()
    # held back by `starting`, in which this process was started
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [*_SIGNALS, signal.SIGPROF])


def stop_workers(batches: Any, stopping: Any) -> None:
    stopping.set()
    # private, but the only way to end them now: else they live until the iterator is collected
    batches._shutdown_workers()


@contextmanager
def starting() -> Iterator[None]:
    """Around the start of workers: signals are held back until each has its own handlers."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with warnings.catch_warnings():  # torch counts cores and workers; `ssl-locat doctor` weighs them by measuring
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def next_of(batches: Iterator, watch: Watch | None) -> Any:
    """The next batch; the errors of a worker as they were raised. Raises Outage if a worker was killed, StuckWorker if its timer did so,
    StopIteration at the end."""
    try:
        batch = next(batches)
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        if watch and (sample := watch.stuck(batches)):
            raise StuckWorker(sample, watch.seconds) from None
        raise Outage(
            f"a data worker was lost: {str(error).strip().splitlines()[0].rstrip('.')}. If the machine ran out of memory (see 'dmesg'), lower data.workers or "
            "the batch size per GPU; if /dev/shm was full, enlarge it. Then start the same command again: nothing is lost."
        ) from error
    if isinstance(batch, Failure):
        raise batch.error
    return batch
