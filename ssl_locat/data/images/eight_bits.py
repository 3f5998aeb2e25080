"""Ordinary images -> 8-bit pixels: JPEG by libjpeg-turbo, the rest by Pillow, each looked at by headers.py first."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from ssl_locat.data.images.headers import check_bytes, check_jpeg, check_memory, check_work, jpeg_scans
from ssl_locat.errors import CorruptSample, UserError

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "JPEG2000",
)  # MPO is opened by JPEG's plugin: its name here would end in a KeyError
_WHOLE, _STRIP = 1 << 18, 1 << 16  # pixels up to which an image is converted at once, as most are; and of a strip of a larger one
_SPARSE = 400  # pixels per byte above which a JPEG 2000 holds one colour, or lacks its data
# libjpeg's words for what it fills with grey; of other oddities (bytes between markers) an image may be whole
_MISSING = re.compile("premature end of data segment|bad Huffman code|found marker")

_SCIENCE = (b"PK\x03\x04", b"II\x2a\x00", b"MM\x00\x2a", b"II\x2b\x00", b"MM\x00\x2b")  # .npz and TIFF
_NEEDS_BANDS = "not an image of 8-bit grey or colours: DICOM, .npz and TIFF of other bands or types need data.channels, which `ssl-locat init` writes"

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> what makes the stored pixels upright; numpy only, so images and masks take the same path
_UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@contextmanager
def as_corrupt(what: str) -> Iterator[None]:
    """Decoders raise whatever they like for a damaged file, and warn of odd EXIF, palettes and sizes: either it decodes or it is corrupt."""
    try:
        yield
    except (CorruptSample, UserError):  # the second: a library is missing, which no other image will mend
        raise
    except Exception as error:
        raise CorruptSample(f"{what} does not decode: {type(error).__name__}: {error}") from None


def decode_rgb(data: bytes, max_pixels: int) -> np.ndarray:
    """uint8 [H, W, 3], upright, of any kind of ordinary image."""
    if data[:2] == b"\xff\xd8":
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is not None:
            orientation = image_orientation(data) if b"Exif\0\0" in data[:65536] else 1
            return turn(pixels, orientation)
    pixels, orientation = _decode_by_pillow(data, max_pixels)
    return turn(pixels, orientation)


def _decode_by_pillow(data: bytes, max_pixels: int) -> tuple[np.ndarray, int]:
    """RGB as stored, and the orientation: what Pillow holds is freed before it is turned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_image(data, max_pixels)
        image.load()  # before EXIF is looked for, which loads a PNG and hides what is wrong with it
        pixels = _to_rgb(image)
        if image.format == "JPEG2000" and pixels.size > 3 * _SPARSE * len(data) and (pixels != pixels[0, 0]).any():
            raise CorruptSample(f"image data is missing: {len(data)} bytes for {image.width} x {image.height} pixels")
        return pixels, orientation_of(image)


def decode_own_bands(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """An image whose own 8-bit bands are as many as asked for, untouched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_image(data, max_pixels)
        bands = len(image.getbands())
        if bands != channels or image.mode.startswith("I;16") or image.mode in ("I", "F", "P"):
            raise CorruptSample(
                f"the image has {bands} channels (mode {image.mode}), the backbone takes {channels}: see the guide to channels"
            )
        image.load()
        return turn(np.array(image), orientation_of(image))


def with_channels(pixels: np.ndarray, channels: int | None) -> np.ndarray:
    have = pixels.shape[2]
    if channels in (have, None):
        return pixels
    if have == 3 and channels == 1:
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    if have == 1 and channels == 3:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    raise CorruptSample(f"the image has {have} channels, the backbone takes {channels}: set backbone.in_chans={have}")


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """RGB by libjpeg-turbo; None where it refuses (CMYK, odd files): Pillow then decides. CorruptSample where image data is missing."""
    scans = jpeg_scans(data)
    try:
        height, width, colorspace, sampling = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_jpeg(width, height, sampling, scans, max_pixels)
    colours = colorspace in ("YCbCr", "Gray", "RGB")
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB" if colours else "CMYK")
    except ValueError as error:
        if _MISSING.search(str(error)):
            raise CorruptSample(f"image data is missing: {error}") from None
        return None
    return pixels if colours else None


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Its header read and found harmless; no pixel decoded yet."""
    if not data:
        raise CorruptSample("0 bytes")
    if data[128:132] == b"DICM":  # before all else: its first bytes may be a TIFF's, for viewers that know no DICOM
        raise CorruptSample(_NEEDS_BANDS)
    check_bytes(data)
    if data[:2] == b"\xff\xd8":
        jpeg_scans(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise CorruptSample(f"refused from its header: {error}") from None
    except Exception:
        if data.startswith(_SCIENCE):
            raise CorruptSample(_NEEDS_BANDS) from None
        raise CorruptSample(f"not an image of a known format ({', '.join(FORMATS)}): it begins with {data[:8]!r}") from None
    check_memory(image, max_pixels)
    check_work(image, data, max_pixels)
    return image


def image_orientation(data: bytes) -> int:
    """EXIF orientation 1..8 of an image; 1 (upright) where there is none or it cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return orientation_of(Image.open(io.BytesIO(data), formats=FORMATS))
        except Exception:
            return 1


def orientation_of(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1
    return value if value in _UPRIGHT else 1


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation in _UPRIGHT else pixels


def _to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3], strip by strip: whole, the copies in between take several times the result."""
    width, height = image.size
    rows = max(1, _STRIP // width)
    if width * height <= _WHOLE:
        return _strip_to_rgb(image, lambda: _range(image))
    found = _range(image) if image.mode in ("I", "F") else (0.0, 0.0)  # of other modes it is not asked for
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        pixels[top:bottom] = _strip_to_rgb(image.crop((0, top, width, bottom)), lambda: found)
    return pixels


def _range(image: Image.Image) -> tuple[float, float]:
    """Least and greatest value of a grey image of 32 bits."""
    rows = max(1, _STRIP // image.width)
    strips = (image.crop((0, top, image.width, min(image.height, top + rows))) for top in range(0, image.height, rows))
    values = [(strip.min(), strip.max()) for strip in (np.nan_to_num(np.array(one, dtype=np.float64)) for one in strips)]
    return min(low for low, _ in values), max(high for _, high in values)


def _strip_to_rgb(image: Image.Image, whole_range: Callable[[], tuple[float, float]]) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return _gray_to_rgb((np.array(image).astype(np.uint32) + 128) // 257)
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.array(image, dtype=np.float64))
        low, high = whole_range()
        if image.mode == "I" and low >= 0 and high <= 65535:  # how older Pillow opens 16-bit PNG
            return _gray_to_rgb((values + 128) // 257)
        return _gray_to_rgb((values - low) * (255 / max(high - low, 1e-12)) + 0.5)
    if image.mode == "P":  # by RGBA: a palette may carry transparency, which convert("RGB") warns about
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _gray_to_rgb(values: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(values.astype(np.uint8), cv2.COLOR_GRAY2RGB)
