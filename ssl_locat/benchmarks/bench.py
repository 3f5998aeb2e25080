"""`ssl-locat bench`: what is fast here, by how much, and against what. Every number stands beside its baseline from the same run.

Rows come from `ssl_locat.benchmarks`, one module per subject; this file prints them as they come and compares them with an earlier run's
JSON. Cases stand alone: one that fails is named, and the others are measured.
"""

import json
import logging
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table

from ssl_locat.errors import UserError
from ssl_locat.runs.folder import cpu_instructions, cpu_name
from ssl_locat.runs.log import console, progress

log = logging.getLogger(__name__)

BENCHES = {
    "attention": "ssl_locat.benchmarks.attention",
    "step": "ssl_locat.benchmarks.step",
    "crops": "ssl_locat.benchmarks.crops",
    "stream": "ssl_locat.benchmarks.stream",
    "start": "ssl_locat.benchmarks.start",
    "memory": "ssl_locat.benchmarks.memory",
}  # each has cases(quick), which yields names and calls that measure: () -> list of dicts of the columns below
COLUMNS = ("bench", "case", "variant", "metric", "value", "unit", "baseline", "ratio")
PACKAGES = ("ssl_locat", "torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "opencv-python-headless", "triton")


def run(what: str, as_json: bool = False, compare: Path | None = None, quick: bool = False) -> dict:
    """Measure `what` (a key of BENCHES, or "all") -> {"hardware", "versions", "rows", "failed"}; unless as_json, prints the rows of each
    case when it is done. "failed" has {"bench", "case", "error"} of each case that could not be measured.

    Raises UserError if `compare` is not the JSON of an earlier run. Times are medians; on a CPU, CPU-seconds (benchmarks/timing.py).
    """
    earlier = load_earlier(compare) if compare else {}
    machine = hardware()
    rows, failed = [], []
    names = list(BENCHES) if what == "all" else [what]
    with progress("bench", len(names), "subjects") as bar:
        for name in names:
            for case, measure in subject_cases(name, quick):
                try:
                    found = measure()
                except Exception as error:
                    # a case stands alone: the trace goes to --verbose, the next case runs
                    log.debug("bench %s, %s", name, case, exc_info=True)
                    log.error("bench %s, %s: not measured: %s: %s", name, case, type(error).__name__, error)
                    failed.append({"bench": name, "case": case, "error": f"{type(error).__name__}: {error}"})
                    continue
                if compare:
                    # ratios, not times: those of another machine, or of another day of this one, say nothing
                    found = [row | {"earlier_ratio": earlier.get(identity(row), {}).get("ratio")} for row in found]
                rows += found
                if found and not as_json:
                    console().print(table(found, compare is not None))
            bar.update()
    if not as_json:
        console().print(describe(machine), style="dim")
    return {"hardware": machine, "versions": versions(), "rows": rows, "failed": failed}


def subject_cases(name: str, quick: bool) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """A subject's cases; if they cannot even be listed to the end, a last one that fails with the reason."""
    try:
        # listing may allocate, and so fail: then the other subjects are measured all the same
        yield from import_module(BENCHES[name]).cases(quick)
    except Exception as error:
        yield "setting up", partial(_fail, error)


def _fail(error: Exception) -> list[dict]:
    raise error


def identity(row: dict) -> tuple:
    return tuple(row[name] for name in ("bench", "case", "variant", "metric"))


def load_earlier(path: Path) -> dict[tuple, dict]:
    """Rows of an earlier `ssl-locat bench --json`, by what they measured."""
    try:
        return {identity(row): row for row in json.loads(Path(path).read_text())["rows"]}
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--compare {path}: not the JSON of an earlier bench ({error}); write one with 'ssl-locat bench all --json > FILE'"
        ) from error


def table(rows: list[dict], compared: bool) -> Table:
    """Rows for people: value, spread between quartiles, ratio to the baseline, and the ratio of the earlier run if there is one."""
    view = Table(box=None, pad_edge=False)
    for name, width in {"bench": 9, "case": 24, "variant": 20, "metric": 12}.items():  # at least, so that tables of cases line up
        view.add_column(name, min_width=width)
    for name in ["value", "spread", "x baseline"] + ["x earlier"] * compared:
        view.add_column(name, justify="right")
    view.add_column("baseline")
    previous = None
    for row in rows:
        case = (row["bench"], row["case"], row["metric"])
        if previous is not None and case != previous:
            view.add_section()
        ratios = [row["ratio"], row["earlier_ratio"]] if compared else [row["ratio"]]
        spread = row.get("spread")
        view.add_row(
            *(row["bench"], row["case"], row["variant"], row["metric"], f"{row['value']:.4g} {row['unit']}"),
            "" if spread is None else f"{100 * spread:.0f} %",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            row["baseline"] or "",
        )
        previous = case
    return view


def hardware() -> dict:
    """What the numbers were measured on."""
    import torch

    found = {
        "cpu": cpu_name(),
        # AVX2, AVX-512, bf16, AMX: ratios of one do not hold for another
        "instructions": cpu_instructions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        # AVX2 or AVX512: kernels differ between them
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0],  # before; above the number of cores, spreads are wide
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe(found: dict) -> str:
    # without a GPU other work on the machine must not count (timing.py)
    gpu = f", {found['gpu']}" if "gpu" in found else "; times are CPU-seconds"
    return f"{found['cpu']} ({', '.join(found['instructions']) or found['cpu_capability']}), {found['cores']} cores, {found['threads']} threads, load {found['load']:.1f}{gpu}. Lower ratios of time are better."
