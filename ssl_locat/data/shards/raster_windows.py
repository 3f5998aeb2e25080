"""Windows of a large TIFF: their pixels out of its tiles, and which of them hold tissue or data.

Tissue, as pathologists' tools tell it on stained slides: colours, not the grey of glass or ink. Judged on the smallest level on which a window
still has 16 pixels, tile by tile, so that a slide is never held whole.
"""

import io
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.data.images.eight_bits import as_corrupt
from ssl_locat.data.shards.raster_pages import COMPRESSIONS, Level, tile_header
from ssl_locat.errors import CorruptSample, DataError

_SATURATION = 18  # of 255: glass and the noise of its JPEG stay below, eosin above
_DARK = 30  # of 255: ink and the scanner's black border
_LEAST_PIXELS = 16  # of a window's side on the level that is judged
_SEGMENT = 4096  # pixels of a row of tiles that are judged at once
_SIZE = re.compile(rb"\xff\x51..[\x00-\xff]{2}(.{16})", re.DOTALL)  # JPEG 2000: SIZ, its length and capabilities, then four sizes

Pixels = Callable[[int, int, int, int], np.ndarray]  # (x, y, width, height) -> [height, width, bands]


class Windows(NamedTuple):
    """The grid of windows of a level; those at the right and lower edge that would reach over it are left out."""

    size: int
    stride: int
    columns: int
    rows: int

    def place(self, number: int) -> tuple[int, int]:
        """(x, y) of a window, pixels of its level."""
        return number % self.columns * self.stride, number // self.columns * self.stride


def grid(level: Level, size: int, stride: int) -> Windows:
    return Windows(size, stride, max(0, (level.width - size) // stride + 1), max(0, (level.height - size) // stride + 1))


def decode(tiles: list[bytes], level: Level, box: tuple[int, int, int, int]) -> np.ndarray:
    """[height, width, bands] of a box, out of the tiles that it touches, in the order of `Level.numbers`; b"" for one that the file leaves out.
    CorruptSample for a tile that is damaged."""
    x, y, width, height = box
    left, right, top, bottom = level.touched(*box)
    across, down = right - left, bottom - top
    shape = (down * level.tile_height, across * level.tile_width)
    whole = np.full((*shape, level.pages * level.samples), level.no_data or 0, level.kind)
    each = 1 if level.planar else level.samples
    with as_corrupt("a tile"):
        for place, tile in enumerate(tiles):
            plane, within = divmod(place, across * down)
            row, column = divmod(within, across)
            if tile:
                _check_tile(tile, level)
                rows = (
                    min(level.tile_height, level.height - (top + row) * level.tile_height)
                    if not level.tiled
                    else level.tile_height
                )
                pixels = _decoder(level, rows)(tile)
                at_y, at_x = row * level.tile_height, column * level.tile_width
                target = whole[at_y : at_y + rows, at_x : at_x + level.tile_width, plane * each : plane * each + each]
                target[...] = pixels.reshape(target.shape)
    x, y = x - left * level.tile_width, y - top * level.tile_height
    return np.ascontiguousarray(whole[y : y + height, x : x + width, : level.bands])


@lru_cache(maxsize=64)
def _decoder(level: Level, rows: int) -> Callable[[bytes], np.ndarray]:
    """Decodes one tile (or a strip of so many rows): tifffile's own, out of the header of a TIFF of that tile alone."""
    import tifffile

    one = level._replace(width=level.tile_width, height=rows, tile_height=rows, pages=1)
    file = tifffile.TiffFile(io.BytesIO(tile_header(one)), _multifile=False)
    page: Any = file.pages[0].aspage()
    tables = page.jpegtables

    def decoded(tile: bytes) -> np.ndarray:
        found, _, _ = page.decode(tile, 0, jpegtables=tables, _fullsize=True)
        if found is None:
            raise CorruptSample("a tile holds nothing")
        return np.asarray(found)

    return decoded


def _check_tile(tile: bytes, level: Level) -> None:
    """Decoders of JPEG make as many pixels as its own header says, and grey ones of what is missing; plain values may be fewer than there is room for."""
    kind = COMPRESSIONS[level.compression]
    if kind == "none":
        row = level.tile_width * (1 if level.planar else level.samples) * level.bits // 8
        if len(tile) % row or (level.tiled and len(tile) != row * level.tile_height):
            raise CorruptSample(f"a tile of {len(tile)} bytes where {row * level.tile_height} are needed")
    if kind not in ("JPEG", "JPEG 2000"):
        return
    if kind == "JPEG" and tile.rstrip(b"\0")[-2:] != b"\xff\xd9":
        raise CorruptSample("a tile is cut short")
    width, height = _jpeg_size(tile) if kind == "JPEG" else _jpeg_2000_size(tile)
    if width > level.tile_width or height > level.tile_height:
        raise CorruptSample(
            f"a tile of {width} x {height} pixels where there is room for {level.tile_width} x {level.tile_height}"
        )


def _jpeg_size(tile: bytes) -> tuple[int, int]:
    at = 2
    while tile[:2] == b"\xff\xd8" and at + 9 <= len(tile) and tile[at] == 0xFF:
        marker = tile[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(tile[at + 7 : at + 9], "big"), int.from_bytes(tile[at + 5 : at + 7], "big")
        at += 2 + int.from_bytes(tile[at + 2 : at + 4], "big")
    raise CorruptSample("a tile is no JPEG")


def _jpeg_2000_size(tile: bytes) -> tuple[int, int]:
    found = _SIZE.search(tile[:4096])
    if not found:
        raise CorruptSample("a tile is no JPEG 2000")
    x, y, left, top = (int.from_bytes(found.group(1)[place : place + 4], "big") for place in (0, 4, 8, 12))
    return x - left, y - top


def level_to_judge(levels: list[Level], chosen: int, size: int) -> int:
    """The smallest level on which a window still has enough pixels to be judged."""
    fine = [place for place in range(chosen, len(levels)) if size * levels[chosen].factor / levels[place].factor >= _LEAST_PIXELS]
    return max(fine, default=chosen)


def judge(
    level: Level, windows: Windows, scale: float, pixels: Pixels, min_tissue: float, min_data: float, no_data: float | None
) -> np.ndarray:
    """bool [windows]: which of them are kept. scale: pixels of `level` for one of the windows' level."""
    if min_tissue and (level.kind != "uint8" or level.bands != 3):
        raise DataError(
            f"min_tissue is for stained slides of 8 bits and 3 bands; this one holds {level.bands} bands of {level.kind}: take min_data"
        )
    side = [_edges(count, windows, scale) for count in (windows.columns, windows.rows)]
    tissue, data = (np.zeros((windows.rows, windows.columns)) for _ in range(2))
    none = level.no_data if no_data is None else no_data
    step = max(1, _SEGMENT // level.tile_width) * level.tile_width
    for top in range(0, level.height, level.tile_height):
        for left in range(0, level.width, step):
            width, height = min(step, level.width - left), min(level.tile_height, level.height - top)
            values = pixels(left, top, width, height)
            if min_tissue:
                _count(tissue, _tissue(values), left, top, *side)
            if min_data:
                _count(data, _data(values, none), left, top, *side)
    area = np.maximum(1, (side[1][1] - side[1][0])[:, None] * (side[0][1] - side[0][0])[None])
    kept: np.ndarray = (tissue / area >= min_tissue) & (data / area >= min_data)
    return kept.ravel()


def _edges(count: int, windows: Windows, scale: float) -> tuple[np.ndarray, np.ndarray]:
    starts = np.floor(np.arange(count) * windows.stride * scale).astype(int)
    return starts, np.maximum(starts + 1, np.round((np.arange(count) * windows.stride + windows.size) * scale).astype(int))


def _count(sums: np.ndarray, mask: np.ndarray, left: int, top: int, across: tuple, down: tuple) -> None:
    """Add to each window the pixels of a piece that are set: by sums over all rectangles from the piece's corner."""
    whole = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    whole[1:, 1:] = mask.cumsum(0).cumsum(1)
    x = [np.clip(edge - left, 0, mask.shape[1]) for edge in across]
    y = [np.clip(edge - top, 0, mask.shape[0]) for edge in down]
    columns, rows = np.flatnonzero(x[1] > x[0]), np.flatnonzero(y[1] > y[0])
    if len(columns) and len(rows):
        x0, x1, y0, y1 = x[0][columns], x[1][columns], y[0][rows], y[1][rows]
        sums[np.ix_(rows, columns)] += (
            whole[np.ix_(y1, x1)] - whole[np.ix_(y0, x1)] - whole[np.ix_(y1, x0)] + whole[np.ix_(y0, x0)]
        )


def _tissue(values: np.ndarray) -> np.ndarray:
    high, low = values.max(2).astype(np.int16), values.min(2)
    found: np.ndarray = ((high - low) * 255 > _SATURATION * high) & (high > _DARK)
    return found


def _data(values: np.ndarray, no_data: float | None) -> np.ndarray:
    """Where any band holds a value."""
    there: Any = np.isfinite(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
    if no_data is not None:
        there = there & (values != no_data)
    found: np.ndarray = there.any(2)
    return found


def reader(level: Level, fetch: Callable[[np.ndarray], list[bytes]]) -> Pixels:
    """Pixels of boxes by the tiles that `fetch` brings."""
    return lambda x, y, width, height: decode(fetch(level.numbers(x, y, width, height)), level, (x, y, width, height))
