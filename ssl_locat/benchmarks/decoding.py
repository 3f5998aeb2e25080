"""Part of `ssl-locat bench crops`: from a file's bytes to pixels, images per second and core of each format, beside the library's own reader.

The library reads what is stored and no more. Ours looks for damage and bombs first, and puts values of more than 8 bits on one scale as
float32, with no data filled in: what a network needs, and the library's reader leaves to its user.
"""

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ssl_locat.benchmarks.timing import make_rows, side_by_side
from ssl_locat.data.images.bands import Bands
from ssl_locat.data.images.decode import decode_image

SIDE = 256  # pixels
MANY = 12  # bands: Sentinel-2's


def cases(jpegs: list[bytes], repeats: int) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """One of each format whose library is installed. jpegs: of SIDE x SIDE pixels, from which the others are made."""
    for name, make in FORMATS.items():
        yield name, partial(_case, name, make, jpegs, repeats)


def _case(name: str, make: Callable, jpegs: list[bytes], repeats: int) -> list[dict]:
    encode, own, channels = make()
    files = [encode(image) for image in map(decode_image, jpegs)]
    variants = {
        own.__name__.strip("_"): lambda: [own(data) for data in files],
        "ours": lambda: [decode_image(data, channels=channels) for data in files],
    }
    timings = side_by_side(variants, repeats)
    speeds = {variant: len(files) / timing.seconds for variant, timing in timings.items()}
    spreads = {variant: timing.spread for variant, timing in timings.items()}
    case = f"{name}, {sum(map(len, files)) / len(files) / 1000:.0f} kB"
    return make_rows("crops", case, "decode", "images/s/core", speeds, next(iter(variants)), spreads)


def bands_of(image: np.ndarray, count: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint16 [H, W, count] of 12 bits, each band a mixture of the colours with noise below 8 bits."""
    mixture = np.random.default_rng(0).dirichlet((1, 1, 1), count)  # [count, 3]
    noise = np.random.default_rng(1).integers(0, 16, (*image.shape[:2], count))
    return (16 * (image @ mixture.T).astype(np.uint16) + noise).astype(np.uint16)


def _reading(count: int, type: str = "uint16") -> Bands:
    return Bands((0.0,) * count, (4095.0,) * count, (0.5,) * count, type=type)


def _jpeg() -> tuple:
    def pillow(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    return lambda image: cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 78])[1].tobytes(), pillow, 3


def _png8() -> tuple:
    def pillow(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    return lambda image: cv2.imencode(".png", image)[1].tobytes(), pillow, 3


def _png16() -> tuple:
    def opencv(data: bytes) -> np.ndarray:
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert found is not None  # we have just written it
        return found

    return lambda image: cv2.imencode(".png", bands_of(image, 3))[1].tobytes(), opencv, _reading(3)


def _npy() -> tuple:
    def numpy(data: bytes) -> np.ndarray:
        return np.load(io.BytesIO(data), allow_pickle=False)

    def encode(image: np.ndarray) -> bytes:
        out = io.BytesIO()
        np.save(out, bands_of(image, MANY))
        return out.getvalue()

    return encode, numpy, _reading(MANY)


def _tiff(**options: Any) -> tuple:
    import tifffile as library

    def tifffile(data: bytes) -> np.ndarray:
        return library.imread(io.BytesIO(data))

    def encode(image: np.ndarray) -> bytes:
        out = io.BytesIO()
        library.imwrite(out, bands_of(image, MANY), photometric="minisblack", planarconfig="contig", **options)
        return out.getvalue()

    return encode, tifffile, _reading(MANY)


def _dicom() -> tuple:
    from pydicom import Dataset, dcmread, dcmwrite
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    def pydicom(data: bytes) -> np.ndarray:
        return dcmread(io.BytesIO(data)).pixel_array

    def encode(image: np.ndarray) -> bytes:
        dataset, dataset.file_meta = Dataset(), FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.PhotometricInterpretation = SIDE, SIDE, 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.PixelData = bands_of(image, 1).tobytes()
        out = io.BytesIO()
        dcmwrite(out, dataset, enforce_file_format=True)
        return out.getvalue()

    return encode, pydicom, _reading(1, "dicom")


FORMATS: dict[str, Callable[..., tuple]] = {
    "JPEG": _jpeg,
    "PNG": _png8,
    "PNG of 3 x 16 bits": _png16,
    f"npy of {MANY} x uint16": _npy,
    f"TIFF of {MANY} x uint16": _tiff,
    f"TIFF of {MANY} x uint16, tiles, deflate": partial(_tiff, tile=(64, 64), compression="zlib"),
    "DICOM of 12 bits": _dicom,
}
