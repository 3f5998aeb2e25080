"""TIFF of any number type and bands, striped or tiled, by tifffile: GeoTIFF, microscopes, stacks of bands as pages. For 8-bit ones of colours Pillow serves."""

import io
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from ssl_locat.data.images.arrays import PICKED, TYPES, Stored
from ssl_locat.data.images.eight_bits import turn
from ssl_locat.data.images.headers import check_bytes, check_bytes_needed, check_pixels
from ssl_locat.errors import CorruptSample, UserError

MAGIC = (b"II\x2a\x00", b"MM\x00\x2a", b"II\x2b\x00", b"MM\x00\x2b")
# none, LZW, deflate (two numbers), PackBits, Zstandard: each is told how many bytes come out, and makes no more
_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 50000: "Zstandard"}
_PREDICTORS = (1, 2, 3)
_MAX_PAGES = 512  # each is a step in Python; stacks of bands have a few dozen
_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _FORMAT, _REDUCED, _ZSTANDARD = 258, 259, 262, 277, 339, 254, 50000
_PLAIN = ((1, 0), (1, 1), (1, 3), (3, 2), (3, 6), (4, 2), (4, 5))  # bands, photometric interpretation
_GDAL_METADATA, _GDAL_NODATA, _ORIENTATION = 42112, 42113, 274
_DESCRIPTION = re.compile(r'<Item name="DESCRIPTION" sample="(\d{1,4})" role="description">([^<]{1,200})</Item>')


def is_plain(data: bytes) -> bool:
    """Whether Pillow reads it without a loss: one page of grey, a palette or colours, of 8 bits or fewer."""
    pages = [page for page in _pages(data) if not page.get(_REDUCED, 0)]
    first = pages[0] if pages else {}
    kind = first.get(_SAMPLES, 1), first.get(_PHOTOMETRIC, 1)
    packed = first.get(_COMPRESSION, 1) == _ZSTANDARD  # which Pillow reads in some builds alone
    return len(pages) == 1 and kind in _PLAIN and first.get(_BITS, 1) <= 8 and first.get(_FORMAT, 1) == 1 and not packed


def stored_tiff(data: bytes, max_pixels: int, picked: int | None) -> Stored:
    """All bands of its full-size pages, which must be alike; reduced copies and masks are passed over."""
    check_bytes(data)
    count = sum(1 for _ in _pages(data))
    try:
        import tifffile
    except ImportError:
        raise UserError(
            "TIFF of more than 8 bits, or of other bands than colours, needs tifffile: pip install 'ssl_locat[tiff]'."
        ) from None
    # _multifile: OME-TIFF may name other files, which nobody asked for
    with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as file:
        every: list[Any] = [file.pages[number] for number in range(count)]
        pages = [page for page in every if not int(getattr(page, "subfiletype", 0)) & 5]
        if not pages:
            raise CorruptSample("a TIFF without an image of full size")
        first = pages[0]
        _check_page(first)
        if len(pages) > 1 and (first.samplesperpixel > 1 or len({(page.shape, str(page.dtype)) for page in pages}) > 1):
            raise CorruptSample(
                f"a TIFF of {len(pages)} images: pages that are bands have one band each, and one size and type: {first.shape} of {first.dtype} is the first"
            )
        height, width = first.imagelength, first.imagewidth
        bands = first.samplesperpixel * len(pages)
        check_pixels(width, height, max_pixels)
        kept = bands if picked is None else picked
        # tiles may reach over the edge by one each way; the result is held beside one of them
        check_bytes_needed(
            width, height, bands * first.dtype.itemsize + PICKED * kept, max_pixels, f"{bands} bands of {first.dtype}"
        )
        planes = [_read(page) for page in pages]
        values = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        no_data = _no_data(first)
        names = _names(first, bands)
        inverted = int(first.photometric) == 0
        orientation = _number(first, _ORIENTATION, 1)
    return Stored(turn(values, orientation), str(values.dtype), no_data, inverted=inverted, names=names)


def _check_page(page: Any) -> None:
    compression, predictor = int(page.compression), int(getattr(page, "predictor", 1) or 1)
    if compression not in _COMPRESSIONS or predictor not in _PREDICTORS:
        known = ", ".join(dict.fromkeys(_COMPRESSIONS.values()))
        raise CorruptSample(
            f"a TIFF of compression {getattr(page.compression, 'name', compression)}, predictor {predictor}; read are {known}"
        )
    if page.dtype is None or str(page.dtype.newbyteorder("=")) not in TYPES or page.bitspersample not in (8, 16, 32, 64):
        raise CorruptSample(f"a TIFF of {page.bitspersample} bits a value ({page.dtype}); read are {', '.join(TYPES)}")
    if getattr(page, "imagedepth", 1) != 1 or int(page.photometric) in (3, 6, 32803):
        raise CorruptSample("a TIFF of volumes, palettes, YCbCr or raw sensor data: convert it to plain bands")


def _read(page: Any) -> np.ndarray:
    """[H, W, N]; CorruptSample where strips or tiles are cut short: tifffile would leave zeros."""
    size = page.parent.filehandle.size
    for offset, length in zip(page.dataoffsets, page.databytecounts, strict=False):
        if length and offset + length > size:
            raise CorruptSample(f"image data is missing: a strip or tile ends at byte {offset + length} of {size}")
    values: np.ndarray = page.asarray(maxworkers=1)
    values = values.reshape(page.samplesperpixel, page.imagelength, page.imagewidth) if _planar(page) else values
    values = np.moveaxis(values, 0, 2) if _planar(page) else values.reshape(page.imagelength, page.imagewidth, -1)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _planar(page: Any) -> bool:
    return page.samplesperpixel > 1 and int(page.planarconfig) == 2


def _number(page: Any, code: int, default: int) -> int:
    tag = page.tags.get(code)
    return int(tag.value) if tag is not None and isinstance(tag.value, int) else default


def _no_data(page: Any) -> float | None:
    """GDAL writes it as text."""
    tag = page.tags.get(_GDAL_NODATA)
    try:
        value = float(str(tag.value).strip(" \0")) if tag is not None else math.nan
    except ValueError:
        return None
    return None if math.isnan(value) else value  # NaN is no data in every file


def _names(page: Any, bands: int) -> tuple[str, ...]:
    """GDAL's descriptions of the bands; () unless each has one."""
    tag = page.tags.get(_GDAL_METADATA)
    found = dict(_DESCRIPTION.findall(str(tag.value)[: 1 << 18])) if tag is not None else {}
    names = tuple(found.get(str(band), "") for band in range(bands))
    return names if all(names) else ()


def _pages(data: bytes) -> Iterator[dict[int, int]]:
    """Tag -> first value, where it is a small integer, of each page. CorruptSample for a chain that has no end."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    number, length, entry = ("Q", "Q", "HHQ8s") if big else ("I", "H", "HHI4s")
    tag_of = struct.Struct(order + entry)
    (at,) = struct.unpack_from(order + number, data, 8 if big else 4)
    seen: set[int] = set()
    while at:
        if at in seen or len(seen) >= _MAX_PAGES:
            raise CorruptSample(f"refused: a TIFF whose pages go round in a circle, or are more than {_MAX_PAGES}")
        seen.add(at)
        try:
            (count,) = struct.unpack_from(order + length, data, at)
            at += struct.calcsize(order + length)
            if count > 4096:
                raise CorruptSample(f"refused: a TIFF of {count} tags")
            found = {}
            for place in range(count):
                tag, kind, values, value = tag_of.unpack_from(data, at + place * tag_of.size)
                width = {3: 2, 4: 4}.get(kind)
                if width and tag < 512:
                    inside = width * values <= len(value)
                    where = 0 if inside else struct.unpack(order + number, value)[0]
                    found[tag] = struct.unpack_from(order + ("H" if width == 2 else "I"), value if inside else data, where)[0]
            (at,) = struct.unpack_from(order + number, data, at + count * tag_of.size)
        except struct.error:
            raise CorruptSample("the header is cut short") from None
        yield found
