"""Image files of a folder as numbered samples."""

import hashlib
import zlib
from contextlib import suppress

import numpy as np

from ssl_locat.data.shards.filters import Filters, with_filters
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.data.stores.objects import Gone, join, scheme_of
from ssl_locat.data.stores.store import Store
from ssl_locat.text.shown import redact, shown


class FolderDataset:
    """Image files under a folder. If all of them lie in sub-folders, the first level names the class: member 'cls' is its number."""

    by_range, together = False, 1
    filters: Filters | None = None

    def __init__(self, name: str, store: Store, folder: str, paths: list[str]):
        self.name, self.store, self.folder = name, store, folder
        self.remote = scheme_of(folder) != "file"
        self.classes = sorted({path.partition("/")[0] for path in paths}) if all("/" in path for path in paths) else []
        # millions of small strings would be copied into every worker: one string and its offsets are shared
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._paths = b"".join(encoded)
        self.manifest_hash = hashlib.blake2b(b"\0".join(encoded), digest_size=8).hexdigest()
        sizes = []
        # some 32 of them: a stat of a million files on a network disk takes minutes
        for path in paths[:: max(1, len(paths) // 32)]:
            with suppress(Gone):  # a link to nowhere counts as corrupt when it is read, and ends nothing
                sizes.append(store.stat(join(folder, path)).size)
        self.mean_bytes = sum(sizes) / max(1, len(sizes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return self.fetch(start, stop)

    def key_crcs(self) -> np.ndarray:
        keys = (self._path(index).rpartition(b".")[0] for index in range(len(self)))
        return np.fromiter(map(zlib.crc32, keys), np.uint32, len(self))

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]: the number of each file's class folder."""
        numbers = {name.encode("utf-8", "surrogateescape"): number for number, name in enumerate(self.classes)}
        return np.fromiter((numbers[self._path(index).partition(b"/")[0]] for index in range(len(self))), np.int64, len(self))

    def parse(self, entry: RawSample | Damage) -> RawSample | Damage:
        return entry

    def fetch(self, start: int, stop: int) -> list[RawSample | Damage]:
        return [with_filters(self._read_one(self._path(i)), self.filters) for i in range(start, stop)]

    def _path(self, index: int) -> bytes:
        return self._paths[self._ends[index] : self._ends[index + 1]]

    def _read_one(self, encoded: bytes) -> RawSample | Damage:
        path = encoded.decode("utf-8", "surrogateescape")
        key, _, extension = path.rpartition(".")
        try:
            members = {extension.lower(): self.store.read_all(join(self.folder, path))}
        except Gone as error:
            return Damage(key, shown(self.folder), str(error))
        if self.classes:
            members["cls"] = str(self.classes.index(path.partition("/")[0])).encode()
        return RawSample(members, key, redact(self.folder))
