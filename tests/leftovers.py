"""Nothing that a test starts outlives it: `conftest.py` takes these hooks.

The process that runs tests adopts whatever loses its parent (a rank whose launcher was killed, submitit's detached controller). After a
test that failed, what it started is ended; at the end of the session, everything. A TERM, such as `timeout` sends, ends the session the
same way as Ctrl-C: fixtures are torn down. Linux only; elsewhere the hooks do nothing.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import pytest

PR_SET_CHILD_SUBREAPER = 36
KEEP = "SSL_LOCAT_OUTLIVES_TESTS"  # in the environment of what a test starts for good: a node of a cluster that was up before
SHARED = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")  # of this process itself, for all its tests


def descendants(pid: int) -> list[int]:
    """All live processes below `pid`, parents first; nothing below one that is to be kept."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry.name))
    found, waiting = [], list(children.get(pid, []))
    while waiting:
        child = waiting.pop(0)
        if f"{KEEP}=".encode() not in _read(child, "environ"):
            found.append(child)
            waiting += children.get(child, [])
    return found


def end(processes: list[int]) -> list[str]:
    """TERM, and KILL two seconds later; the command lines of those that were there."""
    told = [_read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()[:200] for pid in processes]
    for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 1.0)):
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        until = time.monotonic() + patience
        while processes and time.monotonic() < until:
            processes = [pid for pid in processes if _alive(pid)]
            time.sleep(0.05)
    return told


def _alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # ours by adoption: nobody else asks for it
    return bool(_read(pid, "cmdline"))


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


# --- hooks --------------------------------------------------------------------------------------------------------------------


def pytest_configure(config) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(_number: int, _frame) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: fixtures need the time
    raise KeyboardInterrupt("SIGTERM")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Ends what a failed test left, before the next one; what the fixtures of its module started before it stays."""
    item.stash[_before], item.stash[_failed] = None, False
    result = yield
    if item.stash[_failed] and sys.platform == "linux":
        before = item.stash[_before] or set()
        end(_not_shared([pid for pid in descendants(os.getpid()) if pid not in before]))
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    item.stash[_before] = set(descendants(os.getpid())) if sys.platform == "linux" else set()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.stash[_failed] = item.stash[_failed] or (report.failed and call.when == "call")
    return report


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config) -> None:
    if sys.platform == "linux":
        left = end(_not_shared(descendants(os.getpid())))
        if left:
            print(f"\nended what tests left behind: {'; '.join(left)}", file=sys.stderr)


def _not_shared(processes: list[int]) -> list[int]:
    """Without multiprocessing's helpers, which end by themselves when nobody uses them any more. They are children of this process; what the
    fork server forked is not, though it carries the server's command line."""
    return [
        pid
        for pid in processes
        if _parent(pid) != os.getpid() or not any(name.encode() in _read(pid, "cmdline") for name in SHARED)
    ]


def _parent(pid: int) -> int:
    stat = _read(pid, "stat").decode(errors="replace").rpartition(")")[2].split()  # after the name, which may hold anything
    return int(stat[1]) if stat else 0


_before, _failed = pytest.StashKey(), pytest.StashKey()
