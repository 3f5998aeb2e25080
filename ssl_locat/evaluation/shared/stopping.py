"""A wish to stop that reaches a protocol wherever it is: the warning signal of a cluster, or Ctrl-C.

The command (evaluate, table) opens `stoppable`; the protocols' loops ask, at the same place on all processes. Outside of it, in probes
during pretraining and from Python, nothing asks: there the signal is the caller's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from ssl_locat.errors import Preempted
from ssl_locat.runs.stop import StopFlag

# one for the process: handing it through every protocol would put it into their signatures, which are the YAML
_flag: StopFlag | None = None


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, a stop signal ends the work at the next place that asks, by Preempted."""
    global _flag
    with StopFlag() as flag:
        _flag = flag
        try:
            yield
        finally:
            _flag = None


def asked_to_stop() -> bool:
    """On all processes alike, at the same call."""
    # agreed, not seen: a process that stopped alone would leave the others in a collective
    return _flag is not None and _flag.agreed()


def stopped(what: str) -> Preempted:
    """The error to raise once progress is saved."""
    name = _flag.reason if _flag else "a signal"
    return Preempted(f"Stopped by {name or 'a signal'} in {what}. The same command resumes; what was finished or saved is kept.")


def stop_if_asked(what: str) -> None:
    """For work that has nothing of its own to save. Raises Preempted."""
    if asked_to_stop():
        raise stopped(what)
