"""The page cache: right bytes always, one download per page, a limit that holds, safe under kills and full disks."""

import ctypes
import multiprocessing
import os
import random
import signal
import time

import pytest

from ssl_locat.data.stores import cache
from ssl_locat.data.stores.cache import CachedStore
from ssl_locat.data.stores.objects import Stat
from ssl_locat.data.stores.store import Store

PAGE = 4096


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(cache, "PAGE_BYTES", PAGE)


@pytest.fixture
def remote():
    """(URL, content, Stat) of an object on a store; memory:// counts as remote."""
    content = random.Random(0).randbytes(20 * PAGE + 123)
    url = f"memory://bucket/{os.urandom(4).hex()}/x.tar"
    Store().write(url, content)
    return url, content, Store().stat(url)


def pages(folder) -> list:
    return [path for path in folder.glob("*/*") if path.suffix != ".tmp"]


def test_reads_are_exact_and_pages_fetched_once(remote, tmp_path, monkeypatch):
    url, content, stat = remote
    store = CachedStore(tmp_path, 1 << 30)
    rng = random.Random(1)
    for _ in range(50):
        start = rng.randrange(len(content))
        end = rng.randrange(start, min(len(content), start + 3 * PAGE)) + 1
        assert store.read(url, start, end, stat) == content[start:end]
    assert store.read(url, 0, len(content), stat) == content
    assert len(pages(tmp_path)) == 21
    monkeypatch.setattr(Store, "read", None)  # from now on the store is not asked
    assert CachedStore(tmp_path, 1 << 30).read(url, 0, len(content), stat) == content


def test_same_base_names_and_other_versions_do_not_collide(tmp_path):
    store = CachedStore(tmp_path, 1 << 30)
    for name, content in (("a", b"x" * 5000), ("b", b"y" * 5000)):
        Store().write(f"memory://same/{name}/000.tar", content)
        assert store.read(f"memory://same/{name}/000.tar", 0, 5000, Store().stat(f"memory://same/{name}/000.tar")) == content
    old = Store().stat("memory://same/a/000.tar")
    Store().write("memory://same/a/000.tar", b"z" * 5000)
    new = Store().stat("memory://same/a/000.tar")
    assert new != old and CachedStore(tmp_path, 1 << 30).read("memory://same/a/000.tar", 0, 5000, new) == b"z" * 5000


def test_the_limit_holds(remote, tmp_path):
    url, content, stat = remote
    store = CachedStore(tmp_path, 8 * PAGE)
    for turn in range(4):
        assert store.read(url, 0, len(content), stat) == content, turn
    assert len(pages(tmp_path)) <= 16
    store.trim(2 * PAGE + 8)
    assert len(pages(tmp_path)) == 2


def test_the_least_recently_used_pages_go_first(remote, tmp_path):
    url, _, stat = remote
    store, paths = CachedStore(tmp_path, 1 << 30), []
    for number in range(4):
        store.read(url, number * PAGE, (number + 1) * PAGE, stat)
        paths += set(pages(tmp_path)) - set(paths)
        os.utime(paths[number], (number, number))  # file systems do not tell times a moment apart
    store.read(url, 0, PAGE, stat)
    store.trim(2 * (PAGE + 4))
    assert set(pages(tmp_path)) == {paths[0], paths[3]}


def test_a_damaged_page_is_fetched_again(remote, tmp_path):
    url, content, stat = remote
    store = CachedStore(tmp_path, 1 << 30)
    store.read(url, 0, len(content), stat)
    for path in pages(tmp_path):
        path.write_bytes(path.read_bytes()[:100] + bytes(path.stat().st_size - 100))
    assert store.read(url, 0, len(content), stat) == content


def hammer(folder, url, content, stat, seed, done, number) -> None:
    """Read for ever, counting in done[number]; a wrong byte ends the process."""
    cache.PAGE_BYTES = PAGE
    store, rng = CachedStore(folder, 6 * PAGE), random.Random(seed)
    while True:
        start = rng.randrange(len(content) - PAGE)
        assert store.read(url, start, start + PAGE, stat) == content[start : start + PAGE]
        done[number] += 1


def test_processes_share_it_and_may_be_killed(remote, tmp_path):
    url, content, stat = remote
    context = multiprocessing.get_context("fork")
    for turn in range(3):
        done = context.RawArray("q", 3)  # without a lock, which a killed process would keep
        ranks = [
            context.Process(target=hammer, args=(tmp_path, url, content, stat, turn * 9 + i, done, i), daemon=True)
            for i in range(3)
        ]
        for rank in ranks:
            rank.start()
        waited_until = time.monotonic() + 60
        while min(done) < 100 and all(rank.is_alive() for rank in ranks) and time.monotonic() < waited_until:
            time.sleep(0.01)
        assert min(done) >= 100 and all(rank.is_alive() for rank in ranks)  # none met a wrong byte
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)
            rank.join()
    assert CachedStore(tmp_path, 1 << 30).read(url, 0, len(content), stat) == content


def test_a_folder_that_cannot_be_written_means_no_cache(remote, tmp_path, caplog):
    url, content, stat = remote
    (tmp_path / "file").write_text("in the way")
    store = CachedStore(tmp_path / "file" / "cache", 1 << 30)
    assert store.read(url, 0, len(content), stat) == content
    assert "reading continues without it" in caplog.text


def on_full_disk(folder, url, content, stat, answers) -> None:
    cache.PAGE_BYTES = PAGE
    libc = ctypes.CDLL(None)
    if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, (1 << 14) | (1 << 18), None):
        return answers.put("not permitted")
    if libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, b"size=32k"):
        return answers.put("not permitted")
    store = CachedStore(folder, 1 << 30)
    answers.put(all(store.read(url, 0, len(content), stat) == content for _ in range(3)))


def test_a_full_disk_means_less_cache(remote, tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=on_full_disk, args=(tmp_path, *remote, answers), daemon=True)
    process.start()
    answer = answers.get(timeout=60)
    process.join()
    if answer == "not permitted":
        pytest.skip("mounting a small disk needs root")
    assert answer is True


def test_local_files_and_unversioned_objects_are_read_directly(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"q" * 6000)
    store = CachedStore(tmp_path / "cache", 1 << 30)
    assert store.read(str(tmp_path / "a.tar"), 5, 50, store.stat(str(tmp_path / "a.tar"))) == b"q" * 45
    Store().write("memory://plain/b.tar", b"w" * 6000)
    assert store.read("memory://plain/b.tar", 0, 6000, Stat(6000, "")) == b"w" * 6000
    assert not (tmp_path / "cache").exists()
