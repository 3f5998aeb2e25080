"""torchdata: StatefulDataLoader over a folder of pictures, with its distributed sampler; each rank saves its own state."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from ssl_locat.benchmarks.reliability.samples import Job, Sample, batch, decoded, seen

FORMAT = ".png"


def write(folder: Path, samples: Iterable[Sample]) -> None:
    folder.mkdir(parents=True)
    for sample in samples:
        (folder / f"{sample.number:07d}_{sample.label}.png").write_bytes(sample.png)


class Folder(torch.utils.data.Dataset):
    def __init__(self, folder: str):
        self.paths = sorted(Path(folder).glob("*.png"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> tuple[int, int, int]:
        number, _, label = self.paths[place].stem.partition("_")
        return seen(int(number), decoded(self.paths[place].read_bytes()), int(label))


class Reader:
    def __init__(self, job: Job):
        dataset = Folder(job.data[0])
        sampler = StatefulDistributedSampler(dataset, job.world, job.rank, shuffle=True, seed=3)
        self.loader = StatefulDataLoader(
            dataset, batch_size=job.own_batch, sampler=sampler, num_workers=job.workers, collate_fn=batch
        )
        if job.state:
            self.loader.load_state_dict(torch.load(job.state, weights_only=True))

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        yield from self.loader

    def save(self, path: Path) -> None:
        torch.save(self.loader.state_dict(), path)
