"""Tar shards and folders as datasets: grouping like WebDataset's, damage seen, indexes cached and written beside the shards."""

import io
import os
import random
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from shards import add, write_shard, write_shards

from ssl_locat.data.shards import shard_index
from ssl_locat.data.shards.check import check_command, show_command
from ssl_locat.data.shards.index import open_dataset, open_mix, read_compressed
from ssl_locat.data.shards.tar import Damage, RawSample, parse, scan, split_name
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import ConfigError, CorruptSample, DataError


def read_bytes(data: bytes) -> list[RawSample | Damage]:
    """Scan and parse an archive held in memory."""
    found = scan(lambda at, length: data[at : at + length], len(data))
    return [
        parse(data, start, end, crc, "x.tar") for start, end, crc in zip(found.starts, found.starts[1:], found.crcs, strict=False)
    ]


def good(found: list) -> dict[str, dict]:
    return {sample.key: sample.members for sample in found if isinstance(sample, RawSample)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# grouping ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_grouped_as_webdataset_groups_them(tmp_path, format):
    import webdataset

    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=format) as archive:
        folder = tarfile.TarInfo("images")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        add(archive, "__meta__", b"note")
        add(archive, "__index__/a.json", b"{}")
        add(archive, "images/0001.JPG", b"one")
        add(archive, "images/0001.seg.PNG", b"mask")
        add(archive, "no_extension", b"skipped")
        add(archive, "images/0002.jpg", b"")
        long = "deep/" * 30 + "name" * (20 if format == tarfile.USTAR_FORMAT else 60)
        add(archive, f"{long}.jpg", b"three" * 300)
        link = tarfile.TarInfo("images/0003.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "0001.JPG"
        archive.addfile(link)
        add(archive, "bild_ü.jpg" if format != tarfile.USTAR_FORMAT else "bild.jpg", b"umlaut")
    ours = good(open_dataset(str(path)).read(0, 4))
    theirs = {}
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        theirs[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
    assert ours == theirs and len(ours) == 4


def test_names_split_at_the_first_dot_of_the_base_name():
    assert split_name("a.b/c.d.E") == ("a.b/c", "d.e")
    assert split_name("c") is None and split_name("__meta__") is None and split_name(".hidden") is None


def test_a_repeated_key_is_another_sample_never_a_mixture(shared_data):
    found = open_dataset(str(shared_data("broken") / "duplicate-keys.tar")).read(0, 5)
    assert [sample.key for sample in found] == ["000000", "000001", "000001", "000002", "000000"]
    assert len({sample.members["jpg"] for sample in found}) == 5


# damage -----------------------------------------------------------------------------------------------------------------------


def archive_bytes(count: int = 20) -> tuple[bytes, dict]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for i in range(count):
            add(archive, f"{i:04d}.bin", random.Random(i).randbytes(300 + 97 * i))
            add(archive, f"{i:04d}.cls", str(i).encode())
    data = buffer.getvalue()
    return data, good(read_bytes(data))


def test_every_truncation_is_seen_and_nothing_false_is_returned():
    data, whole = archive_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for cut in sorted({*range(512, end, 512), *random.Random(0).sample(range(512, end), 150)}):
        found = read_bytes(data[:cut])
        usable = good(found)
        assert all(whole[key] == members for key, members in usable.items()), cut
        assert sum(isinstance(sample, Damage) for sample in found) == 1, cut
        lost = next(i for i, key in enumerate(whole) if key not in usable)
        assert list(usable) == list(whole)[:lost]


def test_an_overwritten_block_costs_at_most_two_samples():
    data, whole = archive_bytes()
    end = len(data.rstrip(b"\0")) // 512
    rng = random.Random(1)
    for block in range(1, end):
        spoiled = data[: block * 512] + rng.randbytes(512) + data[block * 512 + 512 :]
        found = read_bytes(spoiled)
        intact = {key: members for key, members in good(found).items() if whole.get(key) == members}
        assert len(whole) - len(intact) <= 2, block
        # what is left of a sample behind a spoiled header lacks members; all else that differs has a spoiled payload
        if len(found) == len(whole) and not any(isinstance(sample, Damage) for sample in found):
            assert len(intact) >= len(whole) - 1


def test_a_hole_of_zeros_is_no_end():
    data, whole = archive_bytes()
    spoiled = data[:4096] + bytes(2048) + data[6144:]
    found = read_bytes(spoiled)
    assert any(isinstance(sample, Damage) for sample in found) and len(good(found)) >= len(whole) - 4
    assert list(whole)[-1] in good(found)


def test_a_missing_end_marker_is_damage_and_a_plain_end_is_none():
    data, _ = archive_bytes(3)
    assert len(good(read_bytes(data))) == 3
    cut = data.rstrip(b"\0")
    cut = cut + bytes(-len(cut) % 512)
    found = read_bytes(cut)
    assert list(good(found)) == ["0000", "0001"] and "cut" in found[-1].reason


@pytest.mark.parametrize("trap", ["a negative size", "a pax record of no length"])
def test_headers_that_lead_backwards_are_damage(trap):
    """Followed, they would be read round and round for ever."""
    info = tarfile.TarInfo("a.jpg" if trap == "a negative size" else "pax")
    records = b"" if trap == "a negative size" else b"0 path=b.jpg\n"
    info.size, info.type = len(records), b"x" if records else b"0"
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if not records:
        header[124:136] = b"-0000001000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w") as archive:
        add(archive, "good.jpg", b"x" * 700)
    data = bytes(header) + records.ljust(512 * bool(records), b"\0") + good.getvalue()
    found = scan(lambda at, n: data[at : at + n], len(data))
    samples = [parse(data, *found.starts[i : i + 2], found.crcs[i], "s") for i in range(len(found.crcs))]
    # the unreadable pax header belongs to the member behind it, whose true name and size it may have held
    assert [sample.key for sample in samples if isinstance(sample, RawSample)] == ["good"] * (not records)
    assert isinstance(samples[0], Damage) and samples[0].key == ("good" if records else "a")


def test_what_is_no_tar_is_refused():
    with pytest.raises(CorruptSample, match="not a tar"):
        read_bytes(b"<html>" * 500)


# datasets ---------------------------------------------------------------------------------------------------------------------


def test_ranges_cross_shards(tmp_path):
    dataset = open_dataset(write_shards(tmp_path, [3, 1, 5]))
    assert len(dataset) == 9
    keys = [sample.key for sample in dataset.read(0, 9)]
    assert keys == [f"{shard:03d}_{i:05d}" for shard, count in enumerate([3, 1, 5]) for i in range(count)]
    assert [sample.key for sample in dataset.read(2, 5)] == keys[2:5]


def test_the_manifest_tells_data_apart_wherever_it_lies(tmp_path):
    here = open_dataset(write_shards(tmp_path / "here", [3, 4]))
    there = open_dataset([str(tmp_path / "here/000.tar"), str(tmp_path / "here/001.tar")])
    write_shards(tmp_path / "moved", [3, 4])
    assert here.manifest_hash == there.manifest_hash == open_dataset(str(tmp_path / "moved")).manifest_hash
    assert here.manifest_hash != open_dataset(write_shards(tmp_path / "other", [4, 3])).manifest_hash


def test_the_index_is_cached_and_a_changed_shard_scanned_again(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path / "data", [5, 5])
    scanned = []
    original = shard_index.scan_shard
    monkeypatch.setattr(shard_index, "scan_shard", lambda store, url, stat: scanned.append(url) or original(store, url, stat))
    first = open_dataset(pattern)
    assert len(scanned) == 2
    assert open_dataset(pattern).manifest_hash == first.manifest_hash and len(scanned) == 2
    write_shard(tmp_path / "data/001.tar", ["x", "y", "z"])
    assert len(open_dataset(pattern)) == 8 and len(scanned) == 3


def test_sidecars_spare_the_scan_even_when_the_data_moves(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", [5, 6])
    dataset = open_dataset(str(tmp_path / "data"))
    (written,) = shard_index.write_sidecars(Store(), dataset.shards)
    assert written.endswith("data/shards.index")
    (tmp_path / "data").rename(tmp_path / "moved")
    monkeypatch.setattr(shard_index, "scan_shard", None)
    moved = open_dataset(str(tmp_path / "moved"))
    assert moved.manifest_hash == dataset.manifest_hash and moved.read(10, 11)[0].key == "001_00005"


def test_a_shard_cut_after_indexing_loses_exactly_what_it_lost(tmp_path):
    write_shards(tmp_path / "data", [10, 10])
    dataset = open_dataset(str(tmp_path / "data"))
    shard_index.write_sidecars(Store(), dataset.shards)
    starts = shard_index.load_block(Store(), dataset.shards[1])[0]
    os.truncate(tmp_path / "data/001.tar", starts[6] + 700)
    found = open_dataset(str(tmp_path / "data")).read(0, 20)
    assert [isinstance(sample, Damage) for sample in found] == [False] * 16 + [True] * 4
    assert "only" in found[-1].reason


def test_a_stale_sidecar_is_noticed(tmp_path, caplog):
    write_shards(tmp_path / "data", [2])
    shard_index.write_sidecars(Store(), open_dataset(str(tmp_path / "data")).shards)
    write_shards(tmp_path / "data", [40])
    assert len(open_dataset(str(tmp_path / "data"))) == 40
    assert "indexed anew" in caplog.text


def note_scans(monkeypatch, folder: Path, before=lambda url: None) -> Path:
    """A folder that from now on gets a file per scanned shard, named after it, with the scanning process's id."""
    folder.mkdir()
    real = shard_index.scan_shard

    def scan_shard(store, url, stat):
        before(url)
        (folder / Path(url).name).write_text(str(os.getpid()))
        return real(store, url, stat)

    monkeypatch.setattr(shard_index, "scan_shard", scan_shard)
    return folder


def test_many_shards_are_scanned_by_other_processes(tmp_path, monkeypatch):
    noted = note_scans(monkeypatch, tmp_path / "noted")
    assert len(open_dataset(write_shards(tmp_path / "data", [2] * 33))) == 66
    scanned_by = [path.read_text() for path in noted.iterdir()]
    assert len(scanned_by) == 33 and str(os.getpid()) not in scanned_by


def test_an_interrupted_scan_keeps_what_it_had(tmp_path, monkeypatch):
    kept, keep = threading.Semaphore(0), shard_index.IndexFile.add

    def add_and_tell(*arguments):
        moved = keep(*arguments)
        kept.release()
        return moved

    def broken_one_last(url: str) -> None:
        if url.endswith("003.tar"):
            assert all(kept.acquire(timeout=60) for _ in range(3))

    monkeypatch.setattr(shard_index.IndexFile, "add", add_and_tell)
    pattern = write_shards(tmp_path / "data", [2, 2, 2])
    (tmp_path / "data/003.tar").write_text("no tar at all, but long enough to be looked at" * 20)
    with monkeypatch.context() as patched:
        assert note_scans(patched, tmp_path / "first", broken_one_last)
        with pytest.raises(DataError, match=r"003\.tar is not a tar"):
            open_dataset(pattern)
    write_shard(tmp_path / "data/003.tar", ["a", "b"])  # fetched again
    scanned = note_scans(monkeypatch, tmp_path / "second")
    assert len(open_dataset(pattern)) == 8
    assert [path.name for path in scanned.iterdir()] == ["003.tar"]


def test_a_hundred_thousand_shards_open_in_seconds(tmp_path):
    """10^9 samples: the index tells counts; offsets are read when needed (sparse here: the file holds zeros)."""
    import json
    import time

    per_shard, shards = 10_000, 100_000
    block = 12 * per_shard + 8
    lines = [[f"{i:06d}.tar", 10**9, "", per_shard, 0, f"{i:016x}", 24 + i * block] for i in range(shards)]
    lines[-1][5] = shard_index._digest("099999.tar", bytes(block))
    text = json.dumps(lines, separators=(",", ":")).encode()
    with open(tmp_path / "shards.index", "wb") as file:
        file.write(shard_index._MAGIC)
        file.seek(24 + shards * block)
        file.write(text + len(text).to_bytes(8, "little"))
    began = time.perf_counter()
    known = shard_index.read_index(Store(), str(tmp_path / "shards.index"))
    from ssl_locat.data.shards.shard_set import ShardDataset

    dataset = ShardDataset("huge", Store(), list(known.values()))
    assert len(dataset) == 10**9
    assert time.perf_counter() - began < 10  # about 1 s
    assert len(dataset._block(99_999)[1]) == per_shard


# folders, compressed archives, specs ---------------------------------------------------------------------------------------------


def test_a_folder_of_class_folders_has_labels(tmp_path):
    for name in ("cat/b.jpg", "cat/a.JPEG", "dog/old/c.png", "dog/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    dataset = open_dataset(str(tmp_path))
    assert dataset.classes == ["cat", "dog"]
    found = dataset.read(0, len(dataset))
    assert [(sample.key, sample.members["cls"]) for sample in found] == [("cat/a", b"0"), ("cat/b", b"0"), ("dog/old/c", b"1")]
    assert found[0].members["jpeg"] == b"cat/a.JPEG"


def test_a_flat_folder_has_none_and_a_vanished_file_is_damage(tmp_path):
    for name in ("b.jpg", "a.png", "x/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    dataset = open_dataset(str(tmp_path))
    (tmp_path / "b.jpg").unlink()
    found = dataset.read(0, 3)
    assert "cls" not in found[0].members and isinstance(found[1], Damage) and found[2].key == "x/c"


def test_compressed_shards_are_for_evaluation_only(shared_data, tmp_path):
    packed = shared_data("cifar10") / "cifar10-train-000000.tar.gz"
    with pytest.raises(DataError, match="ssl-locat shards pack"):
        open_dataset(str(packed))
    assert len(list(read_compressed(str(packed)))) == 5000
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(packed.read_bytes()[:300_000])
    found = list(read_compressed(str(cut)))
    assert isinstance(found[-1], Damage) and all(isinstance(sample, RawSample) for sample in found[:-1]) and len(found) > 500


@pytest.mark.parametrize(
    "spec, words",
    [
        ("pipe:touch HACKED", "no commands"),
        ("simplecache::s3://b/x.tar", "no '::' chains"),
        ("htps://host/x.tar", "Did you mean 'https'"),
        ("missing/{000..003}.tar", "does not exist"),
        ("missing/*.tar", "matches nothing"),
        ("x/{000..003.tar", "unbalanced"),
    ],
)
def test_wrong_specs_get_one_message(spec, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words):
        open_dataset(spec)
    assert not Path("HACKED").exists()


def test_empty_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="neither"):
        open_dataset(str(tmp_path))
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(DataError, match="no samples"):
        open_dataset(str(tmp_path / "a.tar"))


def test_a_mix_names_its_parts(tmp_path):
    one, two = write_shards(tmp_path / "a", [3]), write_shards(tmp_path / "b", [4])
    datasets, weights = open_mix([{"shards": one, "weight": 3}, {"shards": two, "weight": 1}])
    assert [len(dataset) for dataset in datasets] == [3, 4] and weights == [3, 1]
    assert len(open_mix([one, two])[0]) == 1
    with pytest.raises(ConfigError, match="weight"):
        open_mix([{"shards": one, "wieght": 3}])


def test_links_are_followed_and_each_folder_counts_once(tmp_path):
    for name in ("set/cat/1.jpg", "set/cat/deep/2.jpg", "set/dog/3.jpg", "elsewhere/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"pixels")
    (tmp_path / "set/cat/deep/up").symlink_to("../..")  # a loop
    (tmp_path / "set/a").symlink_to("dog")  # sorted before the folder itself, which keeps its name
    (tmp_path / "set/fox").symlink_to("../elsewhere")
    (tmp_path / "elsewhere/back").symlink_to("../set")
    dataset = open_dataset(str(tmp_path / "set"))
    assert [sample.key for sample in dataset.read(0, len(dataset))] == ["cat/1", "cat/deep/2", "dog/3", "fox/4"]
    assert dataset.classes == ["cat", "dog", "fox"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_a_terminal_cannot_show_are_printed_all_the_same(tmp_path, monkeypatch, encoding):
    with tarfile.open(tmp_path / "a.tar", "w", encoding="utf-8", errors="surrogateescape") as archive:
        add(archive, b"caf\xe9.txt".decode("utf-8", "surrogateescape"), "\u00fc".encode())
    for command in (show_command, check_command):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        command(str(tmp_path / "a.tar"), as_json=False)
        stdout.flush()
        assert r"[caf\udce9]" in stdout.buffer.getvalue().decode(encoding)
