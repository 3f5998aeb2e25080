"""ssl_locat on Parquet files: row groups of 20 rows and, at the end of each file, one of 8."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from ssl_locat.benchmarks.reliability.peers import ours
from ssl_locat.benchmarks.reliability.samples import PER_SHARD, SECOND, Sample, seen
from ssl_locat.data.images.decode import decode_image
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import RawSample

FORMAT = ".parquet"
_GROUP = 20


def write(folder: Path, samples: Iterable[Sample]) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    listed = list(samples)
    for start in range(0, len(listed), PER_SHARD):
        rows = [{"image": {"bytes": one.png, "path": None}, "label": one.label} for one in listed[start : start + PER_SHARD]]
        path = folder / f"{start // PER_SHARD:05d}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=_GROUP)


def number_of(raw: RawSample) -> int:
    """From file and row; the folder of the second set of a mix ends in 1."""
    folder, _, name = raw.shard.rpartition("/")
    return int(name.partition(".")[0]) * PER_SHARD + int(raw.key.removeprefix("row ")) + SECOND * folder.endswith("1")


def prepare(raw: RawSample, seed: int) -> tuple[int, int, int]:
    return seen(number_of(raw), Image.fromarray(decode_image(raw.members["png"])), int(raw.members["cls"]))


class Reader(ours.Reader):
    prepare = staticmethod(prepare)

    def shards(self, data: str) -> list[str]:
        return self.urls(data, FORMAT)

    def order(self, dataset: Dataset) -> list[int]:
        """Training numbers the rows by row groups of the usual length first."""
        starts = [
            (rows != _GROUP, start, rows)
            for first in range(0, len(dataset), PER_SHARD)
            for start in range(first, min(len(dataset), first + PER_SHARD), _GROUP)
            if (rows := min(_GROUP, min(len(dataset), first + PER_SHARD) - start))
        ]
        starts.sort(key=lambda one: one[0])
        return [row for _, start, rows in starts for row in range(start, start + rows)]
