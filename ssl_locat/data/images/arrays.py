"""Images as arrays of any number type: .npy and .npz. Headers are looked at before anything is allocated; nothing is unpickled."""

import io
import math
import zipfile
from typing import NamedTuple

import numpy as np

from ssl_locat.data.images.headers import check_bytes_needed, check_pixels
from ssl_locat.errors import CorruptSample

# 64-bit floats are numpy's own default, and 32-bit integers what counts come in; both become float32, exactly up to 2^24
TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")
PICKED = 6  # bytes for each value that is kept: a float32, and whether it and its neighbours of the file are missing
_MEMBERS = 1024  # of a .npz: each is a step in Python; a hyperspectral cube has some hundred bands
_HEADER = 1 << 16  # bytes that a .npy's header may take, its magic included


class Stored(NamedTuple):
    """What a file holds, before anything is picked or scaled."""

    values: np.ndarray  # [H, W, N], of a type in TYPES, in the machine's byte order
    type: str  # of TYPES, or "dicom": values after the rescale slope and intercept
    no_data: float | None = None  # the value that the file itself names as none
    missing: np.ndarray | None = None  # bool [H, W, N]: further ones
    inverted: bool = False  # the smallest value is white
    names: tuple[str, ...] = ()  # of the N bands, where the file has some
    places: tuple[int, ...] | None = None  # which of the file's bands the N are; None: all of them, in its order
    total: int | None = None  # how many the file has; None: N


def decode_npy(data: bytes, max_pixels: int) -> np.ndarray:
    """uint8 [H, W, C] of a .npy file of uint8 [H, W] or [H, W, C]."""
    shape, columns_first, dtype, start = _npy_header(data)
    if dtype != np.uint8 or len(shape) not in (2, 3):
        raise CorruptSample(
            f"the array is {dtype} {list(shape)}; expected uint8 [height, width, channels]: other types need data.channels, which "
            "`ssl-locat init` writes"
        )
    check_pixels(shape[1], shape[0], max_pixels)
    return np.array(_npy_values(data, shape, columns_first, dtype, start).reshape(*shape[:2], -1), order="C")


def npy_type(data: bytes) -> str:
    return str(_npy_header(data)[2].newbyteorder("="))


def stored_npy(data: bytes, max_pixels: int, picked: int | None, bands_first: bool) -> Stored:
    """Of [H, W], [H, W, N], or with bands_first [N, H, W]."""
    shape, columns_first, dtype, start = _npy_header(data)
    check_array(shape, dtype, max_pixels, picked, bands_first)
    values = _npy_values(data, shape, columns_first, dtype, start)
    values = np.moveaxis(values, 0, 2) if bands_first and len(shape) == 3 else values
    return Stored(values.reshape(*values.shape[:2], -1), str(dtype.newbyteorder("=")))


def stored_npz(data: bytes, max_pixels: int, picked: int | None, bands_first: bool) -> Stored:
    """The one array of two or three axes; or all those of two, as bands under their names. Others (labels, coordinates) are passed over."""
    if data.count(b"PK\x01\x02") > _MEMBERS:
        raise CorruptSample(f"refused: a .npz of more than {_MEMBERS} arrays")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = {}
        for info in archive.infolist():
            if not info.filename.endswith(".npy") or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                continue
            with archive.open(info) as member:
                shape = _npy_header(member.read(_HEADER))[0]
            if len(shape) in (2, 3):
                found[info.filename.removesuffix(".npy")] = (info, shape)
        flat = {name: place for name, place in found.items() if len(place[1]) == 2}
        chosen = found if len(found) == 1 else flat if len(flat) == len(found) else {}
        if not chosen or len({shape for _, shape in chosen.values()}) > 1:
            listed = ", ".join(f"{name} {list(shape)}" for name, (_, shape) in found.items()) or "none"
            raise CorruptSample(f"a .npz needs one image, or bands of one size; its arrays of two or three axes: {listed}")
        parts, total = [], 0
        for info, shape in chosen.values():
            total += info.file_size
            # of all bands together: each by itself may be small
            check_bytes_needed(shape[-1], shape[-2], total / max(1, shape[-1] * shape[-2]), max_pixels, "a .npz")
            with archive.open(info) as member:
                content = member.read(info.file_size)  # no more than the directory says, which was checked; ends with its CRC
            parts.append(stored_npy(content, max_pixels, picked, bands_first))
    if len({part.type for part in parts}) > 1:
        raise CorruptSample(f"bands of several types: {', '.join(sorted({part.type for part in parts}))}")
    if len(parts) == 1:
        return parts[0]
    return Stored(np.concatenate([part.values for part in parts], axis=2), parts[0].type, names=tuple(chosen))


def check_array(shape: tuple[int, ...], dtype: np.dtype, max_pixels: int, picked: int | None, bands_first: bool = False) -> None:
    """CorruptSample for what is no image, or takes more memory than `max_pixels` allow."""
    if str(dtype.newbyteorder("=")) not in TYPES or len(shape) not in (2, 3):
        raise CorruptSample(f"the array is {dtype} {list(shape)}; expected [height, width] or three axes, of {', '.join(TYPES)}")
    bands, height, width = (1, *shape) if len(shape) == 2 else shape if bands_first else (shape[2], *shape[:2])
    check_pixels(width, height, max_pixels)
    kept = bands if picked is None else picked
    check_bytes_needed(width, height, bands * dtype.itemsize + PICKED * kept, max_pixels, f"{bands} bands of {dtype}")


def _npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether columns come first, type, where the values begin)"""
    stream = io.BytesIO(data[:_HEADER])
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read_header(stream)
    except Exception as error:  # of Python's own tokenizer, too
        raise CorruptSample(f"not a .npy file that can be read: {error}") from None
    return shape, columns_first, dtype, stream.tell()


def _npy_values(data: bytes, shape: tuple[int, ...], columns_first: bool, dtype: np.dtype, start: int) -> np.ndarray:
    expected, there = math.prod(shape) * dtype.itemsize, len(data) - start  # Python's product: numpy's would overflow
    if there != expected:
        raise CorruptSample(f"the array's header says {list(shape)} of {dtype}, {expected} bytes, but {there} bytes follow")
    values = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if columns_first else "C")
    return values.astype(dtype.newbyteorder("="), copy=False)
