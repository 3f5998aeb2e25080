"""grain: its DataLoader over ArrayRecord files with an IndexSampler; each rank saves the state of its own iterator."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import grain.python as grain
from array_record.python.array_record_module import ArrayRecordWriter

from ssl_locat.benchmarks.reliability.samples import PER_SHARD, Job, Sample, batch, decoded, seen

FORMAT = ".arrayrecord"


def write(folder: Path, samples: Iterable[Sample]) -> None:
    folder.mkdir(parents=True)
    listed = list(samples)
    for start in range(0, len(listed), PER_SHARD):
        out = ArrayRecordWriter(str(folder / f"{start // PER_SHARD:05d}{FORMAT}"), "group_size:1")
        for sample in listed[start : start + PER_SHARD]:
            out.write(json.dumps([sample.number, sample.label]).encode().ljust(32) + sample.png)
        out.close()


class Told(grain.MapTransform):
    def map(self, record: bytes) -> tuple[int, int, int]:
        number, label = json.loads(record[:32])
        return seen(number, decoded(record[32:]), label)


class Reader:
    def __init__(self, job: Job):
        source = grain.ArrayRecordDataSource([str(path) for path in sorted(Path(job.data[0]).glob(f"*{FORMAT}"))])
        shard = grain.ShardOptions(shard_index=job.rank, shard_count=job.world, drop_remainder=True)
        sampler = grain.IndexSampler(len(source), shard_options=shard, shuffle=True, num_epochs=1, seed=3)
        loader = grain.DataLoader(
            data_source=source,
            sampler=sampler,
            operations=[Told(), grain.Batch(job.own_batch, drop_remainder=False)],
            worker_count=job.workers,
        )
        self.iterator = iter(loader)
        if job.state:
            self.iterator.set_state(job.state.read_bytes())

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for columns in self.iterator:
            yield batch(zip(*columns, strict=True))

    def save(self, path: Path) -> None:
        path.write_bytes(self.iterator.get_state())
