"""MosaicML Streaming: MDS shards with hashes that are checked, StreamingDataset in its StreamingDataLoader; rank 0's state is everyone's."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from streaming import MDSWriter, Stream, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from ssl_locat.benchmarks.reliability.samples import Job, Sample, batch, bucket, decoded, seen

FORMAT = ".mds"
HASH = "sha1"


def write(folder: Path, samples: Iterable[Sample]) -> None:
    columns = {"number": "int", "png": "bytes", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 14, hashes=[HASH]) as out:
        for sample in samples:
            out.write({"number": sample.number, "png": sample.png, "label": sample.label})


def collate(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    return batch(seen(row["number"], decoded(row["png"]), row["label"]) for row in rows)


class Reader:
    def __init__(self, job: Job):
        if job.world > 1:
            dist.init_process_group("gloo", f"file://{job.folder}/store", rank=job.rank, world_size=job.world)
        # what a killed job left behind; on all ranks, as its documentation asks for
        clean_stale_shared_memory()
        options: dict[str, Any] = {"shuffle": True, "shuffle_seed": 3, "batch_size": job.own_batch, "validate_hash": HASH}
        if job.data[0].startswith("http"):
            endpoint, remote = bucket(job.data[0])
            os.environ |= {"S3_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
            dataset = StreamingDataset(remote=remote, local=f"{job.folder}/shards", num_canonical_nodes=1, **options)
        elif len(job.data) == 1:
            dataset = StreamingDataset(local=job.data[0], num_canonical_nodes=1, **options)
        else:
            streams = [Stream(local=data, proportion=share) for data, share in zip(job.data, job.weights, strict=True)]
            dataset = StreamingDataset(streams=streams, num_canonical_nodes=1, epoch_size=job.samples, **options)
        self.loader = StreamingDataLoader(dataset, batch_size=job.own_batch, num_workers=job.workers, collate_fn=collate)
        if job.state:
            self.loader.load_state_dict(json.loads(job.state.read_text()))

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        yield from self.loader

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.loader.state_dict()))
