"""Tar archives as samples: where each sample starts (`scan`), and a sample's members out of its bytes (`parse`).

The tar headers themselves are the check: every 512-byte header carries a checksum, every span read by offset must begin with the
header of the expected key, and an archive must end with its end marker. What fails becomes a damaged slot, never a shorter shard.
Grouping follows WebDataset: neighbours whose names agree up to the first dot of the base name are one sample.
"""

import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ssl_locat.errors import CorruptSample

BLOCK = 512
ZERO = bytes(BLOCK)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".tar.lzma")

DAMAGED = 0  # crc of a flagged slot; no key has it

_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own notes inside a shard
_REGULAR, _SKIPPED = b"0\0007", b"123456g"  # types: files; links, devices, folders, global headers
_EXTENDED = b"xLK"  # headers that describe the next member: pax, GNU long name, GNU long link


class CorruptTar(CorruptSample):
    """No valid tar structure at byte `at`."""

    def __init__(self, at: int, reason: str):
        super().__init__(reason)
        self.at = at


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


class Damage(NamedTuple):
    """Stands where a sample should be."""

    key: str  # '' if not even that is known
    shard: str
    reason: str


def split_name(name: str) -> tuple[str, str] | None:
    """'a/b.seg.PNG' -> ('a/b', 'seg.png'); None for what is no member of a sample."""
    match = _NAME.fullmatch(name)
    if match is None or _META.match(name):
        return None
    return match[1], match[2].lower()


def key_crc(key: str) -> int:
    return zlib.crc32(key.encode("utf-8", "surrogateescape")) or 1


def _number(field: bytes, at: int) -> int:
    if field[0] & 0x80:  # GNU's base-256, for sizes of 8 GiB and more
        return int.from_bytes(field, "big") & (1 << 8 * len(field) - 1) - 1
    try:
        number = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:  # would lead backwards, and round and round
        raise CorruptTar(at, f"unreadable number {field!r} in the tar header")
    return number


def is_header(block: bytes) -> bool:
    """Whether the checksum of a 512-byte header holds."""
    try:
        stored = int(block[148:156].split(b"\0", 1)[0].strip(), 8)
    except (ValueError, IndexError):
        return False
    # adler32's low half is 1 + the sum of the bytes mod 65521, at C speed; the checksum counts its own field as eight spaces
    return (stored + sum(block[148:156]) - 256 + 1 - (zlib.adler32(block) & 0xFFFF)) % 65521 == 0


def _pax(records: bytes, at: int) -> dict[str, bytes]:
    found = {}
    try:
        while records.strip(b"\0"):
            length, rest = records.split(b" ", 1)
            if int(length) <= len(length):  # would never end
                raise ValueError
            record, records = rest[: int(length) - len(length) - 2], records[int(length) :]
            name, value = record.split(b"=", 1)
            found[name.decode()] = value
    except ValueError:
        raise CorruptTar(at, "unreadable pax header") from None
    return found


def members(fetch: Callable[[int, int], bytes], at: int, end: int) -> Iterator[Member]:
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
        if len(block) < BLOCK or not is_header(block):
            raise CorruptTar(at, "cut inside a tar header" if len(block) < BLOCK else "no valid tar header")
        kind = block[156]
        length = _number(block[124:136], at) if size is None or kind in _EXTENDED else size
        data = at + BLOCK
        at = data + -(-length // BLOCK) * BLOCK
        if kind in _EXTENDED:
            text = fetch(data, min(length, 1 << 20))
            if kind == b"L"[0]:
                name = text.rstrip(b"\0")
            elif kind == b"x"[0]:
                fields = _pax(text[:length], data)
                if any(field.startswith("GNU.sparse") for field in fields):
                    raise CorruptTar(start, "sparse tar members are not supported")
                name = fields.get("path", name)
                size = _number(fields["size"].ljust(20, b"\0"), data) if "size" in fields else size
            continue
        if kind in _REGULAR:
            if name is None:
                name = block[:100].split(b"\0", 1)[0]
                if block[257:263] == b"ustar\0" and block[345]:
                    name = block[345:500].split(b"\0", 1)[0] + b"/" + name
            if not name.endswith(b"/"):  # a folder, as very old tars write it
                yield Member(start, data, length, name.decode("utf-8", "surrogateescape"))
        elif kind not in _SKIPPED:
            raise CorruptTar(start, f"tar member of unsupported type {chr(kind)!r}")
        start, name, size = at, None, None
    if start != at or at > end:
        raise CorruptTar(start, "the archive ends in the middle of a member")


def scan(fetch: Callable[[int, int], bytes], size: int) -> Scan:
    """Slots of the whole archive of `size` bytes. `fetch(at, n)` returns n bytes, or what there is up to the end.

    Raises CorruptSample if it does not begin as a tar at all. Damage further on never ends the scan: it goes on at the next valid header.
    The slot before the damage is flagged: nobody can tell whether it lost a member. A missing end marker counts as damage.
    """
    if size < BLOCK or not ((first := fetch(0, BLOCK)) == ZERO or is_header(first)):
        raise CorruptSample(f"not a tar archive ({size} bytes, beginning with {fetch(0, 24)!r})")
    starts, crcs = array("Q"), array("I")
    key, extensions, at = None, set(), 0
    while at < size:
        resume = size  # no end marker; if one is met, the offset of what follows it
        try:
            for member in members(fetch, at, size):
                if not member.name:
                    resume = _after_zeros(fetch, member.start, size)
                    if resume is None:
                        starts.append(member.start)
                        return Scan(starts, crcs)
                elif parts := split_name(member.name):
                    if parts[0] != key or parts[1] in extensions:  # a repeated extension: another sample of the same name
                        key, extensions = parts[0], set()
                        starts.append(member.start)
                        crcs.append(key_crc(key))
                    extensions.add(parts[1])
        except CorruptTar as error:
            resume = error.at + BLOCK
        if not crcs:
            starts.append(0)
            crcs.append(DAMAGED)
        crcs[-1] = DAMAGED
        at = _next_header(fetch, resume, size)
    starts.append(size)
    return Scan(starts, crcs)


def _after_zeros(fetch, at: int, size: int) -> int | None:
    """Offset of the first non-zero block after `at`; None if zeros fill the rest, as behind an end marker."""
    while at < size:
        piece = fetch(at, 1 << 16)
        if piece.strip(b"\0"):
            return at + (len(piece) - len(piece.lstrip(b"\0"))) // BLOCK * BLOCK
        at += len(piece)
    return None


def _next_header(fetch, at: int, size: int) -> int:
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
        return Damage(key, shard, error.reason)
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
