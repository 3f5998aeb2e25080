"""webdataset: shards split by node and worker, shuffled through a buffer. It has no state to save: a resumed epoch begins anew."""

from collections.abc import Iterator
from pathlib import Path

import webdataset as wds

from ssl_locat.benchmarks.reliability.samples import Job, batch, seen, shard_urls, write_tars

write, FORMAT = write_tars, ".tar"


def told(sample: tuple) -> tuple[int, int, int]:
    key, picture, label = sample
    return seen(int(key), picture, label)


class Reader:
    def __init__(self, job: Job):
        dataset = (
            wds.WebDataset(
                shard_urls(job.data[0]),
                shardshuffle=100,
                seed=3,
                nodesplitter=wds.split_by_node,
                handler=wds.warn_and_continue,
                empty_check=False,
            )
            .shuffle(100)
            .decode("pil", handler=wds.warn_and_continue)
            .to_tuple("__key__", "png", "cls", handler=wds.warn_and_continue)
            .map(told)
            .batched(job.own_batch, collation_fn=batch)
        )
        self.loader = wds.WebLoader(dataset, batch_size=None, num_workers=job.workers)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        yield from self.loader

    def save(self, path: Path) -> None:
        path.write_text("")
