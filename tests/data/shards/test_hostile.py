"""Archives that somebody made to be slow, to hide something or to be mistaken: each ends as damage that is named, in linear time."""

import gzip
import io
import logging
import random
import tarfile
import time

import pytest
from shards import add, write_shard

from ssl_locat.data.shards.check import check
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.pack_sources import list_source
from ssl_locat.data.shards.tar import MAX_NAME, Damage, RawSample, parse, scan, split_name
from ssl_locat.errors import DataError

SECONDS = 3  # 10 ms each on an idle core; quadratic took up to a minute


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def raw_header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo("x")
    info.size, info.type = size, kind
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:512])
    header[:100] = name[:100].ljust(100, b"\0")
    return checksummed(header)


def checksummed(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return raw_header(name, len(data), kind) + padded(data)


def sample(key: bytes) -> bytes:
    return member(key + b".jpg", key * 100) + member(key + b".cls", b"1")


def record(name: bytes, value: bytes) -> bytes:
    body = b" " + name + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length = len(b"%d" % length) + len(body)
    return b"%d" % length + body


END = bytes(1024)


def read(data: bytes) -> list[RawSample | Damage]:
    found = scan(lambda at, n: data[at : at + n], len(data))
    return [parse(data, *found.starts[i : i + 2], found.crcs[i], "s") for i in range(len(found.crcs))]


def keys(found: list) -> list[tuple[str, bool]]:
    return [(sample.key, isinstance(sample, RawSample)) for sample in found]


@pytest.mark.parametrize("letters", [b"/", b".", b"a/", b"a.", b"./", b"__"])
def test_a_long_name_costs_linear_time_and_is_reported(letters):
    name = (letters * 70_000)[:65_536] + b".jpg\0"
    data = sample(b"before") + member(b"././@LongLink", name, b"L") + member(name, b"pixels") + sample(b"behind") + END
    began = time.perf_counter()
    split_name(name.decode())
    found = read(data)
    assert time.perf_counter() - began < SECONDS
    assert keys(found) == [("before", True), (found[1].key, False), ("behind", True)]
    assert "GNU long name of 65541 bytes, more than" in found[1].reason and len(found[1].reason) < 500


def test_a_long_pax_name_is_reported_and_longer_ones_than_any_path_are_not_used():
    for length in (MAX_NAME + 1, 60_000):
        pax = record(b"path", b"x" * (length - 4) + b".jpg")
        found = read(sample(b"before") + member(b"pax", pax, b"x") + member(b"xxx.jpg", b"pixels") + sample(b"behind") + END)
        assert keys(found) == [("before", True), (found[1].key, False), ("behind", True)]
        assert found[1].key.startswith("x") and "more than" in found[1].reason


def test_names_of_4_kb_are_used():
    key = "/".join(["folder" * 30] * 22)
    for name_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=name_format) as archive:
            add(archive, f"{key}.jpg", b"pixels")
        assert keys(read(buffer.getvalue())) == [(key, True)]


@pytest.mark.parametrize("pax", [record(b"a", b"") * 200_000, b"9" * 1_000_000, b"1 " * 500_000, b"=" * 1_000_000])
def test_a_long_pax_header_costs_linear_time_and_is_reported(pax):
    for size in (len(pax), 60_000):
        data = sample(b"before") + member(b"pax", pax[:size], b"x") + member(b"next.jpg", b"pixels") + sample(b"behind") + END
        began = time.perf_counter()
        found = read(data)
        assert time.perf_counter() - began < SECONDS
        assert keys(found) == [("before", True), ("next", size == 60_000 and pax[0:1] == b"5"), ("behind", True)]


def test_pax_sizes_are_decimal():
    """POSIX.1-2001: a size of 700 is not 448, and 800 is a number."""
    for size in (700, 800, 9_999):
        data = (
            member(b"pax", record(b"size", b"%d" % size), b"x")
            + raw_header(b"a.jpg", 5)
            + padded(b"p" * size)
            + sample(b"b")
            + END
        )
        first, second = read(data)
        assert first.members == {"jpg": b"p" * size} and second.key == "b"


@pytest.mark.parametrize("size", [b"-5", b"0x10", b"1e3", b"", b"9" * 40, "٣".encode(), b"1_0"])
def test_odd_pax_sizes_are_damage(size):
    data = sample(b"a") + member(b"pax", record(b"size", size), b"x") + member(b"b.jpg", b"x") + sample(b"c") + END
    assert keys(read(data)) == [("a", True), ("b", False), ("c", True)]


@pytest.mark.parametrize("what", ["checksum", "size", "type"])
@pytest.mark.parametrize("which", [0, 1])
def test_the_damaged_member_is_named_not_the_one_before(what, which):
    """`which` of its members: the image or the label."""
    spoiled = bytearray(sample(b"b"))
    at = 0 if which == 0 else len(member(b"b.jpg", b"b" * 100))
    if what == "checksum":
        spoiled[at + 110] ^= 1
    else:
        spoiled[at + (124 if what == "size" else 156)] = ord("z")
        spoiled[at : at + 512] = checksummed(spoiled[at : at + 512])
    found = read(sample(b"a") + bytes(spoiled) + sample(b"c") + END)
    assert keys(found) == [("a", True), ("b", False), ("c", True)]
    assert ("b.jpg" if which == 0 else "b.cls") in found[1].reason


def test_a_sample_that_may_have_lost_a_member_is_not_used():
    """The name of the destroyed header is wrong, too: whether it was this sample's label nobody can tell."""
    spoiled = bytearray(sample(b"b"))
    spoiled[len(member(b"b.jpg", b"b" * 100))] ^= 1
    found = read(sample(b"a") + bytes(spoiled) + sample(b"c") + END)
    assert keys(found) == [("a", True), ("b", False), ("c", True)]


def test_what_a_mac_leaves_on_a_foreign_disk_is_no_image(tmp_path):
    assert split_name("._x.jpg") is split_name("folder/._x.jpg") is None
    data = (
        member(b"a/._x.jpg", b"finder")
        + member(b"a/x.jpg", b"pixels")
        + member(b"a/._y.jpg", b"f")
        + member(b"a/y.jpg", b"p")
        + END
    )
    assert keys(read(data)) == [("a/x", True), ("a/y", True)]
    for name in ("cat/x.jpg", "cat/._x.jpg", "dog/y.png", "dog/._y.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(name.encode())
    assert [sample.key for sample in open_dataset(str(tmp_path / "images")).read(0, 2)] == ["cat/x", "dog/y"]
    assert [source.key for source in list_source(str(tmp_path / "images"), tmp_path / "u").samples] == ["cat_x", "dog_y"]


def test_images_of_other_kinds_are_counted_and_named_once(tmp_path, caplog):
    for name in ("a.jpg", "b.HEIC", "c.heic", "d.avif", "e.txt"):
        (tmp_path / name).write_bytes(b"x")
    for look in (open_dataset, lambda folder: list_source(folder, tmp_path / "u")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            look(str(tmp_path))
        (line,) = [record.message for record in caplog.records if "not read" in record.message]
        assert "3 images" in line and "2 .heic, 1 .avif" in line and "b.HEIC" in line and "convert" in line


def test_gzip_under_the_name_of_a_tar_is_called_that(tmp_path):
    whole = write_shard(tmp_path / "whole.tar", ["a", "b"])
    (tmp_path / "packed.tar").write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(DataError, match=r"packed\.tar is gzip data under the name of a tar.*\.tar\.gz.*shards pack"):
        open_dataset(str(tmp_path / "packed.tar"))


def spoil(data: bytes, rng: random.Random) -> bytes:
    """One of the ways in which an archive may be wrong."""
    spoiled = bytearray(data)
    at = rng.randrange(len(spoiled))
    header = at // 512 * 512
    kind = rng.randrange(7)
    if kind == 0:
        spoiled[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del spoiled[at:]
    elif kind == 2:
        spoiled[at : at + rng.randrange(2000)] = rng.randbytes(rng.randrange(2000))
    elif kind == 3:
        spoiled[at : at + 1024] = bytes(len(spoiled[at : at + 1024]))
    elif kind == 4:  # a header that claims something, with a checksum that holds
        field, values = rng.choice(
            [(0, b"._/"), (124, b"-019z\x80\xff"), (156, bytes(range(48, 128))), (257, b"u\0"), (345, b"x/")]
        )
        block = bytearray(spoiled[header : header + 512].ljust(512, b"\0"))
        block[field + rng.randrange(3)] = rng.choice(values)
        spoiled[header : header + 512] = checksummed(block)
    elif kind == 5:
        extended = rng.choice(
            [record(b"size", b"%d" % rng.randrange(1 << 40)), record(b"path", rng.randbytes(9)), rng.randbytes(40)]
        )
        spoiled[header:header] = member(b"pax", extended, rng.choice([b"x", b"L", b"K", b"g"]))
    else:
        spoiled[header:header] = spoiled[(other := rng.randrange(len(spoiled)) // 512 * 512) : other + 512 * rng.randrange(4)]
    return bytes(spoiled)


def fuzz(seed: int, cases: int) -> None:
    """Whatever is done to an archive: no error but a refusal, no made-up sample, slots that cover it, linear time."""
    rng = random.Random(seed)
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    ) as archive:
        for i in range(8):
            key = f"{i:04d}" if i % 3 else f"{'long' * 30}/{i:04d}é"
            add(archive, f"{key}.bin", rng.randbytes(300 + 97 * i))
            add(archive, f"{key}.cls", str(i).encode())
    data = buffer.getvalue()
    for case in range(cases):
        spoiled = data
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            spoiled = spoil(spoiled, rng) or b"\0"
        began = time.perf_counter()
        try:
            found = scan(lambda at, n: spoiled[at : at + n], len(spoiled))  # noqa: B023
        except Exception as error:
            assert type(error).__name__ == "CorruptSample", (seed, case, error)
            continue
        assert list(found.starts) == sorted(found.starts) and found.starts[-1] <= len(spoiled), (seed, case)
        for i in range(len(found.crcs)):
            result = parse(spoiled, found.starts[i], found.starts[i + 1], found.crcs[i], "s")
            assert isinstance(result, RawSample | Damage), (seed, case)
            if isinstance(result, RawSample):
                assert all(content in spoiled for content in result.members.values()), (seed, case)
        assert time.perf_counter() - began < SECONDS, (seed, case)


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_archives_end_as_samples_or_as_damage(seed, request):
    fuzz(seed, 500 * request.config.getoption("--fuzz-factor"))


def test_check_names_the_damaged_member(tmp_path):
    spoiled = bytearray(sample(b"b"))
    spoiled[110] ^= 1
    (tmp_path / "x.tar").write_bytes(sample(b"a") + bytes(spoiled) + sample(b"c") + END)
    (damage,) = check(str(tmp_path / "x.tar")).damage
    assert damage.key == "b"
