"""Hugging Face datasets: a streamed IterableDataset over the same tars, split by node, in torchdata's StatefulDataLoader as its guide shows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node
from torchdata.stateful_dataloader import StatefulDataLoader

from ssl_locat.benchmarks.reliability.samples import Job, batch, seen, shard_urls, write_tars

write, FORMAT = write_tars, ".tar"


def collate(samples: list[dict[str, Any]]) -> dict[str, list[int]]:
    return batch(seen(int(sample["__key__"]), sample["png"], sample["cls"]) for sample in samples)


class Reader:
    BUFFER = 100  # samples of the shuffle buffer of each worker

    def __init__(self, job: Job):
        parts = [
            load_dataset("webdataset", data_files={"train": shard_urls(data)}, split="train", streaming=True) for data in job.data
        ]
        dataset = parts[0] if len(parts) == 1 else interleave_datasets(parts, probabilities=job.weights, seed=3)
        if self.BUFFER:
            dataset = dataset.shuffle(seed=3, buffer_size=self.BUFFER)
        dataset = split_dataset_by_node(dataset, rank=job.rank, world_size=job.world)
        self.loader = StatefulDataLoader(dataset, batch_size=job.own_batch, num_workers=job.workers, collate_fn=collate)
        if job.state:
            self.loader.load_state_dict(torch.load(job.state, weights_only=True))

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        yield from self.loader

    def save(self, path: Path) -> None:
        torch.save(self.loader.state_dict(), path)
