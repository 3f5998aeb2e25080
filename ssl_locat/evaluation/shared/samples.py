"""Random access to the samples of a DATA spec, and reading them in a given order with worker processes.

Pretraining reads an endless stream (data/stream.py) and features a single ordered pass (evaluation/features.py); probes that train over small
labelled sets read in their own random order, for which this is enough.
"""

import bisect
import bz2
import gzip
import itertools
import logging
import lzma
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_locat.data.images.decode import decode_image, find_image, find_label
from ssl_locat.data.shards.index import is_compressed, open_dataset, open_mix
from ssl_locat.data.shards.tar import Damage, RawSample, parse, scan
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import CorruptSample, DataError, UserError
from ssl_locat.runs.distributed import all_gather_cat, rank, world_size
from ssl_locat.runs.log import progress
from ssl_locat.seeds import mix64

log = logging.getLogger(__name__)

NO_LABEL = -1


def share(total: int, rank: int, world_size: int) -> tuple[list[int], list[bool]]:
    """(indices, valid) of one process's contiguous part; all parts are ceil(total / world_size) long, repeats marked invalid."""
    length = -(-total // world_size)
    positions = range(rank * length, (rank + 1) * length)
    return [min(position, total - 1) for position in positions], [position < total for position in positions]


def epoch_keys(total: int, batch_size: int, epoch: int, seed: int, rank: int, world_size: int) -> Iterator[list[tuple[int, int]]]:
    """One epoch as batches of (index, augmentation seed), this process's part of each. A last incomplete batch is left out.

    The global batches do not depend on the number of processes, which must divide `batch_size`; a set smaller than a batch is one batch.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(mix64(seed, epoch) >> 1)).tolist()
    batch_size = min(batch_size, total // world_size * world_size)
    per_process = batch_size // world_size
    for start in range(0, total - batch_size + 1, batch_size):
        mine = order[start + rank * per_process : start + (rank + 1) * per_process]
        yield [(index, mix64(seed, epoch, index)) for index in mine]


def training_keys(total: int, batch_size: int, first: int, steps: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """The batches of steps first..steps-1, epoch after epoch, this process's part of each.

    One epoch's order is held at a time: the keys of 300 epochs of ImageNet would take 57 GB.
    """
    per_epoch = total // min(batch_size, total // world_size() * world_size())
    for epoch in range(first // per_epoch, -(-steps // per_epoch)):
        batches = epoch_keys(total, batch_size, epoch, seed, rank(), world_size())
        before = epoch * per_epoch
        yield from itertools.islice(batches, max(first - before, 0), steps - before)


def load_in_order(dataset: Dataset, keys: Iterable[Sequence], workers: int) -> Iterator[list]:
    """The items of each list of keys, in order; tuples come as a list of columns, tensors among them stacked.

    An error in a worker arrives here as it was raised.

    `dataset.fetch(keys)` is asked for a whole list where it exists, else `dataset[key]` for each.
    """
    loader = DataLoader(
        _Guarded(dataset),
        batch_sampler=keys,
        num_workers=min(workers, os.cpu_count() or 1),  # more would only be slower, and torch warns
        collate_fn=_columns,
        multiprocessing_context="fork" if workers else None,
        # shuffling is ours and each key brings its own seed: the caller's generator must not move
        generator=torch.Generator().manual_seed(0),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Guarded(Dataset):
    """Turns a user's error into a value, since DataLoader would send it back as the text of a trace."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, keys: list) -> list:
        try:
            return self.dataset.fetch(keys) if hasattr(self.dataset, "fetch") else [self.dataset[key] for key in keys]
        except UserError as error:
            return [error]


def _columns(items: list) -> list | UserError:
    """Stacked in the worker: every tensor that is sent costs a file descriptor."""
    if isinstance(items[0], UserError):
        return items[0]
    if not isinstance(items[0], tuple):
        return items
    return [torch.stack(column) if isinstance(column[0], Tensor) else list(column) for column in zip(*items, strict=True)]


class CompressedShard:
    """A .tar.gz, .tar.bz2 or .tar.xz, unpacked into memory (workers share it): labelled sets often come so, and are small."""

    OPENERS: ClassVar = {"gz": gzip.decompress, "tgz": gzip.decompress, "bz2": bz2.decompress, "xz": lzma.decompress}

    def __init__(self, url: str):
        suffix = url.rpartition(".")[2].lower()
        if suffix not in self.OPENERS:
            raise DataError(f"{url}: cannot read .{suffix} here; repack it with `ssl-locat shards pack {url} OUT`.")
        self.name = url
        self.data = self.OPENERS[suffix](Store().read_all(url))
        try:
            self.starts, self.crcs = scan(lambda at, length: self.data[at : at + length], len(self.data))
        except CorruptSample as error:
            raise DataError(f"{url}: {error.reason}.") from None

    def __len__(self) -> int:
        return len(self.crcs)

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return [parse(self.data, self.starts[i], self.starts[i + 1], self.crcs[i], self.name) for i in range(start, stop)]


class Members(Sequence):
    """`members[i]` is the undecoded sample i of a DATA spec (a mix is one after the other). Damage is an error: probes are exact."""

    def __init__(self, spec: str | list):
        parts = [part["shards"] if isinstance(part, dict) else part for part in (spec if isinstance(spec, list) else [spec])]
        urls = list(Store().expand(parts)) if all(isinstance(part, str) for part in parts) else []
        if any(map(is_compressed, urls)):
            self.datasets = [CompressedShard(url) if is_compressed(url) else open_dataset(url) for url in urls]
        else:
            self.datasets = open_mix(spec)[0]
        self.ends = list(itertools.accumulate(len(dataset) for dataset in self.datasets))

    @property
    def name(self) -> str:
        """Which set it is, in a few words for a progress bar: the last two parts of its path."""
        first = self.datasets[0].name.rstrip("/").split("/")
        return "/".join(first[-2:]) + (f" and {len(self.datasets) - 1} more" if len(self.datasets) > 1 else "")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> RawSample:
        return self.fetch([index])[0]

    @property
    def classes(self) -> list[str]:
        """Names of the class folders, [] where labels are written in the samples."""
        return next((dataset.classes for dataset in self.datasets if getattr(dataset, "classes", [])), [])

    def how_to_check(self) -> str:
        """' Check the set with ...' where it is shards; a folder's files are named one by one."""
        shards = any(getattr(dataset, "by_range", True) for dataset in self.datasets)
        return " Check the set with `ssl-locat shards check`." if shards else ""

    def fetch(self, indices: Sequence[int]) -> list[RawSample]:
        """Several samples in the order asked for; neighbours that follow each other share one read of the store."""
        found: list[RawSample] = []
        while len(found) < len(indices):
            first = indices[len(found)]
            number = bisect.bisect_right(self.ends, first)
            before = self.ends[number - 1] if number else 0
            stop = first + 1
            while len(found) + stop - first < len(indices) and indices[len(found) + stop - first] == stop < self.ends[number]:
                stop += 1
            for sample in self.datasets[number].read(first - before, stop - before):
                if isinstance(sample, Damage):
                    raise DataError(f"{sample.shard}: {sample.key}: {sample.reason}.{self.how_to_check()}")
                found.append(sample)
        return found


def same_classes(train: Members, test: Members) -> None:
    """Class folders are numbered in sorted order, each set by itself: unless both have the same ones, the numbers mean different things."""
    for name in sorted({*train.classes} ^ {*test.classes}) if train.classes and test.classes else []:
        has, lacks = ("data.train", "data.test") if name in train.classes else ("data.test", "data.train")
        raise DataError(
            f"the class folder {name!r} is in {has}, not in {lacks} ({len(train.classes)} and {len(test.classes)} folders). "
            "Class folders are numbered in sorted order, so both must have the same; an empty one does not count."
        )


class CorruptImage(DataError):
    """An image that cannot be read, where the set may have others; a missing label concerns the whole set."""


class LabelledSamples(Dataset):
    """Decoded, prepared images with labels, fetched by (index, seed): prepare(image uint8 [H, W, C], seed) -> tensor [C, h, w].

    max_bad: share of damaged samples that may be left out; with 0 the first is an error. Only readers that heed NO_LABEL may allow more.
    """

    def __init__(
        self,
        members: Members,
        prepare: Callable[[np.ndarray, int], Tensor],
        image_key: str | None,
        label_key: str | None,
        channels: int = 3,
        max_bad: float = 0.0,
    ):
        self.members, self.prepare, self.image_key, self.label_key = members, prepare, image_key, label_key
        self.channels, self.max_bad = channels, max_bad

    def fetch(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        if self.max_bad:
            return [self._prepared_or_blank(index, seed) for index, seed in keys]
        try:
            samples = self.members.fetch([index for index, _ in keys])
            return [self._prepared(sample, seed) for sample, (_, seed) in zip(samples, keys, strict=True)]
        except CorruptImage as error:
            raise DataError(f"{error} To leave out up to one image in a hundred: data.max_bad=0.01.") from None

    def reason(self, index: int) -> str:
        """Why a sample was left out."""
        try:
            self._prepared(self.members[index], 0)
        except DataError as error:
            return str(error)
        return "it could not be read then, but can be now"

    def _prepared(self, sample: RawSample, seed: int) -> tuple[Tensor, int]:
        try:
            label = find_label(sample.members, self.label_key)
        except CorruptSample as error:
            raise DataError(f"{sample.shard}: {sample.key}: {error.reason}.") from None
        try:
            image = decode_image(find_image(sample.members, self.image_key), channels=self.channels)
            return self.prepare(image, seed), label
        except CorruptSample as error:
            raise CorruptImage(f"{sample.shard}: {sample.key}: {error.reason}.") from None

    def _prepared_or_blank(self, index: int, seed: int) -> tuple[Tensor, int]:
        """Black, and no label, where the sample is damaged."""
        try:
            return self._prepared(self.members[index], seed)
        except DataError as error:
            log.info("left out: %s", error)
            return self.prepare(np.zeros((64, 64, self.channels), np.uint8), seed), NO_LABEL


class _Labels(Dataset):
    def __init__(self, members: Members, label_key: str | None):
        self.members, self.label_key = members, label_key

    def fetch(self, indices: list[int]) -> list[int]:
        return [self._label(sample) for sample in self.members.fetch(indices)]

    def _label(self, sample: RawSample) -> int:
        try:
            return find_label(sample.members, self.label_key)
        except CorruptSample as error:
            raise DataError(f"{sample.shard}: {sample.key}: {error.reason}.") from None


def first_label(members: Members, label_key: str | None) -> int:
    """Of the first sample. DataError if it has none."""
    return _Labels(members, label_key).fetch([0])[0]


def read_labels(members: Members, label_key: str | None, workers: int) -> Tensor:
    """int64 [N]: the label of every sample, read by all processes together. One pass over the data, nothing decoded."""
    indices, valid = share(len(members), rank(), world_size())
    keys = [indices[start : start + 1024] for start in range(0, len(indices), 1024)]
    labels: list[int] = []
    with progress(f"labels of {members.name}", total=len(members), unit="images") as bar:
        for batch in load_in_order(_Labels(members, label_key), keys, workers):
            labels += batch
            bar.update(len(batch) * world_size())
    return all_gather_cat(torch.tensor(labels))[all_gather_cat(torch.tensor(valid))]


class Batch(NamedTuple):
    images: Tensor  # [B, 3, H, W]
    labels: Tensor  # [B] int64
    index: Tensor  # [B]
    valid: Tensor  # [B] bool; False on repeats, and on damaged images where they may be left out


class Pass:
    """One ordered pass over some samples (`positions`), this process's share: what `features.extract` reads. len() is the whole pass."""

    def __init__(self, samples: LabelledSamples, positions: Tensor, *, batch_size: int, workers: int):
        self.samples, self.positions = samples, positions.tolist()
        self.batch_size, self.workers = batch_size, workers

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Batch]:
        indices, valid = share(len(self.positions), rank(), world_size())
        starts = range(0, len(indices), self.batch_size)
        keys = [[(self.positions[i], 0) for i in indices[start : start + self.batch_size]] for start in starts]
        for start, batch in zip(starts, load_in_order(self.samples, keys, self.workers), strict=True):
            images, labels = batch
            end = start + len(labels)
            labels = torch.tensor(labels)
            yield Batch(images, labels, torch.tensor(indices[start:end]), torch.tensor(valid[start:end]) & (labels != NO_LABEL))
