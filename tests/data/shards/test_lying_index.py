"""An index that lies is refused or built again; it never costs a sample, and nobody else's is believed."""

import json
import os
import shutil

import pytest
from shards import write_shards

from ssl_locat.data.shards import shard_index
from ssl_locat.data.shards.index import open_dataset, write_index
from ssl_locat.data.shards.tar import RawSample
from ssl_locat.data.stores.cache import CachedStore
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import DataError

COUNT, DAMAGED, DIGEST, AT, SIZE, VERSION, NAME = 3, 4, 5, 6, 1, 2, 0


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ssl_locat" / "indexes"


def changed(data: bytes, field: int, value: object, line: int = 0) -> bytes:
    """An index file with one entry of one line replaced."""
    length = int.from_bytes(data[-8:], "little")
    lines = json.loads(data[-8 - length : -8])
    lines[line][field] = value
    text = json.dumps(lines).encode()
    return data[: -8 - length] + text + len(text).to_bytes(8, "little")


LIES = {
    "count of 10^12": lambda data: changed(data, COUNT, 10**12),
    "count of 10^40": lambda data: changed(data, COUNT, 10**40),
    "count of -1": lambda data: changed(data, COUNT, -1),
    "fewer samples": lambda data: changed(data, COUNT, 1),
    "count as text": lambda data: changed(data, COUNT, "3"),
    "count of null": lambda data: changed(data, COUNT, None),
    "count of 1.5": lambda data: changed(data, COUNT, 1.5),
    "more damage than samples": lambda data: changed(data, DAMAGED, 9),
    "place behind the end": lambda data: changed(data, AT, 10**9),
    "place of another": lambda data: changed(data, AT, 24, line=1),
    "digest of another": lambda data: changed(data, DIGEST, "00" * 8),
    "name as number": lambda data: changed(data, NAME, 5),
    "deep nesting": lambda data: data[:24] + b"[" * 100_000 + (100_000).to_bytes(8, "little"),
    "no list": lambda data: data[:24] + b"5" + (1).to_bytes(8, "little"),
    "not JSON": lambda data: data[:-20] + b"\xff" * 12 + data[-8:],
    "length beyond": lambda data: data[:-8] + b"\xff" * 8,
    "cut": lambda data: data[: len(data) // 2],
    "flipped offset": lambda data: data[:26] + bytes([data[26] ^ 2]) + data[27:],
    "flipped crc": lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
    "empty": lambda data: b"",
    "another release": lambda data: b"x" * 24 + data[24:],
}


def keys(pattern: str) -> list[str]:
    dataset = open_dataset(pattern)
    return [sample.key for sample in dataset.read(0, len(dataset)) if isinstance(sample, RawSample)]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("place", ["beside", "cache"])
def test_an_index_that_lies_costs_no_sample(tmp_path, cache, lie, place):
    pattern = write_shards(tmp_path / "data", [3, 4])
    whole = keys(pattern)
    if place == "beside":
        write_index(pattern)
        shutil.rmtree(cache)
        index = tmp_path / "data" / "shards.index"
    else:
        (index,) = cache.glob("*.index")
    index.write_bytes(LIES[lie](index.read_bytes()))
    for _ in range(2):
        try:
            assert keys(pattern) == whole
        except DataError as error:  # one message, which says what to do
            assert str(index) in str(error) and "delete it" in str(error)


def test_the_caches_are_the_users_alone(tmp_path, cache, monkeypatch):
    pattern = write_shards(tmp_path / "data", [2])
    old = os.umask(0)
    try:
        keys(pattern)
        Store().write("memory://trust/a.bin", b"x" * 5000)
        store = CachedStore(tmp_path / "pages", 1 << 30)
        assert store.read("memory://trust/a.bin", 0, 5000, store.stat("memory://trust/a.bin")) == b"x" * 5000
    finally:
        os.umask(old)
    for folder in (cache, tmp_path / "pages"):
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_a_cache_that_is_a_link_is_not_used(tmp_path, cache, caplog):
    pattern = write_shards(tmp_path / "data", [2])
    (tmp_path / "elsewhere").mkdir()
    cache.parent.mkdir(parents=True)
    cache.symlink_to(tmp_path / "elsewhere")
    assert len(keys(pattern)) == 2 and not list((tmp_path / "elsewhere").iterdir())
    assert "is not used: it is a link" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
def test_a_cache_of_another_user_is_not_used(tmp_path, cache, caplog):
    pattern = write_shards(tmp_path / "data", [2])
    cache.mkdir(parents=True)
    os.chown(cache, 12345, 12345)
    assert len(keys(pattern)) == 2 and not list(cache.iterdir())
    assert "belongs to another user" in caplog.text


def test_an_index_in_the_cache_that_is_a_link_is_not_followed(tmp_path, cache):
    pattern = write_shards(tmp_path / "data", [2])
    keys(pattern)
    (index,) = cache.glob("*.index")
    (tmp_path / "target").write_bytes(b"untouched")
    index.unlink()
    index.symlink_to(tmp_path / "target")
    assert len(keys(pattern)) == 2
    assert (tmp_path / "target").read_bytes() == b"untouched" and not index.is_symlink()


def test_the_index_in_the_cache_knows_no_credentials(tmp_path, cache):
    Store().write("memory://u:hunter2@bucket/x.tar", (write_one(tmp_path)).read_bytes())
    assert len(keys("memory://u:hunter2@bucket/x.tar")) == 2
    assert list(cache.iterdir())
    for path in cache.iterdir():
        assert b"hunter2" not in path.read_bytes() and "hunter2" not in path.name
    assert shard_index.SIDECAR == "shards.index"


def write_one(folder):
    write_shards(folder / "one", [2])
    return folder / "one" / "000.tar"
