"""Bytes of one sample -> pixels, label, mask. Every kind of image becomes 8-bit RGB, or a `CorruptSample` that says why not.

Choices, the same for every reader of this package:
  EXIF orientation is applied, as viewers show the photograph; a mask stored like its image gets the same turn (`decode_mask`).
  Alpha is dropped, not composited (what `convert("RGB")` does everywhere in this field); of an animation the first frame is used.
  16-bit greys are scaled to 8 bits (value / 257), never clipped; 32-bit and float greys are stretched from their own range.
  Where a backbone takes one channel, colours become grey; where it takes another number than 1 or 3, images are .npy files (uint8
  [H, W, C]), or have as many 8-bit bands themselves (RGBA and CMYK have four).
  Size is read from the header and checked before any pixel is allocated; only the formats below are opened (no EPS, no PDF).
"""

import warnings

import numpy as np

from ssl_locat.data.images.arrays import decode_npy
from ssl_locat.data.images.bands import Bands, decode_bands
from ssl_locat.data.images.eight_bits import as_corrupt, decode_own_bands, decode_rgb, open_image, turn, with_channels
from ssl_locat.errors import CorruptSample, MissingMember

MAX_PIXELS = 100_000_000  # 300 MB as RGB: above the largest photographs, far below a decompression bomb
MAX_LABEL = 9_999_999  # scores are kept per class: one mistaken id must not ask for all memory, nor overflow
IMAGE_EXTENSIONS = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "ppm",
    "pgm",
    "jp2",
    "dcm",
)  # in order of preference
ARRAY_EXTENSIONS = (
    "npy",
    "npz",
)  # images where the sample or folder holds no other; beside one they are something else, such as features
LABEL_KEYS = ("cls", "label", "class", "target", "cls.txt", "label.txt")
MASK_KEYS = ("seg.png", "mask.png", "label.png", "segmentation.png", "seg", "mask")
_MASK_WORDS = ("seg", "mask", "label", "segmentation", "depth", "annotation")


def decode_image(data: bytes, *, channels: int | Bands | None = 3, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """[H, W, C], upright, contiguous and writable. Raises CorruptSample for anything that is not a whole image.

    channels: 3, RGB; 1, grey; another number, as stored, if the image has so many; None, as stored in an array and RGB otherwise: uint8.
    A Bands, what it picks of values of any type: float32, where 0 and 255 are its `low` and `high`.
    """
    with as_corrupt("image"):
        if isinstance(channels, Bands):
            return decode_bands(data, channels, max_pixels)
        if data[:6] == b"\x93NUMPY":
            return with_channels(decode_npy(data, max_pixels), channels)
        if channels not in (1, 3, None):
            return decode_own_bands(data, channels, max_pixels)
        return with_channels(decode_rgb(data, max_pixels), channels)


def decode_mask(data: bytes, *, orientation: int = 1, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """int64 [H, W] class ids: palette indices or grey values as stored, never colours.

    Args:
        orientation: of the *image* (`image_orientation`), for masks drawn on the stored pixels, as annotation tools and the usual
            data sets have them; it is the image's choice that counts, a mask's own EXIF is not read.
    """
    with as_corrupt("mask"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_image(data, max_pixels)
        image.load()
        mask = np.array(image)
    if mask.ndim == 3:
        if (mask[..., :3] != mask[..., :1]).any():
            raise CorruptSample(f"mask is in colours (mode {image.mode}); a palette or greyscale image of class ids is needed")
        mask = mask[..., 0]
    if mask.dtype.kind == "f":
        raise CorruptSample("mask holds floating-point values; a palette or greyscale image of class ids is needed")
    return turn(mask, orientation).astype(np.int64)  # turned while it is small


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
    for extension in ARRAY_EXTENSIONS:
        if extension in names:
            return members[names[extension]]
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
