"""What `shards pack` cannot reach by offset (Parquet files, zip archives, anything on a store) copied to plain tars first, which are then packed.

Each tar appears when it is whole: a packing that was stopped goes on behind the last one. It takes the room of the data once more, in
OUT/.unpacked, until the packing is done.
"""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ssl_locat.data.shards.index import AnySet, kind_of, open_dataset
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.data.shards.write import write_shard
from ssl_locat.errors import DataError
from ssl_locat.runs.log import progress
from ssl_locat.text.shown import redact, shown

_TAR_BYTES = 256 << 20  # of the data, about
_READ_BYTES = 16 << 20  # at once


class Copied(NamedTuple):
    tars: list[str]
    origins: list[str]  # of each sample: the file that it came from, and its key there
    classes: list[str]
    damaged: int


def is_to_be_copied(source: str) -> bool:
    """Whether samples are to be read one by one: tars and folders of images on a disk are packed from where they lie."""
    if "://" in source:
        return True
    if os.path.isdir(source):
        found = [name for _, _, names in os.walk(source) for name in names]
        # a folder is what training would take it for: images and tars before anything else
        return any(kind_of(name) != "tar" for name in found) and not _holds_more(source, found)
    paths = [source] if os.path.exists(source) else sorted(glob.glob(source))
    return any(kind_of(path) != "tar" for path in paths)


def _holds_more(source: str, names: list[str]) -> bool:
    from ssl_locat.data.images.decode import IMAGE_EXTENSIONS
    from ssl_locat.data.images.names import has_extension

    # a row of Parquet may name an image beside it: then the folder is the Parquet's
    if any(kind_of(name) == "Parquet" for name in os.listdir(source)):
        return False
    return any(has_extension(name, IMAGE_EXTENSIONS) or ".tar" in name for name in names)


def copy_to_tars(source: str, folder: Path, split: str | None) -> Copied:
    """Write `folder/copy-000000.tar`, ... of all samples of a source, with all their members. Damaged ones are listed in `damaged.txt` beside the folder.

    Raises DataError for what cannot be opened as data, Outage if a store does not answer."""
    dataset = open_dataset(source, split=split, metadata=True)
    folder.mkdir(parents=True, exist_ok=True)
    each = max(1, int(_TAR_BYTES / max(1.0, dataset.mean_bytes)))
    tars, origins = [], []
    with progress("copying", total=len(dataset), unit="samples") as bar:
        for number, first in enumerate(range(0, len(dataset), each)):
            last = min(len(dataset), first + each)
            path = folder / f"copy-{number:06d}.tar"
            listed = path.with_suffix(".tsv")
            if not (path.exists() and listed.exists()):
                lines: list[str] = []
                write_shard(path, _samples(dataset, first, last, lines))
                listed.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
            text = listed.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            origins += text
            tars.append(str(path))
            bar.update(last - first)
    kept = [line for line in origins if not line.startswith("\t")]
    damaged = [line[1:] for line in origins if line.startswith("\t")]
    if damaged:
        (folder.parent / "damaged.txt").write_text("\n".join(damaged) + "\n", encoding="utf-8", errors="surrogateescape")
    if not kept:
        raise DataError(f"{shown(source)}: all {len(damaged)} samples are damaged; the first: {shown(damaged[0])}")
    return Copied(tars, kept, list(getattr(dataset, "classes", [])), len(damaged))


def _samples(dataset: AnySet, first: int, last: int, lines: list[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members); lines: the origin of each, or behind a tab what is damaged."""
    before = ""
    step = max(1, int(_READ_BYTES / max(1.0, dataset.mean_bytes)))
    for start in range(first, last, step):
        for number, sample in enumerate(dataset.read(start, min(last, start + step)), start):
            if isinstance(sample, Damage):
                lines.append(f"\t{_plain(sample.shard)}: {_plain(sample.key)}: {_plain(sample.reason)}\n")
                continue
            lines.append(f"{_plain(sample.shard)}: {_plain(sample.key)}\n")
            key = _key(sample)
            # neighbours of one name would be read as one sample
            key, before = (f"{key}_{number}" if key == before else key), key
            yield key, sample.members


def _key(sample: RawSample) -> str:
    """Of a tar: without dots and folders, and of a row with its file's name."""
    file = redact(sample.shard).rpartition("/")[2].rpartition(".")[0] if kind_of(sample.shard) == "Parquet" else ""
    stem = f"{file}_{sample.key}" if file else sample.key
    text = "_".join(part for part in stem.replace(".", "_").replace(" ", "_").split("/") if part.strip("_"))
    return text or "sample"


def _plain(text: str) -> str:
    return " ".join(text.split())
