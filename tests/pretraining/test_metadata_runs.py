"""Metadata reaches the loss with its image: any ranks, workers and formats, after damage, and in a run that is resumed."""

import io
import json
import random
import shutil
import tarfile

import numpy as np
import pytest
import yaml
from PIL import Image
from shards import add, write_parquet
from tiny_run import losses, write_config

from ssl_locat.config.schema import load
from ssl_locat.data.images.crops import MultiCrop
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.errors import ConfigError
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.parts import Prepare, check
from ssl_locat.runs.log import read_jsonl

COUNT, VALUES = 96, ["A", "B", "C"]
DAMAGED = 17


def content(number: int) -> tuple[bytes, str | None]:
    """A grey that tells the number, and what is said of it: every fifth image says nothing."""
    out = io.BytesIO()
    Image.new("RGB", (24, 24), (number, 100, 100)).save(out, "PNG")
    return out.getvalue(), None if number % 5 == 0 else random.Random(number).choice(VALUES)


def as_tar(folder):
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number in range(COUNT):
            png, value = content(number)
            add(archive, f"{number:03d}.png", png[:40] if number == DAMAGED else png)
            add(archive, f"{number:03d}.json", json.dumps({"camera": value} if value else {}).encode())
    return folder / "a.tar"


def as_parquet(folder):
    rows = []
    for number in range(COUNT):
        png, value = content(number)
        rows.append({"image": {"bytes": png[:40] if number == DAMAGED else png, "path": None}, "camera": value})
    return write_parquet(folder / "a.parquet", rows, 12)


def config_of(folder, shards, *given: str):
    path = write_config(folder, folder)
    text = yaml.safe_load(path.read_text())
    text["data"] |= {"train": str(shards), "test": None, "max_bad": 0.5}
    text["data"]["metadata"] = {"camera": {"member": "json", "key": "camera", "values": VALUES}}
    text["objective"] = [text["objective"], {"name": "metadata", "nuisance": ["camera"], "hidden_dim": 16}]
    path.write_text(yaml.safe_dump(text))
    return load(str(path), given)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("make", "mode", "ranks"), [(as_tar, "cpu", 1), (as_tar, "device", 2), (as_parquet, "device-photometric", 2)]
)
def test_each_image_comes_with_its_own(tmp_path, make, mode, ranks):
    """By the image's red, which no augmentation changes here; the sample in the place of a damaged one brings its own."""
    config = config_of(tmp_path, make(tmp_path))
    datasets, weights, _ = check(config)
    plan = choose_plan(datasets, weights, 0, 16)
    plain = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": (0, 0, 0), "solarize_prob": (0, 0, 0)}
    crops = MultiCrop(16, 8, 1, mode=mode, mean=(0, 0, 0), std=(1 / 255,) * 3, **plain)
    seen = []
    for rank in range(ranks):
        options = {"global_batch_size": 16, "rank": rank, "world_size": ranks, "max_bad": 0.5}
        with TrainStream(datasets, plan, Prepare(crops, config.data), crops.collate, start_samples=COUNT, **options) as stream:
            for batch, _ in zip(stream, range(COUNT // 16), strict=False):
                finished = crops.finish(batch.payload, "cpu")
                red = finished.global_crops[: len(batch.keys), 0].mean((1, 2)).round().int().tolist()
                for number, column in zip(red, finished.metadata.tolist(), strict=True):
                    value = content(number)[1]
                    assert column == [VALUES.index(value) if value else -1]
                    seen.append(number)
    assert DAMAGED not in seen and set(seen) == set(range(COUNT)) - {DAMAGED} and len(seen) == COUNT


def test_a_run_that_resumes_has_the_same_losses(tmp_path):
    config = config_of(
        tmp_path, as_tar(tmp_path), "log.every_steps=1", "optim.epochs=1", "checkpoint={every_steps: 2, keep_last: 9}"
    )
    pretrain(config)
    whole, run = losses(config.run_dir), tmp_path / "run"
    last = read_jsonl(run / "metrics.jsonl")[-1]
    assert 0.6 < last["metadata_camera_known"] < 1 and last["metadata"] > 0 and 0 <= last["metadata_camera_accuracy"] <= 1
    for path in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    pretrain(config)
    again = losses(config.run_dir)
    assert {step: again[step] for step in whole} == whole and np.isfinite(list(whole.values())).all()


def test_mistakes_cost_no_run(tmp_path):
    shards = as_tar(tmp_path)
    with pytest.raises(ConfigError, match=r"data.metadata.camera: .*\[?'D', 'E': they hold "):
        check(config_of(tmp_path, shards, "data.metadata.camera.values=[D, E]"))
    with pytest.raises(ConfigError, match=r"names 'scanner', which data.metadata does not describe; it has: camera"):
        check(config_of(tmp_path, shards, "objective.1.nuisance=[scanner]"))
