"""What the header of an image may claim, looked at before a decoder believes it: sizes, scans, tiles, comments.

Decoders are C libraries that allocate and loop as a file tells them to. A file of a few kB must not cost more time or memory than an
honest image of the same size in pixels: what claims more is refused here, from its first bytes, as a corrupt sample.
"""

import re
import struct
from typing import NamedTuple

from PIL import Image

from ssl_locat.errors import CorruptSample

MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten
MAX_SCANNED = 10  # scans x pixels, as a multiple of max_pixels
MAX_METADATA = 16 << 20  # bytes before the pixels: the largest colour profiles and depth maps take a few MB
MAX_SEGMENTS = 4096  # before a JPEG's pixels: each is a step in Python for Pillow; cameras write a dozen
MAX_COMMENTS = 1 << 20  # bytes of a GIF's or PNG's comments: Pillow joins them piece by piece
MAX_CHUNKS = 1024  # of a PNG, and one more for each 512 bytes: a step in Python each; encoders write 8 kB and more
MAX_PROFILES = 8  # of a PNG: one is allowed, each is unpacked, to 1 MB at most
MAX_PIECES = 1 << 14  # strips or tiles of a TIFF, and one more for each 512 pixels: each has a decoder set up for it
MAX_PLAIN_COMMENTS = 1000  # in an ASCII PPM: Pillow copies a megabyte to take each out
MAX_WORK, LEAST_WORK, MOST_WORK = (
    1e-7,
    2.0,
    30.0,
)  # seconds of a core for each of max_pixels; and altogether, however few or many they are
MAX_PACKETS = 1 << 20  # of a JPEG 2000, and one more for each 16 pixels: layers x resolutions x precincts x channels x tiles

# bytes per pixel that Pillow holds of a decoded image, by mode; colours take four
_CORE = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2}
# on top of it while decoding: WebP's canvases and frame, JPEG 2000's planes of 32 bits in OpenJPEG, measured (tests/data/images/test_limits.py)
_DECODER = {"WEBP": 15, "JPEG2000": 17, "TIFF": 5}
_ALWAYS = 16 << 20  # bytes that any image may take
# seconds of a core, measured with noise, of what may exceed MAX_WORK at an allowed size: JPEG 2000, and what Pillow decodes in Python
# (ASCII PPM, PPM of odd depths, packed BMP)
_JPEG2000_PIXEL, _JPEG2000_BYTE, _PYTHON_VALUE = 4e-8, 1.5e-7, 6e-7
_TIFF_SCAN = 3.5e-9  # of a pixel in one scan of a progressive JPEG, which all pieces of a TIFF may share
_SPACE = rb"(?:\s|#[^\r\n]*[\r\n])+"
_SIZE = _SPACE + rb"\d{1,9}" + _SPACE + rb"\d{1,9}"
_PPM = re.compile(rb"(?:P[14]%s|P[2356]%s%s\d{1,5}|Pf%s%s[-+.eE\d]{1,40})\s" % (_SIZE, _SIZE, _SPACE, _SIZE, _SPACE))
_PROGRESSIVE = re.compile(rb"\xff[\xc2\xca]\x00[\x0b\x0e\x11\x14]\x08")  # its frame's header, of one to four channels of 8 bits
# what follows a JPEG's next segment: stuffing, fill bytes and restarts begin none
_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
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
    check_bytes_needed(*image.size, per_pixel, max_pixels, f"{image.format} of mode {image.mode}")


def check_work(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Decoding takes at most MAX_WORK for each of `max_pixels`, which is what ten JPEGs of that size take.

    By what there is to do, never by the clock: the same images are refused on a busy machine as on an idle one, and in every rank.
    """
    work = 0.0
    if image.format == "JPEG2000":
        work = _JPEG2000_PIXEL * image.width * image.height + _JPEG2000_BYTE * len(data)
    elif image.format == "TIFF" and _PROGRESSIVE.search(data):
        work = _TIFF_SCAN * image.width * image.height * min(100, data.count(b"\xff\xda"))  # libtiff ends at a hundred
    elif any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ())):
        work = _PYTHON_VALUE * max(image.width * image.height * len(image.getbands()), len(data) // 2)
    allowed = min(max(MAX_WORK * max_pixels, LEAST_WORK), MOST_WORK)
    if work > allowed:
        raise CorruptSample(
            f"refused from its header: {image.width} x {image.height} pixels in {len(data)} bytes of this kind of {image.format} take about "
            f"{work:.0f} s to decode, with max_pixels = {max_pixels} at most {allowed:.0f}: store it as PNG "
            "or JPEG"
        )


def check_bytes_needed(width: int, height: int, per_pixel: float, max_pixels: int, what: str) -> None:
    """`per_pixel`: bytes held at once for each pixel while it is decoded, the result included."""
    if width * height * per_pixel > max(2 * 3 * max_pixels, _ALWAYS):
        raise CorruptSample(
            f"refused from its header: {width} x {height} pixels as {what} take {width * height * per_pixel / 1e6:.0f} MB to decode, more "
            f"than twice what max_pixels = {max_pixels} take as RGB: raise max_pixels, or convert the image"
        )


# --- JPEG -----------------------------------------------------------------------------------------------------------------


def jpeg_scans(data: bytes) -> int:
    """How often the decoder will go over all pixels. CorruptSample if no encoder would ask for that."""
    segments, first, found = 0, 2, None
    while (
        len(data) > 4 * MAX_SEGMENTS and (found := _SEGMENT.search(data, first)) and data[found.start() + 1] not in (0xD9, 0xDA)
    ):
        # fill bytes before it count, too
        segments, first = segments + 1 + found.start() - first, _behind(data, found.start())
        if segments > MAX_SEGMENTS:
            raise CorruptSample(f"refused: a JPEG of more than {MAX_SEGMENTS} segments before its pixels")
        if first > MAX_METADATA:
            raise CorruptSample(f"refused: more than {MAX_METADATA} bytes of metadata")
    if found and found.start() - first > MAX_SEGMENTS:
        raise CorruptSample(f"refused: {found.start() - first} stray bytes before a JPEG's pixels")
    scans = data.count(b"\xff\xda", first)  # those of a second picture included: an upper bound, at C speed
    if scans > 16:
        scans = _count_scans(data, first)
        if scans > MAX_SCANS:
            raise CorruptSample(f"refused: a JPEG of more than {MAX_SCANS} scans")
    return scans


def check_jpeg(width: int, height: int, sampling: str, scans: int, max_pixels: int) -> None:
    check_pixels(width, height, max_pixels)
    if scans > 1:
        if scans * width * height > MAX_SCANNED * max_pixels:
            raise CorruptSample(f"refused: {scans} scans over {width} x {height} pixels")
        # libjpeg keeps all coefficients, of two bytes, until the last scan
        check_bytes_needed(width, height, 3 + 2 * _SUBSAMPLED.get(sampling, 4), max_pixels, f"progressive JPEG {sampling}")


def _behind(data: bytes, segment: int) -> int:
    return segment + 2 + int.from_bytes(data[segment + 2 : segment + 4], "big")


def _count_scans(data: bytes, at: int) -> int:
    """By the markers themselves, up to one more than are allowed."""
    scans, segments = 0, 0
    while scans <= MAX_SCANS and (found := _SEGMENT.search(data, at)) and data[found.start() + 1] != 0xD9:
        scans += data[found.start() + 1] == 0xDA
        segments, at = segments + 1, _behind(data, found.start())
        if segments > MAX_SEGMENTS:
            raise CorruptSample(f"refused: a JPEG of more than {MAX_SEGMENTS} segments")
    return scans


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
    at, metadata, chunks, profiles = 8, 0, 0, 0
    while at + 8 <= len(data) and (kind := data[at + 4 : at + 8]) != b"IEND":
        length = int.from_bytes(data[at : at + 4], "big")
        chunks, profiles = chunks + 1, profiles + (kind == b"iCCP")
        metadata += length if kind in (b"tEXt", b"zTXt", b"iTXt") else 0
        at += 12 + length
        if metadata > MAX_COMMENTS:
            raise CorruptSample(f"refused: {metadata} bytes of comments, more than {MAX_COMMENTS}")
        if chunks > MAX_CHUNKS + len(data) // 512 or profiles > MAX_PROFILES:
            raise CorruptSample(
                f"refused: a PNG of {chunks} chunks and more in {len(data)} bytes, {profiles} of them colour profiles"
            )


def _check_ppm(data: bytes) -> None:
    if _PPM.match(data[:65536]) is None:
        raise CorruptSample("the header of a PPM cannot be read")
    if data[1] in b"123" and data.count(b"#") > MAX_PLAIN_COMMENTS:
        raise CorruptSample(f"refused: more than {MAX_PLAIN_COMMENTS} comments in an ASCII PPM")


def _check_tiff(data: bytes) -> None:
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    (at,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, at)
    at, entry = at + (8 if big else 2), struct.Struct(f"{order}HH{'Q8s' if big else 'I4s'}")
    if count > 4096:
        raise CorruptSample(f"refused: a TIFF of {count} tags")
    sizes, number_of_pieces = {}, 0
    for _ in range(count):
        tag, kind, number, value = entry.unpack_from(data, at)
        at += entry.size
        width = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8, 17: 8, 18: 8}.get(kind, 1)
        pieces = tag in (273, 279, 324, 325)
        number_of_pieces = max(number_of_pieces, number if pieces else 0)
        if not pieces and number * width > MAX_METADATA:
            raise CorruptSample(f"refused: tag {tag} of a TIFF has {number} values")
        if tag in (256, 257, 322, 323) and kind in (3, 4):
            (sizes[tag],) = struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", value)
    pixels = sizes.get(256, 0) * sizes.get(257, 0)
    if number_of_pieces > MAX_PIECES + pixels // 512:
        raise CorruptSample(f"refused: a TIFF of {number_of_pieces} strips or tiles for {pixels} pixels")
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
    pixels = (x1 - x0) * (y1 - y0)
    if tiles > 64 + pixels // 4096 or bands > 16:
        raise CorruptSample(f"refused: {tiles} tiles of {bands} channels")
    first = data.find(b"\xff\x90\x00\x0a", at)
    codings = _jp2_codings(data, at + 2, first)
    found, part = set(), at
    while (part := data.find(b"\xff\x90\x00\x0a", part)) >= 0:  # the tile parts, each with its number and length
        number, length = struct.unpack_from(">HI", data, part + 4)
        found.add(number)
        if length and part + length > len(data):
            raise CorruptSample("image data is missing: a tile is cut short")
        if data[part + 12 : part + 14] != b"\xff\x93":  # a tile may have its own
            end = data.find(b"\xff\x93", part, part + (1 << 20))
            if end < 0:
                raise CorruptSample("image data is missing: a tile without a beginning")
            codings += _jp2_codings(data, part + 12, end)
        part += max(length, 12)
    if len(found) < tiles:
        raise CorruptSample(f"image data is missing: {tiles} tiles, and {len(found)} of them are there")
    one_layer = bands * max((one.packets(x1 - x0, y1 - y0, tiles) for one in codings), default=0)
    packets = one_layer * max((one.layers for one in codings), default=1)
    if packets > MAX_PACKETS + pixels // 16:
        raise CorruptSample(f"refused: a JPEG 2000 of {packets} packets for {pixels} pixels")


class _Coding(NamedTuple):
    """How a JPEG 2000 divides its channels, or one of them."""

    layers: int
    precincts: list[int]  # of each resolution, the smallest first: log2 of height and of width, four bits each

    def packets(self, width: int, height: int, tiles: int) -> int:
        """Of one layer of one channel, at most."""
        total = 0
        for resolution, size in enumerate(self.precincts):
            smaller = len(self.precincts) - 1 - resolution
            columns, rows = (2 + (side >> smaller + bits) for side, bits in ((width, size & 15), (height, size >> 4)))
            total += max(tiles, columns * rows)
        return total


def _jp2_codings(data: bytes, at: int, end: int) -> list[_Coding]:
    """What the marker segments in data[at:end] say. A JPEG 2000 tells its progression once: one that changes it is refused."""
    found, segments = [], 0
    while at < end:
        kind, length = struct.unpack_from(">HH", data, at)
        if kind in (0xFF52, 0xFF53):
            body = data[at + 4 : at + 2 + length]
            layers, body = (int.from_bytes(body[2:4], "big"), body[:1] + body[5:]) if kind == 0xFF52 else (1, body[1:])
            levels, precincts = body[1], body[6:]
            if levels > 32:
                raise CorruptSample(f"refused: a JPEG 2000 of {levels} levels")
            found.append(_Coding(layers, list(precincts[: levels + 1]) if body[0] & 1 else [0xFF] * (levels + 1)))
        segments += 1
        if kind == 0xFF5F or segments > MAX_SEGMENTS:
            raise CorruptSample("refused: a JPEG 2000 whose header has thousands of segments, or several progressions")
        at += 2 + length
    return found


_CHECKS = {b"GIF8": _check_gif, b"\x89PNG": _check_png, b"II\x2a\x00": _check_tiff, b"MM\x00\x2a": _check_tiff}
_CHECKS |= {b"II\x2b\x00": _check_tiff, b"MM\x00\x2b": _check_tiff}
_CHECKS |= {b"\x00\x00\x00\x0cjP  ": _check_jp2, b"\xff\x4f\xff\x51": _check_jp2}
_CHECKS |= {b"P%c" % kind: _check_ppm for kind in b"0123456fy"}
