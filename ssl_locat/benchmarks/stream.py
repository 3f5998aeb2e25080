"""`ssl-locat bench stream`: samples per second out of shards, beside webdataset's own pipeline on the same shards.

Both sides read raw bytes (no decoding) in one process of their own, one after the other, from local files and from a web server on
loopback, at once and with 50 ms to the first byte. webdataset shuffles through a buffer of 1000; what that is worth is a row of its own.
Then resuming: how long from opening the data to the first batch, at 90 % of a pass over 1.28 million samples.
"""

import asyncio
import io
import multiprocessing
import os
import random
import resource
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from ssl_locat.benchmarks.timing import make_rows
from ssl_locat.data.index import open_dataset
from ssl_locat.data.plan import choose_plan
from ssl_locat.data.stream import TrainStream

BASELINE = "webdataset, shuffle(1000)"
OURS = "ssl_locat"
BATCH = 256
_SIZES = {"global_batch_size": BATCH, "world_size": 1, "accumulate_steps": 1, "workers": 0}
_fork = multiprocessing.get_context("fork")


def rows(quick: bool) -> list[dict]:
    """Rows of throughput, requests, memory, shuffle quality and resume. Needs `curl` for webdataset's web cases."""
    found: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="bench_stream") as folder, _index_cache(folder):
        root = Path(folder)
        small = _make_shards(root / "small", 10 if quick else 40, 500, 2_500)
        large = _make_shards(root / "large", 4 if quick else 12, 100, 100_000)
        for name, samples, size in (("small, 2.5 kB", small, 2_500), ("large, 100 kB", large, 100_000)):
            found += _local_case(name, root / name.partition(",")[0], samples, size, 1 if quick else 3)
            for delay in (0.0, 0.05):
                found += _web_case(name, root, name.partition(",")[0], samples, size, delay, 1 if quick else 3)
        found += _shuffle_rows(root / "small", small)
        found += _resume_rows(root, 100_000 if quick else 1_280_000)
    return found


def _local_case(name: str, folder: Path, samples: int, size: int, repeats: int) -> list[dict]:
    urls = sorted(map(str, folder.glob("*.tar")))
    open_dataset(urls)  # the index; later runs find it cached, as in a job
    return _compare(f"{name}, local", urls, samples, size, repeats, None)


def _web_case(name: str, root: Path, folder: str, samples: int, size: int, delay: float, repeats: int) -> list[dict]:
    with _web_server(root, delay) as (url, requests):
        urls = [f"{url}/{folder}/{path.name}" for path in sorted((root / folder).glob("*.tar"))]
        _in_child(lambda: open_dataset(urls))  # not here: its event loop would not survive the forks to come
        return _compare(f"{name}, http{f' + {1000 * delay:.0f} ms' * bool(delay)}", urls, samples, size, repeats, requests)


def _compare(case: str, urls: list[str], samples: int, size: int, repeats: int, requests) -> list[dict]:
    """Both pipelines over one pass, in turns, each time in a fresh process."""
    measured: dict[str, list[tuple[float, float, int]]] = {BASELINE: [], OURS: []}
    for _ in range(repeats):
        for variant, run in ((BASELINE, _webdataset_pass), (OURS, _our_pass)):
            before = requests.value if requests else 0
            seconds, memory = _in_child(lambda run=run: run(urls, samples))
            measured[variant].append((seconds, memory, (requests.value if requests else 0) - before))
    seconds = {variant: statistics.median(run[0] for run in runs) for variant, runs in measured.items()}
    found = make_rows("stream", case, "throughput", "samples/s", {v: samples / s for v, s in seconds.items()}, BASELINE)
    found += make_rows("stream", case, "bandwidth", "MB/s", {v: samples * size / 1e6 / s for v, s in seconds.items()}, BASELINE)
    found += make_rows(
        "stream", case, "peak memory added", "MB", {v: max(r[1] for r in runs) for v, runs in measured.items()}, BASELINE
    )
    if requests:
        per_thousand = {v: 1000 * statistics.median(r[2] for r in runs) / samples for v, runs in measured.items()}
        found += make_rows("stream", case, "requests", "per 1000 samples", per_thousand, BASELINE)
    return found


def _count(raw, seed: int) -> int:
    return sum(map(len, raw.members.values()))


def _our_pass(urls: list[str], samples: int) -> None:
    dataset = open_dataset(urls)
    plan = choose_plan([dataset], [1.0], 0, _SIZES["global_batch_size"])
    with TrainStream([dataset], plan, _count, sum, start_samples=0, **_SIZES) as stream:
        for _ in islice(stream, samples // BATCH):
            pass


def _webdataset_pass(urls: list[str], samples: int) -> None:
    for _ in islice(_webdataset(urls), samples):
        pass


def _webdataset(urls: list[str]) -> Iterator[tuple[int, str]]:
    import webdataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = webdataset.WebDataset(urls, shardshuffle=100, seed=0).shuffle(1000)
        for sample in pipeline:
            yield sum(len(data) for data in sample.values() if isinstance(data, bytes)), sample["__url__"]


def _shuffle_rows(folder: Path, samples: int) -> list[dict]:
    """Distinct shards among the samples of a batch: with labels sorted into shards, that is what a batch knows of the data."""
    urls = sorted(map(str, folder.glob("*.tar")))
    theirs = [url for _, url in islice(_webdataset(urls), samples)]
    plan = choose_plan([open_dataset(urls)], [1.0], 0, _SIZES["global_batch_size"])
    ours = [plan.locate(position)[1] * len(urls) // samples for position in range(BATCH * 8)]
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
        os.link(root / "resume/00000.tar", root / f"resume/{number:05d}.tar")
    names = [f"{number:05d}.tar" for number in range(samples // 10_000)]
    seconds: dict[str, float] = {}
    local = [str(root / "resume" / name) for name in names]
    open_dataset(local)
    seconds["local"] = _in_child(lambda: _first_batch(local, samples * 9 // 10))[0]
    with _web_server(root, 0.0) as (url, _):
        remote = [f"{url}/resume/{name}" for name in names]
        _in_child(lambda: open_dataset(remote))
        seconds["http"] = _in_child(lambda: _first_batch(remote, samples * 9 // 10))[0]
    case = f"resume at 90 % of {samples / 1e6:.2g} M samples"
    return make_rows("stream", case, "to the first batch", "s", seconds, "local")


def _first_batch(urls: list[str], start: int) -> None:
    dataset = open_dataset(urls)
    plan = choose_plan([dataset], [1.0], 0, _SIZES["global_batch_size"])
    with TrainStream([dataset], plan, _count, sum, start_samples=start, **_SIZES) as stream:
        next(iter(stream))


# scaffolding ------------------------------------------------------------------------------------------------------------------


def _in_child(run: Callable[[], object]) -> tuple[float, float]:
    """(seconds, MB of memory added at the peak) of a call in a fresh process."""
    answers = _fork.SimpleQueue()

    def work():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        try:
            run()
            answers.put((time.perf_counter() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
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
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for i in range(per_shard):
                for name, data in (
                    (f"{number:05d}{i:06d}.jpg", content[i % size : i % size + size]),
                    (f"{number:05d}{i:06d}.cls", b"7"),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return shards * per_shard


@contextmanager
def _web_server(root: Path, delay: float):
    """(URL, count of requests so far) of a web server with range requests, in a process of its own."""
    requests, port = _fork.Value("l", 0), _fork.SimpleQueue()
    server = _fork.Process(target=_serve, args=(root, delay, requests, port), daemon=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{port.get()}", requests
    finally:
        server.kill()
        server.join()


def _serve(root: Path, delay: float, requests, port) -> None:
    async def client(reader, writer):
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"):
                requests.value += 1
                await asyncio.sleep(delay)
                await _answer(root / head.split()[1].lstrip("/"), head, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def serve():
        server = await asyncio.start_server(client, "127.0.0.1", 0)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


async def _answer(path: Path, head: str, writer) -> None:
    if not path.is_file():
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        return
    size = path.stat().st_size
    wanted = next((line for line in head.split("\r\n") if line.lower().startswith("range:")), None)
    start, end = 0, size
    if wanted:
        first, _, last = wanted.partition("=")[2].partition("-")
        start, end = int(first), min(size, int(last) + 1 if last else size)
        writer.write(f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{end - 1}/{size}\r\n".encode())
    else:
        writer.write(b"HTTP/1.1 200 OK\r\n")
    writer.write(f'ETag: "{path.stat().st_mtime_ns}"\r\nContent-Length: {end - start}\r\n\r\n'.encode())
    with open(path, "rb") as file:
        file.seek(start)
        while start < end and not head.startswith("HEAD"):
            piece = file.read(min(end - start, 1 << 20))
            writer.write(piece)
            await writer.drain()
            start += len(piece)
