"""Tar archives as samples: where each sample starts (`scan`), and a sample's members out of its bytes (`parse`).

The tar headers themselves are the check: every 512-byte header carries a checksum, every span read by offset must begin with the
header of the expected key, and an archive must end with its end marker. What fails becomes a damaged slot, never a shorter shard.
Grouping follows WebDataset: neighbours whose names agree up to the first dot of the base name are one sample.
"""

import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from ssl_locat.errors import CorruptSample

BLOCK = 512
ZERO = bytes(BLOCK)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".tar.lzma")

_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_ENDINGS = {"gzip": ".gz", "bzip2": ".bz2", "xz": ".xz", "zstd": ".zst"}

Fetch = Callable[[int, int], bytes]  # (at, n) -> n bytes of the archive, or what there is up to its end

DAMAGED = 0  # crc of a flagged slot; no key has it

_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own notes inside a shard
_REGULAR, _SKIPPED = b"0\0007", b"123456g"  # types: files; links, devices, folders, global headers
_EXTENDED = b"xLK"  # headers that describe the next member: pax, GNU long name, GNU long link
MAX_NAME = 4096  # bytes: no system opens a longer path
_MAX_PAX = 64 << 10  # bytes of an extended header: names, times and attributes take some kB
_SHOWN = 200  # letters of a damaged member's name
_APPLE = "._"  # begins the names in which a Mac keeps what a foreign disk cannot: beside x.jpg, ._x.jpg, which is no image


class CorruptTar(CorruptSample):
    """No valid tar structure in the member that starts at byte `at`. `name`: of that member, its beginning at least, '' if it cannot be read;
    `after`: where to look for the next one."""

    def __init__(self, at: int, reason: str, name: str = "", after: int | None = None):
        super().__init__(reason)
        self.at, self.name, self.after = at, name, at + BLOCK if after is None else after


class Member(NamedTuple):
    start: int  # of its first header, the extended ones included
    data: int
    size: int
    name: str

    @property
    def end(self) -> int:
        return self.data + -(-self.size // BLOCK) * BLOCK


class Scan(NamedTuple):
    """Slots of one archive: slot i lies in bytes starts[i]..starts[i+1]. Damage is a slot too, flagged: `parse` refuses it."""

    starts: array  # uint64 [n + 1]
    crcs: array  # uint32 [n], of the keys; DAMAGED for a flagged slot


class RawSample(NamedTuple):
    members: dict[str, bytes]  # extension in lower case ('jpg', 'cls', 'seg.png') -> content
    key: str
    shard: str  # file name or URL, for messages
    filters: Callable[["RawSample", int], "RawSample"] | None = None  # what is done to it before it is used (filters.py)


class Damage(NamedTuple):
    """Stands where a sample should be."""

    key: str  # '' if not even that is known
    shard: str
    reason: str


def split_name(name: str) -> tuple[str, str] | None:
    """'a/b.seg.PNG' -> ('a/b', 'seg.png'); None for what is no member of a sample."""
    slash = name.rfind("/")
    dot = name.find(".", slash + 1)
    if dot < 0 or name.startswith(_APPLE, slash + 1) or _META.match(name):
        return None
    # a base name that is all extension: the folder is the key, as in WebDataset, if it has no dot itself
    if dot == slash + 1 and (slash < 0 or "." in name[name.rfind("/", 0, slash) + 1 : slash]):
        return None
    return name[:dot], name[dot + 1 :].lower()


def key_crc(key: str) -> int:
    return zlib.crc32(key.encode("utf-8", "surrogateescape")) or 1


def _number(field: bytes) -> int:
    """ValueError for what is none."""
    if field[0] & 0x80:  # GNU's base-256, for sizes of 8 GiB and more
        return int.from_bytes(field, "big") & (1 << 8 * len(field) - 1) - 1
    try:
        number = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:  # would lead backwards, and round and round
        raise ValueError
    return number


def is_header(block: bytes) -> bool:
    """Whether the checksum of a 512-byte header holds."""
    try:
        stored = int(block[148:156].split(b"\0", 1)[0].strip(), 8)
    except (ValueError, IndexError):
        return False
    # adler32's low half is 1 + the sum of the bytes mod 65521, at C speed; the checksum counts its own field as eight spaces
    return (stored + sum(block[148:156]) - 256 + 1 - (zlib.adler32(block) & 0xFFFF)) % 65521 == 0


def _pax(records: bytes) -> dict[str, bytes]:
    """{name: value} of "LENGTH NAME=VALUE\\n" records, LENGTH counting all of it in decimal digits (POSIX.1-2001). ValueError for what is none."""
    found, start = {}, 0
    while start < len(records) and records[start]:
        space = records.index(b" ", start, start + 20)
        end = start + _decimal(records[start:space])
        equals = records.index(b"=", space, end)
        if end > len(records):
            raise ValueError
        found[records[space + 1 : equals].decode()] = records[equals + 1 : end - 1]
        start = end
    return found


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise ValueError
    return int(digits)


def _header_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _readable(block: bytes) -> str:
    """The name in a header that is damaged elsewhere; '' where it can be none."""
    try:
        name = _header_name(block).decode() if len(block) == BLOCK and block[257:262] == b"ustar" else ""
    except UnicodeDecodeError:
        return ""
    return name if name.isprintable() and split_name(name) else ""


def members(fetch: Fetch, at: int, end: int) -> Iterator[Member]:
    """Regular members from byte `at` to `end`; a zero block ends it too, and is yielded last as a member without a name.

    Raises CorruptTar at the first thing that is neither. A member whose data runs past `end` is yielded before that: its name tells
    which sample is cut short.
    """
    start, name, size = at, None, None
    while at < end:
        block = fetch(at, BLOCK)
        if block == ZERO:
            yield Member(at, at, 0, "")
            return
        if len(block) < BLOCK:
            raise CorruptTar(start, "cut inside a tar header", after=at + BLOCK)
        if not is_header(block):
            raise CorruptTar(start, "no valid tar header", _readable(block) if name is None else _text(name), at + BLOCK)
        kind = block[156]
        try:
            length = _number(block[124:136]) if size is None or kind in _EXTENDED else size
        except ValueError:
            found = _header_name(block) if name is None else name
            raise CorruptTar(start, f"unreadable size {block[124:136]!r} in the tar header", _text(found), at + BLOCK) from None
        data = at + BLOCK
        at = data + -(-length // BLOCK) * BLOCK
        if kind in _EXTENDED:
            name, size = _extended(fetch, kind, start, data, length, at, (name, size))
            continue
        if name is None:
            name = _header_name(block)
        if kind in _REGULAR:
            if not name.endswith(b"/"):  # a folder, as very old tars write it
                yield Member(start, data, length, _text(name))
        elif kind not in _SKIPPED:
            raise CorruptTar(start, f"tar member of unsupported type {chr(kind)!r}", _text(name), data)
        start, name, size = at, None, None
    if start != at or at > end:
        raise CorruptTar(start, "the archive ends in the middle of a member")


def _extended(
    fetch: Fetch, kind: int, start: int, data: int, length: int, at: int, known: tuple[bytes | None, int | None]
) -> tuple[bytes | None, int | None]:
    """(name, size) of the next member, whose own header is at byte `at`: what this extended header says, else what was known."""
    name, size = known
    limit = MAX_NAME + 1 if kind == b"L"[0] else _MAX_PAX  # a GNU name ends in a zero
    reason, text = None, fetch(data, min(length, limit))
    if length > limit:
        what = "GNU long name" if kind == b"L"[0] else "pax header" if kind == b"x"[0] else "GNU long link"
        reason = f"{what} of {length} bytes, more than {limit}"
        name = text if kind == b"L"[0] else name
    elif kind == b"L"[0]:
        name = text.rstrip(b"\0")
    elif kind == b"x"[0]:
        try:
            fields = _pax(text)
            name = fields.get("path", name)
            size = _decimal(fields["size"]) if "size" in fields else size
            if any(field.startswith("GNU.sparse") for field in fields):
                reason = "sparse tar members are not supported"
            elif len(name or b"") > MAX_NAME:
                reason = f"name of {len(name or b'')} bytes, more than {MAX_NAME}"
        except ValueError:
            reason = "unreadable pax header"
    if reason is None:
        return name, size
    # not to be taken for a member under the short name in its own header: the next one begins behind it
    block = fetch(at, BLOCK)
    found, after = b"", at
    if len(block) == BLOCK and is_header(block) and block[156] not in _EXTENDED:
        with suppress(ValueError):
            found, after = _header_name(block), at + BLOCK + -(-_number(block[124:136]) // BLOCK) * BLOCK
    raise CorruptTar(start, reason, _text((name or found)[:MAX_NAME]), after)


def scan(fetch: Fetch, size: int) -> Scan:
    """Slots of the whole archive of `size` bytes.

    Raises CorruptSample if it does not begin as a tar at all. Damage further on never ends the scan: it continues at the next valid header.
    A missing end marker counts as damage. Flagged is the sample whose member is damaged, if a name can still be read and the sample before
    it is as whole as its own neighbour; else the sample before: nobody can tell whether it lost a member.
    """
    if size < BLOCK or not ((first := fetch(0, BLOCK)) == ZERO or is_header(first)):
        if packed := next((name for magic, name in _PACKED.items() if first.startswith(magic)), None) if size >= BLOCK else None:
            raise CorruptSample(
                f"{packed} data under the name of a tar, whose samples cannot be reached by offset. Rename it (.tar{_ENDINGS.get(packed, '')}) "
                "and repack it with 'ssl-locat shards pack'"
            )
        raise CorruptSample(f"not a tar archive ({size} bytes, beginning with {fetch(0, 24)!r})")
    starts, crcs = array("Q"), array("I")
    key: str | None = None
    extensions: set[str] = set()
    at = 0
    usual: set[str] | None = None  # extensions of the sample before the last one
    while at < size:
        damaged: CorruptTar | None = None
        resume = size  # no end marker; if one is met, the offset of what follows it
        try:
            for member in members(fetch, at, size):
                if not member.name:
                    following = _after_zeros(fetch, member.start, size)
                    if following is None:
                        starts.append(member.start)
                        return Scan(starts, crcs)
                    resume = following
                elif parts := split_name(member.name):
                    if parts[0] != key or parts[1] in extensions:  # a repeated extension: another sample of the same name
                        usual = extensions if key is not None else None
                        key, extensions = parts[0], set()
                        starts.append(member.start)
                        crcs.append(key_crc(key))
                    extensions.add(parts[1])
        except CorruptTar as error:
            # a size that leads beyond the end is damage, too
            resume, damaged = (error.after if error.after <= size else error.at + BLOCK), error
        if damaged and damaged.name and not damaged.name.startswith(f"{key}.") and (usual is None or usual <= extensions):
            usual = extensions if key is not None else None
            key, extension = split_name(damaged.name) or (None, "")
            extensions = {extension}
            starts.append(damaged.at)
            crcs.append(DAMAGED)
        if not crcs:
            starts.append(0)
            crcs.append(DAMAGED)
        crcs[-1] = DAMAGED
        at = _next_header(fetch, resume, size)
    starts.append(size)
    return Scan(starts, crcs)


def _after_zeros(fetch: Fetch, at: int, size: int) -> int | None:
    """Offset of the first non-zero block after `at`; None if zeros fill the rest, as behind an end marker."""
    while at < size:
        piece = fetch(at, 1 << 16)
        if piece.strip(b"\0"):
            return at + (len(piece) - len(piece.lstrip(b"\0"))) // BLOCK * BLOCK
        at += len(piece)
    return None


def _next_header(fetch: Fetch, at: int, size: int) -> int:
    """Offset of the first valid header at or after `at` on the grid of blocks; `size` if there is none."""
    at = -(-at // BLOCK) * BLOCK
    while at + BLOCK <= size:
        piece = fetch(at, 1 << 16)
        for offset in range(0, len(piece) - BLOCK + 1, BLOCK):
            if piece[offset + 257 : offset + 262] == b"ustar" and is_header(piece[offset : offset + BLOCK]):
                return at + offset
        at += len(piece) // BLOCK * BLOCK
    return size


def parse(data: bytes, start: int, end: int, crc: int, shard: str) -> RawSample | Damage:
    """The slot in data[start:end] as a sample, or why it is not exactly the sample whose key has this crc."""
    if plain := _parse_plain(data, start, end, crc):
        return RawSample(plain[1], plain[0], shard)
    key, found = "", {}
    try:
        for _, at, size, name in members(lambda at, n: data[at : min(at + n, end)], start, end):
            parts = split_name(name)
            if not name or at + size > end:
                return Damage(key, shard, f"{name or 'zeros'} where the rest of the sample should be: cut short or overwritten")
            if parts:
                key = key or parts[0]
                if parts[0] != key or parts[1] in found:
                    return Damage(key, shard, f"{name!r} is mixed into it")
                found[parts[1]] = data[at : at + size]
    except CorruptTar as error:
        named = error.name if len(error.name) <= _SHOWN else f"{error.name[:_SHOWN]}..."
        return Damage(key or (split_name(named) or (named,))[0], shard, f"{named}: {error.reason}" if named else error.reason)
    if crc == DAMAGED:
        return Damage(key, shard, "it may lack members: the archive is damaged or cut right behind it")
    if key_crc(key) != crc:
        return Damage(key, shard, "another sample lies where the index has this one: the shard was replaced or overwritten")
    return RawSample(found, key, shard)


def _parse_plain(data: bytes, at: int, end: int, crc: int) -> tuple[str, dict[str, bytes]] | None:
    """(key, members) of a sample without extended headers, links or folders, which is nearly all; None leaves it to the full parser.

    The hot spot of reading small samples: the same checks as in `members`, three times as fast.
    """
    found, key = {}, None
    try:
        while at < end:
            block = data[at : at + BLOCK]
            name = block[:100].split(b"\0", 1)[0]
            if block[156] not in _REGULAR or block[257:262] != b"ustar" or block[345] or name[:2] == b"__":
                return None
            if (int(block[148:154], 8) + sum(block[148:156]) - 255 - (zlib.adler32(block) & 0xFFFF)) % 65521:
                return None
            size, dot = int(block[124:135], 8), name.find(b".", name.rfind(b"/") + 1)
            data_at = at + BLOCK
            at = data_at - (-size // BLOCK) * BLOCK
            extension = name[dot + 1 :].decode().lower()
            if key is None:
                key = name[:dot]
            if name[:dot] != key or extension in found or not 0 <= size <= end - data_at or block[124] & 0x80:
                return None
            found[extension] = data[data_at : data_at + size]
        if at != end or not key or key.endswith(b"/") or zlib.crc32(key) != crc or b"." not in name:
            return None
        return key.decode(), found
    except (ValueError, IndexError):  # an unusual number or name, or the end of the data
        return None
