"""Tar shards as numbered samples: the index tells where each begins, one range read brings a run of neighbours."""

import hashlib
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from contextlib import suppress
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.data.shards.filters import Filters, with_filters
from ssl_locat.data.shards.shard_index import Shard, load_block, load_key_crcs
from ssl_locat.data.shards.tar import DAMAGED, Damage, RawSample, parse
from ssl_locat.data.stores.objects import Gone, scheme_of
from ssl_locat.data.stores.store import Store, anew
from ssl_locat.text.shown import redact

_BLOCKS = 256  # shards whose offsets one process keeps


class Slot(NamedTuple):
    """Where an entry comes from."""

    shard: str  # its name, for messages
    number: int  # of the shard in the data set
    at: int  # byte in the shard


class ShardDataset:
    """Tar shards."""

    by_range, together = True, 1
    filters: Filters | None = None  # of the user's, by what `open_mix` was given

    def __init__(self, name: str, store: Store, shards: list[Shard]):
        self.name, self.store, self.shards = name, store, shards
        self.ends = list(accumulate(shard.count for shard in shards))
        self.manifest_hash = hashlib.blake2b("".join(shard.digest for shard in shards).encode(), digest_size=8).hexdigest()
        # headers and padding included: what a range read costs
        self.mean_bytes = sum(shard.stat.size for shard in shards) / max(1, len(self))
        self.remote = any(scheme_of(shard.url) != "file" for shard in shards[:1])
        self._blocks: OrderedDict[int, tuple[array, array]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # a copy in a worker reads its own blocks: locks cannot be pickled, and 256 blocks would travel with each
        return self.__dict__ | {"_blocks": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return [self.parse(entry) for entry in self.fetch(start, stop)]

    def key_crcs(self) -> np.ndarray:
        return np.array(load_key_crcs(self.store, self.shards), dtype=np.uint32)

    def parse(self, entry: tuple | Damage) -> RawSample | Damage:
        if isinstance(entry, Damage):
            return entry
        data, start, end, crc, slot = entry
        found = parse(data, start, end, crc, slot.shard)
        if isinstance(found, Damage) and self.remote and crc != DAMAGED:
            # bytes that the store sent once may be wrong (a proxy's error page): a sample is given up if they come twice
            shard, size = self.shards[slot.number], end - start
            with suppress(Gone), anew():
                again = self.store.read(shard.url, slot.at, slot.at + size, shard.stat)
                found = parse(again, 0, size, crc, slot.shard)
        return with_filters(found, self.filters)

    def fetch(self, start: int, stop: int) -> list[tuple | Damage]:
        found: list[tuple | Damage] = []
        while start < stop:
            number = bisect_right(self.ends, start)
            first = self.ends[number] - self.shards[number].count
            end = min(stop, self.ends[number])
            found += self._fetch_shard(number, start - first, end - first)
            start = end
        return found

    def _fetch_shard(self, number: int, first: int, last: int) -> list[tuple | Damage]:
        shard = self.shards[number]
        name = redact(shard.url)
        starts, crcs = self._block(number)
        base = starts[first]
        try:
            data = self.store.read(shard.url, base, starts[last], shard.stat)
        except Gone as error:
            whole = first if error.size is None else max(first, bisect_right(starts, error.size) - 1)
            before = self._fetch_shard(number, first, whole) if whole > first else []
            return before + [Damage("", name, str(error))] * (last - whole)
        return [
            (data, starts[i] - base, starts[i + 1] - base, crcs[i], Slot(name, number, starts[i])) for i in range(first, last)
        ]

    def _block(self, number: int) -> tuple[array, array]:
        with self._lock:
            if number in self._blocks:
                self._blocks.move_to_end(number)
                return self._blocks[number]
        block = load_block(self.store, self.shards[number])
        with self._lock:
            self._blocks[number] = block
            if len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
        return block
