"""Parquet files of images as data, as the Hugging Face hub has them: a row is a sample, a row group the unit of reading (extra `parquet`).

parquet_columns.py says which columns hold the image and the label; nothing else of a row is read. Footers are read at the start, row groups by
one range each; what is damaged is named by its file and row. A row that only names its image has it read from beside the Parquet file.
"""

import hashlib
import io
import threading
import zlib
from bisect import bisect_right
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.data.shards.filters import Filters, with_filters
from ssl_locat.data.shards.parquet_columns import Columns, choose_columns, ending_of, further_members, row_members
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.data.stores.objects import Gone, Stat, folder_and_name, join, scheme_of
from ssl_locat.data.stores.store import Store, anew, is_anew
from ssl_locat.errors import DataError, UserError
from ssl_locat.text.shown import redact, shown

ENDING = ".parquet"
_THREADS = 8  # that read footers
_FOOTER = 1 << 16  # bytes at the end of a file that are read first: of most files, the whole footer
_LARGEST_FOOTER = 64 << 20
_FOOTERS = 512  # that a process keeps, some 50 kB each
_MOST_BYTES = 1 << 30  # of a row group, unpacked: it is held whole
_KEPT_BYTES = 128 << 20  # of row groups that a process keeps: small sets whole, and of large ones what the next chunk begins in
_LOCKS = 64  # threads that want the same row group wait for one read of it
_NO_IMAGE = 100  # bytes of a row: less holds no image but its path
_ALIKE = 0.8  # share of the rows that must lie in row groups of one length, for reads to be laid on their grid


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


class _Named(NamedTuple):
    """A row whose image lies in a file of its own."""

    path: str
    members: dict[str, bytes]
    key: str
    shard: str


Row = RawSample | Damage | _Named


class ParquetDataset:
    """Rows of Parquet files, one after the other.

    in_groups: number the rows for training: those of row groups of the usual length first, so that they lie on a grid of `together`, and the
        shorter last one of each file behind them all. A plan whose chunks lie on that grid fetches each row group once.
    metadata: samples hold the other columns, too.
    """

    by_range = True
    filters: Filters | None = None

    def __init__(
        self, name: str, store: Store, files: list[File], columns: Columns, in_groups: bool = False, metadata: bool = False
    ):
        self.name, self.store, self.files, self.columns, self.metadata = name, store, files, columns, metadata
        self.classes = list(columns.classes)
        self.remote = any(scheme_of(file.url) != "file" for file in files[:1])
        # all row groups of all files: which file, and which of its groups
        places = [(number, place) for number, file in enumerate(files) for place in range(len(file.groups))]
        usual, share = _usual([files[number].groups[place].rows for number, place in places])
        self.together = usual if in_groups and share >= _ALIKE else 1
        if self.together > 1:
            places.sort(key=lambda one: files[one[0]].groups[one[1]].rows != usual)
        self._places = places
        rows = [files[number].groups[place].rows for number, place in places]
        self._ends = list(accumulate(rows))
        within = [[0, *accumulate(group.rows for group in file.groups)] for file in files]
        self._first_rows = [within[number][place] for number, place in places]  # in the file
        self.rows_per_read = int(np.median(rows)) if rows else 1
        self.mean_bytes = sum(group.stop - group.start for file in files for group in file.groups) / max(1, len(self))
        parts = [f"{_base(file.url)} {[group[:3] for group in file.groups]}" for file in files]
        parts += [f"on a grid of {self.together}"] if self.together > 1 else []
        self.manifest_hash = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
        self._forget()

    def _forget(self) -> None:
        self._kept: OrderedDict[int, list[Row]] = OrderedDict()
        self._kept_bytes: dict[int, int] = {}
        self._confirmed: set[int] = set()
        self._footers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._reading = [threading.Lock() for _ in range(_LOCKS)]

    def __getstate__(self) -> dict[str, Any]:
        own = ("_kept", "_kept_bytes", "_confirmed", "_footers", "_lock", "_reading")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def numbers_of(self, rows: np.ndarray) -> np.ndarray:
        """The numbers here of rows that are counted file after file: others where whole row groups come first."""
        order = sorted(range(len(self._places)), key=lambda one: self._places[one])
        starts = np.array([self._ends[one - 1] if one else 0 for one in order])
        lengths = np.array([self._ends[one] for one in order]) - starts
        group = np.searchsorted(np.cumsum(lengths), rows, side="right")
        found: np.ndarray = starts[group] + rows - (np.cumsum(lengths) - lengths)[group]
        return found

    def parse(self, entry: RawSample | Damage) -> RawSample | Damage:
        return entry

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return self.fetch(start, stop)

    def key_crcs(self) -> np.ndarray:
        found = np.empty(len(self), np.uint32)
        at = 0
        for (number, place), first in zip(self._places, self._first_rows, strict=True):
            file = self.files[number]
            name = _base(file.url).encode("utf-8", "surrogateescape")
            for row in range(first, first + file.groups[place].rows):
                found[at] = zlib.crc32(b"%b:%d" % (name, row))
                at += 1
        return found

    def fetch(self, start: int, stop: int) -> list[RawSample | Damage]:
        found: list[Row] = []
        while start < stop:
            number = bisect_right(self._ends, start)
            end = min(stop, self._ends[number])
            first = self._ends[number - 1] if number else 0
            found += self._group(number)[start - first : end - first]
            start = end
        # files that rows name are read here, for the rows that are asked for: a row group may name more than memory holds
        whole = (self._with_file(row) if isinstance(row, _Named) else row for row in found)
        return [with_filters(row, self.filters) for row in whole]

    def _with_file(self, row: _Named) -> RawSample | Damage:
        if row.path.startswith("/") or ":" in row.path or ".." in row.path.split("/") or "\\" in row.path:
            return Damage(row.key, row.shard, f"it names {shown(row.path)}, which is no place beside its file")
        url = join(folder_and_name(self._url_of(row.shard))[0], row.path)
        try:
            content = self.store.read_all(url)
        except Gone:
            reason = (
                f"no image in column {self.columns.image} (it names {shown(row.path)}, which is not in the file, nor beside it)"
            )
            return Damage(row.key, row.shard, reason)
        return RawSample({ending_of(content, row.path): content, **row.members}, row.key, row.shard)

    def _url_of(self, name: str) -> str:
        return next(file.url for file in self.files if redact(file.url) == name)

    def _group(self, number: int) -> list[Row]:
        with self._reading[number % _LOCKS]:
            with self._lock:
                # asked for again from the store itself, once: a row group is no small request
                afresh = is_anew() and number not in self._confirmed
                self._confirmed |= {number} if afresh else set()
                if number in self._kept and not afresh:
                    self._kept.move_to_end(number)
                    return self._kept[number]
            rows = self._read_group(number)
            size = sum(len(content) for row in rows if not isinstance(row, Damage) for content in row.members.values())
            with self._lock:
                self._kept[number], self._kept_bytes[number] = rows, size
                while len(self._kept) > 1 and sum(self._kept_bytes.values()) > _KEPT_BYTES:
                    del self._kept_bytes[self._kept.popitem(last=False)[0]]
        return rows

    def _read_group(self, number: int) -> list[Row]:
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

    def _decode(self, place: int, within: int, first: int) -> list[Row]:
        parquet = _pyarrow()
        file = self.files[place]
        group, name = file.groups[within], redact(file.url)
        data = self.store.read(file.url, group.start, group.stop, file.stat)
        footer = self._footer(place)
        source = _Part(data, group.start, file.stat.size)
        wanted = self.columns.read(self.metadata)
        table = parquet.ParquetFile(source, metadata=footer, pre_buffer=False).read_row_group(within, wanted, use_threads=False)
        if table.num_rows != group.rows:
            raise ValueError(f"{table.num_rows} rows, not {group.rows}")
        return [self._row(row, f"row {first + number}", name) for number, row in enumerate(_rows(table, wanted))]

    def _row(self, row: dict[str, Any], key: str, name: str) -> Row:
        found = row_members(row, self.columns, key, name)
        if isinstance(found, Damage):
            return found
        members, path = found
        members = {**members, **further_members(row, self.columns)} if self.metadata else members
        return _Named(path, members, key, name) if path else RawSample(members, key, name)

    def _footer(self, place: int) -> Any:
        with self._lock:
            if place in self._footers:
                return self._footers[place]
        footer = _read_footer(self.store, self.files[place].url, self.files[place].stat)
        with self._lock:
            self._footers[place] = footer
            while len(self._footers) > _FOOTERS:
                self._footers.popitem(last=False)
        return footer

    def keep_footers(self, footers: dict[int, Any]) -> None:
        """Those that this process has read."""
        self._footers = OrderedDict(list(footers.items())[:_FOOTERS])

    def measure_files(self) -> None:
        """Of rows that only name their images: how large those are, by a few of them."""
        sizes = []
        for row in self._group(0)[:: max(1, len(self._group(0)) // 8)]:
            if isinstance(row, _Named) and isinstance(found := self._with_file(row), RawSample):
                sizes.append(sum(map(len, found.members.values())))
        if sizes:
            self.mean_bytes, self.together, self.rows_per_read = float(np.mean(sizes)), 1, 1
            self.by_range = False


def _usual(rows: list[int]) -> tuple[int, float]:
    """(the length of a row group that most rows lie in, the share of them that do)"""
    counts = Counter(rows)
    usual = max(counts, key=lambda length: length * counts[length], default=1)
    return usual, usual * counts[usual] / max(1, sum(rows))


def _rows(table: Any, wanted: list[str]) -> Any:
    columns = [table.column(name).to_pylist() for name in wanted]
    return (dict(zip(wanted, values, strict=True)) for values in zip(*columns, strict=True))


def open_parquet(
    name: str, store: Store, found: dict[str, Stat | None], in_groups: bool = False, metadata: bool = False
) -> ParquetDataset:
    """Read all footers. DataError for a file that is none, or whose columns differ from the first one's."""
    urls = list(found)
    with ThreadPoolExecutor(_THREADS) as pool:
        opened = list(pool.map(lambda url: _open_file(store, url, found[url], metadata), urls))
    columns = opened[0][1]
    footers = [footer for file, _, footer in opened if file.rows]
    for url, (_, others, _) in zip(urls, opened, strict=True):
        if others[:3] != columns[:3] or (metadata and others != columns):
            raise DataError(
                f"{shown(url)} has image and label in {others.image} and {others.label} ({len(others.classes)} classes), the first file in "
                f"{columns.image} and {columns.label} ({len(columns.classes)}): files of one set have the same columns."
            )
    dataset = ParquetDataset(name, store, [file for file, _, _ in opened if file.rows], columns, in_groups, metadata)
    if not len(dataset):
        raise DataError(f"{name} holds no rows: {len(urls)} Parquet file(s), all empty.")
    dataset.keep_footers(dict(enumerate(footers)))
    if dataset.mean_bytes < _NO_IMAGE:
        dataset.measure_files()
    return dataset


def _open_file(store: Store, url: str, stat: Stat | None, metadata: bool) -> tuple[File, Columns, Any]:
    try:
        stat = stat or store.stat(url)
        footer = _read_footer(store, url, stat)
        columns = choose_columns(footer, url)
        wanted = columns.read(metadata)
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
    return File(url, stat, groups), columns, footer


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
