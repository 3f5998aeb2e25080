"""Images of any number type and bands: read without a loss, picked, put on a scale, and refused in words where they are damaged."""

import io
import struct
import tarfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.encaps import get_frame
from pydicom.pixels import apply_windowing

from ssl_locat.data.images.bands import Bands, decode_bands, decode_stored, needs_bands, reading
from ssl_locat.data.images.decode import decode_image, find_image
from ssl_locat.data.images.dicom_values import windowed
from ssl_locat.errors import CorruptSample

MANY = 100_000_000
TYPES = ("uint8", "uint16", "int16", "float16", "float32")


def values(bands: int, dtype: str, height: int = 20, width: int = 24) -> np.ndarray:
    rng = np.random.default_rng(bands)
    if dtype.startswith("float"):
        return rng.normal(0, 100, (height, width, bands)).astype(dtype)
    return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (height, width, bands), dtype=dtype, endpoint=True)


def npy(array: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def npz(save=np.savez_compressed, **arrays) -> bytes:
    out = io.BytesIO()
    save(out, **arrays)
    return out.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, photometric=options.pop("photometric", "minisblack"), **options)
    return out.getvalue()


def png16(array: np.ndarray) -> bytes:
    stored = array[..., [2, 1, 0, 3][: array.shape[2]]] if array.shape[2] > 2 else array
    return cv2.imencode(".png", stored)[1].tobytes()


def dicom(name: str) -> bytes:
    """Of the files that pydicom ships; its own look-up may ask a server."""
    return (Path(pydicom.__file__).parent / "data" / "test_files" / name).read_bytes()


def unscaled(count: int, **options) -> Bands:
    """On which a stored value v comes out as 255 * v."""
    return Bands((0.0,) * count, (1.0,) * count, (0.5,) * count, **options)


def stored(data: bytes, **options) -> np.ndarray:
    return decode_stored(data, MANY, **options).values


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bands", [1, 2, 3, 12])
def test_every_value_of_every_type_comes_back(bands, dtype):
    image = values(bands, dtype)
    files = {
        "npy": npy(image),
        "other byte order": npy(image.astype(image.dtype.newbyteorder(">"))),
        "columns first": npy(np.asfortranarray(image)),
        "npz": npz(image=image, label=np.array(3)),
        "interleaved": tiff(image, planarconfig="contig") if bands > 1 else tiff(image[..., 0]),
        "big endian": tiff(image, planarconfig="contig", byteorder=">") if bands > 1 else tiff(image[..., 0], byteorder=">"),
        "planar": tiff(np.moveaxis(image, 2, 0), planarconfig="separate") if bands > 1 else tiff(image[..., 0]),
        "tiled": tiff(image, tile=(16, 16), planarconfig="contig") if bands > 1 else tiff(image[..., 0], tile=(16, 16)),
        "bigtiff": tiff(image, planarconfig="contig", bigtiff=True) if bands > 1 else tiff(image[..., 0], bigtiff=True),
        "pages": tiff(np.moveaxis(image, 2, 0)),
    }
    for compression in ("zlib", "lzw", "zstd", "packbits"):
        files[compression] = tiff(np.moveaxis(image, 2, 0), compression=compression, tile=(16, 16))
    if dtype == "uint16" and bands in (1, 3):
        files["png"] = png16(image)
    for name, data in files.items():
        found = decode_stored(data, MANY)
        assert found.type == dtype and found.values.dtype == np.dtype(dtype), name
        assert np.array_equal(found.values, image, equal_nan=True), name
    first = stored(npy(np.moveaxis(image, 2, 0)), bands_first=True)
    assert np.array_equal(first, image)


@pytest.mark.parametrize("predictor", ["zlib", "lzw"])
def test_predictors_of_tiff(predictor):
    for dtype in ("uint16", "float32"):
        image = values(1, dtype)[..., 0]
        assert np.array_equal(stored(tiff(image, compression=predictor, predictor=True))[..., 0], image)


def test_sentinels_patch_is_the_same_interleaved_and_planar(shared_data):
    folder = shared_data("s2_12band_sample")
    layouts = [stored((folder / f"patch_{name}.tif").read_bytes()) for name in ("120x120x12_contig", "12x120x120_planar")]
    assert layouts[0].shape == (120, 120, 12) and np.array_equal(*layouts)
    # as info.json has it, measured by another program
    assert abs(layouts[0][..., 6].mean() - 4501.9) < 0.1


def test_a_ct_slice_is_the_same_as_dicom_and_as_png(shared_data):
    folder = shared_data("ct16_dicom")
    with (
        tarfile.open(folder / "ct16_dicom-dcm-test-000000.tar") as one,
        tarfile.open(folder / "ct16_dicom-png-test-000000.tar") as other,
    ):
        for number in range(0, 25, 6):
            key = f"test{number:06d}"
            hounsfield, shifted = (
                decode_stored(find_image({k: t.extractfile(f"{key}.{k}").read()}), MANY)
                for k, t in (("dcm", one), ("png", other))
            )
            assert hounsfield.type == "dicom" and shifted.type == "uint16"
            assert np.array_equal(hounsfield.values, shifted.values.astype(np.float32) - 1024)


def test_colours_of_sixteen_bits_are_not_cut():
    image = values(3, "uint16")
    assert np.array_equal(stored(png16(image)), image)
    alpha = values(4, "uint16")
    assert np.array_equal(stored(png16(alpha)), alpha)


def test_ordinary_images_are_bands_of_eight_bits():
    rgb = values(3, "uint8")
    for format in ("PNG", "BMP", "TIFF", "WEBP"):
        out = io.BytesIO()
        Image.fromarray(rgb).save(out, format, **({"lossless": True} if format == "WEBP" else {}))
        found = decode_stored(out.getvalue(), MANY)
        assert found.type == "uint8" and np.array_equal(found.values, rgb), format
        assert not needs_bands(out.getvalue())


@pytest.mark.parametrize(
    "data",
    [
        npy(values(3, "uint16")), npy(values(3, "float32")), npz(image=values(3, "uint8")), png16(values(1, "uint16")),
        png16(values(3, "uint16")), tiff(values(1, "int16")[..., 0]), tiff(values(5, "uint8"), planarconfig="contig"),
    ],
)  # fmt: skip
def test_what_eight_bits_would_cut_is_known_by_its_header(data):
    assert needs_bands(data)


# --- picking, scaling, no data --------------------------------------------------------------------------------------------


def test_bands_are_picked_ordered_and_scaled():
    image = values(4, "int16")
    bands = Bands((-100.0, 0.0), (100.0, 2000.0), (0.5, 0.5), pick=(2, 0))
    found = decode_image(npy(image), channels=bands)
    expected = np.stack([(image[..., 2] + 100.0) / 200, image[..., 0] / 2000.0], axis=2)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_allclose(found / 255, expected, rtol=1e-6, atol=1e-6)


def test_bands_go_by_the_names_of_the_file():
    red, near = values(2, "uint16")[..., 0], values(3, "uint16")[..., 0]
    data = npz(B08=near, B04=red, label=np.array(1))
    found = decode_bands(data, unscaled(2, pick=("B04", "B08")), MANY)
    np.testing.assert_allclose(found / 255, np.stack([red, near], 2), rtol=1e-6)
    gdal = '<GDALMetadata><Item name="DESCRIPTION" sample="0" role="description">B04</Item>\n' + (
        '<Item name="DESCRIPTION" sample="1" role="description">B08</Item></GDALMetadata>'
    )
    geo = tiff(np.stack([red, near], 2), planarconfig="contig", extratags=[(42112, 2, 0, gdal, True), (42113, 2, 0, "0", True)])
    found = decode_stored(geo, MANY)
    assert found.names == ("B04", "B08") and found.no_data == 0
    with pytest.raises(CorruptSample, match="no band 'B02': the file names B04, B08"):
        decode_bands(geo, unscaled(1, pick=("B02",)), MANY)


def test_no_data_becomes_the_mean_of_its_band():
    image = values(2, "float32")
    image[:5, :, 0], image[2, 3, 1] = np.nan, np.inf
    image[10, 10] = -9999
    found = decode_bands(npy(image), Bands((0.0, 0.0), (1.0, 1.0), (0.25, 0.75), no_data=-9999.0), MANY) / 255
    assert (found[:5, :, 0] == 0.25).all() and found[2, 3, 1] == 0.75 and found[10, 10].tolist() == [0.25, 0.75]
    assert np.isfinite(found).all() and found[6, 6, 0] == pytest.approx(image[6, 6, 0], rel=1e-6)
    with pytest.raises(CorruptSample, match=r"13 % of the values are no data; data\.channels\.max_no_data is 0\.1"):
        decode_bands(npy(image), unscaled(2, max_no_data=0.1), MANY)
    with pytest.raises(CorruptSample, match="100 % of the values are no data"):
        decode_bands(npy(np.full((4, 4), np.nan, np.float32)), unscaled(1), MANY)


def test_the_smallest_value_of_monochrome1_is_white():
    dataset = pydicom.dcmread(io.BytesIO(dicom("CT_small.dcm")))
    plain, bands = (
        decode_bands(dicom("CT_small.dcm"), Bands((-1000.0,), (1000.0,), (0.5,)), MANY),
        Bands((-1000.0,), (1000.0,), (0.5,)),
    )
    dataset.PhotometricInterpretation = "MONOCHROME1"
    out = io.BytesIO()
    dataset.save_as(out)
    np.testing.assert_allclose(decode_bands(out.getvalue(), bands, MANY), 255 - plain, atol=1e-4)


# --- DICOM against pydicom ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_are_the_standards(function):
    dataset = pydicom.Dataset()
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = 40, 400, function
    dataset.BitsStored, dataset.PixelRepresentation, dataset.PhotometricInterpretation = 12, 0, "MONOCHROME2"
    hounsfield = np.linspace(-500, 500, 2001)
    theirs = apply_windowing(hounsfield, dataset) / 4095
    np.testing.assert_allclose(windowed(hounsfield, 40, 400, function), theirs, atol=1e-6)


# transfer syntax by name in the file: what this project reads must be what pydicom says, all bits of it
READABLE = (
    "CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm", "JPGExtended.dcm", "JPEG2000.dcm", "693_J2KI.dcm", "SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm",
    "SC_rgb_rle_16bit.dcm", "SC_rgb_small_odd.dcm", "SC_ybr_full_422_uncompressed.dcm", "examples_rgb_color.dcm", "liver_1frame.dcm",
)  # fmt: skip


@pytest.mark.parametrize("name", READABLE)
def test_dicom_as_pydicom_reads_it(name):
    data = dicom(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(io.BytesIO(data))
        if name == "JPGExtended.dcm":  # of 12 bits, which none of pydicom's decoders here reads
            expected = imagecodecs.jpeg_decode(get_frame(dataset.PixelData, 0, number_of_frames=1))[..., None].astype(float)
        else:
            expected = np.atleast_3d(dataset.pixel_array).astype(float)
    expected = expected * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    np.testing.assert_allclose(stored(data), expected)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("image_dfl.dcm", r"1\.2\.840\.10008\.1\.2\.1\.99 .deflated.: unpack it first"), ("rtplan.dcm", "without an image .RTPLAN.|without any"),
        ("SC_rgb_rle_2frame.dcm", "6 channels, the backbone takes 1"), ("examples_palette.dcm", "of a palette, .* convert it to RGB"),
        ("MR_truncated.dcm", "does not decode|cannot be decoded"), ("rtdose.dcm", "15 channels, the backbone takes 1"),
    ],
)  # fmt: skip
def test_dicom_that_cannot_be_used_says_why(name, says):
    with pytest.raises(CorruptSample, match=says):
        decode_image(dicom(name), channels=unscaled(1))


# --- damage and bombs -----------------------------------------------------------------------------------------------------


def kinds() -> dict[str, bytes]:
    image = values(3, "uint16", 48, 64)
    return {
        "npy": npy(image),
        "npz": npz(image=image),
        "png": png16(image),
        "tiff": tiff(image, planarconfig="contig"),
        "tiled": tiff(np.moveaxis(image, 2, 0), planarconfig="separate", tile=(16, 16), compression="zlib"),
        "lzw": tiff(image, planarconfig="contig", compression="lzw"),
        "dicom": dicom("CT_small.dcm"),
        "dicom rle": dicom("MR_small_RLE.dcm"),
        "dicom jp2": dicom("MR_small_jp2klossless.dcm"),
        "dicom jpeg-ls": dicom("MR_small_jpeg_ls_lossless.dcm"),
    }


@pytest.mark.parametrize("name", kinds())
def test_what_is_cut_is_corrupt(name):
    data = kinds()[name]
    for share in (0.02, 0.3, 0.6, 0.97):
        with pytest.raises(CorruptSample):
            decode_image(data[: int(share * len(data))], channels=unscaled(1 if "dicom" in name else 3))


@pytest.mark.parametrize("name", kinds())
def test_flipped_bytes_decode_or_are_corrupt(name):
    """And in time: no flip of a header makes a decoder allocate or loop."""
    data, rng, began = kinds()[name], np.random.default_rng(0), time.process_time()
    for _ in range(60):
        broken = bytearray(data)
        for at in rng.integers(0, min(len(data), 2000), 3):
            broken[at] = rng.integers(256)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                decode_image(bytes(broken), channels=unscaled(1 if "dicom" in name else 3), max_pixels=1_000_000)
        except CorruptSample:
            pass
    assert time.process_time() - began < 15


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (npy(np.zeros((4, 4, 2), np.complex64)), "complex64 .*expected"),
        (npy(np.array([{}, {}], object), allow_pickle=True), "object"),
        (npz(image=np.array([{}, {}], object)), "needs one image|object|not a .npy"),
        (npy(values(2, "uint16"))[:-7], "bytes follow"),
        (npy(values(5, "uint16")), "no band 7: the image has 5, numbered from 0"),
        (npy(values(9, "uint8")), "holds uint8, data.channels.type is uint16"),
        (npz(a=values(2, "uint16"), b=values(3, "uint16")), "its arrays of two or three axes: a .20, 24, 2., b"),
        (tiff(values(3, "uint16"), planarconfig="contig", compression="jpeg2000"), "compression .*read are none, LZW"),
        (b"", "0 bytes"),
        (b"\0" * 4000, "not an image of a known format"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_says_why(data, says):
    with pytest.raises(CorruptSample, match=says):
        decode_image(data, channels=unscaled(2, pick=(7, 1), type="uint16"))


@pytest.mark.parametrize(
    "data", [dicom("CT_small.dcm"), npz(image=values(3, "uint16")), tiff(values(5, "uint16"), planarconfig="contig")]
)
def test_without_a_section_of_channels_the_reason_names_it(data):
    with pytest.raises(CorruptSample, match=r"need data\.channels, which `ssl-locat init` writes"):
        decode_image(data)


def test_another_number_of_bands_in_mid_set_is_corrupt():
    with pytest.raises(CorruptSample, match=r"has 5 channels, the backbone takes 4: choose some with data\.channels\.pick"):
        decode_image(npy(values(5, "uint16")), channels=unscaled(4))


def refused(data: bytes, says: str, bands: int = 1, **options) -> None:
    began = time.process_time()
    with pytest.raises(CorruptSample, match=says):
        decode_image(data, channels=unscaled(bands), **options)
    assert time.process_time() - began < 3


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_bombs_are_refused_before_they_unpack():
    bomb = zeros()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 0, 0, 0, 0))
    refused(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", bomb) + chunk(b"IEND", b""), "bytes of pixels instead of")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("image.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<u2", "fortran_order": False, "shape": (20000, 20000)})
        for _ in range(50):
            member.write(b"\0" * (1 << 20))
    refused(out.getvalue(), "refused from its header|bytes follow", max_pixels=1_000_000)
    small = tiff(values(1, "uint16", 64, 64)[..., 0], compression="zlib", rowsperstrip=64)
    with tifffile.TiffFile(io.BytesIO(small)) as file:
        page = file.pages[0]
        at, count_at = page.dataoffsets[0], page.tags[279].valueoffset
    broken = bytearray(small[:at] + bomb)
    struct.pack_into("<H" if page.tags[279].dtype == 3 else "<I", broken, count_at, min(len(bomb), 65535))
    refused(bytes(broken), "does not decode|missing")
    claims = tiff(values(1, "uint16")[..., 0]).replace(
        struct.pack("<HHII", 256, 4, 1, 24), struct.pack("<HHII", 256, 4, 1, 1 << 30)
    )
    refused(claims, "refused|does not decode|missing")


def zeros() -> bytes:
    """A quarter of a bomb of zeros, deflated."""
    pack = zlib.compressobj(1)
    return b"".join([pack.compress(bytes(1 << 24)) for _ in range(16)] + [pack.flush()])


def test_a_tiff_whose_pages_go_round_is_refused():
    data = bytearray(tiff(values(1, "uint16")[..., 0]))
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    struct.pack_into("<I", data, first + 2 + 12 * count, first)
    refused(bytes(data), "go round in a circle")


def test_a_dicom_frame_of_another_size_is_refused():
    data = bytearray(dicom("JPGExtended.dcm"))
    at = data.index(b"\xff\xc1")
    struct.pack_into(">HH", data, at + 5, 65000, 65000)
    refused(bytes(data), "the compressed picture is 65000 x 65000, the file says")


def test_memory_of_many_bands_is_bounded():
    with pytest.raises(CorruptSample, match="more than twice what max_pixels = 10000 take as RGB"):
        decode_image(npy(np.zeros((100, 100, 400), np.uint16)), channels=unscaled(400), max_pixels=10000)
    assert reading(None, (0.5,) * 7) == 7
