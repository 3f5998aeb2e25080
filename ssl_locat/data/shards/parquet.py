"""Parquet files of images as data, as the Hugging Face hub has them: a row is a sample, a row group the unit of reading (extra `parquet`).

The image is the column whose `huggingface` feature is an Image, else one named image, img, jpg, ...; bytes, or struct<bytes, path>. The
label is the ClassLabel, else an integer column named label, cls, ...; its names are the classes. Nothing else of a row is read. Footers are
read at the start, row groups by one range each; what is damaged is named by its file and row.
"""

import hashlib
import io
import json
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.data.images.decode import IMAGE_EXTENSIONS
from ssl_locat.data.shards.filters import Filters, with_filters
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.data.stores.objects import Gone, Stat, scheme_of
from ssl_locat.data.stores.store import Store, anew
from ssl_locat.errors import DataError, UserError
from ssl_locat.text.shown import redact, shown

ENDING = ".parquet"
_IMAGES = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "tif",
    "npy",
    "pixel_values",
    "picture",
    "photo",
)  # names of columns, in this order
_LABELS = ("label", "cls", "class", "labels", "fine_label", "target")
_THREADS = 8  # that read footers
_FOOTER = 1 << 16  # bytes at the end of a file that are read first: of most files, the whole footer
_LARGEST_FOOTER = 64 << 20
_MOST_BYTES = 1 << 30  # of a row group, unpacked: it is held whole
_KEPT = 2  # row groups that a process keeps: a chunk of the plan mostly begins in one and ends in the next


class Group(NamedTuple):
    """A row group: where the columns that are read lie."""

    rows: int
    start: int  # bytes in the file
    stop: int
    unpacked: int  # bytes


class File(NamedTuple):
    url: str
    stat: Stat
    groups: tuple[Group, ...]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)


class Columns(NamedTuple):
    image: str
    label: str | None
    classes: tuple[str, ...]


class ParquetDataset:
    """Rows of Parquet files, one after the other."""

    by_range = True
    filters: Filters | None = None

    def __init__(self, name: str, store: Store, files: list[File], columns: Columns):
        self.name, self.store, self.files, self.columns = name, store, files, columns
        self.classes = list(columns.classes)
        self.remote = any(scheme_of(file.url) != "file" for file in files[:1])
        # all row groups of all files: which file, which of its groups, and the number of its first row in the set and in the file
        self._places = [(number, place) for number, file in enumerate(files) for place in range(len(file.groups))]
        rows = [files[number].groups[place].rows for number, place in self._places]
        self._ends = list(accumulate(rows))
        within = [[0, *accumulate(group.rows for group in file.groups)] for file in files]
        self._first_rows = [within[number][place] for number, place in self._places]
        self.rows_per_read = int(np.median(rows)) if rows else 1
        self.mean_bytes = sum(group.stop - group.start for file in files for group in file.groups) / max(1, len(self))
        parts = [f"{_base(file.url)} {[group[:3] for group in file.groups]}" for file in files]
        self.manifest_hash = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
        self._forget()

    def _forget(self) -> None:
        self._kept: OrderedDict[int, list[RawSample | Damage]] = OrderedDict()
        self._footers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_kept", "_footers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def parse(self, entry: RawSample | Damage) -> RawSample | Damage:
        return with_filters(entry, self.filters)

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return [self.parse(entry) for entry in self.fetch(start, stop)]

    def key_crcs(self) -> np.ndarray:
        found = [
            zlib.crc32(f"{_base(file.url)}:{row}".encode("utf-8", "surrogateescape"))
            for file in self.files
            for row in range(file.rows)
        ]
        return np.array(found, dtype=np.uint32)

    def fetch(self, start: int, stop: int) -> list[RawSample | Damage]:
        found: list[RawSample | Damage] = []
        while start < stop:
            number = bisect_right(self._ends, start)
            end = min(stop, self._ends[number])
            first = self._ends[number - 1] if number else 0
            found += self._group(number)[start - first : end - first]
            start = end
        return found

    def _group(self, number: int) -> list[RawSample | Damage]:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        rows = self._read_group(number)
        with self._lock:
            self._kept[number] = rows
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return rows

    def _read_group(self, number: int) -> list[RawSample | Damage]:
        """All rows of a row group. Raises Outage; anything else that is wrong is Damage of its rows."""
        place, within = self._places[number]
        file, first = self.files[place], self._first_rows[number]
        group = file.groups[within]
        name = redact(file.url)
        if group.unpacked > _MOST_BYTES:
            reason = (
                f"a row group of {group.unpacked / 1e9:.1f} GB unpacked, more than {_MOST_BYTES / 1e9:.1f}: write smaller ones"
            )
            return [Damage(f"row {first + row}", name, reason) for row in range(group.rows)]
        wrong = ""
        for again in (False, True):
            try:
                if again:  # bytes that a store sent once may be wrong
                    with anew():
                        return self._decode(place, within, first)
                return self._decode(place, within, first)
            except Gone as error:
                wrong = str(error)
                break
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
                NotImplementedError,
            ) as error:  # of pyarrow, whose own are among these
                if isinstance(error, UserError):
                    raise
                wrong = f"the row group does not decode: {type(error).__name__}: {str(error)[:200]}"
            if not self.remote:
                break
        return [Damage(f"row {first + row}", name, wrong) for row in range(group.rows)]

    def _decode(self, place: int, within: int, first: int) -> list[RawSample | Damage]:
        parquet = _pyarrow()
        file = self.files[place]
        group, name = file.groups[within], redact(file.url)
        data = self.store.read(file.url, group.start, group.stop, file.stat)
        footer = self._footer(place)
        source = _Part(data, group.start, file.stat.size)
        columns = [self.columns.image, *([self.columns.label] if self.columns.label else [])]
        table = parquet.ParquetFile(source, metadata=footer, pre_buffer=False).read_row_group(within, columns, use_threads=False)
        if table.num_rows != group.rows:
            raise ValueError(f"{table.num_rows} rows, not {group.rows}")
        images = table.column(self.columns.image).to_pylist()
        labels = table.column(self.columns.label).to_pylist() if self.columns.label else [None] * group.rows
        return [
            _sample(image, label, f"row {first + row}", name, self.columns.image)
            for row, (image, label) in enumerate(zip(images, labels, strict=True))
        ]

    def _footer(self, place: int) -> Any:
        with self._lock:
            if place in self._footers:
                return self._footers[place]
        footer = _read_footer(self.store, self.files[place].url, self.files[place].stat)
        with self._lock:
            self._footers[place] = footer
            while len(self._footers) > 64:
                self._footers.popitem(last=False)
        return footer


def open_parquet(name: str, store: Store, found: dict[str, Stat | None]) -> ParquetDataset:
    """Read all footers. DataError for a file that is none, or whose columns differ from the first one's."""
    urls = list(found)
    with ThreadPoolExecutor(_THREADS) as pool:
        opened = list(pool.map(lambda url: _open_file(store, url, found[url]), urls))
    columns = opened[0][1]
    for url, (_, others) in zip(urls, opened, strict=True):
        if others != columns:
            raise DataError(
                f"{shown(url)} has image and label in {others.image} and {others.label} ({len(others.classes)} classes), the first file in "
                f"{columns.image} and {columns.label} ({len(columns.classes)}): files of one set have the same columns."
            )
    dataset = ParquetDataset(name, store, [file for file, _ in opened if file.rows], columns)
    if not len(dataset):
        raise DataError(f"{name} holds no rows: {len(urls)} Parquet file(s), all empty.")
    return dataset


def _open_file(store: Store, url: str, stat: Stat | None) -> tuple[File, Columns]:
    try:
        stat = stat or store.stat(url)
        footer = _read_footer(store, url, stat)
        columns = choose_columns(footer, url)
        wanted = [columns.image, *([columns.label] if columns.label else [])]
        groups = tuple(_group_of(footer.row_group(place), wanted) for place in range(footer.num_row_groups))
    except Gone as error:
        raise DataError(f"{error}. Check the data pattern.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise DataError(f"{shown(url)} is no Parquet file that can be read: {type(error).__name__}: {str(error)[:200]}") from None
    for group in groups:
        if not 0 <= group.start <= group.stop <= stat.size or not 0 <= group.rows <= stat.size:
            raise DataError(
                f"{shown(url)} is no Parquet file that can be read: a row group of {group.rows} rows lies outside of it."
            )
    return File(url, stat, groups), columns


def choose_columns(footer: Any, url: str) -> Columns:
    """Image, label and names of the classes, by the Hugging Face's features where the file has them, else by the columns' names."""
    schema = footer.schema.to_arrow_schema()
    try:
        features = json.loads((footer.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}
    features = features if isinstance(features, dict) else {}

    def kind(name: str) -> Any:
        feature = features.get(name)
        return feature.get("_type") if isinstance(feature, dict) else None

    names = [name for name in schema.names if schema.names.count(name) == 1]
    holds = [name for name in names if _holds_bytes(schema.field(name).type)]
    image = next((name for name in holds if kind(name) == "Image"), None)
    image = image or next((name for wish in _IMAGES for name in holds if name.lower() == wish), None)
    image = image or (holds[0] if len(holds) == 1 else None)
    if image is None:
        raise DataError(
            f"{shown(url)}: no column of images among {', '.join(schema.names) or 'none'}; expected bytes, or bytes and path, in one named "
            f"{', '.join(_IMAGES[:3])}, ..."
        )
    numbers = [
        name for name in names if str(schema.field(name).type) in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32")
    ]
    label = next((name for name in numbers if kind(name) == "ClassLabel"), None)
    label = label or next((name for wish in _LABELS for name in numbers if name.lower() == wish), None)
    classes = features[label].get("names") if label and kind(label) == "ClassLabel" else None
    return Columns(image, label, tuple(map(str, classes)) if isinstance(classes, list) else ())


def _holds_bytes(kind: Any) -> bool:
    """bytes, or a struct of which one field is `bytes`."""
    if str(kind) in ("binary", "large_binary"):
        return True
    return str(kind).startswith("struct<") and any(
        kind.field(place).name == "bytes" and str(kind.field(place).type) in ("binary", "large_binary")
        for place in range(kind.num_fields)
    )


def _group_of(group: Any, wanted: list[str]) -> Group:
    """The one range that holds all chunks of the wanted columns."""
    starts, stops, unpacked = [], [], 0
    for place in range(group.num_columns):
        column = group.column(place)
        if column.path_in_schema.partition(".")[0] not in wanted:
            continue
        offsets = [column.data_page_offset, *([column.dictionary_page_offset] if column.has_dictionary_page else [])]
        starts.append(min(offset for offset in offsets if offset is not None))
        stops.append(starts[-1] + column.total_compressed_size)
        unpacked += column.total_uncompressed_size
    return Group(group.num_rows, min(starts), max(stops), unpacked)


def _sample(image: Any, label: Any, key: str, shard: str, column: str) -> RawSample | Damage:
    path = ""
    if isinstance(image, dict):
        path, image = image.get("path") or "", image.get("bytes")
    if not isinstance(image, bytes):
        where = f" (it names {shown(path)}, which is not in the file)" if path else ""
        return Damage(key, shard, f"no image in column {column}{where}")
    ending = path.rpartition(".")[2].lower()
    members = {ending if ending in IMAGE_EXTENSIONS else "npy" if image.startswith(b"\x93NUMPY") else "jpg": image}
    if label is not None:
        members["cls"] = b"%d" % label
    return RawSample(members, key, shard)


def _read_footer(store: Store, url: str, stat: Stat) -> Any:
    parquet = _pyarrow()
    start = max(0, stat.size - _FOOTER)
    tail = store.read(url, start, stat.size, stat)
    if len(tail) < 12 or tail[-4:] != b"PAR1":
        raise ValueError(f"it ends with {tail[-4:]!r}")
    length = 8 + int.from_bytes(tail[-8:-4], "little")
    if length > min(stat.size, _LARGEST_FOOTER):
        raise ValueError(f"its footer says that it has {length} bytes")
    if length > len(tail):
        start = stat.size - length
        tail = store.read(url, start, stat.size, stat)
    return parquet.read_metadata(_Part(tail, start, stat.size))


class _Part(io.RawIOBase):
    """A file of `size` bytes of which only those from `start` on are there: what else a footer asks for is an error, not a read."""

    def __init__(self, data: bytes, start: int, size: int):
        self.data, self.start, self.size, self.at = data, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, count: int = -1) -> bytes:
        stop = self.size if count is None or count < 0 else min(self.size, self.at + count)
        if stop > self.at and not (self.start <= self.at and stop <= self.start + len(self.data)):
            raise OSError(f"bytes {self.at} to {stop} lie outside of what the footer said")
        found = self.data[self.at - self.start : stop - self.start] if stop > self.at else b""
        self.at = max(self.at, stop)
        return found


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow: pip install 'ssl_locat[parquet]'.") from None
    return parquet


def _base(url: str) -> str:
    return redact(url).rpartition("/")[2]
