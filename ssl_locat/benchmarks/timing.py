"""How `bench` measures: variants take turns in one process, so that whatever else the machine does hits all of them alike."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Timing(NamedTuple):
    seconds: float  # median
    spread: float  # between quartiles, as a share of the median


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precisions() -> dict[str, torch.dtype]:
    """Those worth measuring: a CPU without instructions for bfloat16 takes 15 times as long with it (measured), and nobody would use it."""
    cpu = Path("/proc/cpuinfo")
    emulated = device().type == "cpu" and cpu.exists() and "bf16" not in cpu.read_text()
    return {"fp32": torch.float32} if emulated else {"fp32": torch.float32, "bf16": torch.bfloat16}


def side_by_side(variants: dict[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """Median over `repeats` rounds, each of which runs every variant once.

    Without a GPU these are CPU-seconds of this process, summed over its threads: other people's work on the machine does not count
    (but for the caches it takes), and images over them are images per second and core."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warmup + repeats):
        for name, call in variants.items():
            start = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    timings = {}
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values[warmup:], n=4)
        timings[name] = Timing(middle, (high - low) / middle)
    return timings


def make_rows(
    bench: str, case: str, metric: str, unit: str, values: dict[str, float], baseline: str, spreads: dict | None = None
):
    """One row per variant; `ratio` is its value over the baseline's."""
    return [
        {
            "bench": bench,
            "case": case,
            "variant": variant,
            "metric": metric,
            "value": value,
            "unit": unit,
            "baseline": baseline,
            "ratio": value / values[baseline] if values[baseline] else None,
            "spread": spreads[variant] if spreads else None,
        }
        for variant, value in values.items()
    ]


def time_rows(bench: str, case: str, timings: dict[str, Timing], baseline: str) -> list[dict]:
    milliseconds = {name: 1000 * timing.seconds for name, timing in timings.items()}
    return make_rows(bench, case, "time", "ms", milliseconds, baseline, {name: t.spread for name, t in timings.items()})


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once that `call` made: the allocator's peak on a GPU, counted tensor by tensor on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as counter:
        call()
    return counter.peak


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, while they live. Workspaces inside an operator are not seen."""

    def __init__(self):
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and StorageWeakRef(leaf.untyped_storage()) not in given:
                self.alive[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return result
