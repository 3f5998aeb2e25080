"""What every kind of data is to the stream: numbered samples, of which a run of neighbours is read at once. One file for each kind.

    tar         shard_set.py    members at their offsets, by an index that is made once
    Parquet     parquet.py      rows; a row group is the unit of reading
    zip         zips.py         members by the central directory at the end
    raster      raster.py       windows of large TIFFs; the tiles that a window touches
    folder      folder.py       files

`fetch` reads bytes, in the process that reads; `parse` makes a sample of an entry, in the process that decodes. The plan, the stream and its
quarantine know of numbers and nothing else.
"""

from typing import Any, Protocol

import numpy as np

from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.data.stores.store import Store


class Dataset(Protocol):
    """Numbered samples. Copies into worker processes."""

    name: str
    manifest_hash: str  # of the samples' names, order and places: tells another data set, not where it lies
    mean_bytes: float  # per sample
    by_range: bool  # neighbours share one read
    together: int  # samples that are read together or not at all (a row group), and lie on a grid of so many; 1: each by itself
    remote: bool
    store: Store

    def __len__(self) -> int: ...

    def fetch(self, start: int, stop: int) -> list[Any]:
        """Bytes of the samples start..stop, one entry each for `parse`. Raises Outage; never fewer entries."""

    def parse(self, entry: Any) -> RawSample | Damage: ...

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        """Samples start..stop: fetched and parsed."""

    def key_crcs(self) -> np.ndarray:
        """uint32 [N]: of the samples' keys, from the index: no sample is read."""
