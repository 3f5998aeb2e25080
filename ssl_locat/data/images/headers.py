"""What the header of an image may claim, looked at before a decoder believes it: sizes, scans, tiles, comments.

Decoders are C libraries that allocate and loop as a file tells them to. A file of a few kB must not cost more time or memory than an
honest image of the same size in pixels: what claims more is refused here, from its first bytes, as a corrupt sample.
"""

import re
import struct

from PIL import Image

from ssl_locat.errors import CorruptSample

MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten
MAX_SCANNED = 10  # scans x pixels, as a multiple of max_pixels
MAX_METADATA = 16 << 20  # bytes before the pixels: the largest colour profiles and depth maps take a few MB
MAX_COMMENTS = 1 << 20  # bytes of a GIF's or PNG's comments: Pillow joins them piece by piece
MAX_PIECES = 1 << 18  # strips or tiles of a TIFF: each costs Pillow an entry in a list
MAX_PLAIN = 16 << 20  # bytes of an ASCII PPM, which Pillow reads in Python

# bytes per pixel that Pillow holds of a decoded image, by mode; colours take four
_CORE = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2}
# on top of it while decoding: WebP's canvases and frame, JPEG 2000's planes of 32 bits in OpenJPEG, measured (tests/data/images/test_limits.py)
_DECODER = {"WEBP": 15, "JPEG2000": 17, "TIFF": 5}
_ALWAYS = 16 << 20  # bytes that any image may take
_PPM = re.compile(rb"P[1-6](?:\s|#[^\r\n]*[\r\n])+\d{1,9}(?:\s|#[^\r\n]*[\r\n])+\d{1,9}[\s#]")
_SUBSAMPLED = {"444": 3, "422": 2, "440": 2, "420": 1.5, "411": 1.5, "Gray": 1}  # coefficients per pixel


def check_bytes(data: bytes) -> None:
    """CorruptSample for what no decoder should open."""
    for magic, check in _CHECKS.items():
        if data.startswith(magic):
            try:
                check(data)
            except (struct.error, IndexError):
                raise CorruptSample("the header is cut short") from None


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    if min(width, height) <= 0:
        raise CorruptSample(f"no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise CorruptSample(f"refused from its header: {width} x {height} pixels, more than max_pixels = {max_pixels}")


def check_memory(image: Image.Image, max_pixels: int) -> None:
    """Decoding, the result included, takes at most twice what `max_pixels` take as RGB."""
    check_pixels(*image.size, max_pixels)
    per_pixel = _CORE.get(image.mode, 4) + max(3, _DECODER.get(image.format or "", 0))
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        per_pixel += 8  # coefficients of four channels
    _check_bytes_needed(*image.size, per_pixel, max_pixels, f"{image.format} of mode {image.mode}")


def _check_bytes_needed(width: int, height: int, per_pixel: float, max_pixels: int, what: str) -> None:
    if width * height * per_pixel > max(2 * 3 * max_pixels, _ALWAYS):
        raise CorruptSample(
            f"refused from its header: {width} x {height} pixels as {what} take {width * height * per_pixel / 1e6:.0f} MB to decode, more "
            f"than twice what max_pixels = {max_pixels} take as RGB: raise max_pixels, or convert the image"
        )


# --- JPEG -----------------------------------------------------------------------------------------------------------------


def jpeg_scans(data: bytes) -> int:
    """How often the decoder will go over all pixels. CorruptSample if no encoder would ask for that."""
    scans = data.count(b"\xff\xda")  # those of a thumbnail included: an upper bound, at C speed
    if scans > 16 or len(data) > MAX_METADATA:
        scans, metadata = _walk_jpeg(data)
        if scans > MAX_SCANS:
            raise CorruptSample(f"refused: a JPEG of {scans} scans, more than {MAX_SCANS}")
        if metadata > MAX_METADATA:
            raise CorruptSample(f"refused: {metadata} bytes of metadata, more than {MAX_METADATA}")
    return scans


def check_jpeg(width: int, height: int, sampling: str, scans: int, max_pixels: int) -> None:
    check_pixels(width, height, max_pixels)
    if scans > 1:
        if scans * width * height > MAX_SCANNED * max_pixels:
            raise CorruptSample(f"refused: {scans} scans over {width} x {height} pixels")
        # libjpeg keeps all coefficients, of two bytes, until the last scan
        _check_bytes_needed(width, height, 3 + 2 * _SUBSAMPLED.get(sampling, 4), max_pixels, f"progressive JPEG {sampling}")


def _walk_jpeg(data: bytes) -> tuple[int, int]:
    """(scans, bytes before the first), by the markers themselves."""
    at, scans, metadata = 2, 0, 0
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 3:
        marker = data[at + 1]
        if marker in (0, 1, 0xFF) or 0xD0 <= marker <= 0xD8:  # stuffing, restarts
            at += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9:
            break
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        scans += marker == 0xDA
        metadata += length if not scans else 0
        at += length
    return scans, metadata


# --- other formats --------------------------------------------------------------------------------------------------------


def _check_gif(data: bytes) -> None:
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while at < len(data) and data[at] == 0x21:  # extensions before the first frame, in pieces of up to 255 bytes
        at += 2
        while size := data[at]:
            at += size + 1
            if at > MAX_COMMENTS:
                raise CorruptSample(f"refused: more than {MAX_COMMENTS} bytes of comments")
        at += 1


def _check_png(data: bytes) -> None:
    at, metadata = 8, 0
    while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IDAT":
        length = int.from_bytes(data[at : at + 4], "big")
        metadata += length if data[at + 4 : at + 8] in (b"tEXt", b"zTXt", b"iTXt") else 0
        at += 12 + length
    if metadata > MAX_COMMENTS:
        raise CorruptSample(f"refused: {metadata} bytes of comments, more than {MAX_COMMENTS}")


def _check_ppm(data: bytes) -> None:
    if _PPM.match(data[:65536]) is None:
        raise CorruptSample("the header of a PPM cannot be read")
    if data[1] in b"123" and len(data) > MAX_PLAIN:
        raise CorruptSample(f"refused: {len(data)} bytes of PPM in ASCII, more than {MAX_PLAIN}: store it as binary PPM or PNG")


def _check_tiff(data: bytes) -> None:
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    (at,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, at)
    at, entry = at + (8 if big else 2), struct.Struct(f"{order}HH{'Q8s' if big else 'I4s'}")
    if count > 4096:
        raise CorruptSample(f"refused: a TIFF of {count} tags")
    sizes = {}
    for _ in range(count):
        tag, kind, number, value = entry.unpack_from(data, at)
        at += entry.size
        width = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8, 17: 8, 18: 8}.get(kind, 1)
        pieces = tag in (273, 279, 324, 325)
        if number > MAX_PIECES if pieces else number * width > MAX_METADATA:
            raise CorruptSample(f"refused: tag {tag} of a TIFF has {number} values")
        if tag in (256, 257, 322, 323) and kind in (3, 4):
            (sizes[tag],) = struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", value)
    pixels = sizes.get(256, 0) * sizes.get(257, 0)
    if sizes.get(322, 0) * sizes.get(323, 0) > 4 * pixels + (1 << 20):
        raise CorruptSample(f"refused: tiles of {sizes[322]} x {sizes[323]} pixels in an image of {pixels}")


def _check_jp2(data: bytes) -> None:
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0:
        raise CorruptSample("a JPEG 2000 file without a codestream")
    x1, y1, x0, y0, width, height, tile_x, tile_y, bands = struct.unpack_from(">8IH", data, at + 8)
    if not (width and height and x1 > x0 and y1 > y0):
        raise CorruptSample("no pixels")
    tiles = -(-(x1 - tile_x) // width) * -(-(y1 - tile_y) // height)
    if tiles > 64 + (x1 - x0) * (y1 - y0) // 4096 or bands > 16:
        raise CorruptSample(f"refused: {tiles} tiles of {bands} channels")
    found, part = set(), at
    while (part := data.find(b"\xff\x90\x00\x0a", part)) >= 0:  # the tile parts, each with its number and length
        number, length = struct.unpack_from(">HI", data, part + 4)
        found.add(number)
        if length and part + length > len(data):
            raise CorruptSample("image data is missing: a tile is cut short")
        part += max(length, 12)
    if len(found) < tiles:
        raise CorruptSample(f"image data is missing: {tiles} tiles, and {len(found)} of them are there")


_CHECKS = {b"GIF8": _check_gif, b"\x89PNG": _check_png, b"II\x2a\x00": _check_tiff, b"MM\x00\x2a": _check_tiff}
_CHECKS |= {b"II\x2b\x00": _check_tiff, b"MM\x00\x2b": _check_tiff}
_CHECKS |= {b"\x00\x00\x00\x0cjP  ": _check_jp2, b"\xff\x4f\xff\x51": _check_jp2}
_CHECKS |= {b"P%d" % number: _check_ppm for number in range(1, 7)}
