"""ssl_locat: the stream that training reads, from plain tars; the state is one integer and the plan, the same for all ranks.

`ours_parquet`, `ours_zip` and `ours_raster` are the same on other kinds of shards.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from ssl_locat.benchmarks.reliability.samples import SECOND, Job, batch, seen, write_tars
from ssl_locat.data.images.decode import decode_image
from ssl_locat.data.shards.index import open_mix
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import RawSample
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stream.plan import Plan, choose_plan, resume_plan
from ssl_locat.data.stream.stream import TrainStream

SEED = 3
write, FORMAT = write_tars, ".tar"
window_samples = lru_cache(1024)(Plan.window_samples)


def prepare(raw: RawSample, seed: int) -> tuple[int, int, int]:
    return seen(int(raw.key), Image.fromarray(decode_image(raw.members["png"])), int(raw.members["cls"]))


class Reader:
    prepare = staticmethod(prepare)

    def __init__(self, job: Job):
        self.job = job
        self.state: dict[str, Any] = json.loads(job.state.read_text()) if job.state else {}
        spec = [self.spec(data, weight) for data, weight in zip(job.data, job.weights, strict=True)]
        # a minute, not five, until a store that does not answer is an outage
        self.datasets, weights = open_mix(spec, store=Store(budget_seconds=60), in_groups=True)
        known = self.state.get("plan")
        self.plan = (
            resume_plan(known, self.datasets, weights, SEED) if known else choose_plan(self.datasets, weights, SEED, job.batch)
        )
        self.start = self.taken = self.state.get("samples_seen", 0)
        self.orders = [self.order(dataset) for dataset in self.datasets]

    def spec(self, data: str, weight: float) -> dict[str, Any]:
        return {"shards": self.shards(data), "weight": weight}

    def shards(self, data: str) -> list[str]:
        return self.urls(data, FORMAT)

    def urls(self, data: str, ending: str) -> list[str]:
        """The shards of a folder, or of a web server that has as many as `URL#COUNT` says."""
        if data.startswith("http"):
            url, _, count = data.partition("#")
            return [f"{url}/{number:05d}{ending}" for number in range(int(count))]
        return [str(path) for path in sorted(Path(data).glob(f"*{ending}"))]

    def order(self, dataset: Dataset) -> Sequence[int]:
        """Which picture each sample of a data set is."""
        return range(len(dataset))

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        job = self.job
        with TrainStream(
            self.datasets,
            self.plan,
            self.prepare,
            batch,
            start_samples=self.start,
            global_batch_size=job.batch,
            rank=job.rank,
            world_size=job.world,
            workers=job.workers,
            max_bad=1.0,
            quarantine_path=job.folder.parent / "quarantine.jsonl",
        ) as stream:
            for found in islice(stream, job.steps):  # the stream has no end: a pass does
                self.taken += job.batch
                positions, damaged = found.positions.tolist(), {entry.position for entry in found.damaged}
                yield self._checked(positions, found.payload, damaged)

    def _checked(self, positions: list[int], payload: dict[str, list[int]], damaged: set[int]) -> dict[str, list[int]]:
        """More than is asked of others: each position must show the sample that the plan says; another one counts as wrong.

        Where a cut shard left fewer samples, places in the index are no numbers any more; and the pass ends in the middle of a batch."""
        slots = [self.plan.slot(position) for position in positions]
        if sum(self.plan.sizes) < self.job.samples:
            kept = [place for place, slot in enumerate(slots) if slot.epoch == 0]
            return {name: [values[place] for place in kept] for name, values in payload.items()}
        for place, slot in enumerate(slots):
            number = self.orders[slot.dataset][window_samples(self.plan, *slot[:4])[slot.offset]]
            if payload["number"][place] != number + SECOND * slot.dataset and positions[place] not in damaged:
                payload["checksum"][place] = -1
        return payload

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"samples_seen": self.taken, "plan": self.plan.to_dict()}))
