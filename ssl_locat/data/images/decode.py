"""Bytes of one sample -> pixels, label, mask. Every kind of image becomes 8-bit RGB, or a `CorruptSample` that says why not.

Choices, the same for every reader of this package:
  EXIF orientation is applied, as viewers show the photograph; a mask stored like its image gets the same turn (`decode_mask`).
  Alpha is dropped, not composited (what `convert("RGB")` does everywhere in this field); of an animation the first frame is used.
  16-bit greys are scaled to 8 bits (value / 257), never clipped; 32-bit and float greys are stretched from their own range.
  Where a backbone takes one channel, colours become grey; where it takes another number than 1 or 3, images are .npy files (uint8
  [H, W, C]), or have as many 8-bit bands themselves (RGBA and CMYK have four).
  Size is read from the header and checked before any pixel is allocated; only the formats below are opened (no EPS, no PDF).
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from ssl_locat.data.images.headers import check_bytes, check_jpeg, check_memory, check_pixels, check_work, jpeg_scans
from ssl_locat.errors import CorruptSample, MissingMember

MAX_PIXELS = 100_000_000  # 300 MB as RGB: above the largest photographs, far below a decompression bomb
MAX_LABEL = 9_999_999  # scores are kept per class: one mistaken id must not ask for all memory, nor overflow
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
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2")  # in order of preference
ARRAY_EXTENSION = "npy"  # an image where the sample or folder holds no other; beside one it is something else, such as features
LABEL_KEYS = ("cls", "label", "class", "target", "cls.txt", "label.txt")
MASK_KEYS = ("seg.png", "mask.png", "label.png", "segmentation.png", "seg", "mask")
_MASK_WORDS = ("seg", "mask", "label", "segmentation", "depth", "annotation")

_WHOLE, _STRIP = 1 << 18, 1 << 16  # pixels up to which an image is converted at once, as most are; and of a strip of a larger one
_SPARSE = 400  # pixels per byte above which a JPEG 2000 holds one colour, or lacks its data
# libjpeg's words for what it fills with grey; of other oddities (bytes between markers) an image may be whole
_MISSING = re.compile("premature end of data segment|bad Huffman code|found marker")

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


def decode_image(data: bytes, *, channels: int | None = 3, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, C], upright, contiguous and writable. Raises CorruptSample for anything that is not a whole image.

    channels: 3, RGB; 1, grey; another number, as stored, if the image has so many; None, as stored in an array and RGB otherwise.
    """
    with _as_corrupt("image"):
        if data[:6] == b"\x93NUMPY":
            return _with_channels(_decode_array(data, max_pixels), channels)
        if channels not in (1, 3, None):
            return _decode_bands(data, channels, max_pixels)
        return _with_channels(_decode_rgb(data, max_pixels), channels)


@contextmanager
def _as_corrupt(what: str) -> Iterator[None]:
    """Decoders raise whatever they like for a damaged file, and warn of odd EXIF, palettes and sizes: either it decodes or it is corrupt."""
    try:
        yield
    except CorruptSample:
        raise
    except Exception as error:
        raise CorruptSample(f"{what} does not decode: {type(error).__name__}: {error}") from None


def _decode_rgb(data: bytes, max_pixels: int) -> np.ndarray:
    if data[:2] == b"\xff\xd8":
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is not None:
            orientation = image_orientation(data) if b"Exif\0\0" in data[:65536] else 1
            return _turn(pixels, orientation)
    pixels, orientation = _decode_by_pillow(data, max_pixels)
    return _turn(pixels, orientation)


def _decode_by_pillow(data: bytes, max_pixels: int) -> tuple[np.ndarray, int]:
    """RGB as stored, and the orientation: what Pillow holds is freed before it is turned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data, max_pixels)
        image.load()  # before EXIF is looked for, which loads a PNG and hides what is wrong with it
        pixels = _to_rgb(image)
        if image.format == "JPEG2000" and pixels.size > 3 * _SPARSE * len(data) and (pixels != pixels[0, 0]).any():
            raise CorruptSample(f"image data is missing: {len(data)} bytes for {image.width} x {image.height} pixels")
        return pixels, _orientation(image)


def _decode_array(data: bytes, max_pixels: int) -> np.ndarray:
    """A .npy file of uint8 [H, W] or [H, W, C] -> [H, W, C]. Its header is looked at before anything is allocated; nothing is unpickled."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read_header(stream)
    except Exception as error:  # of Python's own tokenizer, too
        raise CorruptSample(f"not a .npy file that can be read: {error}") from None
    if dtype != np.uint8 or len(shape) not in (2, 3):
        raise CorruptSample(
            f"the array is {dtype} {list(shape)}; expected uint8 [height, width, channels]: scale other types to 0..255 first"
        )
    check_pixels(shape[1], shape[0], max_pixels)
    values = np.frombuffer(data, np.uint8, offset=stream.tell())
    if len(values) != math.prod(shape):  # Python's: numpy's would overflow
        raise CorruptSample(f"the array's header says {list(shape)}, but {len(values)} bytes follow")
    return np.array(values.reshape(shape, order="F" if columns_first else "C").reshape(*shape[:2], -1), order="C")


def _decode_bands(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """An image whose own 8-bit bands are as many as asked for, untouched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data, max_pixels)
        bands = len(image.getbands())
        if bands != channels or image.mode.startswith("I;16") or image.mode in ("I", "F", "P"):
            raise CorruptSample(
                f"the image has {bands} channels (mode {image.mode}), the backbone takes {channels}: see the guide to channels"
            )
        image.load()
        return _turn(np.array(image), _orientation(image))


def _with_channels(pixels: np.ndarray, channels: int | None) -> np.ndarray:
    have = pixels.shape[2]
    if channels in (have, None):
        return pixels
    if have == 3 and channels == 1:
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    if have == 1 and channels == 3:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    raise CorruptSample(f"the image has {have} channels, the backbone takes {channels}: set backbone.in_chans={have}")


def image_orientation(data: bytes) -> int:
    """EXIF orientation 1..8 of an image; 1 (upright) where there is none or it cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _orientation(Image.open(io.BytesIO(data), formats=FORMATS))
        except Exception:
            return 1


def decode_mask(data: bytes, *, orientation: int = 1, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """int64 [H, W] class ids: palette indices or grey values as stored, never colours.

    Args:
        orientation: of the *image* (`image_orientation`), for masks drawn on the stored pixels, as annotation tools and the usual
            data sets have them; it is the image's choice that counts, a mask's own EXIF is not read.
    """
    with _as_corrupt("mask"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data, max_pixels)
        image.load()
        mask = np.array(image)
    if mask.ndim == 3:
        if (mask[..., :3] != mask[..., :1]).any():
            raise CorruptSample(f"mask is in colours (mode {image.mode}); a palette or greyscale image of class ids is needed")
        mask = mask[..., 0]
    if mask.dtype.kind == "f":
        raise CorruptSample("mask holds floating-point values; a palette or greyscale image of class ids is needed")
    return _turn(mask, orientation).astype(np.int64)  # turned while it is small


def find_image(members: dict[str, bytes], image_key: str | None = None) -> bytes:
    """The encoded image among a sample's members (extension after the key, any case -> bytes).

    Without `image_key`: `jpg`, `png`, ... first, then `image.jpg` and the like; names of masks are passed over.
    """
    names = {name.lower(): name for name in members}
    if image_key is not None:
        return _member(members, names, image_key.lower().lstrip("."), "image_key")
    for extension in IMAGE_EXTENSIONS:
        if extension in names:
            return members[names[extension]]
    for extension in IMAGE_EXTENSIONS:
        for name in sorted(names):
            head, _, last = name.rpartition(".")
            if last == extension and not any(word in _MASK_WORDS for word in head.split(".")):
                return members[names[name]]
    if ARRAY_EXTENSION in names:
        return members[names[ARRAY_EXTENSION]]
    raise MissingMember(f"no image among the members {_list(members)}; name the one to use with image_key")


def find_label(members: dict[str, bytes], label_key: str | None = None) -> int:
    """The class id of a sample: an integer from 0 to MAX_LABEL written as text. Raises CorruptSample if it is missing or no such number."""
    names = {name.lower(): name for name in members}
    if label_key is not None:
        text = _member(members, names, label_key.lower().lstrip("."), "label_key")
    else:
        found = next((key for key in LABEL_KEYS if key in names), None)
        if found is None and len(names) == 1:  # an image and nothing beside it: mostly from a folder
            raise MissingMember(
                "no label. Labels come from class folders, such as cats/ and dogs/; in shards from a .cls file beside each image"
            )
        if found is None:
            raise MissingMember(f"no label ({', '.join(LABEL_KEYS)}) among the members {_list(members)}; name it with label_key")
        text = members[names[found]]
    try:
        digits = bytes(text[:32]).decode("ascii").strip()
        if "_" in digits:  # Python reads 1_0 as 10
            raise ValueError
        label = int(digits)
    except ValueError:
        raise CorruptSample(f"label {bytes(text[:32])!r} is not a number; class ids are integers from 0") from None
    if label < 0:
        raise CorruptSample(f"label {label} is negative; class ids are integers from 0")
    if label > MAX_LABEL:
        raise CorruptSample(f"label {label} is too large; class ids are integers from 0 to {MAX_LABEL}, best without gaps")
    return label


def find_mask(members: dict[str, bytes], mask_key: str | None = None) -> bytes:
    """The encoded mask of a sample: `seg.png`, `mask.png`, ... or the member named `mask_key`."""
    names = {name.lower(): name for name in members}
    if mask_key is not None:
        return _member(members, names, mask_key.lower().lstrip("."), "mask_key")
    for key in MASK_KEYS:
        if key in names:
            return members[names[key]]
    if len(names) == 1:
        raise MissingMember(
            "no mask. Masks are looked for in masks/ (or annotations/, labels/) beside images/, under the image's name with .png; in shards "
            "as .seg.png or .mask.png beside each image"
        )
    raise MissingMember(f"no mask ({', '.join(MASK_KEYS)}) among the members {_list(members)}; name it with mask_key")


def _member(members: dict[str, bytes], names: dict[str, str], key: str, option: str) -> bytes:
    if key not in names:
        raise MissingMember(f"{option} is {key!r}, but the members are {_list(members)}")
    return members[names[key]]


def _list(members: dict[str, bytes]) -> str:
    return ", ".join(sorted(members)) or "(none)"


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


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise CorruptSample("0 bytes")
    check_bytes(data)
    if data[:2] == b"\xff\xd8":
        jpeg_scans(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise CorruptSample(f"refused from its header: {error}") from None
    except Exception:
        raise CorruptSample(f"not an image of a known format ({', '.join(FORMATS)}): it begins with {data[:8]!r}") from None
    check_memory(image, max_pixels)
    check_work(image, data, max_pixels)
    return image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1
    return value if value in _UPRIGHT else 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
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
