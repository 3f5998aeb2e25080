"""The tiles of a large TIFF: which levels it has, where their tiles lie, and how one is decoded.

A level is plain values, so that it can be kept and sent: a worker makes tifffile's decoder from the header of a TIFF of one tile. Tiled and striped files, pyramids as further pages (SVS, GeoTIFF's overviews) or as
SubIFDs (OME), BigTIFF, either byte order; one band a page, or all of them in one. (TIFF 6.0, sections 2 and 15; tifffile reads the headers.)
"""

import io
import struct
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.data.images.arrays import TYPES
from ssl_locat.data.stores.objects import Gone, Stat
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import CorruptSample, Outage, UserError

_BLOCK = 256 << 10  # bytes of a header that are read at once
_BLOCKS = 64  # that are kept while a file is looked at
_MAX_PAGES = 512
_MAX_TILES = 1 << 27  # of a level: a square of 3 million pixels in tiles of 256
MAX_TILE_BYTES = 256 << 20  # unpacked: of a tile, or of a strip as wide as the file
# none, LZW, JPEG, deflate (two numbers), PackBits, Zstandard, JPEG 2000 (Aperio's two numbers)
COMPRESSIONS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32946: "deflate", 32773: "PackBits", 50000: "Zstandard"}
COMPRESSIONS |= {33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000"}
_NAMES, _NO_DATA, _SUBSAMPLING = 42112, 42113, 530


class Level(NamedTuple):
    """One resolution of a file: plain values, so that it can be kept as JSON."""

    width: int
    height: int
    tile_width: int
    tile_height: int  # of strips: rows of one
    tiled: bool
    pages: int  # that hold a band each; else 1
    samples: int  # of a pixel of a page
    planar: bool  # the samples of a page lie in planes of their own
    order: str  # "<" or ">"
    compression: int
    bits: int
    kind: str  # numpy's number type
    tags: tuple[tuple[int, int, int, str], ...]  # (tag, TIFF type, count, bytes as hex) that tell how its tiles are to be decoded
    factor: float  # by which it is smaller than the largest level
    no_data: float | None
    alpha: bool  # the fourth sample of RGB is transparency

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile_width)

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile_height)

    @property
    def planes(self) -> int:
        return self.pages * (self.samples if self.planar else 1)

    @property
    def bands(self) -> int:
        return self.pages * self.samples - self.alpha

    def touched(self, x: int, y: int, size_x: int, size_y: int) -> tuple[int, int, int, int]:
        """Columns and rows of tiles that a box touches: (first column, behind the last, first row, behind the last)."""
        return (
            x // self.tile_width,
            -(-(x + size_x) // self.tile_width),
            y // self.tile_height,
            -(-(y + size_y) // self.tile_height),
        )

    def numbers(self, x: int, y: int, size_x: int, size_y: int) -> np.ndarray:
        """int64 [planes * rows * columns]: the tiles of a box, plane by plane, row by row."""
        left, right, top, bottom = self.touched(x, y, size_x, size_y)
        plane = np.arange(self.planes)[:, None, None] * (self.rows * self.columns)
        found: np.ndarray = plane + np.arange(top, bottom)[:, None] * self.columns + np.arange(left, right)
        return found.ravel()


class Ranged(io.RawIOBase):
    """A file of a store as tifffile reads it: whole blocks, some of which are kept."""

    def __init__(self, store: Store, url: str, stat: Stat):
        self.store, self.url, self.stat, self.at = store, url, stat, 0
        self.blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.stat.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, count: int = -1) -> bytes:
        stop = self.stat.size if count is None or count < 0 else min(self.stat.size, self.at + count)
        found = []
        while self.at < stop:
            number = self.at // _BLOCK
            part = self._block(number)[self.at - number * _BLOCK : stop - number * _BLOCK]
            found.append(part)
            self.at += len(part)
        return b"".join(found)

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _block(self, number: int) -> bytes:
        if number not in self.blocks:
            start = number * _BLOCK
            self.blocks[number] = self.store.read(self.url, start, min(self.stat.size, start + _BLOCK), self.stat)
            if len(self.blocks) > _BLOCKS:
                self.blocks.popitem(last=False)
        self.blocks.move_to_end(number)
        return self.blocks[number]


def read_levels(store: Store, url: str, stat: Stat) -> list[tuple[Level, np.ndarray, np.ndarray]]:
    """[(level, offsets uint64 [tiles], lengths uint64 [tiles])], the largest first. CorruptSample for what cannot be read as windows."""
    try:
        import tifffile
    except ImportError:
        raise UserError("Rasters need tifffile: pip install 'ssl_locat[tiff]'.") from None
    source: Any = Ranged(store, url, stat)
    try:
        with tifffile.TiffFile(source, name=url, _multifile=False) as file:
            return _levels(file)
    except (CorruptSample, UserError, Outage, Gone):
        raise
    except Exception as error:  # tifffile raises whatever it likes for a damaged header
        raise CorruptSample(f"no TIFF that can be read: {type(error).__name__}: {str(error)[:200]}") from None


def _levels(file: Any) -> list[tuple[Level, np.ndarray, np.ndarray]]:
    if len(file.pages) > _MAX_PAGES:
        raise CorruptSample(f"a TIFF of {len(file.pages)} pages, more than {_MAX_PAGES}")
    pages = [page.aspage() for page in file.pages]
    whole = [page for page in pages if not int(page.subfiletype) & 5]
    if not whole:
        raise CorruptSample("a TIFF without an image of full size")
    first = whole[0]
    if min(first.imagewidth, first.imagelength) < 1:
        raise CorruptSample("a TIFF without pixels")
    alike = [page for page in whole if _kind(page) == _kind(first) and page.shape == first.shape]
    bands = alike if first.samplesperpixel == 1 else [first]
    found = [bands]
    if first.subifds:
        for place in range(min(len(page.subifds or ()) for page in bands)):
            found.append([page.pages[place].aspage() for page in bands])
    elif len(bands) == 1:
        found += [[page] for page in pages if page is not first]
    levels = [bands]
    for group in found[1:]:
        page, factor = group[0], first.imagewidth / max(1, group[0].imagewidth)
        # labels, thumbnails and masks are no levels: another type, another shape, or no tiles
        if (
            not int(page.subfiletype) & 4
            and factor > 1.2
            and _kind(page) == _kind(first)
            and abs(page.imagelength * factor - first.imagelength) <= 2 * factor
        ):
            levels.append(group)
    levels.sort(key=lambda group: -group[0].imagewidth)
    return [_level(file, group, first.imagewidth / group[0].imagewidth) for group in levels]


def _kind(page: Any) -> tuple:
    return page.samplesperpixel, str(page.dtype), page.is_tiled, int(page.photometric)


def _level(file: Any, pages: list[Any], factor: float) -> tuple[Level, np.ndarray, np.ndarray]:
    page, order = pages[0], file.byteorder
    _check(page)
    tiled, planar = bool(page.is_tiled), page.samplesperpixel > 1 and int(page.planarconfig) == 2
    width, height = page.imagewidth, page.imagelength
    tile_width = page.tilewidth if tiled else width
    tile_height = page.tilelength if tiled else min(height, page.rowsperstrip or height)
    extra = tuple(int(value) for value in (page.extrasamples or ()))
    alpha = int(page.photometric) in (2, 6) and page.samplesperpixel == 4 and extra[:1] in ((1,), (2,))
    level = Level(
        width,
        height,
        tile_width,
        tile_height,
        tiled,
        len(pages),
        page.samplesperpixel,
        planar,
        order,
        int(page.compression),
        page.bitspersample,
        str(page.dtype.newbyteorder("=")),
        _tags(page, order, extra),
        factor,
        _no_data(page),
        alpha,
    )
    if tile_width <= 0 or tile_height <= 0 or level.planes * level.rows * level.columns > _MAX_TILES:
        raise CorruptSample(f"a TIFF of {width} x {height} pixels in tiles of {tile_width} x {tile_height}")
    per_pixel = page.dtype.itemsize * (1 if planar else page.samplesperpixel)
    if tile_width * tile_height * per_pixel > MAX_TILE_BYTES:
        raise CorruptSample(
            f"its {'tiles' if tiled else 'strips'} are of {tile_width} x {tile_height} pixels, more than {MAX_TILE_BYTES >> 20} MB each: write it "
            "tiled (gdal_translate -co TILED=YES, vips tiffsave --tile)"
        )
    offsets = np.concatenate([np.asarray(page.dataoffsets, np.uint64) for page in pages])
    lengths = np.concatenate([np.asarray(page.databytecounts, np.uint64) for page in pages])
    if len(offsets) != len(lengths) or len(offsets) != level.planes * level.rows * level.columns:
        raise CorruptSample(f"{len(offsets)} tiles instead of {level.planes * level.rows * level.columns}")
    return level, offsets, lengths


def _check(page: Any) -> None:
    compression, predictor = int(page.compression), int(getattr(page, "predictor", 1) or 1)
    if compression not in COMPRESSIONS or predictor not in (1, 2, 3):
        known = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
        raise CorruptSample(f"a TIFF of compression {getattr(page.compression, 'name', compression)}; read are {known}")
    if page.dtype is None or str(page.dtype.newbyteorder("=")) not in TYPES or page.bitspersample not in (8, 16, 32, 64):
        raise CorruptSample(f"a TIFF of {page.bitspersample} bits a value ({page.dtype}); read are {', '.join(TYPES)}")
    colours = int(page.photometric)
    if (
        getattr(page, "imagedepth", 1) != 1
        or colours in (0, 3, 32803)
        or (colours == 6 and COMPRESSIONS[compression] not in ("JPEG", "JPEG 2000"))
    ):
        raise CorruptSample(
            "a TIFF of volumes, palettes, inverted greys, raw sensor data or plain YCbCr: convert it to plain bands"
        )


def _tags(page: Any, order: str, extra: tuple[int, ...]) -> tuple[tuple[int, int, int, str], ...]:
    count = page.samplesperpixel
    found = [
        (258, 3, count, struct.pack(f"{order}{count}H", *[page.bitspersample] * count)),
        (259, 3, 1, struct.pack(f"{order}H", int(page.compression))),
        (262, 3, 1, struct.pack(f"{order}H", int(page.photometric))),
        (277, 3, 1, struct.pack(f"{order}H", count)),
        (284, 3, 1, struct.pack(f"{order}H", int(page.planarconfig or 1))),
        (317, 3, 1, struct.pack(f"{order}H", int(page.predictor or 1))),
        (339, 3, count, struct.pack(f"{order}{count}H", *[int(page.sampleformat or 1)] * count)),
    ]
    if extra:
        found.append((338, 3, len(extra), struct.pack(f"{order}{len(extra)}H", *extra)))
    if page.jpegtables:
        found.append((347, 7, len(page.jpegtables), bytes(page.jpegtables)))
    if _SUBSAMPLING in page.tags and len(page.tags[_SUBSAMPLING].value) == 2:
        found.append((530, 3, 2, struct.pack(f"{order}2H", *page.tags[_SUBSAMPLING].value)))
    for code in (_NAMES, _NO_DATA):
        if code in page.tags:
            text = str(page.tags[code].value)[: 1 << 16].encode() + b"\0"
            found.append((code, 2, len(text), text))
    return tuple((tag, kind, number, content.hex()) for tag, kind, number, content in sorted(found))


def _no_data(page: Any) -> float | None:
    if _NO_DATA not in page.tags:
        return None
    try:
        value = float(str(page.tags[_NO_DATA].value).strip(" \0"))
    except ValueError:
        return None
    return None if value != value else value


def tile_header(level: Level) -> bytes:
    """A TIFF of one tile, without the tile: from its header tifffile tells how such tiles are decoded."""
    order = level.order
    numbers = {256: level.width, 257: level.height}
    numbers |= {322: level.tile_width, 323: level.tile_height} if level.tiled else {278: level.tile_height}
    planes = level.samples if level.planar else 1
    where, length = (324, 325) if level.tiled else (273, 279)
    entries = [(tag, 4, 1, struct.pack(f"{order}I", value)) for tag, value in numbers.items()]
    entries += [(tag, kind, count, bytes.fromhex(content)) for tag, kind, count, content in level.tags]
    entries += [(tag, 4, planes, bytes(4 * planes)) for tag in (where, length)]
    entries.sort()
    place = 8 + 2 + 12 * len(entries) + 4
    head, body = [b"II\x2a\0" if order == "<" else b"MM\0\x2a", struct.pack(f"{order}IH", 8, len(entries))], []
    for tag, kind, count, content in entries:
        head.append(struct.pack(f"{order}HHI", tag, kind, count))
        if len(content) <= 4:
            head.append(content.ljust(4, b"\0"))
            continue
        head.append(struct.pack(f"{order}I", place))
        body.append(content + b"\0" * (len(content) & 1))
        place += len(body[-1])
    return b"".join([*head, bytes(4), *body])
