"""DICOM images by pydicom: values after sign, bits and rescale (HU of a CT), or after the file's or a given window.

The parts of PS3.3 that matter: stored -> BitsStored and sign -> modality (slope, intercept or table) -> window or table (C.11.2) -> MONOCHROME1,
whose smallest value is white (dicom_values.py). Padding (PixelPaddingValue) is no data. The frames of a file are its bands, as pages of a TIFF
are: a network sees those that data.channels.pick names, one slice or several beside each other; no others are decoded.
"""

import io
import logging
import re
import struct
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ssl_locat.data.images.arrays import PICKED, Stored
from ssl_locat.data.images.dicom_values import Window, modality_values, of_interest, padding
from ssl_locat.data.images.headers import check_bytes, check_bytes_needed, check_pixels
from ssl_locat.errors import CorruptSample, UserError

_MAX_METADATA = 2 << 20  # bytes before the pixels: each element of eight bytes may be a step in Python; scanners write some 10 kB
_MAX_FRAGMENTS = 4096
_MAX_FRAMES = 512  # that all become bands, where none are picked: each is a step in Python
_DEFLATED, _RLE, _EXTENDED = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.51"
_PIXELS = re.compile(rb"\xe0\x7f[\x08\x09\x10]\x00|\x7f\xe0\x00[\x08\x09\x10]")  # (7FE0,0010), and the two of floats
_FRAMES = (
    *range(0xC0, 0xC4),
    0xC5,
    0xC6,
    0xC7,
    0xC9,
    0xCA,
    0xCB,
    0xCD,
    0xCE,
    0xCF,
    0xF7,
)  # markers of a JPEG's or JPEG-LS' frame header
_MAX_SEGMENTS = 1024  # before it
_MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")


def stored_dicom(data: bytes, max_pixels: int, pick: Sequence[int | str] | None, kept: int | None, window: Window) -> Stored:
    """float32 [H, W, frames x (1 or 3)] of type "dicom"; with a window in 0..1, clipped, as the standard has it.

    Of several frames those that `pick` names, and `places` of what comes back says which they are. `kept`: how many values will be.
    """
    try:
        import pydicom
    except ImportError:
        raise UserError("DICOM images need pydicom: pip install 'ssl_locat[dicom]'.") from None
    theirs = logging.getLogger("pydicom")
    if theirs.level != logging.CRITICAL:  # setting it empties the caches of all loggers
        theirs.setLevel(logging.CRITICAL)  # a trace for each decoder that fails: the sample's reason says it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values against the standard, which most scanners write somewhere
        _check_before(data)
        dataset = pydicom.dcmread(io.BytesIO(data), force=False)
        frames, kind, samples = _check_image(dataset, pick)
        _check_size(dataset, len(frames) * samples, samples, max_pixels, kept)
        bands, missing = [], []
        for frame in frames:
            pixels = _pixels(dataset, frame)
            if samples == 3:
                bands.append(pixels.astype(np.float32))
                continue
            missing.append(padding(dataset, pixels))
            values = modality_values(pixels, dataset, frame)
            bands.append(values if window is None else of_interest(values, dataset, frame, window))
    values = np.concatenate([band.reshape(*band.shape[:2], -1) for band in bands], axis=2)
    places = tuple(samples * frame + sample for frame in frames for sample in range(samples))
    return Stored(
        np.ascontiguousarray(values, np.float32),
        "dicom",
        missing=np.stack(missing, axis=2) if missing and missing[0] is not None else None,  # type: ignore[arg-type]  # all or none
        inverted=kind == "MONOCHROME1",
        places=places if _frame_count(dataset) > 1 else None,
        total=samples * _frame_count(dataset),
    )


def _check_before(data: bytes) -> None:
    """What no parser should open."""
    if _DEFLATED.encode() in data[:4096]:
        raise CorruptSample(f"transfer syntax {_DEFLATED} (deflated): unpack it first, as with dcmconv")
    found = _PIXELS.search(data, 132)
    if (found.start() if found else len(data)) > _MAX_METADATA:
        raise CorruptSample(f"refused: a DICOM file of more than {_MAX_METADATA} bytes before its pixels, or without any")


def _frame_count(dataset: Any) -> int:
    return int(dataset.get("NumberOfFrames", 1) or 1)


def _check_image(dataset: Any, pick: Sequence[int | str] | None) -> tuple[Sequence[int], str, int]:
    """(frames to decode, photometric interpretation, samples a pixel)"""
    if (
        "Rows" not in dataset
        or "Columns" not in dataset
        or not any(f"{kind}PixelData" in dataset for kind in ("", "Float", "DoubleFloat"))
    ):
        raise CorruptSample(f"a DICOM file without an image ({dataset.get('Modality', 'of no modality')})")
    samples, kind = int(dataset.get("SamplesPerPixel", 1)), str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if kind == "PALETTE COLOR":
        raise CorruptSample(
            "a DICOM image of a palette, whose values are numbers of colours: convert it to RGB, as with dcmdjpeg or gdcmconv"
        )
    if (samples, kind) not in [(1, name) for name in _MONOCHROME] + [(3, name) for name in _COLOURS]:
        raise CorruptSample(
            f"a DICOM image of {samples} samples a pixel, {kind}: read are {', '.join((*_MONOCHROME, *_COLOURS))}"
        )
    count = _frame_count(dataset)
    if count == 1:
        return (0,), kind, samples
    if pick is None:
        if not 0 < count <= _MAX_FRAMES:
            raise CorruptSample(f"a DICOM file of {count} frames, which are its bands: pick those to see with data.channels.pick")
        return range(count), kind, samples
    for band in pick:
        if isinstance(band, str):
            raise CorruptSample(f"no band {band!r}: frames have no names; they are numbered from 0 to {count - 1}")
        if band >= count * samples:
            raise CorruptSample(f"no band {band}: the file has {count} frames of {samples}, numbered from 0")
    return sorted({int(band) // samples for band in pick}), kind, samples


def _check_size(dataset: Any, bands: int, samples: int, max_pixels: int, kept: int | None) -> None:
    height, width, bits = int(dataset.Rows), int(dataset.Columns), int(dataset.BitsAllocated)
    check_pixels(width, height, max_pixels)
    # one frame as stored and two copies of it as 64-bit floats (rescaled); all of them as float32, twice while they are put together
    per_pixel = samples * (bits / 8 + 16) + 4 * bands * (2 if bands > samples else 1) + PICKED * (bands if kept is None else kept)
    check_bytes_needed(width, height, per_pixel, max_pixels, f"DICOM of {bits} bits, {bands} bands")


def _pixels(dataset: Any, number: int) -> np.ndarray:
    """[H, W] or [H, W, 3] of one frame, as stored; colours as RGB."""
    meta = getattr(dataset, "file_meta", None)
    syntax = getattr(meta, "TransferSyntaxUID", None)
    if syntax is None:
        raise CorruptSample("a DICOM file that does not say its transfer syntax")
    if not syntax.is_encapsulated:
        return _as_array(dataset, syntax, number)
    from pydicom.encaps import get_frame

    if dataset.PixelData.count(b"\xfe\xff\x00\xe0") > _MAX_FRAGMENTS:
        raise CorruptSample(f"refused: compressed pixels in more than {_MAX_FRAGMENTS} fragments")
    frame = get_frame(dataset.PixelData, number, number_of_frames=_frame_count(dataset))
    if str(syntax) == _RLE:
        return _unpack_rle(frame, dataset)
    _check_frame(frame, dataset)
    if str(syntax) == _EXTENDED and int(dataset.BitsStored) > 8:
        return _decode_extended(frame)
    return _as_array(dataset, syntax, number)


def _as_array(dataset: Any, syntax: Any, number: int) -> np.ndarray:
    from pydicom.pixels import pixel_array

    try:
        return np.asarray(pixel_array(dataset, index=number))
    except (NotImplementedError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        raise CorruptSample(
            f"transfer syntax {syntax} ({syntax.name}) cannot be decoded here: {said} (pip install 'ssl_locat[dicom]' brings decoders; or "
            "convert it, as with dcmconv or gdcmconv)"
        ) from None


def _decode_extended(frame: bytes) -> np.ndarray:
    """JPEG of 12 bits, which no decoder of pydicom's takes."""
    try:
        import imagecodecs
    except ImportError:
        raise UserError("DICOM in JPEG of 12 bits needs imagecodecs: pip install 'ssl_locat[dicom]'.") from None
    return np.asarray(imagecodecs.jpeg_decode(frame))


def _check_frame(frame: bytes, dataset: Any) -> None:
    """The compressed picture's own size must be the file's: a decoder allocates what it says."""
    check_bytes(frame)
    if frame.startswith(b"\xff\x4f\xff\x51"):
        x1, y1, x0, y0 = struct.unpack_from(">4I", frame, 8)
        width, height = x1 - x0, y1 - y0
    elif frame.startswith(b"\xff\xd8"):
        at = 2
        for _ in range(_MAX_SEGMENTS):  # by the segments' own lengths: a comment may hold what looks like a frame
            if at + 9 > len(frame) or frame[at] != 0xFF or frame[at + 1] in _FRAMES:
                break
            at += 1 if frame[at + 1] == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
        if at + 9 > len(frame) or frame[at] != 0xFF or frame[at + 1] not in _FRAMES:
            raise CorruptSample("a JPEG without a frame")
        height, width = struct.unpack_from(">HH", frame, at + 5)
    else:
        return  # a JPEG 2000 in boxes, or what no decoder knows
    if (height, width) != (dataset.Rows, dataset.Columns):
        raise CorruptSample(f"the compressed picture is {width} x {height}, the file says {dataset.Columns} x {dataset.Rows}")


def _unpack_rle(frame: bytes, dataset: Any) -> np.ndarray:
    """PS3.5 annex G: planes of bytes, the highest first, each packed by PackBits. pydicom's own unpacks without a bound."""
    height, width, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel", 1))
    width_of = int(dataset.BitsAllocated) // 8
    (count,) = struct.unpack_from("<I", frame)
    if count != samples * width_of or not 1 <= count <= 15:
        raise CorruptSample(f"an RLE frame of {count} planes; {samples} samples of {width_of} bytes need {samples * width_of}")
    starts = [*struct.unpack_from(f"<{count}I", frame, 4), len(frame)]
    planes = np.stack([_unpack_bits(frame[a:b], height * width) for a, b in pairwise(starts)])
    values: np.ndarray = np.zeros((samples, height * width), f"<u{width_of}")
    for place, plane in enumerate(planes.reshape(samples, width_of, -1).swapaxes(0, 1)):
        values |= plane.astype(values.dtype) << (8 * (width_of - 1 - place))
    if int(dataset.get("PixelRepresentation", 0)):
        unused = 8 * width_of - int(dataset.BitsStored)
        values = (values.view(f"<i{width_of}") << unused) >> unused
    values = values.reshape(samples, height, width)
    rgb: np.ndarray = values[0] if samples == 1 else np.moveaxis(values, 0, 2)
    if samples == 1:
        return rgb
    if dataset.PhotometricInterpretation == "RGB":
        return rgb
    from pydicom.pixels import convert_color_space

    return np.asarray(convert_color_space(np.ascontiguousarray(rgb), dataset.PhotometricInterpretation, "RGB"))


def _unpack_bits(packed: bytes, size: int) -> np.ndarray:
    """uint8 [size]"""
    out, at = bytearray(), 0
    while at < len(packed) - 1 and len(out) < size:
        header = packed[at]
        if header < 128:
            out += packed[at + 1 : at + 2 + header]
            at += 2 + header
        else:
            if header > 128:
                out += packed[at + 1 : at + 2] * (257 - header)
            at += 2 if header > 128 else 1
    if len(out) < size:
        raise CorruptSample(f"image data is missing: an RLE plane of {len(out)} bytes instead of {size}")
    return np.frombuffer(bytes(out[:size]), np.uint8)
