"""`ssl-locat bench stream`: samples per second out of shards, beside webdataset's own pipeline on the same shards.

Both sides read raw bytes (no decoding) in one process of their own, in turns, from local files and from a web server on loopback, at once
and with 50 ms to the first byte. Each is timed once it runs steadily: after its buffer is full, ours after one pass. webdataset shuffles
through a buffer of 1000; what that is worth is a row of its own. CPU-seconds (with those of webdataset's `curl`) tell what is left where
other work shares the machine, and what a trainer's cores lose. The quick form's data sets are too small for ranges of full size.
Then resuming: how long from opening the data to the first batch, at 90 % of a pass over 1.28 million samples, and how much that reads.
Each kind of shard (tar, Parquet, zip, windows of TIFFs) stands beside the library that its users read it with (formats.py). Last an index of 100,000 shards of 10,000 samples: opening it, its memory, planning a window.
"""

import asyncio
import json
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.benchmarks import formats
from ssl_locat.benchmarks.timing import make_rows
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.shard_index import _MAGIC, SIDECAR, read_index
from ssl_locat.data.shards.shard_set import ShardDataset
from ssl_locat.data.shards.write import write_shard
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.stream import TrainStream

BASELINE = "webdataset, shuffle(1000)"
OURS = "ssl_locat"
BATCH = 256
_SIZES: dict[str, Any] = {"global_batch_size": BATCH, "world_size": 1, "accumulate_steps": 1, "workers": 0}
# forked: what is measured is already imported, and closures need not be pickled
_fork = multiprocessing.get_context("fork")


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """Cases of throughput, requests, memory, shuffle quality and resume. Needs `curl` for webdataset's web cases."""
    repeats = 1 if quick else 3
    with tempfile.TemporaryDirectory(prefix="bench_stream") as folder, _index_cache(folder):
        root = Path(folder)
        small = _make_shards(root / "small", 10 if quick else 200, 1000, 2_500)
        large = _make_shards(root / "large", 4 if quick else 40, 250, 100_000)
        for name, samples, size in (("small, 2.5 kB", small, 2_500), ("large, 100 kB", large, 100_000)):
            folder_name = name.partition(",")[0]
            yield f"{name}, local", partial(_local_case, name, root / folder_name, samples, size, repeats)
            for delay in (0.0, 0.05):
                yield f"{name}, http, {delay} s", partial(_web_case, name, root, folder_name, samples, size, delay, repeats)
        yield from formats.cases(root / "formats", quick, _in_child)
        yield "shuffle", partial(_shuffle_rows, root / "small", small)
        yield "resume", partial(_resume_rows, root, 100_000 if quick else 1_280_000)
        yield "many shards", partial(_huge_rows, root, 1_000 if quick else 100_000)


def _local_case(name: str, folder: Path, samples: int, size: int, repeats: int) -> list[dict]:
    urls = sorted(map(str, folder.glob("*.tar")))
    open_dataset(urls)  # the index; later runs find it cached, as in a job
    return _compare(f"{name}, local", urls, samples, size, repeats, None)


def _web_case(name: str, root: Path, folder: str, samples: int, size: int, delay: float, repeats: int) -> list[dict]:
    with _web_server(root, delay) as (url, requests, _):
        urls = [f"{url}/{folder}/{path.name}" for path in sorted((root / folder).glob("*.tar"))]
        _in_child(lambda: len(open_dataset(urls)))  # the index
        return _compare(f"{name}, http{f' + {1000 * delay:.0f} ms' * bool(delay)}", urls, samples, size, repeats, requests)


def _compare(case: str, urls: list[str], samples: int, size: int, repeats: int, requests) -> list[dict]:
    """Both pipelines in turns, each time in a fresh process."""
    measured: dict[str, list[_Pass]] = {BASELINE: [], OURS: []}
    for _ in range(repeats):
        for variant, run in ((BASELINE, _webdataset_pass), (OURS, _our_pass)):
            # a fresh process each time: memory that one left behind would hide what the other needs
            measured[variant].append(_in_child(partial(run, urls, samples, requests)))

    def rows(metric: str, unit: str, value: Callable[[_Pass], float]) -> list[dict]:
        medians = {variant: statistics.median(map(value, runs)) for variant, runs in measured.items()}
        return make_rows("stream", case, metric, unit, medians, BASELINE)

    found = rows("throughput", "samples/s", lambda run: run.samples / run.seconds)
    found += rows("bandwidth", "MB/s", lambda run: run.samples * size / 1e6 / run.seconds)
    found += rows("throughput per core", "samples/CPU-s", lambda run: run.samples / run.cpu_seconds)
    found += rows("peak memory added", "MB", lambda run: run.memory)
    if requests:
        found += rows("requests", "per 1000 samples", lambda run: 1000 * run.requests / run.samples)
    return found


class _Pass(NamedTuple):
    samples: int
    seconds: float
    cpu_seconds: float
    memory: float  # MB added at the peak
    requests: int


def _measure(batches: Iterator, warm: int, timed: int, per_batch: int, requests) -> _Pass:
    """Take `warm` batches, then time `timed` of them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in islice(batches, warm):
        pass
    # counters before the clock: reading them is no part of the work
    asked, cpu, began = requests.value if requests else 0, _cpu_seconds(), time.perf_counter()
    for _ in islice(batches, timed):
        pass
    seconds, cpu = time.perf_counter() - began, _cpu_seconds() - cpu
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return _Pass(timed * per_batch, seconds, cpu, memory, requests.value - asked if requests else 0)


def _cpu_seconds() -> float:
    # webdataset reads the web by `curl`: its time counts once the process has been waited for
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _count(raw, seed: int) -> int:
    return sum(map(len, raw.members.values()))


def _our_pass(urls: list[str], samples: int, requests) -> _Pass:
    dataset = open_dataset(urls)
    plan = choose_plan([dataset], [1.0], 0, _SIZES["global_batch_size"])
    # a whole pass to warm up: by then every lane has read its first window
    with TrainStream([dataset], plan, _count, sum, start_samples=0, **_SIZES) as stream:
        return _measure(iter(stream), samples // BATCH, samples // BATCH, BATCH, requests)


def _webdataset_pass(urls: list[str], samples: int, requests) -> _Pass:
    """A part of the data: this pipeline is steady from its 1000th sample on."""
    return _measure(_webdataset(urls), min(2000, samples // 4), samples // 5, 1, requests)


def _webdataset(urls: list[str]) -> Iterator[tuple[int, str]]:
    import webdataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # buffers of 100 shards and 1000 samples, as people set them
        pipeline = webdataset.WebDataset(urls, shardshuffle=100, seed=0).shuffle(1000)
        for sample in pipeline:
            yield sum(len(data) for data in sample.values() if isinstance(data, bytes)), sample["__url__"]


def _shuffle_rows(folder: Path, samples: int) -> list[dict]:
    """Distinct shards among the samples of a batch: with labels sorted into shards, that is what a batch knows of the data."""
    urls = sorted(map(str, folder.glob("*.tar")))
    # which shard each sample came from, in the order it came
    theirs = [url for _, url in islice(_webdataset(urls), samples)]
    plan = choose_plan([open_dataset(urls)], [1.0], 0, _SIZES["global_batch_size"])
    ours = [plan.locate(position)[1] * len(urls) // samples for position in range(BATCH * 8)]
    # expected number of distinct ones among BATCH draws with replacement
    uniform = len(urls) * (1 - (1 - 1 / len(urls)) ** BATCH)
    values = {
        BASELINE: _distinct(theirs[: len(theirs) // BATCH * BATCH]),
        OURS: _distinct(ours),
        "uniform": uniform,
    }
    return make_rows("stream", f"shuffle, {len(urls)} shards", f"shards per batch of {BATCH}", "shards", values, BASELINE)


def _distinct(shards: list) -> float:
    return float(np.mean([len(set(shards[start : start + BATCH])) for start in range(0, len(shards), BATCH)]))


def _resume_rows(root: Path, samples: int) -> list[dict]:
    """From opening the data to the first batch at 90 % of a pass. One shard under many names: its bytes come from memory anyway."""
    _make_shards(root / "resume", 1, 10_000, 1_000)
    for number in range(1, samples // 10_000):
        # hard links: 128 shards of 10,000 samples in the room of one
        os.link(root / "resume/00000.tar", root / f"resume/{number:05d}.tar")
    names = [f"{number:05d}.tar" for number in range(samples // 10_000)]
    seconds: dict[str, float] = {}
    local = [str(root / "resume" / name) for name in names]
    open_dataset(local)
    seconds["local"], _, _ = _in_child(lambda: _first_batch(local, samples * 9 // 10, None))
    with _web_server(root, 0.0) as (url, _, served):
        remote = [f"{url}/resume/{name}" for name in names]
        _in_child(lambda: len(open_dataset(remote)))
        seconds["http"], megabytes, window = _in_child(lambda: _first_batch(remote, samples * 9 // 10, served))
    case = f"resume at 90 % of {samples / 1e6:.3g} M samples"
    found = make_rows("stream", case, "to the first batch", "s", seconds, "local")
    read = {"http": megabytes, "one window of each lane": window}
    return found + make_rows("stream", case, "read before the first batch", "MB", read, "one window of each lane")


def _first_batch(urls: list[str], start: int, served) -> tuple[float, float, float]:
    """(seconds, MB read meanwhile, MB of one window for each lane)"""
    began, before = time.perf_counter(), served.value if served else 0
    dataset = open_dataset(urls)
    plan = choose_plan([dataset], [1.0], 0, _SIZES["global_batch_size"])
    with TrainStream([dataset], plan, _count, sum, start_samples=start, **_SIZES) as stream:
        next(iter(stream))
        seconds, read = time.perf_counter() - began, served.value - before if served else 0
    return seconds, read / 1e6, plan.lanes * plan.window * dataset.mean_bytes / 1e6


def _huge_rows(root: Path, shards: int) -> list[dict]:
    """An index of counts; where its offsets would lie the file has a hole."""
    per_shard, case = 10_000, f"{shards} shards x 10,000 samples"
    block = 12 * per_shard + 8
    lines = [[f"{i:06d}.tar", 10**9, "", per_shard, 0, f"{i:016x}", len(_MAGIC) + i * block] for i in range(shards)]
    text = json.dumps(lines, separators=(",", ":")).encode()
    with open(root / SIDECAR, "wb") as file:
        file.write(_MAGIC)
        # a sparse file: the offsets of a shard are read only when its samples are
        file.seek(len(_MAGIC) + shards * block)
        file.write(text + len(text).to_bytes(8, "little"))
    opening, memory, window = _in_child(lambda: _open_huge(str(root / SIDECAR)))
    found = make_rows("stream", case, "open and plan", "s", {OURS: opening}, OURS)
    found += make_rows("stream", case, "memory per rank", "MB", {OURS: memory}, OURS)
    return found + make_rows("stream", case, "plan a window", "ms", {OURS: window}, OURS)


def _open_huge(index: str) -> tuple[float, float, float]:
    """(seconds to open, MB that stay, ms to plan one window)"""
    before, began = _resident(), time.perf_counter()
    dataset = ShardDataset("huge", Store(), list(read_index(Store(), index).values()))
    plan = choose_plan([dataset], [1.0], 0, 1024)
    opening, memory = time.perf_counter() - began, _resident() - before
    began = time.perf_counter()
    for lane in range(100):
        plan.window_samples(0, 3, lane, plan.slot(lane * plan.unit).window)
    return opening, memory, (time.perf_counter() - began) / 100 * 1000


def _resident() -> float:
    """MB of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


# scaffolding ------------------------------------------------------------------------------------------------------------------


def _in_child(run: Callable[[], object]):
    """What a call returns in a fresh process."""
    answers = _fork.SimpleQueue()

    def work():
        try:
            answers.put(run())
        finally:
            os._exit(0)  # past the clean-up of inherited things

    child = _fork.Process(target=work)
    child.start()
    child.join()
    if answers.empty():
        raise RuntimeError("a measurement failed; its message is above")
    return answers.get()


@contextmanager
def _index_cache(folder: str) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = folder
    try:
        yield
    finally:
        os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


def _make_shards(folder: Path, shards: int, per_shard: int, size: int) -> int:
    """Shards of KEY.jpg (random bytes) and KEY.cls; returns the number of samples."""
    folder.mkdir()
    content = random.Random(0).randbytes(2 * size)
    for number in range(shards):
        write_shard(
            folder / f"{number:05d}.tar",
            ((f"{number:05d}{i:06d}", {"jpg": content[i % size : i % size + size], "cls": b"7"}) for i in range(per_shard)),
        )
    return shards * per_shard


@contextmanager
def _web_server(root: Path, delay: float):
    """(URL, count of requests so far, bytes sent so far) of a web server with range requests, in a process of its own."""
    requests, served, port = _fork.Value("l", 0), _fork.Value("l", 0), _fork.SimpleQueue()
    server = _fork.Process(target=_serve, args=(root, delay, requests, served, port), daemon=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{port.get()}", requests, served
    finally:
        server.kill()
        server.join()


def _serve(root: Path, delay: float, requests, served, port) -> None:
    async def client(reader, writer):
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"):
                requests.value += 1
                # the time to the first byte of a real store; loopback has none
                await asyncio.sleep(delay)
                served.value += await _answer(root / head.split()[1].lstrip("/"), head, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def serve():
        server = await asyncio.start_server(client, "127.0.0.1", 0)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


async def _answer(path: Path, head: str, writer) -> int:
    """Bytes sent of the object."""
    if not path.is_file():
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        return 0
    size = path.stat().st_size
    wanted = next((line for line in head.split("\r\n") if line.lower().startswith("range:")), None)
    start, end = 0, size
    if wanted:
        # "bytes=0-99": both ends count; "bytes=100-": to the end
        first, _, last = wanted.partition("=")[2].partition("-")
        start, end = int(first), min(size, int(last) + 1 if last else size)
        writer.write(f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{end - 1}/{size}\r\n".encode())
    else:
        writer.write(b"HTTP/1.1 200 OK\r\n")
    writer.write(f'ETag: "{path.stat().st_mtime_ns}"\r\nContent-Length: {end - start}\r\n\r\n'.encode())
    first_byte = start
    with open(path, "rb") as file:
        file.seek(start)
        while start < end and not head.startswith("HEAD"):
            piece = file.read(min(end - start, 1 << 20))
            writer.write(piece)
            # the client sets the pace; else a whole object would wait in memory
            await writer.drain()
            start += len(piece)
    return 0 if head.startswith("HEAD") else end - first_byte
