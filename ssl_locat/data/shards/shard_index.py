"""What lies where: the index of tar shards, built once, kept beside them or in the user's cache, and read piece by piece.

Of each sample the index holds where it starts and a crc of its key, 12 bytes in all. It comes from the file `shards.index` beside the
shards (`ssl-locat shards index` writes it), or else from one scan, kept in the cache. Only one line per shard is held in memory: the
offsets of a shard are read when its samples are, so that a hundred thousand shards open in seconds.

An index file: a first line; one block per shard (uint64 starts [n + 1], then uint32 crcs [n]); a JSON list of shards; its length.
"""

import atexit
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from ssl_locat.data.shards.tar import DAMAGED, Scan, scan
from ssl_locat.data.stores import private
from ssl_locat.data.stores.objects import Denied, Gone, Stat, folder_and_name, join, scheme_of
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import CorruptSample, DataError, did_you_mean
from ssl_locat.runs.log import progress
from ssl_locat.text.shown import redact, shown

log = logging.getLogger(__name__)

SIDECAR = "shards.index"
_MAGIC = b"ssl_locat shard index 1\n"
_TAIL = 8  # bytes of the length of the JSON at the end
_THREADS = 16
_PIECE = 16 << 20  # bytes of an index that are read at once
_LOCAL_BLOCK, _REMOTE_BLOCK = 1 << 16, 8 << 20  # bytes per read while scanning: hops over payloads, or streams


class Shard(NamedTuple):
    """One shard of an index, without its offsets."""

    url: str
    stat: Stat
    count: int  # type: ignore[assignment]  # slots, the damaged ones included; hides tuple.count, which nobody calls
    damaged: int
    digest: str  # of name, offsets and key crcs: the same wherever the shard lies
    source: str  # the index file with its block
    at: int  # of the block

    @property
    def block_size(self) -> int:
        return 12 * self.count + 8


class IndexFile:
    """Writes an index, block by block; nothing is at `path` before `close`."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[list[str | int]] = []
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.temporary.unlink(missing_ok=True)
        self.file = open(private.create(self.temporary), "wb")  # noqa: SIM115
        self.file.write(_MAGIC)

    def add(self, name: str, shard: Shard, block: bytes) -> Shard:
        self.lines.append([name, shard.stat.size, shard.stat.version, shard.count, shard.damaged, shard.digest, self.file.tell()])
        moved = shard._replace(source=str(self.path), at=self.file.tell())
        self.file.write(block)
        return moved

    def close(self) -> None:
        text = json.dumps(self.lines, separators=(",", ":")).encode()
        self.file.write(text + len(text).to_bytes(_TAIL, "little"))
        self.file.close()
        self.temporary.replace(self.path)


def read_index(store: Store, url: str) -> dict[str, Shard]:
    """Lines of an index file by the name they were written under; {} if there is no such file."""
    try:
        stat = store.stat(url)
    except (Gone, Denied):  # stores that may not be listed answer 403 for what is missing
        return {}
    if stat.size < len(_MAGIC) + _TAIL or store.read(url, 0, len(_MAGIC), stat) != _MAGIC:
        raise DataError(f"{shown(url)} is no index of this release: delete it, and write it again with 'ssl-locat shards index'")
    end = stat.size - _TAIL
    length = int.from_bytes(store.read(url, end, stat.size, stat), "little")
    if length > end:
        raise DataError(f"{shown(url)} is damaged: delete it, and write it again with 'ssl-locat shards index'")
    try:
        lines = json.loads(store.read(url, end - length, end, stat))
        return {line[0]: _shard_of(line, url, end - length) for line in lines}
    except (ValueError, TypeError, IndexError, RecursionError):
        raise DataError(f"{shown(url)} is damaged: delete it, and write it again with 'ssl-locat shards index'") from None


def _shard_of(line: list, source: str, end: int) -> Shard:
    """A line of an index as a Shard, if it can be true: the file ends at `end`. ValueError or TypeError if not."""
    name, size, version, count, damaged, digest, at = line
    numbers = (size, count, damaged, at)
    if not all(isinstance(text, str) for text in (name, version, digest)) or not all(type(number) is int for number in numbers):
        raise TypeError
    shard = Shard(name, Stat(size, version), count, damaged, digest, source, at)
    if not 0 <= damaged <= count or size < 0 or at < len(_MAGIC) or at + shard.block_size > end:
        raise ValueError
    return shard


def load_block(store: Store, shard: Shard) -> tuple[array, array]:
    """(starts uint64 [n + 1], crcs uint32 [n]), which the shard's digest vouches for; scanned again where the index was damaged."""
    block = _read_block(store, shard)
    if _digest(shard.url, block) != shard.digest:
        log.warning("the index %s is damaged: %s is scanned again", shown(shard.source), shown(shard.url))
        rescanned, block = _scan_one(store, shard.url, store.stat(shard.url))
        if (rescanned.digest, rescanned.count) != (shard.digest, shard.count):
            raise DataError(
                f"{shown(shard.source)} does not describe {shown(shard.url)}: delete it; a run's shards must then be the same as at its start"
            )
    starts, crcs = array("Q"), array("I")
    starts.frombytes(block[: 8 * (shard.count + 1)])
    crcs.frombytes(block[8 * (shard.count + 1) :])
    return starts, crcs


def load_key_crcs(store: Store, shards: list[Shard]) -> array:
    """uint32 [N]: a crc of each sample's key. Blocks that lie side by side are read together: some requests, not one a shard."""
    found: dict[tuple[str, int], bytes] = {}
    blocks = sorted({(shard.source, shard.at): shard.block_size for shard in shards}.items())
    while blocks:
        (source, begin), size = blocks[0]
        end, count = begin + size, 1
        while count < len(blocks) and blocks[count][0] == (source, end) and end - begin < _PIECE:
            end, count = end + blocks[count][1], count + 1
        piece = store.read(source, begin, end)
        for (_, at), size in blocks[:count]:
            number = size // 12  # of samples: 12 bytes each, and 8
            found[source, at] = piece[at - begin + 8 * (number + 1) : at - begin + size]
        del blocks[:count]
    crcs = array("I")
    for shard in shards:
        crcs.frombytes(found[shard.source, shard.at])
    return crcs


def _block_bytes(store: Store, shard: Shard) -> bytes:
    starts, crcs = load_block(store, shard)
    return starts.tobytes() + crcs.tobytes()


def _read_block(store: Store, shard: Shard) -> bytes:
    try:
        return store.read(shard.source, shard.at, shard.at + shard.block_size)
    except Gone:  # cut, or removed since it was opened
        return b""


def open_shards(store: Store, found: dict[str, Stat | None], cache_dir: Path | None = None) -> list[Shard]:
    """Index lines of all shards, in order: from beside them, from the cache, or scanned now (and then cached).

    Raises DataError for shards that are missing or no tars at all.
    """
    cache_dir = cache_dir or default_cache_dir()
    beside = _read_sidecars(store, found, cache_dir)
    known: dict[str, Shard] = {}
    # a listing or a local stat tells whether a shard is still the indexed one; asking a remote store for each would cost a request
    ask = [url for url, stat in found.items() if stat is None and (scheme_of(url) == "file" or url not in beside)]
    found = {**found, **_stat_all(store, ask)}
    for url, shard in beside.items():
        now = found[url]
        size = now.size if now else shard.stat.size
        if size <= shard.stat.size:  # a shorter shard was cut after indexing: what it lost is damage, and shows when read
            known[url] = shard._replace(stat=Stat(shard.stat.size, now.version if now and size == shard.stat.size else ""))
        else:
            log.warning(
                "%s does not match %s beside it, and is indexed anew: run 'ssl-locat shards index' again", shown(url), SIDECAR
            )
    rest = [url for url in found if url not in known]
    if rest:
        # by URLs without credentials: signatures change, and a cache is no place for them
        names = {url: redact(url) for url in found}
        key = hashlib.blake2b("\n".join(names.values()).encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
        with locked(cache_dir, key) as path:
            cached = _read_cache(path)
            known |= {
                url: cached[names[url]]._replace(url=url)
                for url in rest
                if names[url] in cached and cached[names[url]].stat == found[url]
            }
            if missing := {url: stat for url in rest if url not in known and (stat := found[url])}:
                known |= _scan_all(store, missing, [known[url] for url in rest if url in known], path)
    for url, shard in known.items():
        if shard.damaged:
            log.warning(
                "%s: %d of %d samples are damaged; 'ssl-locat shards check' lists them", shown(url), shard.damaged, shard.count
            )
    return [known[url] for url in found]


def write_sidecars(store: Store, shards: list[Shard]) -> list[str]:
    """Write `shards.index` into every folder that holds one of the shards; lines of other shards in it are kept. Returns the files."""
    folders: dict[str, list[Shard]] = {}
    for shard in shards:
        folders.setdefault(folder_and_name(shard.url)[0], []).append(shard)
    written = []
    for folder, members in folders.items():
        url = join(folder, SIDECAR)
        lines = read_index(store, url) | {folder_and_name(shard.url)[1]: shard for shard in members}
        with tempfile.TemporaryDirectory() as temporary:
            index = IndexFile(Path(temporary) / SIDECAR)
            for name, shard in sorted(lines.items()):
                index.add(name, shard, _block_bytes(store, shard))
            index.close()
            store.write(url, index.path.read_bytes())
        written.append(url)
    return written


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ssl_locat" / "indexes"


def scan_shard(store: Store, url: str, stat: Stat) -> Scan:
    """Read one shard's headers. Raises CorruptSample if it is no tar, Gone or Outage as the store does."""
    size = _LOCAL_BLOCK if scheme_of(url) == "file" else _REMOTE_BLOCK
    buffer, low = b"", 0

    def fetch(at: int, length: int) -> bytes:
        nonlocal buffer, low
        if not low <= at <= at + length <= low + len(buffer):
            end = min(stat.size, at + max(size, length))
            buffer, low = (store.read(url, at, end, stat), at) if at < end else (b"", at)
        return buffer[at - low : at - low + length]

    return scan(fetch, stat.size)


def _scan_twice(store: Store, url: str, stat: Stat) -> Scan:
    """A store may send something else once: damage is believed if it is there again."""
    with suppress(CorruptSample):
        result = scan_shard(store, url, stat)
        if DAMAGED not in result.crcs:
            return result
    return scan_shard(store, url, stat)


def _scan_one(store: Store, url: str, stat: Stat) -> tuple[Shard, bytes]:
    result = _scan_twice(store, url, stat) if scheme_of(url) != "file" else scan_shard(store, url, stat)
    block = result.starts.tobytes() + result.crcs.tobytes()
    return Shard(url, stat, len(result.crcs), result.crcs.count(DAMAGED), _digest(url, block), "", 0), block


def _digest(url: str, block: bytes) -> str:
    name = folder_and_name(url)[1].encode("utf-8", "surrogateescape")
    return hashlib.blake2b(name + b"\0" + block, digest_size=8).hexdigest()


def _scan_all(store: Store, missing: dict[str, Stat], cached: list[Shard], path: Path) -> dict[str, Shard]:
    """Scan in parallel, with progress. What was scanned is kept even if this is interrupted."""
    index, local = IndexFile(path), Store()
    known = {
        shard.url: index.add(redact(shard.url), shard, block)
        for shard in cached
        if _digest(shard.url, block := _read_block(local, shard)) == shard.digest
    }
    missing = missing | {shard.url: shard.stat for shard in cached if shard.url not in known}
    try:
        with _scan_pool(missing) as pool, progress("Indexing shards", len(missing), "shards") as bar:
            jobs = {pool.submit(_scan_one, store, url, stat): url for url, stat in missing.items()}
            try:
                for job in as_completed(jobs):
                    shard, block = job.result()
                    known[shard.url] = index.add(redact(shard.url), shard, block)
                    bar.update(1)
            except CorruptSample as error:
                raise DataError(
                    f"{shown(jobs[job])} is {error.reason}. Remove it from the data pattern, or fetch it again "
                    "('ssl-locat shards check' lists all damage)."
                ) from None
            except Gone as error:
                raise DataError(f"{error}. Check the data pattern.") from None
            finally:
                for job in jobs:
                    job.cancel()
    finally:
        index.close()
    return known


def _scan_pool(urls: Iterable[str]) -> Executor:
    """Parsing headers keeps a core busy: processes for many local shards (they only read files, so a fork is safe), else threads."""
    urls = list(urls)
    if len(urls) >= 32 and all(scheme_of(url) == "file" for url in urls) and hasattr(os, "sched_getaffinity"):
        return ProcessPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0))), mp_context=get_context("fork"))
    return ThreadPoolExecutor(_THREADS)


KINDS = "a folder of images, tar shards, or a quoted pattern of them"


def _hint(url: str) -> str:
    """Why something may not be there: a local path with nearly its name, or a hub that does not tell what one may not see."""
    if scheme_of(url) == "hf":
        return " Without a token that may read it, a private data set looks like none: `hf auth login`, or set HF_TOKEN."
    folder, _, name = url.removeprefix("file://").rstrip("/").rpartition("/")
    return did_you_mean(name, os.listdir(folder or "/")) if scheme_of(url) == "file" and os.path.isdir(folder or "/") else ""


def _stat_all(store: Store, urls: list[str]) -> dict[str, Stat]:
    def stat(url: str) -> Stat:
        try:
            return store.stat(url)
        except Gone:
            raise DataError(f"{shown(url)} does not exist.{_hint(url)} Expected {KINDS}.") from None
        except Denied as error:
            raise DataError(str(error)) from None

    with ThreadPoolExecutor(64) as pool:
        return dict(zip(urls, pool.map(stat, urls), strict=True))


def _read_sidecars(store: Store, urls: Iterable[str], cache_dir: Path) -> dict[str, Shard]:
    """Index lines found beside the shards."""
    found: dict[str, Shard] = {}
    folders: dict[str, dict[str, Shard]] = {}
    for url in urls:
        folder, name = folder_and_name(url)
        if folder not in folders:
            folders[folder] = read_index(store, join(folder, SIDECAR))
        if name in folders[folder]:
            found[url] = folders[folder][name]._replace(url=url)
    return found


def _read_cache(path: Path) -> dict[str, Shard]:
    """Lines of an index file in the cache; {} if there is none, or none to be believed: it is built again then."""
    if path.is_symlink() or (path.exists() and path.stat().st_uid != os.geteuid()):
        path.unlink()
    try:
        return read_index(Store(), str(path))
    except DataError:
        log.warning("the index %s in the cache is damaged, and is built again", path)
        return {}


@contextmanager
def locked(folder: Path, name: str) -> Iterator[Path]:
    """Path of an index file in the cache that only one process of this machine builds; the others wait, then find it."""
    try:
        if reason := private.unusable(folder):
            log.warning("the index cache %s is not used: %s. Set XDG_CACHE_HOME to a folder of your own.", folder, reason)
            folder = Path(tempfile.mkdtemp(prefix="ssl_locat_index_"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        lock = open(private.create(folder / f"{name}.lock", exclusive=False), "w")  # noqa: SIM115
    except OSError as error:
        raise DataError(
            f"cannot write the index cache {folder} ({error.strerror}): set XDG_CACHE_HOME to a writable folder"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / f"{name}.index"
