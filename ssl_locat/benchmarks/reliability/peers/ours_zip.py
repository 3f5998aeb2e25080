"""ssl_locat on zip archives: every second one deflated."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

from ssl_locat.benchmarks.reliability.peers import ours
from ssl_locat.benchmarks.reliability.samples import PER_SHARD, Sample

FORMAT = ".zip"


def write(folder: Path, samples: Iterable[Sample]) -> None:
    folder.mkdir(parents=True)
    listed = list(samples)
    for start in range(0, len(listed), PER_SHARD):
        number = start // PER_SHARD
        method = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
        with zipfile.ZipFile(folder / f"{number:05d}.zip", "w", method) as archive:
            for sample in listed[start : start + PER_SHARD]:
                archive.writestr(f"{sample.number:07d}.png", sample.png)
                archive.writestr(f"{sample.number:07d}.cls", str(sample.label))


class Reader(ours.Reader):
    def shards(self, data: str) -> list[str]:
        return self.urls(data, FORMAT)
