"""Real processes for tests: `run_ranks(function, 2, ...)` calls it in two of them, joined by gloo, and returns what each returned."""

import os
import tempfile
import traceback
from pathlib import Path

import torch
import torch.multiprocessing as mp


def _entry(function, rank: int, world_size: int, rendezvous: str, results, args) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), SSL_LOCAT_RENDEZVOUS=rendezvous)
    torch.set_num_threads(1)
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
    context = mp.get_context("spawn")
    results = context.Queue()
    rendezvous = str(Path(tempfile.mkdtemp()) / "rendezvous.json")
    processes = [
        context.Process(target=_entry, args=(function, rank, world_size, rendezvous, results, args)) for rank in range(world_size)
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
