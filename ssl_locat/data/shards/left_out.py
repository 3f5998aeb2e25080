"""Which samples of shards are left out, such as duplicates: a list beside the shards, which training and evaluation obey.

The shards stay as they are. The list belongs to a data set's manifest: a run that began without it does not continue with it. It is written by
`ssl-locat shards dedup --leave-out`; deleting the file brings all samples back.
"""

import json
import logging
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ssl_locat.data.shards.index import Dataset, ShardDataset
from ssl_locat.data.shards.selections import Chosen
from ssl_locat.data.shards.shard_index import Shard
from ssl_locat.data.stores.objects import Denied, Gone, folder_and_name, join
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import DataError
from ssl_locat.text.shown import shown

log = logging.getLogger(__name__)

NAME = "shards.left_out"
_FIRST = "ssl_locat left out 1"

AnyDataset = TypeVar("AnyDataset", bound=Dataset)


class LeftOut(NamedTuple):
    """A line of a list."""

    shard: str  # its name in the folder
    digest: str  # of the shard's index: tells another shard of the same name
    number: int  # of the sample in the shard
    key: str
    like: str  # what it duplicates, for people


def without_left_out(dataset: AnyDataset) -> AnyDataset | Chosen:
    """The dataset without what a list beside its shards leaves out; as it is where there is none. Raises DataError for a list of other shards."""
    if not isinstance(dataset, ShardDataset):
        return dataset
    lists: dict[str, dict[str, list[LeftOut]]] = {}
    gone = []
    for number, shard in enumerate(dataset.shards):
        folder, name = folder_and_name(shard.url)
        if folder not in lists:
            lists[folder] = _by_shard(read_list(dataset.store, folder))
        for line in lists[folder].get(name, []):
            gone.append(dataset.ends[number] - shard.count + _checked(line, shard, folder))
    if not gone:
        return dataset
    kept = np.ones(len(dataset), bool)
    kept[gone] = False
    if not kept.any():
        raise DataError(
            f"{dataset.name}: {NAME} beside the shards leaves out all {len(dataset)} samples. Delete it, or give other shards."
        )
    log.info("%s: %d of %d samples are left out, by %s beside the shards", dataset.name, len(gone), len(dataset), NAME)
    return Chosen(dataset, np.flatnonzero(kept))


def _checked(line: LeftOut, shard: Shard, folder: str) -> int:
    if line.digest != shard.digest or not 0 <= line.number < shard.count:
        raise DataError(
            f"{shown(join(folder, NAME))} was written for another {line.shard}: the shard has changed since. Write the list again "
            "('ssl-locat shards dedup ... --leave-out'), or delete it."
        )
    return line.number


def _by_shard(lines: Sequence[LeftOut]) -> dict[str, list[LeftOut]]:
    found: dict[str, list[LeftOut]] = {}
    for line in lines:
        found.setdefault(line.shard, []).append(line)
    return found


def read_list(store: Store, folder: str) -> list[LeftOut]:
    """The lines of a folder's list; [] where there is none."""
    url = join(folder, NAME)
    try:
        text = store.read_all(url).decode("utf-8", "surrogateescape")
    except (Gone, Denied):  # stores that may not be listed answer 403 for what is missing
        return []
    first, *rest = text.splitlines()
    try:
        if first != _FIRST:
            raise ValueError
        found = [LeftOut(*json.loads(line)) for line in rest]
        if not all(isinstance(line.number, int) and isinstance(line.shard, str) for line in found):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise DataError(
            f"{shown(url)} is damaged, or of another release: delete it, or write it again with 'ssl-locat shards dedup'."
        ) from None
    return found


def write_lists(dataset: ShardDataset, gone: dict[int, str]) -> list[str]:
    """Write the list of each folder that holds a shard of the data set; lines of its other shards are kept. Returns the files.

    gone: number of a sample -> what it duplicates."""
    folders: dict[str, list[LeftOut]] = {}
    numbers = np.array(sorted(gone), dtype=np.int64)
    for place, shard in enumerate(dataset.shards):
        folder, name = folder_and_name(shard.url)
        begin = dataset.ends[place] - shard.count
        lines = folders.setdefault(folder, [])
        for number in numbers[(numbers >= begin) & (numbers < dataset.ends[place])].tolist():
            key = getattr(dataset.read(number, number + 1)[0], "key", "")
            lines.append(LeftOut(name, shard.digest, number - begin, key, gone[number]))
    written = []
    for folder, lines in folders.items():
        ours = {folder_and_name(shard.url)[1] for shard in dataset.shards if folder_and_name(shard.url)[0] == folder}
        others = [line for line in read_list(dataset.store, folder) if line.shard not in ours]
        text = "\n".join([_FIRST, *(json.dumps(line) for line in [*others, *lines])]) + "\n"
        dataset.store.write(join(folder, NAME), text.encode())
        written.append(join(folder, NAME))
    return written
