"""DICOM: frames as bands, and what the stored values mean (tables and slopes of the modality, tables and windows of interest), against pydicom."""

import io
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_modality_lut, apply_voi
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

from ssl_locat.data.images.bands import Bands, decode_bands, decode_stored
from ssl_locat.data.images.decode import decode_image
from ssl_locat.data.images.dicom_values import windowed
from ssl_locat.errors import CorruptSample

MANY = 100_000_000
FILES = Path(pydicom.__file__).parent / "data" / "test_files"


def scan(name: str = "CT_small.dcm") -> pydicom.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pydicom.dcmread(FILES / name)


def written(dataset: pydicom.Dataset) -> bytes:
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def table(count: int, first: int, bits: int, words: bool = False) -> pydicom.Dataset:
    """A falling curve with a step; `words`: its entries as bytes (OW), else as numbers (US)."""
    item = pydicom.Dataset()
    entries = np.linspace(2**bits - 1, 3, count).astype(np.uint16)
    entries[: count // 3] = 5
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [count % (1 << 16), first, bits])
    item.add_new("LUTData", "OW" if words else "US", entries.tobytes() if words else entries.tolist())
    return item


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize(("first", "bits"), [(0, 16), (900, 16), (-200, 16)])
def test_a_modalitys_table_is_pydicoms(first, bits, words):
    dataset = scan()
    dataset.ModalityLUTSequence = [table(1500, first, bits, words)]
    dataset.ModalityLUTSequence[0].ModalityLUTType = "OD"
    found = decode_stored(written(dataset), MANY).values[..., 0]
    dataset = pydicom.dcmread(io.BytesIO(written(dataset)))
    np.testing.assert_array_equal(found, apply_modality_lut(dataset.pixel_array, dataset))
    assert len(np.unique(found)) > 50


@pytest.mark.parametrize("words", [False, True])
def test_the_files_table_of_interest_is_pydicoms_and_comes_before_its_window(words):
    dataset = scan()
    dataset.WindowCenter, dataset.WindowWidth = 40, 400
    dataset.VOILUTSequence = [table(2000, -900, 14, words), table(9, 0, 8)]
    found = decode_bands(written(dataset), Bands((0.0,), (1.0,), (0.5,), window="file"), MANY)[..., 0] / 255
    dataset = pydicom.dcmread(io.BytesIO(written(dataset)))
    hounsfield = np.rint(apply_modality_lut(dataset.pixel_array, dataset)).astype(int)
    np.testing.assert_allclose(found, apply_voi(hounsfield, dataset) / (2**14 - 1), atol=1e-5)
    # a window that is given is the one that is used
    given = decode_bands(written(dataset), Bands((0.0,), (1.0,), (0.5,), window=(40.0, 400.0)), MANY)[..., 0] / 255
    np.testing.assert_allclose(given, windowed(hounsfield, 40, 400), atol=1e-5)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_a_table_of_bytes_has_the_order_of_its_file(syntax):
    dataset = scan()
    item = table(1500, 0, 16, words=True)
    little = syntax == ExplicitVRLittleEndian
    entries = np.frombuffer(item.LUTData, "<u2")
    item.LUTData = entries.astype("<u2" if little else ">u2").tobytes()
    dataset.ModalityLUTSequence = [item]
    pixels = dataset.pixel_array
    dataset.PixelData = pixels.astype("<i2" if little else ">i2").tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    out = io.BytesIO()
    pydicom.dcmwrite(out, dataset, little_endian=little, implicit_vr=False, force_encoding=True)
    found = decode_stored(out.getvalue(), MANY).values[..., 0]
    np.testing.assert_array_equal(found, entries[np.clip(pixels, 0, 1499)])


def test_broken_tables_are_corrupt():
    dataset = scan()
    for item, says in ((table(1500, 0, 4), "4 bits an entry"), (table(1500, 0, 16), "1500 entries that claims 1501")):
        if "claims" in says:
            item.LUTDescriptor[0] += 1
        dataset.ModalityLUTSequence = [item]
        with pytest.raises(CorruptSample, match=says):
            decode_image(written(dataset), channels=Bands((0.0,), (1.0,), (0.5,)))


FRAMES = {"rtdose.dcm": 15, "rtdose_rle.dcm": 15, "rtdose_expb.dcm": 15, "SC_rgb_rle_2frame.dcm": 2, "SC_rgb_rle_16bit_2frame.dcm": 2, "examples_ybr_color.dcm": 30}  # fmt: skip


@pytest.mark.parametrize("name", FRAMES)
def test_frames_are_bands_and_those_picked_are_pydicoms(name):
    dataset = scan(name)
    colours = int(dataset.SamplesPerPixel)
    frames = dataset.pixel_array.astype(np.float64) * float(dataset.get("DoseGridScaling", 1))
    bands = (
        np.moveaxis(frames, 0, 2) if colours == 1 else np.concatenate(list(frames), axis=2)
    )  # first frame's RGB, second's, ...
    data = (FILES / name).read_bytes()
    whole = decode_stored(data, MANY).values
    assert whole.shape == bands.shape == (*bands.shape[:2], colours * FRAMES[name])
    np.testing.assert_allclose(whole, bands, rtol=1e-6)
    last = bands.shape[2] - 1
    picked = decode_bands(data, Bands((0.0,) * 3, (255.0,) * 3, (0.5,) * 3, pick=(last, 0, last - 1)), MANY)
    np.testing.assert_allclose(picked, bands[..., [last, 0, last - 1]], rtol=1e-6, atol=1e-5)
    with pytest.raises(CorruptSample, match=f"no band {last + 1}: the file has {FRAMES[name]} frames of {colours}"):
        decode_bands(data, Bands((0.0,), (1.0,), (0.5,), pick=(last + 1,)), MANY)


def test_one_frame_of_many_takes_the_memory_of_one():
    """A cine loop of a thousand frames: all of them are refused, one is read."""
    dataset = scan("rtdose.dcm")
    dataset.PixelData = dataset.PixelData * 100
    dataset.NumberOfFrames = 1500
    data, small = written(dataset), 4000  # pixels; the least that any image may take is 16 MB
    with pytest.raises(CorruptSample, match="1500 frames, which are its bands: pick those"):
        decode_image(data, channels=Bands((0.0,) * 1500, (1.0,) * 1500, (0.5,) * 1500), max_pixels=small)
    one = decode_image(data, channels=Bands((0.0,), (255.0,), (0.5,), pick=(1499,)), max_pixels=small)
    np.testing.assert_allclose(one[..., 0], scan("rtdose.dcm").pixel_array[14] * float(dataset.DoseGridScaling), rtol=1e-6)
    dataset.NumberOfFrames = 1501  # the last is not there
    with pytest.raises(CorruptSample):
        decode_image(written(dataset), channels=Bands((0.0,), (255.0,), (0.5,), pick=(1500,)))


def test_frames_of_an_enhanced_object_have_slopes_and_windows_of_their_own():
    dataset = scan("rtdose.dcm")
    del dataset.DoseGridScaling
    groups = []
    for number in range(15):
        values, window, frame = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = number + 1, -10 * number, "US"
        window.WindowCenter, window.WindowWidth, window.VOILUTFunction = 1e5 * (number + 1), 2e5, "LINEAR_EXACT"
        frame.PixelValueTransformationSequence, frame.FrameVOILUTSequence = [values], [window]
        groups.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = groups
    stored = dataset.pixel_array.astype(np.float64)
    found = decode_stored(written(dataset), MANY).values
    expected = np.stack([(n + 1) * stored[n] - 10 * n for n in range(15)], axis=2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    shown = decode_stored(written(dataset), MANY, pick=(3,), window="file").values[..., 0]
    np.testing.assert_allclose(shown, windowed(expected[..., 3], 4e5, 2e5, "LINEAR_EXACT"), atol=1e-6)
    # what all frames share
    dataset.SharedFunctionalGroupsSequence = [groups[2]]
    dataset.PerFrameFunctionalGroupsSequence = [pydicom.Dataset() for _ in range(15)]
    np.testing.assert_allclose(decode_stored(written(dataset), MANY).values[..., 7], 3 * stored[7] - 20, rtol=1e-6)
