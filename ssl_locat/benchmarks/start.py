"""`bench start`: how long a command takes to answer, beside what nobody can do without: Python itself, or `import torch, timm`.

Each case is a process of its own; CPU-seconds of it and its children, so that other work on the machine counts less. Medians.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial

BASE = "import torch, timm"
LOAD = "import ssl_locat; ssl_locat.load_backbone('timm:vit_tiny_patch16_224')"
COMMANDS = {  # case -> a command line and the exit code expected of it
    "--help": ("--help", 0),
    "a wrong path": ("pretrain quickstart data.make=null data.train=nowhere", 2),
    "a foreign key": ("pretrain quickstart batch_size=64", 2),
    "an unknown protocol": ("evaluate nowhere runs/x", 2),
    "a missing run": ("export nowhere out", 2),
}


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    repeats = 2 if quick else 5
    for case, (line, code) in COMMANDS.items():
        yield case, partial(measure_command, case, line.split(), code, repeats)
    yield "load_backbone", partial(measure_code, "load_backbone", LOAD, repeats)


def measure_command(case: str, words: list[str], code: int, repeats: int) -> list[dict]:
    # as a module: the console script of an installed package does the same, from another file
    seconds = median_seconds([sys.executable, "-m", "ssl_locat", *words], repeats, code)
    return [_row(case, "ssl-locat", seconds, base_seconds(repeats))]


def measure_code(case: str, code: str, repeats: int) -> list[dict]:
    """With Python's own way of leaving, in which taking torch apart takes as long for both."""
    seconds = median_seconds([sys.executable, "-c", code], repeats)
    return [_row(case, "ssl_locat", seconds, base_seconds(repeats))]


@cache
def base_seconds(repeats: int) -> float:
    return median_seconds([sys.executable, "-c", BASE], repeats)


def median_seconds(command: list[str], repeats: int, code: int = 0) -> float:
    """CPU-seconds of a process. RuntimeError if it ends with another code than expected."""
    spent = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            # of all children so far: the difference is that of this one and what it started
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=600)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if done.returncode != code:
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(spent)


def _row(case: str, variant: str, seconds: float, base: float) -> dict:
    return {
        "bench": "start",
        "case": case,
        "variant": variant,
        "metric": "time",
        "value": seconds,
        "unit": "s",
        "baseline": f"python -c '{BASE}': {base:.2f} s",
        "ratio": seconds / base,
    }
