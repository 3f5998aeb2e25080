"""Worker processes that load data: how they start, what signals do to them, and how they end."""

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ssl_locat.errors import Outage

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
MOST_WORKERS = 16  # of one process, where nobody chose


class Failure(NamedTuple):
    """An expected error on its way from a worker to the trainer; torch would wrap it into a page of traces."""

    error: Exception


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
    # held back by `starting`, in which this process was started
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


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


def next_of(batches: Iterator) -> Any:
    """The next batch; the errors of a worker as they were raised. Raises Outage if a worker was killed, StopIteration at the end."""
    try:
        batch = next(batches)
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise Outage(
            f"a data worker was lost: {str(error).strip().splitlines()[0].rstrip('.')}. If the machine ran out of memory (see 'dmesg'), lower data.workers or "
            "the batch size per GPU; if /dev/shm was full, enlarge it. Then start the same command again: nothing is lost."
        ) from error
    if isinstance(batch, Failure):
        raise batch.error
    return batch
