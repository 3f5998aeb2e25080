"""Cases of `ssl-locat bench stream`: each kind of shard beside the library that its users read it with today.

Ours shuffles and could stop and resume anywhere; theirs reads from front to back, which is the most that it can do: webdataset without a shuffle,
pyarrow's batches, Python's zipfile, tifffile's tiles, torchvision's ImageFolder. Both give encoded samples (of rasters: pixels of a window), in one process, in turns, from
files that the system has in memory. CPU-seconds are counted: the machine may be shared.

Each file lies there under several names, so that what is timed is read for the first time: row groups and windows that a process still has in
memory would answer for a set as small as this, and hardly ever for one that is worth training on.
"""

import io
import os
import resource
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ssl_locat.benchmarks.timing import make_rows
from ssl_locat.data.shards.index import open_mix
from ssl_locat.data.shards.write import write_shard
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.stream import TrainStream

OURS = "ssl_locat"
_FILES, _BATCH, _BYTES, _WINDOW = 8, 64, 100_000, 256
_MEMORY = (
    64 << 20
)  # bytes that our stream may hold, a third of what is timed: with a run's 1 GiB all of this set would be read before the clock starts
_NAMES = 4  # of each file; a pass over a quarter warms up, the next quarter is timed, and some are held for the shuffle


def cases(
    root: Path, quick: bool, in_child: Callable[[Callable[[], Any]], Any]
) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """One case for each format. in_child: runs a function in a fresh process."""
    samples, repeats = (64 if quick else 256) * _FILES, 1 if quick else 5
    for name, write, spec, theirs, library in (
        ("tar", _write_tars, "{}/*.tar", _read_tars, "webdataset"),
        ("Parquet", _write_parquet, "{}/*.parquet", _read_parquet, "pyarrow"),
        ("zip", _write_zips, "{}/*.zip", _read_zips, "zipfile"),
        ("windows of TIFF", _write_rasters, {"raster": "{}/*.tif", "size": _WINDOW}, _read_rasters, "tifffile"),
        ("folder", _write_folder, "{}", _read_folder, "torchvision"),
    ):
        yield (
            f"format, {name}",
            partial(_case, name, root / name.split()[0], write, spec, theirs, library, samples, repeats, in_child),
        )


def _case(
    name: str,
    folder: Path,
    write: Callable[[Path, int], None],
    spec: Any,
    theirs: Callable[[Path], Iterator[bytes]],
    library: str,
    samples: int,
    repeats: int,
    in_child: Callable[[Callable[[], Any]], Any],
) -> list[dict]:
    folder.mkdir(parents=True)
    write(folder, samples // _FILES)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        for number in range(1, _NAMES):
            os.link(path, path.with_name(f"{number}-{path.name}"))
    spec = spec.format(folder) if isinstance(spec, str) else spec | {"raster": spec["raster"].format(folder)}
    open_mix(spec, in_groups=True)  # the index; later runs find it cached, as in a job
    measured: dict[str, list[float]] = {library: [], OURS: []}
    for _ in range(repeats):
        measured[library].append(in_child(partial(_time, lambda: _again(theirs, folder), samples)))
        measured[OURS].append(in_child(partial(_time, lambda: _ours(spec), samples)))
    medians = {variant: statistics.median(rates) for variant, rates in measured.items()}
    return make_rows("stream", f"format, {name}", "throughput per core", "samples/CPU-s", medians, library)


def _time(read: Callable[[], Iterator[bytes]], samples: int) -> float:
    """Samples per CPU-second of so many, after as many others."""
    contents = read()
    for _ in islice(contents, samples):
        pass
    before, count = _cpu_seconds(), 0
    for content in islice(contents, samples):
        assert content
        count += 1
    assert count == samples
    return samples / (_cpu_seconds() - before)


def _again(read: Callable[[Path], Iterator[bytes]], folder: Path) -> Iterator[bytes]:
    while True:
        yield from read(folder)


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _content(raw: Any, seed: int) -> bytes:
    return next(content for name, content in raw.members.items() if name != "cls")


def _ours(spec: Any) -> Iterator[bytes]:
    datasets, weights = open_mix(spec, in_groups=True)
    plan = choose_plan(datasets, weights, 0, _BATCH, _MEMORY)
    options: dict[str, Any] = {"global_batch_size": _BATCH, "memory_bytes": _MEMORY, "workers": 0}
    with TrainStream(datasets, plan, _content, list, start_samples=0, **options) as stream:
        for batch in stream:
            yield from batch.payload


def _contents(count: int, file: int) -> Iterator[bytes]:
    rng = np.random.default_rng(file)
    return (rng.bytes(_BYTES) for _ in range(count))


def _write_tars(folder: Path, count: int) -> None:
    for file in range(_FILES):
        write_shard(folder / f"{file}.tar", ((f"{i:05d}", {"jpg": data}) for i, data in enumerate(_contents(count, file))))


def _read_tars(folder: Path) -> Iterator[bytes]:
    import webdataset

    dataset = webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False, empty_check=False)
    return (sample["jpg"] for sample in dataset)


def _write_parquet(folder: Path, count: int) -> None:
    import pyarrow
    import pyarrow.parquet

    for file in range(_FILES):
        rows = [{"image": {"bytes": data, "path": None}} for data in _contents(count, file)]
        # as the hub's data sets: row groups of some megabytes, images not packed again
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / f"{file}.parquet", row_group_size=16, compression="none"
        )


def _read_parquet(folder: Path) -> Iterator[bytes]:
    import pyarrow.parquet

    for path in sorted(folder.glob("*.parquet")):
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(16, use_threads=False):
                yield from (row["bytes"] for row in batch.column("image").to_pylist())


def _write_zips(folder: Path, count: int) -> None:
    for file in range(_FILES):
        with zipfile.ZipFile(folder / f"{file}.zip", "w") as archive:
            for number, data in enumerate(_contents(count, file)):
                archive.writestr(f"{number:05d}.jpg", data)


def _read_zips(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield archive.read(name)


def _write_rasters(folder: Path, count: int) -> None:
    """JPEG tiles of 256 px, as slides have them, of a smooth picture with some noise; as many as `count`."""
    import tifffile

    rng = np.random.default_rng(0)
    across = 8
    down = count // across
    y, x = np.mgrid[: down * _WINDOW, : across * _WINDOW]
    picture = np.stack([(x // 3 + y // 2 * c) % 200 for c in (1, 2, 3)], 2).astype(np.uint8)
    picture += rng.integers(0, 40, picture.shape, dtype=np.uint8)
    for file in range(_FILES):
        options: dict[str, Any] = {"tile": (_WINDOW, _WINDOW), "photometric": "rgb", "compression": "jpeg", "metadata": None}
        tifffile.imwrite(folder / f"{file}.tif", np.roll(picture, file, 0), **options)


def _read_rasters(folder: Path) -> Iterator[bytes]:
    """A .npy of each tile, as ours gives."""
    import tifffile

    for path in sorted(folder.glob("*.tif")):
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
            for tile, _, _ in page.segments(maxworkers=1):
                buffer = io.BytesIO()
                np.save(buffer, np.ascontiguousarray(tile[0]))
                yield buffer.getvalue()


def _write_folder(folder: Path, count: int) -> None:
    for file in range(_FILES):
        (folder / f"class{file}").mkdir()
        for number, data in enumerate(_contents(count, file)):
            (folder / f"class{file}/{number:05d}.jpg").write_bytes(data)


def _read_folder(folder: Path) -> Iterator[bytes]:
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(folder), loader=lambda path: Path(path).read_bytes())
    return (dataset[number][0] for number in range(len(dataset)))
