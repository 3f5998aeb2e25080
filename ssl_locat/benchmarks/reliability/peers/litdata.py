"""LitData: chunks written by `optimize`, StreamingDataset in its StreamingDataLoader, whose state any world size may load."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, optimize

from ssl_locat.benchmarks.reliability.samples import PER_SHARD, Job, Sample, batch, bucket, decoded, seen

os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # each start would ask PyPI
FORMAT = ".bin"
SECURE = True  # its client of object stores takes https alone
# drop_last is part of a state, and unless it is given, it depends on the number of ranks: with another number no state would fit
OPTIONS: dict[str, Any] = {"shuffle": True, "seed": 3, "drop_last": False}


def _row(sample: Sample) -> dict[str, Any]:
    return {"number": sample.number, "png": sample.png, "label": sample.label}


def write(folder: Path, samples: Iterable[Sample]) -> None:
    optimize(_row, list(samples), str(folder), chunk_size=PER_SHARD, num_workers=1, verbose=False)


def collate(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    return batch(seen(row["number"], decoded(row["png"]), row["label"]) for row in rows)


def opened(data: str, folder: Path) -> StreamingDataset:
    if not data.startswith("http"):
        return StreamingDataset(data, **OPTIONS)
    endpoint, remote = bucket(data)
    options = {"endpoint_url": endpoint, "aws_access_key_id": "none", "aws_secret_access_key": "none", "region_name": "us-east-1"}
    return StreamingDataset(remote, cache_dir=f"{folder}/chunks", storage_options=options, **OPTIONS)


class Reader:
    def __init__(self, job: Job):
        if job.world > 1:
            dist.init_process_group("gloo", f"file://{job.folder}/store", rank=job.rank, world_size=job.world)
        parts = [opened(data, job.folder) for data in job.data]
        # weights go with iterate_over_all=False alone
        mix: dict[str, Any] = {"seed": 3, "weights": job.weights, "iterate_over_all": False}
        dataset = parts[0] if len(parts) == 1 else CombinedStreamingDataset(parts, **mix)
        self.loader = StreamingDataLoader(dataset, batch_size=job.own_batch, num_workers=job.workers, collate_fn=collate)
        if job.state:
            self.loader.load_state_dict(torch.load(job.state, weights_only=True))

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        yield from self.loader

    def save(self, path: Path) -> None:
        # as its documentation does: JSON would make words of the state's numbers of workers, which then match none, and a mix begins anew
        torch.save(self.loader.state_dict(), path)
