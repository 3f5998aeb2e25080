"""Zip archives as shards: members by the directory at the end of each (zip_directory.py), a run of neighbours by one range read.

Neighbours whose names agree up to the first dot are one sample, as in tars. Class folders give labels, as in a folder of images, unless the
members hold some. Unlike in tars, every payload is checked (CRC-32).
"""

import hashlib
import logging
import os
import zlib
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ssl_locat.data.images.decode import LABEL_KEYS
from ssl_locat.data.shards.filters import Filters, with_filters
from ssl_locat.data.shards.shard_set import Slot
from ssl_locat.data.shards.tar import Damage, RawSample, split_name
from ssl_locat.data.shards.zip_directory import Directory, read_directory, unpack
from ssl_locat.data.stores.objects import Gone, Stat, folder_and_name, scheme_of
from ssl_locat.data.stores.store import Store, anew
from ssl_locat.errors import CorruptSample, DataError
from ssl_locat.text.shown import redact, shown

log = logging.getLogger(__name__)

ENDING = ".zip"
_THREADS = 8  # that read directories
_GAP = 64 << 10  # bytes of other members that are read along rather than asked for apart


class Archive(NamedTuple):
    url: str
    stat: Stat
    directory: Directory
    digest: str  # of its name and directory

    @property
    def samples(self) -> int:
        return len(self.directory.first) - 1


class ZipDataset:
    """Samples of zip archives, one after the other, in the order of their bytes."""

    by_range, together = True, 1
    filters: Filters | None = None

    def __init__(self, name: str, store: Store, archives: list[Archive]):
        self.name, self.store, self.archives = name, store, archives
        self.ends = list(accumulate(archive.samples for archive in archives))
        self.remote = any(scheme_of(archive.url) != "file" for archive in archives[:1])
        self.manifest_hash = hashlib.blake2b("".join(archive.digest for archive in archives).encode(), digest_size=8).hexdigest()
        packed = sum(int((one.directory.ends - one.directory.offsets).sum()) for one in archives)
        self.mean_bytes = packed / max(1, len(self))
        self.root, self.classes = _class_folders(archives)
        self._numbers = {name: b"%d" % number for number, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return [self.parse(entry) for entry in self.fetch(start, stop)]

    def key_crcs(self) -> np.ndarray:
        keys = (_key(one.directory, sample) for one in self.archives for sample in range(one.samples))
        return np.fromiter((zlib.crc32(key.encode("utf-8", "surrogateescape")) for key in keys), np.uint32, len(self))

    def fetch(self, start: int, stop: int) -> list[tuple | Damage]:
        found: list[tuple | Damage] = []
        while start < stop:
            number = bisect_right(self.ends, start)
            before = self.ends[number] - self.archives[number].samples
            end = min(stop, self.ends[number])
            spans = self.archives[number].directory.spans(start - before, end - before)
            first = 0
            for place in range(1, len(spans) + 1):
                # one read for neighbours without much between them
                if place == len(spans) or spans[place][0] - spans[place - 1][1] > _GAP:
                    found += self._fetch_run(number, start - before + first, spans[first:place])
                    first = place
            start = end
        return found

    def _fetch_run(self, number: int, first: int, spans: list[tuple[int, int]]) -> list[tuple | Damage]:
        archive = self.archives[number]
        base, name = spans[0][0], redact(archive.url)
        try:
            data = self.store.read(archive.url, base, spans[-1][1], archive.stat)
        except Gone as error:
            whole = sum(end <= (error.size or 0) for _, end in spans)
            before = self._fetch_run(number, first, spans[:whole]) if whole else []
            keys = (_key(archive.directory, sample) for sample in range(first + whole, first + len(spans)))
            return before + [Damage(key, name, str(error)) for key in keys]
        # the place of a crc of a tar's key is taken by the sample's number in the archive
        return [
            (data, start - base, end - base, sample, Slot(name, number, start))
            for sample, (start, end) in enumerate(spans, first)
        ]

    def parse(self, entry: tuple | Damage) -> RawSample | Damage:
        if isinstance(entry, Damage):
            return entry
        data, start, end, sample, slot = entry
        archive = self.archives[slot.number]
        found = self._sample(archive, sample, memoryview(data)[start:end], slot)
        if (
            isinstance(found, Damage)
            and self.remote
            and not any(member in archive.directory.wrong for member in self._members(archive, sample))
        ):
            # bytes that the store sent once may be wrong: a sample is given up if they come twice
            with suppress(Gone), anew():
                again = self.store.read(archive.url, slot.at, slot.at + end - start, archive.stat)
                found = self._sample(archive, sample, again, slot)
        return with_filters(found, self.filters)

    def _members(self, archive: Archive, sample: int) -> range:
        return range(archive.directory.first.item(sample), archive.directory.first.item(sample + 1))

    def _sample(self, archive: Archive, sample: int, data: bytes | memoryview, slot: Slot) -> RawSample | Damage:
        directory, members = archive.directory, {}
        key = _key(directory, sample)
        for member in self._members(archive, sample):
            extension = _parts(directory.name(member))[1]
            try:
                members[extension] = unpack(data, slot.at, directory, member)
            except CorruptSample as error:
                return Damage(key, slot.shard, f"{shown(extension)}: {error.reason}")
        if self.classes:
            members["cls"] = self._numbers[key[len(self.root) :].partition("/")[0]]
        return RawSample(members, key, slot.shard)


def open_zips(name: str, store: Store, found: dict[str, Stat | None]) -> ZipDataset:
    """Read all directories. DataError for what is no whole archive, or where none holds an image."""
    with ThreadPoolExecutor(_THREADS) as pool:
        archives = list(pool.map(lambda url: _open(store, url, found[url]), found))
    dataset = ZipDataset(name, store, [archive for archive in archives if archive.samples])
    ignored = sum(archive.directory.ignored for archive in archives)
    if not len(dataset):
        raise DataError(f"{name} holds no images: {len(archives)} zip archive(s) with {ignored} other files.")
    if ignored:
        log.info("%s: %d files in the archives belong to no image, and are passed over", name, ignored)
    if wrong := sum(len(archive.directory.wrong) for archive in archives):
        log.warning("%s: %d members cannot be used; 'ssl-locat shards check' lists them", name, wrong)
    return dataset


def _open(store: Store, url: str, stat: Stat | None) -> Archive:
    try:
        stat = stat or store.stat(url)
        directory, content = read_directory(store, url, stat)
    except Gone as error:
        raise DataError(f"{error}. Check the data pattern.") from None
    except CorruptSample as error:
        raise DataError(f"{shown(url)} is {error.reason}. Fetch or pack it again.") from None
    base = folder_and_name(redact(url))[1].encode("utf-8", "surrogateescape")
    return Archive(url, stat, directory, hashlib.blake2b(base + b"\0" + content, digest_size=8).hexdigest())


def _parts(name: str) -> tuple[str, str]:
    found = split_name(name.removeprefix("./"))
    assert found  # else it would not be in the directory
    return found


def _key(directory: Directory, sample: int) -> str:
    return _parts(directory.name(directory.first.item(sample)))[0]


def _class_folders(archives: list[Archive]) -> tuple[str, list[str]]:
    """(the folder that all members share, as of an archive that was packed from outside; the names of the folders in it). Without names where some
    image lies in none of these, or members hold labels."""
    keys = [_key(one.directory, sample) for one in archives for sample in range(one.samples)]
    shared = os.path.commonprefix([key.rpartition("/")[0] + "/" for key in keys])  # noqa: RUF071  # cut at a slash below
    root = shared[: shared.rfind("/") + 1]
    labelled = (
        _parts(one.directory.name(member))[1] in LABEL_KEYS for one in archives for member in range(len(one.directory.offsets))
    )
    if not all("/" in key[len(root) :] for key in keys) or any(labelled):
        return root, []
    return root, sorted({key[len(root) :].partition("/")[0] for key in keys})
