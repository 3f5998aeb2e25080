"""Datasets made of datasets: several one after the other, or some samples of one.

Both speak the protocol of `index.Dataset`, so that whatever reads a data set reads these: the stream, an ordered pass, a single sample.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.seeds import mix64, mix64_array

AnyDataset = TypeVar("AnyDataset", bound=Dataset)

_BY_KEY = 0x6B6579  # one stream of random numbers for this purpose
_GAP_BYTES = 1 << 18  # read along with their neighbours instead of asked for anew: a request to a store costs more


class Joined:
    """Samples of several datasets, one dataset after the other."""

    def __init__(self, datasets: Sequence[Dataset]):
        self.datasets = list(datasets)
        self.ends = list(accumulate(map(len, self.datasets)))
        self.name = ", ".join(dataset.name for dataset in self.datasets)
        self.manifest_hash = _digest(*(dataset.manifest_hash for dataset in self.datasets))
        self.mean_bytes = sum(d.mean_bytes * len(d) for d in self.datasets) / max(1, len(self))
        self.by_range, self.together = all(dataset.by_range for dataset in self.datasets), 1
        self.remote = any(dataset.remote for dataset in self.datasets)
        self.store = self.datasets[0].store
        self.classes: list[str] = next((found for part in self.datasets if (found := getattr(part, "classes", []))), [])

    def __len__(self) -> int:
        return self.ends[-1]

    def fetch(self, start: int, stop: int) -> list:
        found: list[Any] = []
        while start < stop:
            number = bisect_right(self.ends, start)
            before = self.ends[number - 1] if number else 0
            end, part = min(stop, self.ends[number]), self.datasets[number]
            # the last part of what comes out of a tar says where it lies: here, in which part as well
            found += [_with_place(entry, number) for entry in part.fetch(start - before, end - before)]
            start = end
        return found

    def parse(self, entry: Any) -> RawSample | Damage:
        if isinstance(entry, RawSample | Damage):
            return entry
        *rest, (number, place) = entry
        part: Dataset = self.datasets[number]
        return part.parse((*rest, place))

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return [self.parse(entry) for entry in self.fetch(start, stop)]

    def key_crcs(self) -> np.ndarray:
        return np.concatenate([dataset.key_crcs() for dataset in self.datasets])


def _with_place(entry: Any, number: int) -> Any:
    return entry if isinstance(entry, RawSample | Damage) else (*entry[:-1], (number, entry[-1]))


class Chosen:
    """The samples `indices` (ascending) of a dataset, numbered from 0."""

    def __init__(self, dataset: Dataset, indices: np.ndarray):
        self.dataset, self.indices = dataset, np.asarray(indices, dtype=np.int64)
        assert (np.diff(self.indices) > 0).all(), "indices of a selection must ascend"
        self.name, self.mean_bytes, self.remote, self.store = dataset.name, dataset.mean_bytes, dataset.remote, dataset.store
        self.classes: list[str] = getattr(dataset, "classes", [])
        self.manifest_hash = _digest(dataset.manifest_hash, hashlib.blake2b(self.indices.tobytes(), digest_size=8).hexdigest())
        # where neighbours lie too far apart to share a read, each is read by itself, many at a time
        self.gap = 1 + int(_GAP_BYTES / max(1, dataset.mean_bytes)) if dataset.by_range else 1
        spread = (self.indices[-1] - self.indices[0] + 1) / len(self.indices) if len(self.indices) else 1
        self.by_range, self.together = dataset.by_range and spread <= self.gap, 1

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, start: int, stop: int) -> list:
        wanted = self.indices[start:stop]
        found: list[Any] = []
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > self.gap) + 1) if len(wanted) else []:
            first = int(run[0])
            entries = self.dataset.fetch(first, int(run[-1]) + 1)
            found += [entries[index - first] for index in run.tolist()]
        return found

    def parse(self, entry: Any) -> RawSample | Damage:
        return self.dataset.parse(entry)

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return [self.parse(entry) for entry in self.fetch(start, stop)]

    def key_crcs(self) -> np.ndarray:
        crcs: np.ndarray = self.dataset.key_crcs()[self.indices]
        return crcs


def choose_by_key(dataset: Dataset, count: int | None) -> np.ndarray:
    """int64 [min(count, N)], ascending: the samples whose keys have the smallest hashes; all of them for None.

    A function of the keys alone: the same images whatever the order, the shards or the place of the data. No sample is read for it.
    """
    if count is None or count >= len(dataset):
        return np.arange(len(dataset))
    hashes = mix64_array(mix64(_BY_KEY), dataset.key_crcs())
    return np.sort(np.argsort(hashes, kind="stable")[:count])


def some(dataset: AnyDataset, count: int | None) -> AnyDataset | Chosen:
    """The dataset, or `count` of its samples, chosen by their keys."""
    return dataset if count is None or count >= len(dataset) else Chosen(dataset, choose_by_key(dataset, count))


def _digest(*parts: str) -> str:
    return parts[0] if len(parts) == 1 else hashlib.blake2b("".join(parts).encode(), digest_size=8).hexdigest()
