"""Real processes for tests, started warm.

`run_ranks(function, 2, ...)` calls it in two of them, joined by gloo, and returns what each returned. `Command("pretrain", ...)` is
`ssl-locat pretrain ...` in a process of its own, with pid, signals and exit status as any other.

A server per test worker imports torch, timm and ssl_locat once and forks from there: importing takes 4 to 8 CPU-seconds a process, which
was a third of `make test`. What must start as a user's process starts (what is imported when, the launchers, another interpreter) is started
with subprocess where it is tested.
"""

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import torch

WARM = [
    "ssl_locat.cli",
    "ssl_locat.pretraining.loop",
    "ssl_locat.pretraining.summary",
    "ssl_locat.evaluation.evaluate",
    "ssl_locat.tables.table",
    "ssl_locat.export.export",
    "ssl_locat.report.command",
    "torch.distributed.checkpoint",
]


@cache
def warm():
    """The context whose processes are forks of the server. Only modules are loaded there: no model, no thread, no group, no CUDA."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is loaded
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    return context


def become(environment: Mapping[str, str], folder: str | Path) -> None:
    """In a fork: the server's environment and folder are those of the test that started it."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # a fork takes over its server's; a user's process has the platform's


@cache
def scratch() -> Path:
    """A folder that goes when the tests end."""
    folder = tempfile.TemporaryDirectory(prefix="ssl-locat-tests-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


# --- ranks --------------------------------------------------------------------------------------------------------------------


def _entry(function, rank: int, world_size: int, rendezvous: str, environment, folder, results, args) -> None:
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "SSL_LOCAT_RENDEZVOUS": rendezvous}
    become({**environment, **ranks}, folder)
    from ssl_locat.runs import distributed

    try:
        distributed.setup("cpu")
        results.put((rank, "ok", function(*args)))
        distributed.shutdown()
    except BaseException:
        results.put((rank, "failed", traceback.format_exc()))
        raise


def start_ranks(function, world_size: int, *args):
    """-> (processes, queue of (rank, 'ok' | 'failed', result)). `function` is at the top of a module; it may return plain data."""
    context = warm()
    results = context.Queue()
    rendezvous = str(Path(tempfile.mkdtemp(dir=scratch())) / "rendezvous.json")
    here = (dict(os.environ), os.getcwd())
    processes = [
        context.Process(target=_entry, args=(function, rank, world_size, rendezvous, *here, results, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, results


def run_ranks(function, world_size: int, *args, seconds: float = 280) -> list:
    """Results in rank order; `seconds` is how long to wait for one of them."""
    processes, results = start_ranks(function, world_size, *args)
    found = dict.fromkeys(range(world_size))
    try:
        for _ in range(world_size):
            rank, state, result = results.get(timeout=seconds)
            assert state == "ok", f"rank {rank}: {result}"
            found[rank] = result
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(world_size)]


# --- the command --------------------------------------------------------------------------------------------------------------


class Command:
    """`ssl-locat WORDS` in a process of its own, as far as subprocess.Popen's ways are used here.

    What it says goes to files, not through pipes: loader workers outlive a kill by seconds, and would hold a pipe open.
    """

    def __init__(self, *words: str, folder: str | Path | None = None, environment: Mapping[str, str] | None = None):
        self.said = Path(tempfile.mkdtemp(dir=scratch()))
        for stream in ("1", "2"):
            (self.said / stream).touch()
        self.words = words
        environment = {**(os.environ if environment is None else environment), "OMP_NUM_THREADS": "1"}  # what it launches, too
        given = (environment, folder or os.getcwd(), self.said)
        self._process = warm().Process(target=_command, args=(words, *given))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        return (self.said / "1").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return (self.said / "2").read_text(errors="replace")

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float = 240) -> int:
        self._process.join(seconds)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(["ssl-locat", *self.words], seconds, stderr=self.stderr)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:  # else the pid may be another's by now
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run_command(*words: str, seconds: float = 240, **options) -> Command:
    """The finished command: `.returncode`, `.stdout`, `.stderr`."""
    command = Command(*words, **options)
    try:
        command.wait(seconds)
    finally:
        command.kill()
    return command


def start_job(ranks: int, *words: str, environment: Mapping[str, str] | None = None, **options) -> list[Command]:
    """The command as so many ranks, told their places as cluster/launch.py tells them to the tasks of a job."""
    rendezvous = str(Path(tempfile.mkdtemp(dir=scratch())) / "rendezvous.json")
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "SSL_LOCAT_RENDEZVOUS": rendezvous}
    common = {**(os.environ if environment is None else environment), **place}
    return [
        Command(*words, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options) for rank in range(ranks)
    ]


def _command(words, environment, folder, said: Path) -> None:
    for stream in (1, 2):
        file = os.open(said / str(stream), os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    become(environment, folder)
    sys.argv = ["ssl-locat", *words]
    from ssl_locat import cli

    cli.leave(cli.run_command(list(words)))
