"""The central directory at the end of a zip archive: where each member begins, and what is wrong with it, before any of its bytes is read.

Stored and deflated members, zip64 too. What is encrypted, packed otherwise, named twice, overlapping another one (the trick of zip bombs) or
pointing out of the archive's folder is a damaged sample; an archive in several parts, or without a directory, is refused.
(APPNOTE 6.3, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16.)
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np

from ssl_locat.data.images.decode import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS
from ssl_locat.data.images.names import has_extension
from ssl_locat.data.shards.tar import MAX_NAME, split_name
from ssl_locat.data.stores.objects import Stat
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import CorruptSample
from ssl_locat.text.shown import shown

_TAIL = 22 + 65535 + 20  # bytes: the end record, its comment, and what tells of zip64
_LARGEST_DIRECTORY = 1 << 30
MOST_BYTES = 1 << 30  # of a member, unpacked
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_MEMBER = struct.Struct("<4s2B5H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
STORED, DEFLATED = 0, 8
_ENCRYPTED = 1 | 1 << 6 | 1 << 13


class Directory(NamedTuple):
    """The members of an archive that belong to samples, in the order of their bytes; sample s has members first[s]..first[s + 1]."""

    offsets: np.ndarray  # uint64 [n] of the local header
    ends: np.ndarray  # uint64 [n] behind the packed bytes, at the latest
    packed: np.ndarray  # uint64 [n] bytes
    sizes: np.ndarray  # uint64 [n] bytes, unpacked
    crcs: np.ndarray  # uint32 [n]
    deflated: np.ndarray  # bool [n]
    name_ends: np.ndarray  # uint64 [n + 1]
    names: bytes
    first: np.ndarray  # uint32 [samples + 1]
    wrong: dict[int, str]  # member -> why it cannot be used
    ignored: int  # members that belong to no image

    def raw_name(self, member: int) -> bytes:
        return self.names[self.name_ends.item(member) : self.name_ends.item(member + 1)]

    def name(self, member: int) -> str:
        return _text(self.raw_name(member))

    def spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Bytes of the archive in which each of the samples lies."""
        first = self.first[start : stop + 1].astype(np.int64)
        return list(zip(self.offsets[first[:-1]].tolist(), self.ends[first[1:] - 1].tolist(), strict=True))


def read_directory(store: Store, url: str, stat: Stat) -> tuple[Directory, bytes]:
    """(directory, its bytes) of an archive, by two or three reads at its end. CorruptSample for what is no whole zip archive."""
    start = max(0, stat.size - _TAIL)
    tail = store.read(url, start, stat.size, stat)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise CorruptSample("no whole zip archive: its directory, which is at the end, is missing")
    _, disk, begins, here, count, size, offset, comment = _END.unpack_from(tail, at)
    if len(tail) - at - _END.size != comment:
        raise CorruptSample("no whole zip archive: bytes follow its end")
    if disk or begins or here != count:
        raise CorruptSample("a part of a zip archive in several parts: join them first (zip -s 0 PART.zip --out WHOLE.zip)")
    end = start + at
    # writers give a zip64 record also where it is not needed, and the directory ends before it
    count, size, offset, end = _zip64(store, url, stat, tail, start, at) or (count, size, offset, end)
    if size > min(end, _LARGEST_DIRECTORY):
        raise CorruptSample(f"no whole zip archive: its directory would have {size} bytes")
    begin = end - size
    if begin < offset:
        raise CorruptSample("no whole zip archive: bytes are missing before its directory")
    content = tail[begin - start : end - start] if begin >= start else store.read(url, begin, end, stat)
    return _parse(content, count, begin, begin - offset), content


def _zip64(store: Store, url: str, stat: Stat, tail: bytes, start: int, at: int) -> tuple[int, int, int, int] | None:
    """(members, bytes and offset of the directory, where it ends); None where there is no such record."""
    if at < 20 or tail[at - 20 : at - 16] != b"PK\x06\x07":
        return None
    # before what tells where it is: its own offset is wrong where other bytes were put before the archive
    where = start + at - 20 - _END64.size
    record = store.read(url, where, where + _END64.size, stat) if where >= 0 else b""
    if len(record) != _END64.size or record[:4] != b"PK\x06\x06":
        raise CorruptSample("no whole zip archive: its zip64 record is missing")
    *_, disk, begins, here, count, size, offset = _END64.unpack(record)
    if disk or begins or here != count:
        raise CorruptSample("a part of a zip archive in several parts: join them first")
    return count, size, offset, where


class _Entry(NamedTuple):
    offset: int
    name: bytes
    packed: int
    size: int
    crc: int
    method: int
    flags: int


def _entries(content: bytes, count: int, shift: int) -> list[_Entry]:
    found, at = [], 0
    for _ in range(count):
        if len(content) - at < _MEMBER.size:
            raise CorruptSample("no whole zip archive: its directory ends early")
        magic, _, _, _, flags, method, _, _, crc, packed, size, named, extra, comment, _, _, _, offset = _MEMBER.unpack_from(
            content, at
        )
        begin = at + _MEMBER.size
        at = begin + named + extra + comment
        if magic != b"PK\x01\x02" or at > len(content):
            raise CorruptSample("no whole zip archive: its directory is damaged")
        if 0xFFFFFFFF in (packed, size, offset):
            size, packed, offset = _long_numbers(content[begin + named : begin + named + extra], size, packed, offset)
        found.append(_Entry(offset + shift, content[begin : begin + named], packed, size, crc, method, flags))
    if at != len(content):
        raise CorruptSample("no whole zip archive: its directory holds more than its members")
    return sorted(found)


def _long_numbers(extra: bytes, *numbers: int) -> list[int]:
    """The numbers with those that do not fit into 32 bits from the zip64 extra field, where they stand in this order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            given = iter(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            return [next(given, number) if number == 0xFFFFFFFF else number for number in numbers]
        at += 4 + length
    return list(numbers)


def _parse(content: bytes, count: int, end: int, shift: int) -> Directory:
    entries = _entries(content, count, shift)
    kept: list[int] = []  # places in `entries`, sample by sample
    first, wrong, ignored = [0], {}, 0
    group: list[int] = []
    last, extensions, seen = "", set(), set()  # type: str, set[str], set[bytes]

    def close() -> int:
        if not any(has_extension(_text(entries[place].name), (*IMAGE_EXTENSIONS, *ARRAY_EXTENSIONS)) for place in group):
            return len(group)
        kept.extend(group)
        first.append(len(kept))
        return 0

    for place, entry in enumerate(entries):
        name = _text(entry.name)
        if name.endswith("/"):  # a folder
            continue
        parts = split_name(name.removeprefix("./"))
        if parts is None:
            ignored += 1
            continue
        if parts[0] != last or parts[1] in extensions:
            ignored += close()
            last, group, extensions = parts[0], [], set()
        group.append(place)
        extensions.add(parts[1])
    ignored += close()
    for member, place in enumerate(kept):
        reason = _what_is_wrong(entries, place, end, seen)
        if reason:
            wrong[member] = reason
    chosen = [entries[place] for place in kept]
    ends = [min(end, entries[place + 1].offset) if place + 1 < len(entries) else end for place in kept]
    lengths = np.cumsum([0, *(len(entry.name) for entry in chosen)], dtype=np.uint64)
    # a header that lies outside is damage: nothing is asked for there
    columns = [
        np.array([min(entry[column], limit) for entry in chosen], np.uint64)
        for column, limit in ((0, end), (2, end), (3, 1 << 63))
    ]
    return Directory(
        columns[0],
        np.array(ends, np.uint64),
        columns[1],
        columns[2],
        np.array([entry.crc for entry in chosen], np.uint32),
        np.array([entry.method == DEFLATED for entry in chosen], bool),
        lengths,
        b"".join(entry.name for entry in chosen),
        np.array(first, np.uint32),
        wrong,
        ignored,
    )


def _what_is_wrong(entries: list[_Entry], place: int, end: int, seen: set[bytes]) -> str:
    entry = entries[place]
    name = _text(entry.name)
    after = entries[place + 1].offset if place + 1 < len(entries) else end
    repeated = entry.name in seen
    seen.add(entry.name)
    if len(entry.name) > MAX_NAME:
        return f"a name of {len(entry.name)} bytes, more than {MAX_NAME}"
    if name.startswith("/") or ".." in name.split("/") or name[1:2] == ":":
        return f"its name leads out of the archive's folder: {shown(name)}"
    if repeated:
        return f"the archive holds {shown(name)} twice"
    if entry.flags & _ENCRYPTED:
        return "it is encrypted: unpack the archive with its password, and pack it without"
    if entry.method not in (STORED, DEFLATED):
        return f"it is packed by method {entry.method}; read are 0 (stored) and 8 (deflate)"
    if entry.size > MOST_BYTES:
        return f"refused: it unpacks to {entry.size} bytes, more than {MOST_BYTES}"
    if entry.method == STORED and entry.packed != entry.size:
        return f"it is stored, but of {entry.packed} bytes, not {entry.size}"
    if entry.offset + _LOCAL.size + len(entry.name) + entry.packed > min(after, end):
        return "refused: its bytes overlap those of another member, or of the directory"
    return ""


def unpack(data: bytes | memoryview, start: int, directory: Directory, member: int) -> bytes:
    """A member out of the bytes of its sample, which begin at byte `start` of the archive. CorruptSample for what is not what the directory says."""
    if member in directory.wrong:
        raise CorruptSample(directory.wrong[member])
    at, size, length = directory.offsets.item(member) - start, directory.sizes.item(member), directory.packed.item(member)
    if at < 0 or len(data) - at < _LOCAL.size:
        raise CorruptSample("its header is missing")
    magic, *_, named, extra = _LOCAL.unpack_from(data, at)
    name, begin = at + _LOCAL.size, at + _LOCAL.size + named + extra
    packed = data[begin : begin + length]
    if magic != b"PK\x03\x04" or data[name : name + named] != directory.raw_name(member):
        raise CorruptSample("its header is not the one that the directory names")
    if len(packed) != length:
        raise CorruptSample("its bytes are missing")
    content = packed
    if directory.deflated[member]:
        machine = zlib.decompressobj(-15)
        try:
            content = machine.decompress(packed, size + 1)  # no more than the directory says, and one to notice more
        except zlib.error as error:
            raise CorruptSample(f"it does not unpack: {error}") from None
        if len(content) != size or not machine.eof:
            raise CorruptSample(f"it does not unpack to the {size} bytes that the directory says")
    if zlib.crc32(content) != directory.crcs.item(member):
        raise CorruptSample("its bytes are not those that were packed (CRC-32)")
    return bytes(content)


def _text(name: bytes) -> str:
    """Folders by "/", as the format demands and old Windows programs do not."""
    try:
        return name.decode("utf-8").replace("\\", "/")
    except UnicodeDecodeError:
        return name.decode("cp437").replace("\\", "/")
