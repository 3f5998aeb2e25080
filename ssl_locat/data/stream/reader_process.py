"""One process reads for all the workers of a rank, which decode what it hands them: so a lane has one reader, whatever their number.

Raw samples go through one pipe for each worker, a run of neighbours at a time, when the worker has room for them: what waits, waits in the
reader, within one budget of memory.
"""

import fcntl
import multiprocessing.connection
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.stream.plan import Plan
from ssl_locat.data.stream.read_ahead import ReadAhead, ReadCounts, Share
from ssl_locat.data.stream.workers import start_worker
from ssl_locat.errors import EXPECTED, Outage

# A reading thread that has bytes must not wait 5 ms (Python's default) for a busy main thread to let go of the interpreter, once per call.
SWITCH_SECONDS = 0.0005
_LARGE = 32 << 10  # bytes of a sample that are worth a message of their own
_PIPE_BYTES = (
    1 << 20
)  # Linux' limit for one pipe: a run of eight photographs, so that a worker seldom waits for the reader's next turn


class ReaderProcess:
    """Starts the process. `connections[w]` is worker w's end, for `Received`; micro-batch k goes to worker k % workers.

    Args:
        context: of multiprocessing.
        stopping: an event of that context; once set, SIGTERM ends the process.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: Plan,
        share: Share,
        memory_bytes: int,
        workers: int,
        context: Any,
        stopping: Any,
    ):
        self.counts = context.RawArray("q", len(ReadCounts._fields))
        pipes = [context.Pipe(duplex=False) for _ in range(workers)]
        self.connections: list[Connection] = [receiving for receiving, _ in pipes]
        sending = [connection for _, connection in pipes]
        for connection in sending:
            with suppress(OSError, AttributeError):  # not Linux, or the user's pages for pipes are used up
                fcntl.fcntl(connection.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        arguments = (datasets, plan, share, memory_bytes, sending, self.counts, stopping, os.getpid())
        self.process = context.Process(target=_serve, args=arguments, name="reader", daemon=True)
        self.process.start()
        for connection in sending:  # else workers would wait for ever for a reader that died
            connection.close()

    def close_connections(self) -> None:
        """The trainer's copies, once the workers have theirs."""
        for connection in self.connections:
            connection.close()

    def stop(self) -> None:
        """After `stopping` was set."""
        self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _Apart(NamedTuple):
    """A shard's entry whose bytes follow as they are: pickled with the rest, they would be copied twice more."""

    crc: int
    shard: str


class Received:
    """A worker's end: what `ReadAhead.batch` gives, out of the pipe."""

    def __init__(self, connection: Connection, share: Share):
        self.connection, self.share = connection, share

    def batch(self, number: int) -> Iterator[tuple[int, list]]:
        """The worker's micro-batches must be asked for in their order."""
        missing = len(self.share(number))
        while missing:
            try:
                run = self._receive()
            except (EOFError, OSError):  # OSError: it was lost in the middle of a message
                raise Outage(
                    "the process that reads for the data workers was lost. If the machine ran out of memory (see 'dmesg'), lower "
                    "data.read_memory_gb or data.workers. Then start the same command again: nothing is lost."
                ) from None
            if isinstance(run, Exception):
                raise run
            missing -= len(run[1])
            yield run

    def _receive(self) -> tuple[int, list] | Exception:
        run = self.connection.recv()
        if isinstance(run, Exception):
            return run
        dataset, entries = run
        return dataset, [self._with_bytes(entry) if isinstance(entry, _Apart) else entry for entry in entries]

    def _with_bytes(self, entry: _Apart) -> tuple:
        data = self.connection.recv_bytes()
        return data, 0, len(data), entry.crc, entry.shard

    def close(self) -> None:
        self.connection.close()


def _serve(
    datasets: Sequence[Dataset],
    plan: Plan,
    share: Share,
    memory_bytes: int,
    connections: list[Connection],
    counts: Any,
    stopping: Any,
    trainer: int,
) -> None:
    start_worker(stopping, trainer, 0)
    sys.setswitchinterval(SWITCH_SECONDS)
    ahead = ReadAhead(datasets, plan, share, memory_bytes, counts)
    for worker, connection in enumerate(connections):
        threading.Thread(target=_send, args=(ahead, connection, worker, len(connections)), daemon=True).start()
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a child
    multiprocessing.connection.wait([parent.sentinel])  # until the trainer is gone, however it went
    os._exit(0)


def _send(ahead: ReadAhead, connection: Connection, worker: int, workers: int) -> None:
    """A worker's micro-batches, or the error that ended reading them. Ends when the worker is gone; the trainer hears of that by itself."""
    with connection, suppress(BrokenPipeError):
        for number in count(worker, workers):
            runs = ahead.batch(number)
            while True:
                try:
                    run = next(runs, None)
                except Exception as error:
                    if not isinstance(error, EXPECTED):
                        error = RuntimeError(f"while reading for the data workers:\n{traceback.format_exc()}")
                    connection.send(error)
                    return
                if run is None:
                    break
                _send_run(connection, *run)


def _send_run(connection: Connection, dataset: int, entries: list) -> None:
    large = [type(entry) is tuple and entry[2] >= _LARGE for entry in entries]
    connection.send((dataset, [_Apart(*entry[3:]) if apart else entry for entry, apart in zip(entries, large, strict=True)]))
    for entry, apart in zip(entries, large, strict=True):
        if apart:
            connection.send_bytes(entry[0])
