"""Datasets: samples by number, out of tar shards, Parquet files or plain folders of images.

dataset = open_dataset("data/train-{000..099}.tar")      # or "s3://bucket/train-*.tar", a list of them, or a folder
dataset.read(0, 32)                                      # 32 x RawSample, or Damage where a sample cannot be used
"""

import bz2
import gzip
import hashlib
import io
import logging
import lzma
import os
import shutil
import tempfile
import threading
import zlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from ssl_locat.data.images.decode import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS
from ssl_locat.data.images.names import has_extension, warn_of_unread
from ssl_locat.data.shards.filters import Filters, with_filters
from ssl_locat.data.shards.lists import check_counts, choose_split, has_splits, is_shard_list, read_shard_list
from ssl_locat.data.shards.parquet import ENDING, ParquetDataset, open_parquet
from ssl_locat.data.shards.shard_index import Shard, load_block, load_key_crcs, open_shards, scan_shard, write_sidecars
from ssl_locat.data.shards.tar import COMPRESSED, DAMAGED, Damage, RawSample, parse
from ssl_locat.data.stores.objects import Gone, Stat, join, normalise, scheme_of
from ssl_locat.data.stores.store import Store, anew
from ssl_locat.errors import ConfigError, CorruptSample, DataError, Outage
from ssl_locat.text.shown import redact, shown

log = logging.getLogger(__name__)

_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    **{".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open},
    **{".tbz2": bz2.open, ".xz": lzma.open, ".txz": lzma.open},
}
_BLOCKS = 256  # shards whose offsets one process keeps


class Dataset(Protocol):
    """Numbered samples. Copies into worker processes."""

    name: str
    manifest_hash: str  # of the samples' names, order and places: tells another data set, not where it lies
    mean_bytes: float  # per sample
    by_range: bool  # neighbours share one read
    remote: bool
    store: Store

    def __len__(self) -> int: ...

    def fetch(self, start: int, stop: int) -> list[Any]:
        """Bytes of the samples start..stop, one entry each for `parse`. Raises Outage; never fewer entries."""

    def parse(self, entry: Any) -> RawSample | Damage: ...

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        """Samples start..stop: fetched and parsed."""

    def key_crcs(self) -> np.ndarray:
        """uint32 [N]: of the samples' keys, from the index: no sample is read."""


class Slot(NamedTuple):
    """Where an entry comes from."""

    shard: str  # its name, for messages
    number: int  # of the shard in the data set
    at: int  # byte in the shard


class ShardDataset:
    """Tar shards."""

    by_range = True
    filters: Filters | None = None  # of the user's, by what `open_mix` was given

    def __init__(self, name: str, store: Store, shards: list[Shard]):
        self.name, self.store, self.shards = name, store, shards
        self.ends = list(accumulate(shard.count for shard in shards))
        self.manifest_hash = hashlib.blake2b("".join(shard.digest for shard in shards).encode(), digest_size=8).hexdigest()
        # headers and padding included: what a range read costs
        self.mean_bytes = sum(shard.stat.size for shard in shards) / max(1, len(self))
        self.remote = any(scheme_of(shard.url) != "file" for shard in shards[:1])
        self._blocks: OrderedDict[int, tuple[array, array]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # a copy in a worker reads its own blocks: locks cannot be pickled, and 256 blocks would travel with each
        return self.__dict__ | {"_blocks": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return [self.parse(entry) for entry in self.fetch(start, stop)]

    def key_crcs(self) -> np.ndarray:
        return np.array(load_key_crcs(self.store, self.shards), dtype=np.uint32)

    def parse(self, entry: tuple | Damage) -> RawSample | Damage:
        if isinstance(entry, Damage):
            return entry
        data, start, end, crc, slot = entry
        found = parse(data, start, end, crc, slot.shard)
        if isinstance(found, Damage) and self.remote and crc != DAMAGED:
            # bytes that the store sent once may be wrong (a proxy's error page): a sample is given up if they come twice
            shard, size = self.shards[slot.number], end - start
            with suppress(Gone), anew():
                again = self.store.read(shard.url, slot.at, slot.at + size, shard.stat)
                found = parse(again, 0, size, crc, slot.shard)
        return with_filters(found, self.filters)

    def fetch(self, start: int, stop: int) -> list[tuple | Damage]:
        found: list[tuple | Damage] = []
        while start < stop:
            number = bisect_right(self.ends, start)
            first = self.ends[number] - self.shards[number].count
            end = min(stop, self.ends[number])
            found += self._fetch_shard(number, start - first, end - first)
            start = end
        return found

    def _fetch_shard(self, number: int, first: int, last: int) -> list[tuple | Damage]:
        shard = self.shards[number]
        name = redact(shard.url)
        starts, crcs = self._block(number)
        base = starts[first]
        try:
            data = self.store.read(shard.url, base, starts[last], shard.stat)
        except Gone as error:
            whole = first if error.size is None else max(first, bisect_right(starts, error.size) - 1)
            before = self._fetch_shard(number, first, whole) if whole > first else []
            return before + [Damage("", name, str(error))] * (last - whole)
        return [
            (data, starts[i] - base, starts[i + 1] - base, crcs[i], Slot(name, number, starts[i])) for i in range(first, last)
        ]

    def _block(self, number: int) -> tuple[array, array]:
        with self._lock:
            if number in self._blocks:
                self._blocks.move_to_end(number)
                return self._blocks[number]
        block = load_block(self.store, self.shards[number])
        with self._lock:
            self._blocks[number] = block
            if len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
        return block


class FolderDataset:
    """Image files under a folder. If all of them lie in sub-folders, the first level names the class: member 'cls' is its number."""

    by_range = False
    filters: Filters | None = None

    def __init__(self, name: str, store: Store, folder: str, paths: list[str]):
        self.name, self.store, self.folder = name, store, folder
        self.remote = scheme_of(folder) != "file"
        self.classes = sorted({path.partition("/")[0] for path in paths}) if all("/" in path for path in paths) else []
        # millions of small strings would be copied into every worker: one string and its offsets are shared
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._paths = b"".join(encoded)
        self.manifest_hash = hashlib.blake2b(b"\0".join(encoded), digest_size=8).hexdigest()
        sizes = []
        # some 32 of them: a stat of a million files on a network disk takes minutes
        for path in paths[:: max(1, len(paths) // 32)]:
            with suppress(Gone):  # a link to nowhere counts as corrupt when it is read, and ends nothing
                sizes.append(store.stat(join(folder, path)).size)
        self.mean_bytes = sum(sizes) / max(1, len(sizes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return self.fetch(start, stop)

    def key_crcs(self) -> np.ndarray:
        keys = (self._path(index).rpartition(b".")[0] for index in range(len(self)))
        return np.fromiter(map(zlib.crc32, keys), np.uint32, len(self))

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]: the number of each file's class folder."""
        numbers = {name.encode("utf-8", "surrogateescape"): number for number, name in enumerate(self.classes)}
        return np.fromiter((numbers[self._path(index).partition(b"/")[0]] for index in range(len(self))), np.int64, len(self))

    def parse(self, entry: RawSample | Damage) -> RawSample | Damage:
        return entry

    def fetch(self, start: int, stop: int) -> list[RawSample | Damage]:
        return [with_filters(self._read_one(self._path(i)), self.filters) for i in range(start, stop)]

    def _path(self, index: int) -> bytes:
        return self._paths[self._ends[index] : self._ends[index + 1]]

    def _read_one(self, encoded: bytes) -> RawSample | Damage:
        path = encoded.decode("utf-8", "surrogateescape")
        key, _, extension = path.rpartition(".")
        try:
            members = {extension.lower(): self.store.read_all(join(self.folder, path))}
        except Gone as error:
            return Damage(key, shown(self.folder), str(error))
        if self.classes:
            members["cls"] = str(self.classes.index(path.partition("/")[0])).encode()
        return RawSample(members, key, redact(self.folder))


AnySet = ShardDataset | FolderDataset | ParquetDataset


def open_dataset(
    spec: str | list[str], *, store: Store | None = None, cache_dir: Path | None = None, split: str | None = None
) -> AnySet:
    """Open shards (paths, URLs, braces, globs; or a list of these; tars or Parquet), a wids list of shards, or a folder of shards or images.

    split: 'train' or 'test': which one of a folder that holds several (lists.py).
    Raises DataError for what is missing, empty, compressed, or of an unknown scheme; Outage if a store does not answer.
    """
    store = store or Store()
    if isinstance(spec, str) and is_shard_list(spec):
        promised = {url: count for part in read_shard_list(store, spec) for url, count in part.counts.items()}
        return _open_listed(spec, promised, store, cache_dir)
    name = (
        redact(spec)
        if isinstance(spec, str)
        else f"{redact(spec[0])} and {len(spec) - 1} more"
        if len(spec) > 1
        else redact(spec[0])
    )
    if isinstance(spec, str) and (folder := _as_folder(spec)):
        shards, images = _list_folder(store, folder, split)
        if not shards:
            return FolderDataset(name, store, folder, images)
        found: dict[str, Stat | None] = shards
    else:
        found = store.expand(spec)
    return _open_found(name, found, store, cache_dir)


def _open_found(name: str, found: dict[str, Stat | None], store: Store, cache_dir: Path | None) -> ShardDataset | ParquetDataset:
    if packed := next((url for url in found if is_compressed(url)), None):
        raise DataError(
            f"{shown(packed)} is compressed: samples inside cannot be reached by offset, as training does. Repack it once: "
            f"ssl-locat shards pack {shown(packed)} OUT_FOLDER (or unpack it to a plain .tar). Evaluation reads it as it is."
        )
    parquet = [is_parquet(url) for url in found]
    if any(parquet):
        if not all(parquet):
            raise DataError(f"{name}: Parquet files and others in one pattern. Name them apart, as a list of {{shards, weight}}.")
        return open_parquet(name, store, found)
    dataset = ShardDataset(name, store, open_shards(store, found, cache_dir))
    if not len(dataset):
        raise DataError(f"{name} holds no samples: {len(found)} shard(s), all empty. Members must be named KEY.EXTENSION.")
    return dataset


def is_parquet(url: str) -> bool:
    return redact(url).lower().endswith(ENDING)


def _open_listed(spec: str, promised: dict[str, int], store: Store, cache_dir: Path | None = None) -> ShardDataset:
    """Shards of a wids list, in its order."""
    dataset = _open_found(redact(spec), dict.fromkeys(promised), store, cache_dir)
    if not isinstance(dataset, ShardDataset):
        raise DataError(f"{dataset.name} lists Parquet files; a wids list is one of tars. Name them by a pattern.")
    check_counts(dataset.name, promised, ((shard.url, shard.count, shard.damaged) for shard in dataset.shards))
    return dataset


def open_mix(spec: Any, *, store: Store | None = None, split: str | None = None) -> tuple[list[AnySet], list[float]]:
    """(datasets, weights) of a `data.train` value: one source, or a list of {shards: ..., weight: ..., filters: ...}.

    A wids list with weights in it is a mix, too; its parts share the weight of their entry. split: as for `open_dataset`.
    """
    store = store or Store()
    parts = spec if isinstance(spec, list | tuple) and any(isinstance(part, Mapping) for part in spec) else [{"shards": spec}]
    datasets: list[AnySet] = []
    weights: list[float] = []
    for part in parts:
        if not isinstance(part, Mapping) or not {"shards"} <= set(part) <= {"shards", "weight", "filters"}:
            raise ConfigError(
                f"data.train: {part!r} is not of the form {{shards: PATTERN, weight: NUMBER, filters: [MODULE:NAME]}}; a mix lists only such entries"
            )
        opened = _open_part(part["shards"], store, split)
        for dataset, share in opened:
            dataset.filters = Filters(part["filters"]) if part.get("filters") else None
            datasets.append(dataset)
            weights.append(float(part.get("weight", 1.0)) * share)
    return datasets, weights


def _open_part(spec: str | list[str], store: Store, split: str | None) -> list[tuple[AnySet, float]]:
    """(dataset, share of the entry's weight): several only for a wids list that weights them."""
    parts = read_shard_list(store, spec) if isinstance(spec, str) and is_shard_list(spec) else []
    if isinstance(spec, list) or all(part.weight is None for part in parts) or len(parts) < 2:
        return [(open_dataset(spec, store=store, split=split), 1.0)]
    total = sum(part.weight or 1.0 for part in parts)
    return [(_open_listed(spec, part.counts, store), (part.weight or 1.0) / total) for part in parts]


def write_index(spec: str | list[str]) -> list[str]:
    """Index shards and write `shards.index` into their folders, so that nobody need scan them again; returns the files written."""
    dataset = open_dataset(spec)
    if isinstance(dataset, ParquetDataset):
        raise DataError(f"{dataset.name} are Parquet files, which have their index at their end: nothing is to be done.")
    if isinstance(dataset, FolderDataset):
        raise DataError(
            f"{dataset.name} is a folder of images: only tar shards have an index. Pack it first: ssl-locat shards pack FOLDER OUT"
        )
    written = write_sidecars(dataset.store, dataset.shards)
    log.info("indexed %d samples in %d shards: %s", len(dataset), len(dataset.shards), ", ".join(map(shown, written)))
    return written


def is_compressed(url: str) -> bool:
    return redact(url).lower().endswith(COMPRESSED)


def read_compressed(url: str, store: Store | None = None) -> Iterator[RawSample | Damage]:
    """Samples of one .tar.gz, .tar.bz2 or .tar.xz in order, for evaluation: unpacked to a temporary file, then read as any shard.

    A file cut short gives what could be unpacked, and a Damage for the rest. Raises DataError for what is missing or no such archive.
    """
    store, name = store or Store(), redact(url)
    opener = next((opener for ending, opener in _OPENERS.items() if name.lower().endswith(ending)), None)
    if opener is None:
        raise DataError(f"{name}: this compression cannot be read; known are {', '.join(_OPENERS)}. Unpack it to a plain .tar.")
    with tempfile.NamedTemporaryFile(suffix=".tar") as plain:
        try:
            with opener(io.BytesIO(store.read_all(normalise(url)))) as packed:
                # piece by piece: unpacked it may be larger than memory
                shutil.copyfileobj(packed, plain, 1 << 20)
        except Gone:
            raise DataError(f"shard {name} does not exist. Check the data pattern.") from None
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, Outage):
                raise
            log.warning("%s cannot be unpacked to its end (%s): the rest counts as damaged", name, error)
        plain.flush()
        local = Store()
        stat = local.stat(plain.name)
        try:
            starts, crcs = scan_shard(local, plain.name, stat)
        except CorruptSample as error:
            raise DataError(f"{name} is {error.reason}") from None
        for start, end, crc in zip(starts, starts[1:], crcs, strict=False):
            yield parse(local.read(plain.name, start, end), 0, end - start, crc, name)


def _as_folder(spec: str) -> str | None:
    """The folder that a spec names, or None if it names shards."""
    if any(letter in spec for letter in "{*[") and not os.path.isdir(spec):
        return None
    url = normalise(spec)
    if scheme_of(url) == "file":
        return url if os.path.isdir(url) else None
    base = redact(url).rpartition("/")[2]
    return None if ".tar" in base or is_parquet(base) else url.rstrip("/")


def _list_folder(store: Store, folder: str, split: str | None) -> tuple[dict[str, Stat | None], list[str]]:
    """({URL of a shard: Stat}, relative paths of images at any depth). Shards are tars at the top, or Parquet files where there is nothing else; where they lie deeper, or the folder's README
    tells their splits, those of one split."""
    files = store.walk(folder)
    tars = [name for name in files if name.endswith(".tar") and not name.rpartition("/")[2].startswith("._")]
    top = [name for name in tars if "/" not in name]
    images = [name for name in files if has_extension(name, IMAGE_EXTENSIONS)]
    images = images or [name for name in files if has_extension(name, ARRAY_EXTENSIONS)]
    if tars and (has_splits(store, folder, files) or not (top or images)):
        top = choose_split(store, folder, tars, split)
    if not tars and not images:  # the hub's data sets: Parquet at any depth, and images nowhere else
        rows = [name for name in files if is_parquet(name)]
        top = choose_split(store, folder, rows, split) if rows else []
    warn_of_unread(folder, files)
    if not top and not images:
        raise DataError(
            f"{shown(folder)} holds neither .tar shards nor Parquet files nor images ({len(files)} files; images end in {', '.join(IMAGE_EXTENSIONS)})"
        )
    return {join(folder, name): files[name] for name in top}, images
