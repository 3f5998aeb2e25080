"""Loader processes keep to their size, however many batches they make."""

import io
import re
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_locat.data.shards.index import open_mix
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.evaluation.shared.image_views import training_view
from ssl_locat.evaluation.shared.samples import LabelledImage, stack


def _write_photographs(folder: Path, shards: int, each: int) -> str:
    """JPEGs of 40 px, two dozen distinct ones under their own keys."""
    rng, found = np.random.default_rng(0), []
    for _ in range(24):
        file = io.BytesIO()
        pixels = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)).resize((40, 40), Image.Resampling.BICUBIC)
        pixels.save(file, "jpeg", quality=95)
        found.append(file.getvalue())
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for number in range(each):
                for ending, content in (("jpg", found[number % 24]), ("cls", str(number % 10).encode())):
                    member = tarfile.TarInfo(f"{shard:03d}_{number:05d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return str(folder / "*.tar")


def _private_megabytes(process: int) -> int:
    return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) >> 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_worker_does_not_grow_with_its_batches(tmp_path):
    """glibc kept the room of each batch on the heap: 12 MB more with every 1024 images, 5.3 GB after an epoch of ImageNet's count."""
    datasets, weights = open_mix(_write_photographs(tmp_path, 4, 2000))
    view = partial(training_view, size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    plan, held = choose_plan(datasets, weights, 0, 1024), []
    sizes = {"global_batch_size": 1024, "start_samples": 0, "workers": 2}
    with TrainStream(datasets, plan, LabelledImage(view, {}), stack, **sizes) as stream:
        for number, _ in zip(range(81), stream, strict=False):
            if number in (20, 80):
                held.append([_private_megabytes(process.pid) for process in stream._batches._workers])
    # 30 batches of each worker: none or two of 12 MB come; without workers.large_blocks_apart 24 to 348 MB, by chance
    assert max(after - before for before, after in zip(*held, strict=True)) < 60
