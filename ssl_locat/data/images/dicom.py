"""DICOM images by pydicom: values after sign, bits and rescale (HU of a CT), or after the file's or a given window.

The parts of PS3.3 that matter: stored -> BitsStored and sign -> modality (slope, intercept or table) -> window (C.11.2.1) -> MONOCHROME1,
whose smallest value is white. Padding (PixelPaddingValue) is no data. One frame a file: which of several a network sees is the user's to say.
"""

import io
import logging
import re
import struct
import warnings
from itertools import pairwise
from typing import Any

import numpy as np

from ssl_locat.data.images.arrays import PICKED, Stored
from ssl_locat.data.images.headers import check_bytes, check_bytes_needed, check_pixels
from ssl_locat.errors import CorruptSample, UserError

Window = str | tuple[float, float] | None  # "file": the first that it holds; (centre, width); None: values as they are

_MAX_METADATA = 2 << 20  # bytes before the pixels: each element of eight bytes may be a step in Python; scanners write some 10 kB
_MAX_FRAGMENTS = 4096
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


def stored_dicom(data: bytes, max_pixels: int, picked: int | None, window: Window) -> Stored:
    """float32 [H, W, 1 or 3] of type "dicom"; with a window in 0..1, clipped, as the standard has it."""
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut
    except ImportError:
        raise UserError("DICOM images need pydicom: pip install 'ssl_locat[dicom]'.") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # a trace for each decoder that fails: the sample's reason says it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values against the standard, which most scanners write somewhere
        _check_before(data)
        dataset = pydicom.dcmread(io.BytesIO(data), force=False)
        kind, samples = _check_image(dataset, len(data), max_pixels, picked)
        pixels = _pixels(dataset, max_pixels)
        missing = _padding(dataset, pixels) if samples == 1 else None
        values = apply_modality_lut(pixels, dataset).astype(np.float32) if samples == 1 else pixels.astype(np.float32)
        if window is not None and samples == 1:
            values = windowed(values, *_window(dataset, window))
    values = np.ascontiguousarray(values).reshape(*values.shape[:2], -1)
    missing = None if missing is None else missing[..., None]
    return Stored(values, "dicom", missing=missing, inverted=kind == "MONOCHROME1")


def windowed(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Values -> 0..1 by the standard's LINEAR, LINEAR_EXACT or SIGMOID."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    # a width of 1 is a threshold
    return np.clip((values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5, 0, 1)


def _check_before(data: bytes) -> None:
    """What no parser should open."""
    if _DEFLATED.encode() in data[:4096]:
        raise CorruptSample(f"transfer syntax {_DEFLATED} (deflated): unpack it first, as with dcmconv")
    found = _PIXELS.search(data, 132)
    if (found.start() if found else len(data)) > _MAX_METADATA:
        raise CorruptSample(f"refused: a DICOM file of more than {_MAX_METADATA} bytes before its pixels, or without any")


def _check_image(dataset: Any, length: int, max_pixels: int, picked: int | None) -> tuple[str, int]:
    """(photometric interpretation, samples a pixel)"""
    if (
        "Rows" not in dataset
        or "Columns" not in dataset
        or not any(f"{kind}PixelData" in dataset for kind in ("", "Float", "DoubleFloat"))
    ):
        raise CorruptSample(f"a DICOM file without an image ({dataset.get('Modality', 'of no modality')})")
    height, width, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel", 1))
    frames, kind = int(dataset.get("NumberOfFrames", 1) or 1), str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if frames != 1:
        raise CorruptSample(f"a DICOM file of {frames} frames: save those to train on as files of their own")
    if (samples, kind) not in [(1, name) for name in _MONOCHROME] + [(3, name) for name in _COLOURS]:
        raise CorruptSample(
            f"a DICOM image of {samples} samples a pixel, {kind}: read are {', '.join((*_MONOCHROME, *_COLOURS))}"
        )
    check_pixels(width, height, max_pixels)
    bits = int(dataset.BitsAllocated)
    # the stored values, two copies as 64-bit floats (rescaled), the float32
    per_pixel = samples * (bits / 8 + 16 + 4) + PICKED * (samples if picked is None else picked)
    check_bytes_needed(width, height, per_pixel, max_pixels, f"DICOM of {bits} bits")
    return kind, samples


def _pixels(dataset: Any, max_pixels: int) -> np.ndarray:
    """[H, W] or [H, W, 3] as stored; colours as RGB."""
    meta = getattr(dataset, "file_meta", None)
    syntax = getattr(meta, "TransferSyntaxUID", None)
    if syntax is None:
        raise CorruptSample("a DICOM file that does not say its transfer syntax")
    if not syntax.is_encapsulated:
        return _as_array(dataset, syntax)
    from pydicom.encaps import get_frame

    if dataset.PixelData.count(b"\xfe\xff\x00\xe0") > _MAX_FRAGMENTS:
        raise CorruptSample(f"refused: a frame of more than {_MAX_FRAGMENTS} fragments")
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if str(syntax) == _RLE:
        return _unpack_rle(frame, dataset)
    _check_frame(frame, dataset)
    if str(syntax) == _EXTENDED and int(dataset.BitsStored) > 8:
        return _decode_extended(frame)
    return _as_array(dataset, syntax)


def _as_array(dataset: Any, syntax: Any) -> np.ndarray:
    try:
        return np.asarray(dataset.pixel_array)
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


def _padding(dataset: Any, pixels: np.ndarray) -> np.ndarray | None:
    """bool [H, W]: what lies outside the scanner's field of view."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    # stored before the sign was known to some writers: the same bits are meant
    value, other = int(value), int(dataset.get("PixelPaddingRangeLimit", value))
    bits = int(dataset.BitsAllocated)
    if int(dataset.get("PixelRepresentation", 0)):
        value, other = (number - (1 << bits) if number >= 1 << (bits - 1) else number for number in (value, other))
    return (pixels >= min(value, other)) & (pixels <= max(value, other))


def _window(dataset: Any, window: str | tuple[float, float]) -> tuple[float, float, str]:
    """(centre, width, function); of the file the first that it names."""
    if not isinstance(window, str):
        return *window, "LINEAR"
    found = [dataset.get(name) for name in ("WindowCenter", "WindowWidth")]
    if any(value is None or value == "" for value in found):
        raise CorruptSample(
            "no window in the file (WindowCenter, WindowWidth): give one as data.channels.window: [CENTRE, WIDTH]"
        )
    first = [float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value) for value in found]
    function = str(dataset.get("VOILUTFunction", "LINEAR") or "LINEAR")
    if first[1] < (1 if function == "LINEAR" else 1e-6) or function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise CorruptSample(f"a window of width {first[1]:g} and function {function}")
    return first[0], first[1], function
