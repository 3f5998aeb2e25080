"""How `bench` measures: variants take turns in one process, so that whatever else the machine does hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
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


def side_by_side(variants: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """Median over `repeats` rounds, each of which runs every variant once.

    Without a GPU these are CPU-seconds of this process, summed over its threads: other people's work on the machine does not count
    (but for the caches it takes), and images over them are images per second and core."""
    # a GPU is alone with us, so that wall-clock counts, and waiting for it takes no CPU time
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warmup + repeats):
        for name, call in variants.items():
            start = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: summary(values[warmup:]) for name, values in seconds.items()}


def summary(seconds: list[float]) -> Timing:
    # quartiles: one slow round, of a collector or of another process, moves neither
    low, middle, high = statistics.quantiles(seconds, n=4)
    return Timing(middle, (high - low) / middle)


def kernel_times(variants: Mapping[str, Callable[[], object]], repeats: int, at_least: float = 0.005) -> dict[str, Timing]:
    """What the GPU takes for each call, without the launching: each is captured as a CUDA graph, which is replayed in rounds of at least
    `at_least` seconds between two events. The calls must not wait for the device."""
    rounds = {name: _replayed(call, at_least) for name, call in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, (graph, count) in rounds.items():
            seconds[name].append(_replay(graph, count))
    return {name: summary(values) for name, values in seconds.items()}


def _replayed(call: Callable[[], object], at_least: float) -> tuple[torch.cuda.CUDAGraph, int]:
    """The call as a graph, and how often it goes into a round."""
    # torch wants the warm-up before a capture on a stream of its own
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and workspaces made before the capture, which may do neither
            call()
    torch.cuda.current_stream().wait_stream(stream)
    # replayed, a graph costs one launch for all its kernels: what is timed is their work alone
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    _replay(graph, 3)
    return graph, max(1, round(at_least / _replay(graph, 5)))


def _replay(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Seconds for one of `count` replays."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        # one after the other in the queue: between the events the GPU never waits for the host
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / count


def host_times(variants: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """What the CPU takes until each call has queued its work on an idle GPU."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warmup + repeats):
        for name, call in variants.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: summary(values[warmup:]) for name, values in seconds.items()}


def make_rows(
    bench: str, case: str, metric: str, unit: str, values: dict[str, float], baseline: str, spreads: dict | None = None
) -> list[dict]:
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


def time_rows(bench: str, case: str, timings: dict[str, Timing], baseline: str, metric: str = "time") -> list[dict]:
    milliseconds = {name: 1000 * timing.seconds for name, timing in timings.items()}
    return make_rows(bench, case, metric, "ms", milliseconds, baseline, {name: t.spread for name, t in timings.items()})


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
        # weak references: counting must not keep a tensor alive
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        # views and in-place results live in what was given: they are no new memory
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and StorageWeakRef(leaf.untyped_storage()) not in given:
                self.alive[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return result
