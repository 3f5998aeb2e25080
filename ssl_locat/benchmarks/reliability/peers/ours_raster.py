"""ssl_locat on windows of TIFFs: a picture is a window of 8 x 8, four of them in a tile of 16 x 16."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssl_locat.benchmarks.reliability.peers import ours
from ssl_locat.benchmarks.reliability.samples import PER_SHARD, SECOND, SIDE, Sample, label, pixels, seen
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.raster import RasterDataset
from ssl_locat.data.shards.tar import RawSample

FORMAT = ".tif"
_COLUMNS = 8


def write(folder: Path, samples: Iterable[Sample]) -> None:
    import tifffile

    folder.mkdir(parents=True)
    numbers = [sample.number for sample in samples]
    for start in range(0, len(numbers), PER_SHARD):
        image = np.zeros((PER_SHARD // _COLUMNS * SIDE, _COLUMNS * SIDE, 3), np.uint8)
        for place, number in enumerate(numbers[start : start + PER_SHARD]):
            y, x = place // _COLUMNS * SIDE, place % _COLUMNS * SIDE
            image[y : y + SIDE, x : x + SIDE] = np.frombuffer(pixels(number), np.uint8).reshape(SIDE, SIDE, 3)
        options: dict[str, Any] = {"tile": (16, 16), "photometric": "rgb", "compression": "zlib", "metadata": None}
        tifffile.imwrite(folder / f"{start // PER_SHARD:05d}.tif", image, **options)


def prepare(raw: RawSample, seed: int) -> tuple[int, int, int]:
    folder, _, name = raw.shard.rpartition("/")
    x, y, *_ = raw.key.replace(",", "").split()[1::2]
    number = int(name.partition(".")[0]) * PER_SHARD + int(y) // SIDE * _COLUMNS + int(x) // SIDE + SECOND * folder.endswith("1")
    image = np.load(io.BytesIO(raw.members["npy"]), allow_pickle=False)
    return seen(number, Image.fromarray(image), label(number))


class Reader(ours.Reader):
    prepare = staticmethod(prepare)

    def spec(self, data: str, weight: float) -> dict[str, Any]:
        return {"raster": self.urls(data, FORMAT), "size": SIDE, "weight": weight}

    def order(self, dataset: Dataset) -> list[int]:
        """Windows of one tile stand together."""
        assert isinstance(dataset, RasterDataset)
        return [PER_SHARD * file + int(window) for file, slide in enumerate(dataset.slides) for window in slide.kept]
