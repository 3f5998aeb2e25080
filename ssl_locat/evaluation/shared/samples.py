"""The samples of a `data` section: opened with its store, cache and limits, read in one ordered pass, each prepared in a worker.

What trains on them reads the stream of pretraining instead (training_data.py).
"""

import bz2
import gzip
import hashlib
import json
import logging
import lzma
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl_locat.data.images.bands import Bands, how_many
from ssl_locat.data.images.decode import decode_image, find_image, find_label
from ssl_locat.data.shards.filters import filtered
from ssl_locat.data.shards.folder import FolderDataset
from ssl_locat.data.shards.index import is_compressed, open_dataset, open_mix
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.left_out import without_left_out
from ssl_locat.data.shards.selections import Chosen, Joined, some
from ssl_locat.data.shards.shard_index import default_cache_dir
from ssl_locat.data.shards.tar import Damage, RawSample, parse, scan
from ssl_locat.data.stores.cache import CachedStore
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stream.ordered import Unread, read_in_order
from ssl_locat.data.stream.workers import choose_workers
from ssl_locat.errors import CorruptSample, DataBudgetExceeded, DataError
from ssl_locat.evaluation.shared.stopping import stop_if_asked
from ssl_locat.runs.distributed import all_gather_cat, broadcast_object, is_main, rank, world_size
from ssl_locat.runs.log import progress
from ssl_locat.text.shown import redact

log = logging.getLogger(__name__)

NO_LABEL = -1


def share(total: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices int64, valid bool) of one process's contiguous part; all are ceil(total / world_size) long, repeats marked invalid."""
    # equal shares: processes gather after each batch, and one with fewer would leave the others waiting
    length = -(-total // world_size)
    positions = np.arange(rank * length, (rank + 1) * length)
    return positions.clip(max=total - 1), positions < total


class CompressedShard:
    """A .tar.gz, .tar.bz2 or .tar.xz, unpacked into memory (forked workers share it): labelled sets often come so, and are small."""

    OPENERS: ClassVar = {"gz": gzip.decompress, "tgz": gzip.decompress, "bz2": bz2.decompress, "xz": lzma.decompress}
    by_range, together, remote = True, 1, False

    def __init__(self, url: str, store: Store):
        suffix = url.rpartition(".")[2].lower()
        if suffix not in self.OPENERS:
            raise DataError(f"{url}: cannot read .{suffix} here; repack it with `ssl-locat shards pack {url} OUT`.")
        self.name, self.store = url, store
        self.data = self.OPENERS[suffix](store.read_all(url))
        try:
            self.starts, self.crcs = scan(lambda at, length: self.data[at : at + length], len(self.data))
        except CorruptSample as error:
            raise DataError(f"{url}: {error.reason}.") from None
        self.manifest_hash = hashlib.blake2b(self.data, digest_size=8).hexdigest()
        self.mean_bytes = len(self.data) / max(1, len(self))

    def __len__(self) -> int:
        return len(self.crcs)

    def fetch(self, start: int, stop: int) -> list[tuple]:
        return [(self.data, self.starts[i], self.starts[i + 1], self.crcs[i], self.name) for i in range(start, stop)]

    def parse(self, entry: tuple) -> RawSample | Damage:
        return parse(*entry)

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return [self.parse(entry) for entry in self.fetch(start, stop)]

    def key_crcs(self) -> np.ndarray:
        return np.array(self.crcs, dtype=np.uint32)


def open_store(data: Mapping[str, Any]) -> Store:
    """The store of a `data` section: through the page cache if data.cache names one, patient for data.retry_minutes."""
    budget, cache = 60.0 * (data.get("retry_minutes") or 5), data.get("cache")
    return CachedStore(cache["folder"], int(cache.get("max_gb", 50) * 1e9), budget) if cache else Store(budget)


def open_spec(
    spec: str | Path | Sequence[Any], store: Store | None = None, split: str | None = None, metadata: bool = False
) -> Joined:
    """A DATA spec as one dataset (a mix is one after the other); compressed shards, which training refuses, are read as well.

    split: 'train' or 'test': which one of a folder that holds several. metadata: the other columns of Parquet, too."""
    store = store or Store()
    parts: list[Any] = [
        part.get("shards") if isinstance(part, dict) else part for part in (spec if isinstance(spec, list) else [spec])
    ]
    urls = list(store.expand(parts)) if all(isinstance(part, str) for part in parts) else []
    if any(map(is_compressed, urls)):
        if any(part.get("filters") for part in (spec if isinstance(spec, list) else []) if isinstance(part, dict)):
            raise DataError("filters are not run on compressed shards: repack them (ssl-locat shards pack SHARDS OUT)")
        return Joined([CompressedShard(url, store) if is_compressed(url) else open_dataset(url, store=store) for url in urls])
    return Joined([without_left_out(dataset) for dataset in open_mix(spec, store=store, split=split, metadata=metadata)[0]])


def open_split(data: Mapping[str, Any], name: str, metadata: bool = False) -> Joined | Chosen:
    """`data.train` or `data.test`, or those of its samples that data.train_images or data.test_images keep, chosen by their keys."""
    return some(open_spec(data[name], open_store(data), name, metadata), data.get(f"{name}_images"))


def set_name(dataset: Dataset) -> str:
    """Which set it is, in a few words for a progress bar: the last two parts of its path."""
    whole: Dataset = dataset
    while isinstance(whole, Chosen):
        whole = whole.dataset
    parts = whole.datasets if isinstance(whole, Joined) else [whole]
    first = parts[0].name.rstrip("/").split("/")
    return "/".join(first[-2:]) + (f" and {len(parts) - 1} more" if len(parts) > 1 else "")


class Members:
    """`members[i]` is the undecoded sample i of a DATA spec, for looking at a few. Damage is an error.

    run_filters: False leaves out a data set's filters, whose code nobody who only looks at somebody's run may have to run.
    """

    def __init__(self, spec: str | list, store: Store | None = None, run_filters: bool = True):
        self.dataset, self.run_filters = open_spec(spec, store), run_filters

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> RawSample:
        (sample,) = self.dataset.read(index, index + 1)
        if isinstance(sample, Damage):
            raise DataError(f"{sample.shard}: {sample.key}: {sample.reason}.{self.how_to_check()}")
        return filtered(sample, index) if self.run_filters else sample

    def how_to_check(self) -> str:
        """' Check the set with ...' where it is shards; a folder's files are named one by one."""
        shards = any(dataset.by_range for dataset in self.dataset.datasets)
        return " Check the set with `ssl-locat shards check`." if shards else ""


def same_classes(train: Joined | Chosen, test: Joined | Chosen) -> None:
    """Class folders are numbered in sorted order, each set by itself: unless both have the same ones, the numbers mean different things."""
    for name in sorted({*train.classes} ^ {*test.classes}) if train.classes and test.classes else []:
        has, lacks = ("data.train", "data.test") if name in train.classes else ("data.test", "data.train")
        raise DataError(
            f"the class folder {name!r} is in {has}, not in {lacks} ({len(train.classes)} and {len(test.classes)} folders). "
            "Class folders are numbered in sorted order, so both must have the same; an empty one does not count."
        )


class LabelledImage:
    """What a worker makes of a sample: (view of the image, label). view(image [H, W, C], seed) -> tensor [C, h, w].

    label: of a sample's members, in place of `find_label`. Raises DataError for a label beyond `num_classes`, which no quarantine should hide.
    """

    def __init__(
        self,
        view: Callable[[np.ndarray, int], Tensor],
        data: Mapping[str, Any],
        channels: Bands | int = 3,
        num_classes: int | None = None,
        label: Callable[[dict[str, bytes]], int] | None = None,
    ):
        self.label = label
        self.view, self.channels, self.num_classes = view, channels, num_classes
        self.image_key, self.label_key = data.get("image_key"), data.get("label_key")

    def __call__(self, raw: RawSample, seed: int) -> tuple[Tensor, int]:
        label = find_label(raw.members, self.label_key) if self.label is None else self.label(raw.members)
        if self.num_classes is not None and label >= self.num_classes:
            raise DataError(
                f"{raw.shard}: {raw.key}: the label is {label}, but data.num_classes is {self.num_classes}: labels must be "
                f"0..{self.num_classes - 1}."
            )
        return self.view(decode_image(find_image(raw.members, self.image_key), channels=self.channels), seed), label

    def blank(self) -> tuple[Tensor, int]:
        """Stands in for a damaged sample: black, and no label."""
        # any size will do, the view makes it the same as the others
        return self.view(np.zeros((64, 64, how_many(self.channels)), np.uint8), 0), NO_LABEL


def stack(samples: list[tuple]) -> tuple:
    """Columns of tuples: tensors stacked, numbers as a tensor, the rest a list. In the worker: every tensor sent costs a file descriptor."""
    return tuple(_column(list(column)) for column in zip(*samples, strict=True))


def _column(values: list) -> Tensor | list:
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    return torch.tensor(values) if isinstance(values[0], int) else values


class StackReadable:
    """`stack`, with the prepared sample's `blank` where one is damaged; (columns, the damaged)."""

    def __init__(self, prepare: Any):
        self.prepare = prepare

    def __call__(self, items: list) -> tuple[tuple, list[Unread]]:
        damaged = [item for item in items if isinstance(item, Unread)]
        blank = self.prepare.blank() if damaged else ()  # only asked for where something is damaged
        return stack([blank if isinstance(item, Unread) else item for item in items]), damaged


def refuse_damage(damaged: list[Unread], max_bad: float) -> None:
    """Log what is left out; DataError for the first where nothing may be (max_bad 0): a score of record leaves nothing out unasked."""
    if damaged and not max_bad:
        raise DataError(f"{damaged[0]} To leave out up to one image in a hundred: data.max_bad=0.01.")
    for item in damaged:
        log.info("left out: %s", item)


def check_damage(count: int, total: int, max_bad: float, first: str = "") -> None:
    """Raises DataBudgetExceeded on every process alike if too much was left out; count: over all of them; first: one that was."""
    if count > max_bad * total:
        raise DataBudgetExceeded(
            f"{count} of {total} images could not be read, more than data.max_bad = {max_bad:g} allows. "
            f"{f'The first: {first} ' if first else ''}All their names are in the log. Replace or remove them, or allow more."
        )


class Batch(NamedTuple):
    images: Tensor  # [B, 3, H, W]
    labels: Tensor  # [B] int64
    index: Tensor  # type: ignore[assignment]  # [B] in the dataset
    valid: Tensor  # [B] bool; False on repeats, and on damaged images where they may be left out


class Pass:
    """One ordered pass over a labelled dataset, this process's share: what `features.extract` reads. len() is the whole pass.

    prepare: LabelledImage. max_bad: share of damaged samples that may be left out; with 0 the first is an error. positions: those of the
    dataset's samples that are read (ascending); all of them where None.
    """

    def __init__(
        self,
        dataset: Joined | Chosen,
        prepare: LabelledImage,
        positions: Tensor | None = None,
        *,
        batch_size: int,
        workers: int | None,
        max_bad: float = 0.0,
    ):
        self.dataset = dataset if positions is None else Chosen(dataset, positions.numpy())
        self.prepare, self.batch_size, self.workers, self.max_bad = prepare, batch_size, workers, max_bad
        self.first_damage = ""  # that this process met

    def __len__(self) -> int:
        return len(self.dataset)

    def only(self, positions: Tensor) -> "Pass":
        """The same pass over those of its samples alone, int64 [n] ascending; a batch's index counts within them."""
        return Pass(self.dataset, self.prepare, positions, batch_size=self.batch_size, workers=self.workers, max_bad=self.max_bad)

    def __iter__(self) -> Iterator[Batch]:
        indices, valid = share(len(self), rank(), world_size())
        batches = read_in_order(
            self.dataset, indices, self.prepare, StackReadable(self.prepare), batch_size=self.batch_size,
            workers=choose_workers(self.workers), pin_memory=torch.cuda.is_initialized(),
        )  # fmt: skip
        for start, ((images, labels), damaged) in zip(range(0, len(indices), self.batch_size), batches, strict=True):
            refuse_damage(damaged, self.max_bad)
            self.first_damage = self.first_damage or "".join(map(str, damaged[:1]))
            end = start + len(labels)
            yield Batch(
                images, labels, torch.from_numpy(indices[start:end]), torch.from_numpy(valid[start:end]) & (labels != NO_LABEL)
            )


class _Label:
    """The label alone: nothing is decoded."""

    def __init__(self, label_key: str | None):
        self.label_key = label_key

    def __call__(self, raw: RawSample, index: int) -> tuple[int]:
        return (find_label(raw.members, self.label_key),)

    def blank(self) -> tuple[int]:
        return (NO_LABEL,)


def first_label(members: Members, label_key: str | None) -> int:
    """Of the first sample. DataError if it has none."""
    sample = members[0]
    try:
        return find_label(sample.members, label_key)
    except CorruptSample as error:
        raise DataError(f"{sample.shard}: {sample.key}: {error.reason}.") from None


def read_labels(dataset: Dataset, data: Mapping[str, Any], workers: int | None) -> Tensor:
    """int64 [N]: the label of every sample, NO_LABEL of damaged ones that data.max_bad lets pass. Nothing is decoded.

    Class folders tell it by their names. Else one pass over the data, read by all processes together and kept in the user's cache.
    """
    label_key, max_bad = data.get("label_key"), data.get("max_bad") or 0.0
    parts = dataset.datasets if isinstance(dataset, Joined) else []
    folders = [part for part in parts if isinstance(part, FolderDataset) and part.classes and not part.filters]
    if parts and label_key is None and len(folders) == len(parts):
        return torch.from_numpy(np.concatenate([folder.labels for folder in folders]))
    kept = _labels_file(dataset, label_key)
    found = _kept_labels(kept, len(dataset)) if is_main() else None
    if broadcast_object(found is not None):
        return torch.tensor(broadcast_object(found.tolist() if found is not None else None), dtype=torch.int64)
    indices, valid = share(len(dataset), rank(), world_size())
    prepare, pieces = _Label(label_key), []
    options: dict[str, Any] = {"batch_size": 1024, "workers": choose_workers(workers)}
    with progress(f"labels of {set_name(dataset)}", total=len(dataset), unit="images") as bar:
        for (batch,), damaged in read_in_order(dataset, indices, prepare, StackReadable(prepare), **options):
            refuse_damage(damaged, max_bad)
            pieces.append(batch)
            bar.update(len(batch) * world_size())
            stop_if_asked("reading labels")
    # shares are contiguous and in the order of ranks: joined, they are in the order of the data
    labels = all_gather_cat(torch.cat(pieces))[all_gather_cat(torch.from_numpy(valid))]
    lost = int((labels == NO_LABEL).sum())
    check_damage(lost, len(dataset), max_bad)
    if kept and is_main() and not lost:
        with suppress(OSError):  # a full or read-only home: they are read again
            kept.parent.mkdir(parents=True, exist_ok=True)
            # beside and renamed, as other jobs may read; np.save adds .npy to any other ending
            part = kept.with_name(f".{kept.name}.{os.getpid()}.npy")
            np.save(part, labels.numpy().astype(np.int32))
            part.replace(kept)
    return labels


def _labels_file(dataset: Dataset, label_key: str | None) -> Path | None:
    """Where the labels of these very shards are kept; None if it cannot be told whether they are still the same."""
    shards = [shard for part in getattr(dataset, "datasets", []) for shard in getattr(part, "shards", [None])]
    # files of a folder, and stores that tell no version, may change unseen
    if not shards or not all(shard and shard.stat.version for shard in shards):
        return None
    if any(getattr(part, "filters", None) for part in getattr(dataset, "datasets", [])):  # their code may change, too
        return None
    about = [label_key, *([redact(shard.url), shard.stat.size, shard.stat.version, shard.digest] for shard in shards)]
    name = hashlib.blake2b(json.dumps(about).encode(), digest_size=12).hexdigest()
    return default_cache_dir().with_name("labels") / f"{name}.npy"


def _kept_labels(path: Path | None, count: int) -> np.ndarray | None:
    if path is None:
        return None
    try:
        # nothing is unpickled, whoever wrote the file
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return labels if labels.shape == (count,) else None
