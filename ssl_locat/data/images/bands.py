"""Images of any number type and bands -> float32, without a loss: which bands, on which scale, and what stands where there is no data.

The rule for no data: a value that is NaN, infinite, equal to `no_data` (else to what the file itself names: GDAL's tag, DICOM's padding)
becomes its band's mean before anything is cut, so that it is 0 after the normalisation; statistics leave it out.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from ssl_locat.data.images.arrays import PICKED, Stored, npy_type, stored_npy, stored_npz
from ssl_locat.data.images.dicom import stored_dicom
from ssl_locat.data.images.dicom_values import Window
from ssl_locat.data.images.eight_bits import open_image, orientation_of, turn
from ssl_locat.data.images.headers import check_bytes, check_bytes_needed, check_pixels
from ssl_locat.data.images.tiff_bands import MAGIC as TIFF
from ssl_locat.data.images.tiff_bands import is_plain, stored_tiff
from ssl_locat.errors import CorruptSample

_NPY, _NPZ, _PNG = b"\x93NUMPY", b"PK\x03\x04", b"\x89PNG"
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # x, y, and steps of them


class Bands(NamedTuple):
    """Which of a file's values a network of C channels gets, and how. `data.channels` of a config, resolved (`reading`)."""

    low: tuple[float, ...]  # [C] the value that becomes 0
    high: tuple[float, ...]  # [C] and the one that becomes 1; nothing is clipped
    mean: tuple[float, ...]  # [C] on that scale: stands where there is no data
    pick: tuple[int | str, ...] | None = None  # [C] the file's bands, by place from 0 or by name; None: all of them
    type: str | None = None  # what every file must hold
    bands: int | None = None  # and how many of them, where some are picked; None: any number
    no_data: float | None = None
    max_no_data: float = 1.0  # share of an image's values above which it is corrupt; one without any data always is
    bands_first: bool = False  # arrays are [C, H, W]
    window: Window = None  # of DICOM


def reading(channels: Mapping[str, Any] | None, mean: Sequence[float]) -> "Bands | int":
    """What `decode_image` takes as its `channels`: a Bands for a config's `data.channels` section; without one, how many there are."""
    if channels is None:
        return len(mean)
    count, pick, window = len(mean), channels.get("pick"), channels.get("window")
    return Bands(
        _each(channels.get("low", 0.0), count),
        _each(channels.get("high", 1.0), count),
        tuple(mean),
        tuple(pick) if pick else None,
        channels.get("type"),
        channels.get("bands"),
        channels.get("no_data"),
        channels.get("max_no_data", 1.0),
        channels.get("bands_first", False),
        tuple(window) if isinstance(window, list | tuple) else window,
    )


def how_many(channels: "Bands | int") -> int:
    return len(channels.low) if isinstance(channels, Bands) else channels


def _each(value: float | Sequence[float], count: int) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,) * count


def decode_bands(data: bytes, bands: Bands, max_pixels: int) -> np.ndarray:
    """float32 [H, W, C] where 0 is `bands.low` and 255 `bands.high`: the scale on which 8-bit images come."""
    stored = decode_stored(data, max_pixels, bands.pick, bands.bands_first, bands.window, len(bands.low))
    if bands.type and stored.type != bands.type:
        raise CorruptSample(f"the image holds {stored.type}, data.channels.type is {bands.type}")
    if bands.bands and (count := band_count(stored)) != bands.bands:
        raise CorruptSample(f"the image has {count} bands, data.channels.bands is {bands.bands}")
    values, missing = picked(stored, bands.pick, bands.no_data)
    if values.shape[2] != len(bands.low):
        raise CorruptSample(
            f"the image has {values.shape[2]} channels, the backbone takes {len(bands.low)}: choose some with data.channels.pick"
        )
    low, high = (np.array(numbers, np.float64) for numbers in (bands.low, bands.high))
    factor = 255 / (high - low)
    # whole rows at once, the scale repeated along them: over an inner axis of a few bands numpy takes half as long again
    height, width = values.shape[:2]
    shift, scale = (np.tile(numbers.astype(np.float32), width) for numbers in (low, factor))
    # 64 bits for the offset alone: of large values on a small range (heights in mm) float32 would keep few digits
    if np.abs(low).max() > 2.0**20:
        pixels = (values - low).astype(np.float32)
        rows = pixels.reshape(height, -1)
    else:
        pixels = values.astype(np.float32, order="C")
        rows = pixels.reshape(height, -1)
        rows -= shift
    rows *= scale
    if stored.inverted:
        np.subtract(255, pixels, out=pixels)
    if missing is not None:
        share = missing.mean()
        if share == 1 or share > bands.max_no_data:
            raise CorruptSample(
                f"{100 * share:.0f} % of the values are no data; data.channels.max_no_data is {bands.max_no_data:g}"
            )
        if share:
            np.copyto(pixels, np.array([255 * mean for mean in bands.mean], np.float32), where=missing)
    return np.ascontiguousarray(pixels)


def picked(stored: Stored, pick: Sequence[int | str] | None, no_data: float | None) -> tuple[np.ndarray, np.ndarray | None]:
    """([H, W, C] as stored, bool [H, W, C] where there is no data; None where every value is one)."""
    values, missing = stored.values, stored.missing
    if pick is not None:
        places = [_place(stored, band) for band in pick]
        values = values[..., places]
        missing = missing[..., places] if missing is not None else None
    no_data = stored.no_data if no_data is None else no_data
    found = [missing] if missing is not None else []
    if no_data is not None and not math.isnan(no_data):
        found.append(values == no_data)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        found.append(~np.isfinite(values))
    return values, np.logical_or.reduce(found) if found else None


def band_count(stored: Stored) -> int:
    """How many the file has, of which not all may have been read."""
    return stored.values.shape[2] if stored.total is None else stored.total


def _place(stored: Stored, band: int | str) -> int:
    count = stored.values.shape[2]
    if stored.places is not None and band in stored.places:  # else it has been refused
        return stored.places.index(int(band))
    if isinstance(band, str):
        if band not in stored.names:
            raise CorruptSample(f"no band {band!r}: the file names {', '.join(stored.names) or 'none'} ({count} bands)")
        return stored.names.index(band)
    if band >= count:
        raise CorruptSample(f"no band {band}: the image has {count}, numbered from 0")
    return band


def decode_stored(
    data: bytes,
    max_pixels: int,
    pick: Sequence[int | str] | None = None,
    bands_first: bool = False,
    window: Window = None,
    channels: int | None = None,
) -> Stored:
    """All that a file holds, upright; of a DICOM's frames those picked. Else `pick` and `channels` only say how many values will be kept,
    which bounds the memory."""
    kept = len(pick) if pick is not None else channels
    if data.startswith(_NPY):
        return stored_npy(data, max_pixels, kept, bands_first)
    if data.startswith(_NPZ):
        return stored_npz(data, max_pixels, kept, bands_first)
    if data[128:132] == b"DICM":
        return stored_dicom(data, max_pixels, pick, kept, window)
    if data.startswith(TIFF) and not is_plain(data):
        return stored_tiff(data, max_pixels, kept)
    if data.startswith(_PNG) and data[24:25] == b"\x10":
        return _stored_png16(data, max_pixels, kept)
    image = open_image(data, max_pixels)
    bands = len(image.getbands())
    check_bytes_needed(
        *image.size, 4 * bands + PICKED * (bands if kept is None else kept), max_pixels, f"{image.format} of {bands} bands"
    )
    if bands > 1 and _deep_colours(data, image.format or ""):
        raise CorruptSample(
            f"{image.format} of {bands} bands of more than 8 bits is not read without a loss: convert it to TIFF or PNG"
        )
    image.load()
    if image.mode in ("1", "P"):  # a palette stands for colours, and may be transparent
        image = image.convert("L" if image.mode == "1" else "RGBA").convert("L" if image.mode == "1" else "RGB")
    values = np.array(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM", "JPEG2000")):
        values = values.astype(np.uint16)
    return Stored(turn(values.reshape(*values.shape[:2], -1), orientation_of(image)), str(values.dtype))


def _deep_colours(data: bytes, format: str) -> bool:
    """Whether Pillow would cut these colours to 8 bits."""
    if format == "JPEG2000":
        at = data.find(b"\xff\x4f\xff\x51")
        return data[at + 42] & 0x7F > 7  # bits less one, of the first band
    return format == "PPM" and int(data[:256].split()[3]) > 255


def needs_bands(data: bytes) -> bool:
    """Whether 8 bits and three channels would lose something of this file: by its header."""
    if data.startswith(_NPY):
        return npy_type(data) != "uint8"
    if data.startswith(_NPZ) or data[128:132] == b"DICM":
        return True
    if data.startswith(TIFF):
        check_bytes(data)
        return not is_plain(data)
    if data.startswith(_PNG):
        return data[24:25] == b"\x10"
    return open_image(data, 1 << 62).mode in ("I;16", "I;16B", "I;16L", "I", "F") if data[:2] != b"\xff\xd8" else False


def _stored_png16(data: bytes, max_pixels: int, kept: int | None) -> Stored:
    """By OpenCV: Pillow cuts colours of 16 bits to 8. What OpenCV would pass over, cut or flipped data, is looked for before."""
    check_bytes(data)
    width, height, depth, colour, _, _, interlaced = (
        *(int.from_bytes(data[at : at + 4], "big") for at in (16, 20)),
        *data[24:29],
    )
    bands = {0: 1, 2: 3, 4: 2, 6: 4}.get(colour)
    if bands is None or depth != 16:
        raise CorruptSample(f"a PNG of colour type {colour} and {depth} bits")
    check_pixels(width, height, max_pixels)
    check_bytes_needed(
        width, height, 4 * bands + PICKED * (bands if kept is None else kept), max_pixels, f"PNG of {bands} x 16 bits"
    )
    _check_png_data(data, width, height, 2 * bands, bool(interlaced))
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        raise CorruptSample("a PNG of 16 bits that does not decode")
    values = values.reshape(height, width, -1)
    if bands == 2:  # OpenCV makes four of grey and alpha
        values = values[..., [0, -1]] if values.shape[2] > 1 else values
    elif bands > 2:
        values = values[..., [2, 1, 0, 3][:bands]]  # it has blue first
    if values.shape[2] != bands:
        raise CorruptSample(f"a PNG of {bands} bands that OpenCV reads as {values.shape[2]}")
    return Stored(np.ascontiguousarray(values), "uint16")


def _check_png_data(data: bytes, width: int, height: int, pixel_bytes: int, interlaced: bool) -> None:
    """Every chunk whole by its CRC, and as many bytes of pixels inside as the header says; never more are unpacked."""
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    expected = sum(rows * (1 + columns * pixel_bytes) for columns, rows in sizes if columns > 0 and rows > 0)
    unpack, found, at, ended = zlib.decompressobj(), 0, 8, False
    while at + 12 <= len(data) and not ended:
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 8 + length
        if end + 4 > len(data) or zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise CorruptSample(f"image data is missing or flipped: chunk {kind!r} at byte {at}")
        if kind == b"IDAT" and found <= expected:
            piece: bytes = data[at + 8 : end]
            while piece and found <= expected:
                found += len(unpack.decompress(piece, 1 << 20))
                piece = unpack.unconsumed_tail
        ended, at = kind == b"IEND", end + 4
    if found != expected or not ended:
        raise CorruptSample(f"image data is missing: {found} bytes of pixels instead of {expected}")
