"""The data of the scoreboard: pictures of 8 x 8 whose pixels follow from their number, so that every one can be checked; and its damage.

Needs nothing but Pillow: it runs in the environments of all peers.
"""

import io
import random
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

SIDE = 8
PER_SHARD = 48
SECOND = 1_000_000  # numbers of the second set of a mix begin here


class Sample(NamedTuple):
    number: int
    png: bytes
    label: int


class Job(NamedTuple):
    """What one rank is asked to do."""

    data: list[str]  # a folder (or the URL of one) for each set of a mix
    weights: list[float]
    rank: int
    world: int
    workers: int
    batch: int  # of all ranks together
    samples: int  # of a pass over the data
    steps: int  # at most, now
    done: int  # samples of this pass that all ranks saw before: what a training loop counts
    state: Path | None  # what this rank saved
    folder: Path  # of this start; for what ranks agree on

    @property
    def own_batch(self) -> int:
        return self.batch // self.world


def pixels(number: int) -> bytes:
    return random.Random(number).randbytes(3 * SIDE * SIDE)


def label(number: int) -> int:
    return number % 10


def make(count: int, first: int = 0, corrupt: float = 0.0) -> Iterator[Sample]:
    """corrupt: share of the pictures that lack their second half, spread evenly."""
    for number in range(first, first + count):
        file = io.BytesIO()
        Image.frombytes("RGB", (SIDE, SIDE), pixels(number)).save(file, "png")
        content = file.getvalue()
        if corrupt and is_corrupt(number, corrupt):
            content = content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
        yield Sample(number, content, label(number))


def is_corrupt(number: int, share: float) -> bool:
    every = round(1 / share)
    return number % every == every // 2


def decoded(png: bytes) -> Image.Image:
    """As the documentation of each library decodes: by Pillow, whose errors go their way."""
    return Image.open(io.BytesIO(png)).convert("RGB")


def seen(number: int, picture: Image.Image, label: int) -> tuple[int, int, int]:
    """What is told of a sample: (number, checksum of its pixels, label)."""
    return int(number), zlib.crc32(picture.convert("RGB").tobytes()), int(label)


def batch(told: Iterable[tuple[int, int, int]]) -> dict[str, list[int]]:
    """A `collate`: a dict of lists, from which all loaders can tell how many samples it holds."""
    columns = list(zip(*told, strict=True))
    return dict(zip(("number", "checksum", "label"), map(list, columns), strict=True))


def wrong(found: dict[str, Any]) -> int:
    """How many of a batch are not what their number says."""
    columns = zip(found["number"], found["checksum"], found["label"], strict=True)
    rows = ([int(value) for value in row] for row in columns)  # some collate to arrays
    return sum(check != zlib.crc32(pixels(number)) or mark != label(number) for number, check, mark in rows)


def write_tars(folder: Path, samples: Iterable[Sample]) -> None:
    """00000.tar ... with NUMBER.png and NUMBER.cls."""
    folder.mkdir(parents=True)
    listed = list(samples)
    for start in range(0, len(listed), PER_SHARD):
        with tarfile.open(folder / f"{start // PER_SHARD:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for sample in listed[start : start + PER_SHARD]:
                for ending, content in (("png", sample.png), ("cls", str(sample.label).encode())):
                    info = tarfile.TarInfo(f"{sample.number:07d}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def shard_urls(data: str) -> list[str]:
    """The tars of a folder, or of a web server that has as many as `URL#COUNT` says."""
    if data.startswith("http"):
        url, _, count = data.partition("#")
        return [f"{url}/{number:05d}.tar" for number in range(int(count))]
    return [str(path) for path in sorted(Path(data).glob("*.tar"))]


def bucket(data: str) -> tuple[str, str]:
    """Of a folder on a web server: ("http://host:port", "s3://folder"). Reading by range with path-style names is all that a store must do."""
    url, _, _ = data.partition("#")
    endpoint, _, name = url.rpartition("/")
    return endpoint, f"s3://{name}"


def cut(folder: Path, ending: str, where: str) -> None:
    """Cut the second file of a data set (tar, mds, bin, arrayrecord) about half-way: "border", where a tar's samples meet; else in a picture."""
    path = sorted(folder.rglob(f"*{ending}"))[1]
    # a sample of a tar is four blocks: header and data of the picture, and of its label
    keep = path.stat().st_size // 2 // 2048 * 2048 + (0 if where == "border" else 700)
    with open(path, "r+b") as file:
        file.truncate(keep)
