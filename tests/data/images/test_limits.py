"""Images that lie about themselves cost no more time and memory than honest ones, and what is missing in them is seen."""

import io
import os
import random
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from ssl_locat.data.images.decode import decode_image, decode_mask, find_image
from ssl_locat.errors import CorruptSample

SECONDS = 5  # of CPU for anything refused; 0.05 s on an idle core


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Smooth, as photographs are, with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(smooth + rng.integers(-9, 9, smooth.shape), 0, 255).astype(np.uint8))


def saved(image: Image.Image, format: str, **options) -> bytearray:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return bytearray(buffer.getvalue())


def files() -> dict[str, bytearray]:
    """One small file of every format and kind that is read."""
    rgb, grey = picture(), picture().convert("L")
    npy = io.BytesIO()
    np.save(npy, np.asarray(rgb))
    found = {
        "jpeg": saved(rgb, "JPEG", quality=90),
        "jpeg progressive": saved(rgb, "JPEG", progressive=True),
        "jpeg grey": saved(grey, "JPEG"),
        "jpeg cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "jpeg exif": saved(rgb, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        "mpo": saved(rgb, "MPO", save_all=True, append_images=[picture(seed=1)]),
        "png": saved(rgb, "PNG"),
        "png palette": saved(rgb.quantize(64), "PNG"),
        "png rgba": saved(rgb.convert("RGBA"), "PNG"),
        "png 16": saved(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG"),
        "webp": saved(rgb, "WEBP"),
        "webp lossless": saved(rgb, "WEBP", lossless=True),
        "gif": saved(rgb, "GIF"),
        "bmp": saved(rgb, "BMP"),
        "ppm": saved(rgb, "PPM"),
        "pgm": saved(grey, "PPM"),
        "jp2": saved(rgb, "JPEG2000"),
        "jp2 tiled": saved(rgb, "JPEG2000", tile_size=(32, 32)),
        "npy": bytearray(npy.getvalue()),
    }
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        found[f"tiff {compression}"] = saved(rgb, "TIFF", compression=compression)
    found["tiff float"] = saved(Image.fromarray(np.asarray(grey).astype(np.float32)), "TIFF")
    return found


FILES = files()


@pytest.mark.parametrize("name", FILES)
def test_every_kind_decodes(name):
    pixels = decode_image(bytes(FILES[name]))
    assert pixels.dtype == np.uint8 and sorted(pixels.shape) == [3, 48, 64] and pixels.flags.writeable and pixels.std() > 10


# --- missing data ---------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_png_is_no_black_picture():
    whole, data = picture(), FILES["png"]
    for at in range(data.index(b"IDAT") + 60, len(data) - 24, 97):
        flipped = bytearray(data)
        flipped[at] ^= 4
        with pytest.raises(CorruptSample):
            decode_image(bytes(flipped))
    assert (decode_image(bytes(data)) == np.asarray(whole)).all()


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "jpeg grey", "jpeg cmyk"])
def test_a_jpeg_whose_header_claims_more_pixels_than_it_has_is_corrupt(name):
    data = bytearray(FILES[name])
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    for height, width in ((9000, 9000), (96, 64), (48, 640)):
        struct.pack_into(">HH", data, at + 5, height, width)
        with pytest.raises(CorruptSample):
            decode_image(bytes(data))


def test_a_jpeg_with_bytes_between_its_markers_is_whole():
    """What cameras and web servers append is no damage."""
    data = FILES["jpeg"]
    assert (decode_image(bytes(data[:-2]) + b"\x12\x34\x56\xff\xd9") == decode_image(bytes(data))).all()


def jp2_claiming(width: int, height: int, tile: int | None = None) -> bytes:
    data = bytearray(FILES["jp2"])
    struct.pack_into(">II", data, data.index(b"ihdr") + 4, height, width)
    at = data.index(b"\xff\x4f\xff\x51")
    struct.pack_into(">II", data, at + 8, width, height)
    if tile:
        struct.pack_into(">II", data, at + 24, tile, tile)
    return bytes(data)


@pytest.mark.parametrize("claim", [(9000, 9000), (9000, 9000, 9000), (3000, 2000, 3000), (64, 4800)])
def test_a_jpeg_2000_whose_header_claims_more_than_it_has_is_corrupt(claim):
    with pytest.raises(CorruptSample):
        decode_image(jp2_claiming(*claim), max_pixels=400_000_000)


def test_a_jpeg_2000_of_one_colour_is_small_and_whole():
    assert (decode_image(bytes(saved(Image.new("RGB", (1500, 1500), "white"), "JPEG2000"))) == 255).all()


@pytest.mark.parametrize("name", [name for name in FILES if name != "mpo"])
def test_what_is_cut_is_corrupt(name):
    data = FILES[name]
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(CorruptSample):
            decode_image(bytes(data[: int(share * len(data))]))


# --- bombs ----------------------------------------------------------------------------------------------------------------


def refused(data: bytes, words: str = "", **options) -> None:
    began = time.process_time()
    with pytest.raises(CorruptSample, match=words or None):
        decode_image(data, **options)
    assert time.process_time() - began < SECONDS


def test_a_jpeg_of_2000_scans_is_refused():
    data = saved(picture(2000, 2000), "JPEG", progressive=True, quality=10)
    last = data.rindex(b"\xff\xda")
    refused(bytes(data[:-2] + data[last:-2] * 2000 + data[-2:]), "scans")
    bytes_between = b"\xff\xda\0\x08\1\1\0\0\x3f\0\0" * 2000
    refused(bytes(data[:-2]) + bytes_between + b"\xff\xd9", "scans")


def test_scans_times_pixels_are_bounded():
    data = saved(picture(400, 400), "JPEG", progressive=True)
    assert decode_image(bytes(data)).shape == (400, 400, 3)
    refused(bytes(data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 20 + data[-2:]), "scans over", max_pixels=160_000)


def test_long_comments_are_refused():
    gif, png = FILES["gif"], FILES["png"]
    at = 13 + (3 << (gif[10] & 7) + 1)
    refused(bytes(gif[:at]) + b"\x21\xfe" + (b"\xff" + b"c" * 255) * 40_000 + b"\0" + bytes(gif[at:]), "comments")
    text = b"tEXt" + b"a\0" + b"c" * 2_000_000
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    refused(bytes(png[:33]) + chunk + bytes(png[33:]), "comments")
    refused(b"P6 #" + b"c" * 5_000_000 + b"\n8 8 255 " + bytes(192))
    segment = b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)
    refused(b"\xff\xd8" + segment * 300 + bytes(FILES["jpeg"][2:]), "metadata")


def packed_bmp(width: int, height: int, body: bytes) -> bytes:
    """Runs of 8 bits, which Pillow unpacks in Python."""
    start = 14 + 40 + 1024
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + sizes + bytes(1024) + body


def png_chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_small_packed_bmp_decodes():
    assert decode_image(packed_bmp(100, 100, b"\x64\5\0\0" * 100 + b"\0\1")).shape == (100, 100, 3)


def test_millions_of_small_pieces_are_refused():
    """Each is a step in Python for Pillow, and hardly a byte."""
    png, exif = bytes(FILES["png"]), bytes(FILES["jpeg exif"])
    for kind in (b"IDAT", b"abCd"):
        refused(png[:33] + png_chunk(kind) * 500_000 + png[33:], "chunks")
        refused(png[:-12] + png_chunk(kind) * 500_000 + png[-12:], "chunks")
    refused(png[:33] + png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 900 + png[33:], "colour profiles")
    at = exif.index(b"\xff\xdb")
    refused(exif[:at] + b"\xff\xfe\0\2" * 3_000_000 + exif[at:], "segments")
    refused(exif[:at] + b"\xff" * 12_000_000 + exif[at:], "segments|stray")
    jp2 = bytes(FILES["jp2"])
    at = jp2.index(b"\xff\x52")
    refused(jp2[:at] + b"\xff\x64\0\4\0\0" * 500_000 + jp2[at:], "segments")


def test_a_jpeg_2000_of_millions_of_packets_is_refused():
    data = bytearray(FILES["jp2"])
    at = data.index(b"\xff\x52")
    struct.pack_into(">H", data, at + 6, 65535)
    refused(bytes(data), "packets")
    tile = bytes(FILES["jp2"])
    start = tile.index(b"\xff\x90\0\x0a")
    own = bytes(data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")])  # in the tile's header it holds as well
    refused(
        tile[: start + 6]
        + struct.pack(">I", len(tile) - start + len(own))
        + tile[start + 10 : start + 12]
        + own
        + tile[start + 12 :],
        "packets",
    )


def test_what_is_slow_is_refused_by_its_size_not_by_the_clock():
    """JPEG 2000 takes ten times a JPEG's time: noise of 9 million pixels about 4 s, under a max_pixels that allows 2 s."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8))
    data = saved(noise, "JPEG2000")
    assert decode_image(bytes(data), max_pixels=300 * 300).shape == (300, 300, 3)
    refused(
        bytes(data) + bytes(20_000_000), "take about 3 s to decode, with max_pixels = 1000000 at most 2", max_pixels=1_000_000
    )


def test_scans_in_a_tiff_that_all_its_strips_share_are_bounded():
    """125 strips, all of them the same 90 scans: in 0.1 MB what takes a third of a second for each million pixels."""
    strip = saved(picture(1000, 8).convert("L"), "JPEG", progressive=True)
    strip = bytes(strip[:-2] + strip[strip.rindex(b"\xff\xda") : -2] * 80 + strip[-2:])

    def tiff(height: int) -> bytes:
        tags = [(256, 1, 1000), (257, 1, height), (258, 1, 8), (259, 1, 7), (262, 1, 1), (277, 1, 1), (278, 1, 8)]
        pieces, start = height // 8, 8 + 2 + 12 * 9 + 4
        tags += [(273, pieces, start), (279, pieces, start + 4 * pieces)]
        directory = struct.pack("<H", 9) + b"".join(struct.pack("<HHII", tag, 4, *rest) for tag, *rest in sorted(tags)) + bytes(4)
        lists = struct.pack("<I", start + 8 * pieces) * pieces + struct.pack("<I", len(strip)) * pieces
        return b"II*\0\x08\0\0\0" + directory + lists + strip

    assert decode_image(tiff(80)).shape == (80, 1000, 3)
    refused(tiff(8000), "of this kind of TIFF take about 2 s", max_pixels=16_000_000)


def test_slow_and_greedy_headers_are_refused():
    refused(b"P3 5000 5000 255 " + b"1 2 3 " * 4_000_000, "of this kind of PPM take about")
    refused(b"P3 1000 1000 255 " + b"#\n" * 2_000_000, "comments in an ASCII PPM")  # 50 s
    refused(b"P6 5000 5000 100 " + bytes(75_000_000), "of this kind of PPM take about")
    refused(b"Pf #" + b"c" * 10_000_000 + b"\n8 8 1 " + bytes(256), "header of a PPM")
    refused(packed_bmp(8000, 8000, b"\1\5\0\0" * 8000 + b"\0\1"), "of this kind of BMP take about")
    tiff = bytearray(FILES["tiff raw"])
    order = "<" if tiff[:2] == b"II" else ">"
    (at,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, at)
    for number in range(count):
        tag = struct.unpack_from(f"{order}H", tiff, at + 2 + 12 * number)[0]
        if tag in (273, 279):
            struct.pack_into(f"{order}I", tiff, at + 2 + 12 * number + 4, 50_000_000)
    refused(bytes(tiff), "strips or tiles")
    refused(jp2_claiming(64_000, 64_000, 1), "", max_pixels=1 << 40)


def test_pixels_are_counted_before_any_is_allocated():
    for name in ("png", "bmp", "gif", "webp", "jpeg", "tiff raw", "jp2"):
        refused(bytes(FILES[name]), "more than max_pixels", max_pixels=64 * 48 - 1)


# --- memory ---------------------------------------------------------------------------------------------------------------

MEASURE = """
import io, re, sys
import numpy as np
from PIL import Image
from ssl_locat.data.images.decode import decode_image
from ssl_locat.errors import CorruptSample

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

for path in sys.argv[1:]:
    data = open(path, "rb").read()
    for max_pixels in [p * 1_000_000 for p in range(6, 40)]:  # the smallest under which it is decoded
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        try:
            pixels = decode_image(data, max_pixels=max_pixels)
        except CorruptSample as error:
            assert "max_pixels" in str(error), error
            continue
        print(path.rpartition("/")[2], (peak() - before - 4e6) / (3 * max_pixels), max_pixels / 6e6, sep="\\t", flush=True)
        break
    pixels = None
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to reset the peak of memory")
def test_memory_stays_within_twice_the_promised_size(tmp_path):
    """Of images of 6 million pixels, each under the smallest max_pixels that takes it; the peak as the kernel counts it, but for 4 MB
    that no size changes (a decoder's tables, a strip in conversion)."""
    image = picture(3000, 2000)
    grey = np.asarray(image.convert("L"))
    cases = {
        "jpeg": saved(image, "JPEG"),
        "jpeg-progressive": saved(image, "JPEG", progressive=True, subsampling=0),
        "jpeg-rotated": saved(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        "png": saved(image, "PNG", compress_level=1),
        "png-palette": saved(image.quantize(16, method=Image.Quantize.FASTOCTREE), "PNG", compress_level=1),
        "png-16": saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG", compress_level=1),
        "tiff": saved(image, "TIFF"),
        "tiff-lzw": saved(image, "TIFF", compression="tiff_lzw"),
        "tiff-float": saved(Image.fromarray(grey.astype(np.float32)), "TIFF"),
        "webp": saved(image, "WEBP", method=0),
        "webp-lossless": saved(image, "WEBP", lossless=True, method=0, quality=0),
        "jp2": saved(image, "JPEG2000", quality_mode="rates", quality_layers=[20]),
        "bmp": saved(image, "BMP"),
        "ppm": saved(image, "PPM"),
        "cmyk": saved(image.convert("CMYK"), "JPEG"),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in cases)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    measured = {name: (float(factor), float(room)) for name, factor, room in (line.split("\t") for line in lines)}
    assert measured.keys() == cases.keys()
    for name, (factor, room) in measured.items():
        assert factor <= 2, f"{name}: {factor:.2f} x the promised size, at max_pixels of {room:.1f} x its own"


# --- fuzz -----------------------------------------------------------------------------------------------------------------


def spoil(data: bytearray, rng: random.Random) -> bytes:
    spoiled = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(min(len(spoiled), rng.choice([40, 400, 1 << 30])) or 1)
        kind = rng.randrange(6)
        if kind == 0:
            spoiled[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            spoiled[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", rng.randbytes(4)])
        elif kind == 2:
            del spoiled[at : at + rng.randrange(1, 200)]
        elif kind == 3:
            spoiled[at:at] = rng.randbytes(rng.randrange(1, 50))
        elif kind == 4:
            spoiled[at : at + 64] = bytes(64)
        else:
            del spoiled[max(4, at) :]
        spoiled = spoiled or bytearray(b"x")
    return bytes(spoiled)


@pytest.mark.parametrize("name", FILES)
def test_fuzzed_images_decode_or_are_corrupt(name, request):
    """Nothing but CorruptSample ever leaves a decoder, in bounded time, and what is returned is a picture of allowed size."""
    rng = random.Random(name)
    for case in range(120 * request.config.getoption("--fuzz-factor")):
        data, began = spoil(FILES[name], rng), time.process_time()
        for decode in (decode_image, lambda data, **o: decode_image(data, channels=4, **o), decode_mask):
            try:
                pixels = decode(data, max_pixels=1_000_000)
            except CorruptSample:
                continue
            assert 0 < pixels.shape[0] * pixels.shape[1] <= 1_000_000, case
        assert time.process_time() - began < SECONDS, case


@pytest.mark.parametrize(
    "header", [b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 4, ", b"{'descr'", b"\0\0\0", b"((((((((", b"'"]
)
def test_a_broken_npy_header_is_corrupt(header):
    with pytest.raises(CorruptSample):
        decode_image(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)


def test_an_npy_shape_that_overflows_is_corrupt():
    for shape in ((1, 1, 1 << 62), (2, 2, 1 << 63), (1, 1, -1), (1, 1, 0), (1 << 40, 1), (-4, -4)):
        header = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode() + b"\n"
        with pytest.raises(CorruptSample):
            decode_image(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)


def test_a_mask_or_a_mac_file_is_not_the_image():
    assert find_image({"jpg": b"x", "seg.png": b"y"}) == b"x"
