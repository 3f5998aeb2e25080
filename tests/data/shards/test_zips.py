"""Zip archives as shards: stored and deflated members by ranges, labels by folders, and every way in which an archive can lie."""

import io
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image
from servers import range_server
from shards import as_list, fingerprint, write_parquets, write_shards

from ssl_locat.data.images.decode import decode_image, find_image, find_label
from ssl_locat.data.shards.check import check
from ssl_locat.data.shards.index import open_dataset, open_mix
from ssl_locat.data.shards.tar import Damage
from ssl_locat.data.shards.zips import ZipDataset
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.errors import DataError


def png(value: int, size: int = 6) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((size, size + 2, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_zip(path, members: dict[str, bytes], method=zipfile.ZIP_STORED, comment: bytes = b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.comment = comment
    return path


def value(sample) -> int:
    return int(decode_image(find_image(sample.members))[0, 0, 0])


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_samples_come_by_number_with_their_members(tmp_path, method):
    members = {}
    for i in range(20):
        members |= {f"{i:03d}.png": png(i), f"{i:03d}.cls": b"%d" % (i % 3), f"{i:03d}.json": b'{"site": %d}' % i}
    write_zip(tmp_path / "a.zip", members, method, b"a comment")
    dataset = open_dataset(str(tmp_path / "a.zip"))
    assert isinstance(dataset, ZipDataset) and len(dataset) == 20 and not dataset.classes
    samples = dataset.read(0, 20)
    assert [value(sample) for sample in samples] == list(range(20)) and [find_label(s.members) for s in samples] == [
        i % 3 for i in range(20)
    ]
    assert samples[7].members["json"] == b'{"site": 7}' and samples[7].key == "007" and samples[7].shard.endswith("a.zip")
    assert [value(sample) for sample in dataset.read(5, 9)] == [5, 6, 7, 8] and len(set(dataset.key_crcs().tolist())) == 20
    assert check(str(tmp_path / "a.zip")).samples == 20


def test_class_folders_label_what_was_packed_from_outside_or_archive_by_archive(tmp_path):
    one = {f"photos/{kind}/{i}.png": png(i) for kind in ("cat", "dog") for i in range(3)} | {
        "photos/README.txt": b"hello",
        "photos/": b"",
    }
    write_zip(tmp_path / "set" / "one.zip", one)
    dataset = open_dataset(str(tmp_path / "set"))  # a folder of archives
    assert dataset.classes == ["cat", "dog"] and [find_label(sample.members) for sample in dataset.read(0, 6)] == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]
    for kind in ("ant", "bee"):
        write_zip(tmp_path / "apart" / f"{kind}.zip", {f"{kind}/{i}.png": png(i) for i in range(2)})
    apart = open_dataset(f"{tmp_path}/apart/*.zip")
    assert apart.classes == ["ant", "bee"] and [find_label(sample.members) for sample in apart.read(0, 4)] == [0, 0, 1, 1]
    write_zip(tmp_path / "flat.zip", {"1.png": png(1)})
    assert not open_dataset(str(tmp_path / "flat.zip")).classes


def test_zips_obey_the_plan_and_are_read_by_range_from_a_store(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        members = {f"{number}_{i:03d}.npy": rng.bytes(900) for i in range(60)}
        write_zip(tmp_path / "root" / f"{number}.zip", members, zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED)
    options = {"start_samples": 0, "global_batch_size": 8, "workers": 0}

    def stream(spec: str, workers: int = 0) -> list:
        datasets, weights = open_mix(spec, store=Store(20, 10))
        plan = choose_plan(datasets, weights, 3, 8)
        with TrainStream(datasets, plan, fingerprint, as_list, **options | {"workers": workers}) as batches:
            return [sample for _, batch in zip(range(30), batches, strict=False) for sample in batch.payload]

    expected = stream(f"{tmp_path}/root/*.zip")
    assert len({key for key, _, _ in expected}) == 240 and stream(f"{tmp_path}/root/*.zip", 2) == expected
    size = sum(path.stat().st_size for path in (tmp_path / "root").iterdir())
    with range_server(tmp_path / "root") as (url, log):
        files = f"{url}/{{0..3}}.zip"
        dataset = open_dataset(files, store=Store(20, 10))
        before = sum(count for _, count in log)
        assert before <= size + 4 and dataset.remote  # so small ones lie whole in what is read of their ends
        log.clear()
        assert [sample.key for sample in dataset.read(70, 75)] == [f"1_{i:03d}" for i in range(10, 15)]
        assert len(log) == 1 and log[0][1] < 5 * 1100
        assert stream(files) == expected


def test_tars_parquet_and_zips_mix(tmp_path):
    """In their proportions, each sample once a pass of its set, the same for any ranks and workers."""
    tars = write_shards(tmp_path / "tars", [40, 40])
    rows = write_parquets(tmp_path / "rows", [100] * 7, per_group=10)
    write_zip(tmp_path / "a.zip", {f"z{i:03d}.npy": bytes([i]) * 900 for i in range(80)})
    spec = [{"shards": tars}, {"shards": rows, "weight": 2.0}, {"shards": str(tmp_path / "a.zip")}]

    def stream(workers: int, world: int) -> dict:
        datasets, weights = open_mix(spec, in_groups=True)
        plan = choose_plan(datasets, weights, 3, 24)
        assert plan.grids == (0, 10, 0)
        found = {}
        for rank in range(world):
            options = {"start_samples": 0, "global_batch_size": 24, "workers": workers, "rank": rank, "world_size": world}
            with TrainStream(datasets, plan, fingerprint, as_list, **options) as batches:
                for _, batch in zip(range(12), batches, strict=False):
                    found |= dict(zip(batch.positions.tolist(), batch.payload, strict=True))
        return found

    expected = stream(0, 1)
    assert stream(1, 3) == expected and len({crc for _, crc, _ in expected.values()}) == 288
    kinds = [key[0] for key, _, _ in expected.values()]
    assert 60 <= kinds.count("0") <= 84 and 60 <= kinds.count("z") <= 84 and 132 <= kinds.count("r") <= 156


# archives that lie ---------------------------------------------------------------------------------------------------------------------


def patched(path, at: int, content: bytes, central: bool = True) -> None:
    """Write into the first member's header in the directory (or before its bytes)."""
    data = bytearray(path.read_bytes())
    start = data.find(b"PK\x01\x02" if central else b"PK\x03\x04")
    data[start + at : start + at + len(content)] = content
    path.write_bytes(bytes(data))


def bomb(path) -> None:
    write_zip(path, {"0.png": bytes(1 << 20), "1.png": png(1)}, zipfile.ZIP_DEFLATED)
    patched(path, 24, struct.pack("<L", 0x7FFFFFFF))


def overlapping(path) -> None:
    write_zip(path, {"0.png": png(0), "1.png": png(1)})
    patched(path, 20, struct.pack("<2L", 400, 400))


def twice(path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
        for name, content in (("1.png", png(1)), ("0.png", png(0)), ("1.png", png(9))):
            archive.writestr(name, content)


def plainly(path) -> None:
    write_zip(path, {"0.png": png(0), "1.png": png(1)})


LIES = {
    "bomb": (bomb, "unpacks to 2147483647 bytes, more than"),
    "understated": (
        lambda path: (write_zip(path, {"0.png": bytes(9999), "1.png": png(1)}, zipfile.ZIP_DEFLATED), patched(path, 24, struct.pack("<L", 10))),
        "does not unpack to the 10 bytes",
    ),
    "overlapping": (overlapping, "overlap those of another member"),
    "encrypted": (lambda path: (plainly(path), patched(path, 8, b"\x01\x00")), "it is encrypted"),
    "method": (lambda path: (plainly(path), patched(path, 10, b"\x0c\x00")), "packed by method 12; read are 0"),
    "outside": (
        lambda path: write_zip(path, {"../../0.png": png(0), "1.png": png(1)}),
        "leads out of the archive's folder: ../../0.png",
    ),
    "absolute": (lambda path: write_zip(path, {"/0.png": png(0), "1.png": png(1)}), "leads out of the archive's folder"),
    "twice": (twice, "holds 1.png twice"),
    "flipped": (lambda path: (plainly(path), patched(path, 60, b"\xff", central=False)), "CRC-32"),
    "renamed": (lambda path: (plainly(path), patched(path, 30, b"9", central=False)), "not the one that the directory names"),
    "not packed": (
        lambda path: (write_zip(path, {"0.png": bytes(99), "1.png": png(1)}, zipfile.ZIP_DEFLATED), patched(path, 35, b"\xff\xff", central=False)),
        "does not unpack",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_member_that_lies_is_damage_and_its_neighbour_is_not(tmp_path, lie):
    make, says = LIES[lie]
    make(tmp_path / "a.zip")
    samples = open_dataset(str(tmp_path / "a.zip")).read(0, 2 + (lie == "twice"))
    (damage,) = [sample for sample in samples if isinstance(sample, Damage)]
    assert says in damage.reason and damage.shard.endswith("a.zip") and damage.key
    assert value(next(sample for sample in samples if sample.key == "1" and not isinstance(sample, Damage))) == 1
    assert len(check(str(tmp_path / "a.zip")).damage) == 1


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data[:-30], "its directory, which is at the end, is missing"),
        (lambda data: data[100:], "bytes are missing before its directory"),
        (lambda data: b"not a zip", "its directory, which is at the end, is missing"),
        (lambda data: data + b"more", "bytes follow its end"),
        (lambda data: data[:-18] + b"\x01\x00" + data[-16:], "in several parts"),
        (lambda data: data[:-14] + b"\x09\x00\x09\x00" + data[-10:], "its directory"),
        (lambda data: data.replace(b"PK\x01\x02", b"PK\x01\x09"), "its directory is damaged"),
    ],
)  # fmt: skip
def test_an_archive_that_is_none_is_refused_in_words(tmp_path, spoil, says):
    plainly(tmp_path / "a.zip")
    (tmp_path / "a.zip").write_bytes(spoil((tmp_path / "a.zip").read_bytes()))
    with pytest.raises(DataError, match=says):
        open_dataset(str(tmp_path / "a.zip"))


def test_zip64_and_archives_behind_other_bytes_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)  # more members need zip64's end record, as 65536 do
    write_zip(tmp_path / "a.zip", {f"{i}.png": png(i) for i in range(9)})
    assert b"PK\x06\x06" in (tmp_path / "a.zip").read_bytes()
    assert [value(sample) for sample in open_dataset(str(tmp_path / "a.zip")).read(0, 9)] == list(range(9))
    (tmp_path / "b.zip").write_bytes(b"#!/bin/sh\n" * 5 + (tmp_path / "a.zip").read_bytes())
    assert [value(sample) for sample in open_dataset(str(tmp_path / "b.zip")).read(0, 9)] == list(range(9))
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive, archive.open("0.png", "w", force_zip64=True) as member:
        member.write(png(5))  # by a stream: sizes behind the bytes
    assert value(open_dataset(str(tmp_path / "c.zip")).read(0, 1)[0]) == 5


def test_fuzzed_archives_are_refused_or_give_as_many_samples_as_they_say(tmp_path):
    write_zip(tmp_path / "a.zip", {f"{i}.png": png(i) for i in range(12)}, zipfile.ZIP_DEFLATED)
    whole, rng, refused = (tmp_path / "a.zip").read_bytes(), np.random.default_rng(0), 0
    for _ in range(120):
        broken = bytearray(whole)
        for at in rng.integers(len(whole) // 3, len(whole), 3):
            broken[at] = rng.integers(256)
        (tmp_path / "a.zip").write_bytes(bytes(broken[: len(whole) - (rng.integers(40) if rng.random() < 0.2 else 0)]))
        try:
            dataset = open_dataset(str(tmp_path / "a.zip"))
        except DataError:
            refused += 1
            continue
        assert len(dataset.read(0, len(dataset))) == len(dataset)
    assert refused < 80
