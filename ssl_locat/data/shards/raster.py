"""Large rasters and slides as shards of windows: `data.train: {raster: 'slides/*.tif', size: 256}`.

A sample is a window, read by the ranges of the tiles that it touches and of no others. What lies where (and which windows hold tissue or data) is
found out once for each file, and kept in the user's cache; tile tables are mapped from there, so that a thousand slides cost no memory.
"""

import hashlib
import json
import logging
import os
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.data.shards.filters import Filters, with_filters
from ssl_locat.data.shards.raster_pages import Level, read_levels
from ssl_locat.data.shards.raster_windows import Windows, decode, grid, judge, level_to_judge, reader
from ssl_locat.data.shards.shard_index import default_cache_dir, locked
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.data.stores.objects import Gone, Stat, scheme_of
from ssl_locat.data.stores.store import Store, anew
from ssl_locat.errors import ConfigError, CorruptSample, DataError
from ssl_locat.text.shown import redact, shown

log = logging.getLogger(__name__)

_GAP = 4 << 10  # bytes between tiles that are read along: what writers put before each
_MOST_READ = 8 << 20  # bytes of one request
_MAPS = 64  # files whose tables a process keeps mapped
_THREADS = 4  # files that are looked at at once
_FORMAT = 1  # of what is kept


class Slide(NamedTuple):
    """A file, as its index tells it."""

    url: str
    stat: Stat
    level: Level
    windows: Windows
    kept: np.ndarray  # uint32 [n]: numbers in the grid, in the order of their tiles
    tiles: str  # file of uint64 [2, tiles]: offsets and lengths
    digest: str

    def box(self, place: int) -> tuple[int, int, int, int]:
        return (*self.windows.place(int(self.kept[place])), self.windows.size, self.windows.size)


class RasterDataset:
    """Windows of rasters, file after file."""

    by_range, together = True, 1
    filters: Filters | None = None

    def __init__(self, name: str, store: Store, slides: list[Slide], level: int):
        self.name, self.store, self.slides, self.level = name, store, slides, level
        self.ends = list(accumulate(len(slide.kept) for slide in slides))
        self.remote = any(scheme_of(slide.url) != "file" for slide in slides[:1])
        self.classes: list[str] = []
        self.manifest_hash = hashlib.blake2b("".join(slide.digest for slide in slides).encode(), digest_size=8).hexdigest()
        self._forget()
        self.mean_bytes = self._mean_bytes()

    def _forget(self) -> None:
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_maps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return [self.parse(entry) for entry in self.fetch(start, stop)]

    def key_crcs(self) -> np.ndarray:
        keys = (
            f"{redact(slide.url).rpartition('/')[2]}:{self._key(slide, place)}"
            for slide in self.slides
            for place in range(len(slide.kept))
        )
        return np.fromiter((zlib.crc32(key.encode("utf-8", "surrogateescape")) for key in keys), np.uint32, len(self))

    def fetch(self, start: int, stop: int) -> list[tuple | Damage]:
        found: list[tuple | Damage] = []
        while start < stop:
            number = bisect_right(self.ends, start)
            before = self.ends[number - 1] if number else 0
            end = min(stop, self.ends[number])
            found += self._fetch(number, range(start - before, end - before))
            start = end
        return found

    def parse(self, entry: tuple | Damage) -> RawSample | Damage:
        if isinstance(entry, Damage):
            return entry
        data, start, end, place, number = entry
        slide = self.slides[number]
        found = self._sample(slide, place, bytes(memoryview(data)[start:end]))
        if isinstance(found, Damage) and self.remote:
            with anew():  # bytes that a store sent once may be wrong
                (again,) = self._fetch(number, range(place, place + 1))
            found = self._sample(slide, place, again[0]) if not isinstance(again, Damage) else again
        return with_filters(found, self.filters)

    def _sample(self, slide: Slide, place: int, data: bytes) -> RawSample | Damage:
        key, name = self._key(slide, place), redact(slide.url)
        box = slide.box(place)
        lengths = self._tiles(slide)[1][slide.level.numbers(*box)].astype(np.int64)
        ends = np.cumsum(lengths)
        tiles = [data[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
        try:
            values = decode(tiles, slide.level, box)
        except CorruptSample as error:
            return Damage(key, name, error.reason)
        return RawSample(_member(values, slide.level), key, name)

    def _key(self, slide: Slide, place: int) -> str:
        x, y, size, _ = slide.box(place)
        return f"x {x}, y {y}, {size} px" + (f", level {self.level}" if self.level else "")

    def _tiles(self, slide: Slide) -> np.ndarray:
        """uint64 [2, tiles], mapped."""
        found = self._maps.pop(slide.tiles, None)
        if found is None:
            found = np.load(slide.tiles, mmap_mode="r", allow_pickle=False)
        self._maps[slide.tiles] = found
        with suppress(KeyError):  # another thread was quicker
            while len(self._maps) > _MAPS:
                self._maps.popitem(last=False)
        return found

    def _fetch(self, number: int, places: range) -> list[tuple | Damage]:
        slide = self.slides[number]
        wanted = [slide.level.numbers(*slide.box(place)) for place in places]
        tiles, missing = fetch_tiles(self.store, slide.url, slide.stat, self._tiles(slide), np.unique(np.concatenate(wanted)))
        found: list[tuple | Damage] = []
        for place, numbers in zip(places, wanted, strict=True):
            gone = next((missing[tile] for tile in numbers.tolist() if tile in missing), None)
            if gone:
                found.append(Damage(self._key(slide, place), redact(slide.url), gone))
                continue
            data = b"".join([tiles[tile] for tile in numbers.tolist()])
            # where a tar's crc and place stand: the window and its file
            found.append((data, 0, len(data), place, number))
        return found

    def _mean_bytes(self) -> float:
        """Of the tiles that a window touches: of a few windows of a few files."""
        sizes = []
        for slide in self.slides[:: max(1, len(self.slides) // 16)]:
            lengths = self._tiles(slide)[1]
            for place in range(0, len(slide.kept), max(1, len(slide.kept) // 64)):
                sizes.append(float(lengths[slide.level.numbers(*slide.box(place))].sum()))
        self._forget()
        return float(np.mean(sizes)) if sizes else 1.0


def _member(values: np.ndarray, level: Level) -> dict[str, bytes]:
    """An array as it is; as a TIFF where the file names its bands, or a value that means none, which a .npy cannot."""
    import io

    further = [tag for tag in level.tags if tag[0] in (42112, 42113)]
    buffer = io.BytesIO()
    if not further:
        np.save(buffer, values, allow_pickle=False)
        return {"npy": buffer.getvalue()}
    import tifffile

    tags = [
        (code, "s", 0, bytes.fromhex(content).rstrip(b"\0").decode("utf-8", "replace"), True) for code, _, _, content in further
    ]
    contig: dict[str, Any] = {"planarconfig": "contig"} if values.shape[2] > 1 else {}
    tifffile.imwrite(
        buffer,
        values if values.shape[2] > 1 else values[..., 0],
        photometric="minisblack",
        metadata=None,
        extratags=tags,
        **contig,
    )
    return {"tif": buffer.getvalue()}


def fetch_tiles(
    store: Store, url: str, stat: Stat, table: np.ndarray, numbers: np.ndarray
) -> tuple[dict[int, bytes], dict[int, str]]:
    """(tile -> bytes, tile -> why it is not there): neighbours by one request. Raises Outage."""
    offsets, lengths = table[0][numbers].astype(np.int64), table[1][numbers].astype(np.int64)
    order = np.argsort(offsets, kind="stable")
    found: dict[int, bytes] = {}
    missing: dict[int, str] = {}
    run: list[int] = []  # places in `numbers`
    end = 0

    def read() -> None:
        start = int(offsets[run[0]])
        try:
            data = store.read(url, start, end, stat)
        except Gone as error:
            if len(run) > 1:  # each by itself, then: those before the cut are good
                for place in run:
                    _read_one(store, url, stat, int(offsets[place]), int(lengths[place]), int(numbers[place]), found, missing)
            else:
                missing[int(numbers[run[0]])] = str(error)
            return
        for place in run:
            at = int(offsets[place]) - start
            found[int(numbers[place])] = data[at : at + int(lengths[place])]

    for place in order.tolist():
        if not lengths[place]:  # left out by its writer, as what holds no data
            found[int(numbers[place])] = b""
            continue
        if not 0 <= offsets[place] <= offsets[place] + lengths[place] <= stat.size:
            missing[int(numbers[place])] = f"a tile ends at byte {offsets[place] + lengths[place]} of {stat.size}"
            continue
        if run and (offsets[place] - end > _GAP or offsets[place] + lengths[place] - offsets[run[0]] > _MOST_READ):
            read()
            run = []
        end = max(end, int(offsets[place] + lengths[place])) if run else int(offsets[place] + lengths[place])
        run.append(place)
    if run:
        read()
    return found, missing


def _read_one(
    store: Store, url: str, stat: Stat, start: int, length: int, number: int, found: dict[int, bytes], missing: dict[int, str]
) -> None:
    try:
        found[number] = store.read(url, start, start + length, stat)
    except Gone as error:
        missing[number] = str(error)


# the index -------------------------------------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """Which windows of a file are samples."""

    size: int
    stride: int
    level: int = 0
    min_tissue: float = 0.0
    min_data: float = 0.0
    no_data: float | None = None


def options_of(spec: Mapping[str, Any]) -> Options:
    given = {key: value for key, value in spec.items() if key in Options._fields and value is not None}
    if "size" not in given:
        raise ConfigError(f"data.train: {dict(spec)!r} says no size; expected {{raster: PATTERN, size: PIXELS}}")
    return Options(**{"stride": given["size"], **given})


def open_rasters(
    name: str, store: Store, found: dict[str, Stat | None], options: Options, cache_dir: Path | None = None
) -> RasterDataset:
    """Windows of files, of which those are left out that hold none. DataError for what is no such TIFF, or where there is no window at all."""
    folder = (cache_dir or default_cache_dir()).with_name("rasters")
    with ThreadPoolExecutor(_THREADS) as pool:
        slides = list(pool.map(lambda url: _open(store, url, found[url], options, folder), found))
    kept = [slide for slide in slides if len(slide.kept)]
    if not kept:
        raise DataError(
            f"{name}: none of {len(slides)} file(s) holds a window of {options.size} pixels on level {options.level} with enough tissue or data. "
            "Take a smaller size, another level, or lower min_tissue or min_data."
        )
    if len(kept) < len(slides):
        log.warning("%s: %d of %d files hold no window, and are left out", name, len(slides) - len(kept), len(slides))
    return RasterDataset(name, store, kept, options.level)


def _open(store: Store, url: str, stat: Stat | None, options: Options, folder: Path) -> Slide:
    try:
        stat = stat or store.stat(url)
        about = [_FORMAT, redact(url), stat.size, stat.version, *options]
        key = hashlib.blake2b(json.dumps(about).encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
        with locked(folder, key) as path:
            slide = _kept(path, url, stat, about)
            return slide or _index(store, url, stat, options, path, about)
    except Gone as error:
        raise DataError(f"{error}. Check the data pattern.") from None
    except CorruptSample as error:
        raise DataError(f"{shown(url)}: {error.reason}. Remove it from the data pattern, or write it anew.") from None


def _kept(path: Path, url: str, stat: Stat, about: list[Any]) -> Slide | None:
    """What an earlier start found out; None if there is nothing, or nothing whole."""
    try:
        known = json.loads(path.read_text())
        kept = np.load(path.with_suffix(".windows.npy"), allow_pickle=False)
        tiles = np.load(path.with_suffix(".tiles.npy"), mmap_mode="r", allow_pickle=False)
        tags = tuple((tag, kind, count, content) for tag, kind, count, content in known["level"].pop("tags"))
        level, windows = Level(**known["level"], tags=tags), Windows(**known["windows"])
        whole = known["about"] == about and tiles.shape == (2, level.planes * level.rows * level.columns)
        if not whole or kept.ndim != 1 or (len(kept) and int(kept.max()) >= windows.columns * windows.rows):
            return None
        return Slide(url, stat, level, windows, kept, str(path.with_suffix(".tiles.npy")), known["digest"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _index(store: Store, url: str, stat: Stat, options: Options, path: Path, about: list[Any]) -> Slide:
    levels = read_levels(store, url, stat)
    if options.level >= len(levels):
        sizes = ", ".join(f"{place}: {level.width} x {level.height}" for place, (level, _, _) in enumerate(levels))
        raise DataError(f"{shown(url)} has no level {options.level}; it has {sizes}")
    level, offsets, lengths = levels[options.level]
    windows = grid(level, options.size, options.stride)
    kept = np.arange(windows.columns * windows.rows, dtype=np.uint32)
    if len(kept) and (options.min_tissue or options.min_data):
        kept = kept[_judged(store, url, stat, levels, windows, options)]
    kept = _by_tiles(kept, windows, level)
    table = np.stack([offsets, lengths])
    base = redact(url).rpartition("/")[2].encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(base + table.tobytes() + kept.tobytes() + repr(options).encode(), digest_size=8).hexdigest()
    for ending, content in ((".windows.npy", kept), (".tiles.npy", table)):
        part = path.with_suffix(f".{os.getpid()}.npy")  # np.save adds .npy to any other ending
        np.save(part, content, allow_pickle=False)
        part.replace(path.with_suffix(ending))
    text = json.dumps({"about": about, "level": level._asdict(), "windows": windows._asdict(), "digest": digest})
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)  # last: with it, the rest is whole
    return Slide(url, stat, level, windows, kept, str(path.with_suffix(".tiles.npy")), digest)


def _judged(store: Store, url: str, stat: Stat, levels: list, windows: Windows, options: Options) -> np.ndarray:
    sizes = [level for level, _, _ in levels]
    place = level_to_judge(sizes, options.level, options.size)
    level, offsets, lengths = levels[place]
    table = np.stack([offsets, lengths])

    def fetch(numbers: np.ndarray) -> list[bytes]:
        tiles, missing = fetch_tiles(store, url, stat, table, np.unique(numbers))
        if missing:
            raise CorruptSample(next(iter(missing.values())))
        return [tiles[tile] for tile in numbers.tolist()]

    scale = sizes[options.level].factor / level.factor
    return judge(level, windows, scale, reader(level, fetch), options.min_tissue, options.min_data, options.no_data)


def _by_tiles(kept: np.ndarray, windows: Windows, level: Level) -> np.ndarray:
    """Windows that share a tile stand together: row by row where a window is as large as a tile, tile by tile where it is smaller."""
    x, y = kept % max(1, windows.columns) * windows.stride, kept // max(1, windows.columns) * windows.stride
    block_x, block_y = max(level.tile_width, windows.size), max(level.tile_height, windows.size)
    found: np.ndarray = kept[np.lexsort((x, y, x // block_x, y // block_y))]
    return found
