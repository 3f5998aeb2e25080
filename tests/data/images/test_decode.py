"""Every kind of image becomes 8-bit RGB; what does not is a CorruptSample with a reason."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from ssl_locat.data.images.decode import decode_image, decode_mask, find_image, find_label, find_mask
from ssl_locat.data.images.eight_bits import image_orientation
from ssl_locat.errors import CorruptSample


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(height: int = 24, width: int = 40) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 9, columns * 6, rows + columns], -1).astype(np.uint8))


def broken(folder, name: str) -> bytes:
    """The odd image (000001.*) of a shard in shared/data/broken."""
    with tarfile.open(folder / f"{name}.tar") as shard:
        member = next(m for m in shard if m.name.startswith("000001.") and not m.name.endswith("cls"))
        return shard.extractfile(member).read()


def test_jpeg_equals_pillow_exactly():
    data = encode(photo(), "JPEG", quality=90)
    assert np.array_equal(decode_image(data), np.array(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_other_formats_decode(format):
    data = encode(photo(), format, **({"lossless": True} if format == "WEBP" else {}))
    image = decode_image(data)
    assert image.shape == (24, 40, 3) and image.dtype == np.uint8 and image.flags.writeable
    if format != "GIF":
        assert np.array_equal(image, np.array(photo()))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    image = Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 60) if mode == "I;16" else photo().convert(mode)
    format = {"CMYK": "JPEG", "YCbCr": "TIFF", "I": "TIFF", "F": "TIFF"}.get(mode, "PNG")
    data = encode(image, format)
    if mode == "YCbCr":
        try:
            Image.open(io.BytesIO(data)).load()
        except OSError as error:  # Pillow before 13
            pytest.skip(f"this Pillow cannot read the YCbCr TIFF that it writes: {error}")
    assert decode_image(data).shape == (24, 40, 3)


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert decode_image(encode(Image.fromarray(values), "PNG"))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation_equals_pillows(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(), format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert image_orientation(data) == orientation
    assert np.array_equal(decode_image(data), np.array(expected))


def test_mask_gets_the_turn_of_its_image():
    ids = np.arange(24 * 40, dtype=np.uint8).reshape(24, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(), "JPEG", exif=exif)
    mask = decode_mask(encode(Image.fromarray(ids), "PNG"), orientation=image_orientation(data))
    assert mask.dtype == np.int64 and mask.shape == decode_image(data).shape[:2]
    assert np.array_equal(mask, np.rot90(ids, -1))


def test_mask_keeps_palette_indices_and_16_bit_values():
    palette = Image.new("P", (3, 1))
    palette.putpalette([i for rgb in range(256) for i in (rgb, 255 - rgb, 7)])
    palette.putdata([0, 3, 255])
    assert decode_mask(encode(palette, "PNG")).tolist() == [[0, 3, 255]]
    wide = Image.fromarray(np.array([[0, 300, 65535]], np.uint16))
    assert decode_mask(encode(wide, "PNG")).tolist() == [[0, 300, 65535]]
    with pytest.raises(CorruptSample, match="colours"):
        decode_mask(encode(photo(), "PNG"))


@pytest.mark.parametrize(
    ("name", "shape", "mean"),
    [
        ("cmyk-jpeg", (96, 96, 3), None),
        ("grayscale-png", (96, 96, 3), None),
        ("png-16bit", (96, 96, 3), 112),
        ("palette-transparency-png", (96, 96, 3), None),
        ("animated-gif", (64, 64, 3), None),
        ("one-pixel", (1, 1, 3), None),
        ("wide-4000x3", (3, 4000, 3), None),
        ("exif-rotated-jpeg", (96, 64, 3), None),
    ],
)
def test_odd_images_of_the_shared_set_decode(shared_data, name, shape, mean):
    image = decode_image(broken(shared_data("broken"), name))
    assert image.shape == shape
    if mean:
        assert abs(image.mean() - mean) < 1
    if name == "exif-rotated-jpeg":  # the red band is on top
        assert image[:8, :, 0].mean() > 150 > 100 > image[:8, :, 1].mean()


@pytest.mark.parametrize(
    ("name", "reason"), [("truncated-jpeg", "truncated"), ("zero-byte-image", "0 bytes"), ("bomb-png-header", "from its header")]
)
def test_damaged_images_of_the_shared_set_are_corrupt_samples(shared_data, name, reason):
    with pytest.raises(CorruptSample, match=reason):
        decode_image(broken(shared_data("broken"), name))


def test_jpeg_bomb_is_refused_from_its_header():
    data = bytearray(encode(photo(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (60000).to_bytes(2, "big") * 2
    with pytest.raises(CorruptSample, match="60000 x 60000"):
        decode_image(bytes(data))
    with pytest.raises(CorruptSample, match="max_pixels = 100"):
        decode_image(encode(photo(), "PNG"), max_pixels=100)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_a_corrupt_sample(data):
    with pytest.raises(CorruptSample):
        decode_image(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_random_damage_never_raises_anything_else(format):
    rng = np.random.default_rng(0)
    data = encode(photo(64, 64), format)
    for _ in range(60):
        damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
        for position in rng.integers(0, len(damaged), rng.integers(0, 8)):
            damaged[position] = rng.integers(256)
        try:
            assert decode_image(bytes(damaged), max_pixels=10**6).shape[2] == 3
        except CorruptSample as error:
            assert error.reason


def test_image_is_found_under_foreign_names():
    assert find_image({"cls": b"1", "JPG": b"a"}) == b"a"
    assert find_image({"png": b"p", "jpeg": b"a"}) == b"a"
    assert find_image({"seg.png": b"m", "image.jpg": b"a"}) == b"a"
    assert find_image({"left.png": b"l", "seg.png": b"m"}) == b"l"
    assert find_image({"left.png": b"l", "Right.png": b"r"}, "right.png") == b"r"
    with pytest.raises(CorruptSample, match=r"seg\.png"):
        find_image({"seg.png": b"m", "cls": b"1"})
    with pytest.raises(CorruptSample, match="image_key is 'jpg'"):
        find_image({"png": b"p"}, "jpg")


def test_label_is_a_number_or_a_corrupt_sample():
    assert find_label({"cls": b"7\n", "jpg": b""}) == 7
    assert find_label({"y": b"12"}, "y") == 12
    for members, reason in [
        ({"jpg": b""}, "no label"),
        ({"cls": b"cat"}, "not a number"),
        ({"cls": b"1_0"}, "not a number"),
        ({"cls": b"-1"}, "negative"),
        ({"cls": b""}, "not a"),
        ({"cls": b"1" * 31}, "1111 is too large; class ids are integers from 0 to 9999999"),  # no tensor holds it
        ({"cls": b"1" * 5000}, "too large"),
        ({"cls": b"10000000"}, "too large"),
    ]:
        with pytest.raises(CorruptSample, match=reason):
            find_label(members)


def test_mask_is_found():
    assert find_mask({"jpg": b"a", "seg.png": b"m"}) == b"m"
    with pytest.raises(CorruptSample, match="no mask"):
        find_mask({"jpg": b"a"})
