"""Which samples of shards are left out, such as duplicates: a list beside the shards, which training and evaluation obey.

The shards stay as they are, tars or Parquet files. The list belongs to a data set's manifest: a run that began without it does not continue
with it. It is written by `ssl-locat shards dedup --leave-out`; deleting the file brings all samples back.

    shards.left_out: a first line that names the format, then a line of JSON for each sample:
    [shard's name in the folder, digest of its index, number in the shard, key, what it duplicates]
"""

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import numpy as np

from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.parquet import ParquetDataset
from ssl_locat.data.shards.selections import Chosen
from ssl_locat.data.shards.shard_set import ShardDataset
from ssl_locat.data.stores.objects import Denied, Gone, folder_and_name, join
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import DataError
from ssl_locat.text.shown import shown

log = logging.getLogger(__name__)

NAME = "shards.left_out"
_FIRST = "ssl_locat left out 1"

AnyDataset = TypeVar("AnyDataset", bound=Dataset)


class Part(NamedTuple):
    """A shard of a data set."""

    folder: str
    name: str  # in the folder
    digest: str  # of its index: tells another shard of the same name
    begin: int  # the number of its first sample in the data set
    length: int


class Listed(NamedTuple):
    """What a list says of one shard."""

    digests: set[str]  # one, unless somebody edited the list
    numbers: array  # of samples that are left out, 8 bytes each


def parts_of(dataset: ShardDataset | ParquetDataset) -> list[Part]:
    """The shards of a data set in its order."""
    if isinstance(dataset, ShardDataset):
        about = [(shard.url, shard.digest, shard.count) for shard in dataset.shards]
    else:
        about = [
            (file.url, hashlib.blake2b(repr([group[:3] for group in file.groups]).encode(), digest_size=8).hexdigest(), file.rows)
            for file in dataset.files
        ]
    found, begin = [], 0
    for url, digest, count in about:
        found.append(Part(*folder_and_name(url), digest, begin, count))
        begin += count
    return found


def without_left_out(dataset: AnyDataset) -> AnyDataset | Chosen:
    """The dataset without what a list beside its shards leaves out; as it is where there is none. Raises DataError for a list of other shards."""
    if not isinstance(dataset, ShardDataset | ParquetDataset):
        return dataset
    lists: dict[str, dict[str, Listed]] = {}
    kept = np.ones(len(dataset), bool)
    for part in parts_of(dataset):
        if part.folder not in lists:
            lists[part.folder] = read_list(dataset.store, part.folder)
        listed = lists[part.folder].get(part.name)
        if listed is None:
            continue
        if listed.digests != {part.digest} or max(listed.numbers) >= part.length or min(listed.numbers) < 0:
            raise DataError(
                f"{shown(join(part.folder, NAME))} was written for another {part.name}: the shard has changed since. Write the list again "
                "('ssl-locat shards dedup ... --leave-out'), or delete it."
            )
        rows = part.begin + np.array(listed.numbers)
        kept[dataset.numbers_of(rows) if isinstance(dataset, ParquetDataset) else rows] = False
    gone = len(kept) - int(kept.sum())
    if not gone:
        return dataset
    if gone == len(kept):
        raise DataError(
            f"{dataset.name}: {NAME} beside the shards leaves out all {len(dataset)} samples. Delete it, or give other shards."
        )
    log.info("%s: %d of %d samples are left out, by %s beside the shards", dataset.name, gone, len(dataset), NAME)
    return Chosen(dataset, np.flatnonzero(kept))


def read_list(store: Store, folder: str) -> dict[str, Listed]:
    """A shard's name -> what is left out of it; {} where there is no list."""
    found: dict[str, Listed] = {}
    for line in _lines(store, folder):
        shard, digest, number, *_ = json.loads(line)
        listed = found.setdefault(shard, Listed(set(), array("q")))
        listed.digests.add(digest)
        listed.numbers.append(number)
    return found


def _lines(store: Store, folder: str) -> list[str]:
    """The lines of a folder's list, each known to be one; [] where there is no list."""
    url = join(folder, NAME)
    try:
        text = store.read_all(url).decode("utf-8", "surrogateescape")
    except (Gone, Denied):  # stores that may not be listed answer 403 for what is missing
        return []
    first, *rest = text.splitlines()
    try:
        if first != _FIRST:
            raise ValueError
        for line in rest:
            shard, digest, number, _, _ = json.loads(line)
            if not (isinstance(shard, str) and isinstance(digest, str) and isinstance(number, int) and abs(number) < 1 << 62):
                raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise DataError(
            f"{shown(url)} is damaged, or of another release: delete it, or write it again with 'ssl-locat shards dedup'."
        ) from None
    return rest


def write_lists(dataset: ShardDataset | ParquetDataset, gone: Iterable[tuple[int, str, str]]) -> list[str]:
    """Write the list of each folder that holds a shard of the data set; lines of its other shards are kept. Returns the files.

    gone: (number of a sample, its key, what it duplicates) in ascending order."""
    parts = parts_of(dataset)
    folders: dict[str, list[str]] = {part.folder: [] for part in parts}
    left = iter(parts)
    part = next(left)
    for number, key, like in gone:
        while number >= part.begin + part.length:
            part = next(left)
        folders[part.folder].append(json.dumps([part.name, part.digest, number - part.begin, key, like]))
    written = []
    for folder, lines in folders.items():
        ours = {part.name for part in parts if part.folder == folder}
        others = [line for line in _lines(dataset.store, folder) if json.loads(line)[0] not in ours]
        dataset.store.write(join(folder, NAME), "\n".join([_FIRST, *others, *lines, ""]).encode())
        written.append(join(folder, NAME))
    return written
