"""Metadata reaches the loss with its image: any ranks, workers, formats and mixes, after damage, in a run that is resumed, and with whatever
else changes a step. (Two processes, FSDP: test_ssl_distributed.py.)"""

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
DAMAGED, REDDER = 17, 100


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
    text["data"] |= {"train": shards if isinstance(shards, list) else str(shards), "test": None, "max_bad": 0.5}
    text["data"]["metadata"] = {"camera": {"member": "json", "key": "camera", "values": VALUES}}
    text["objective"] = [text["objective"], {"name": "metadata", "nuisance": ["camera"], "hidden_dim": 16, "min_images": 16}]
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
    seen = labels_by_red(config_of(tmp_path, make(tmp_path)), mode, ranks)
    for number, column in seen:
        value = content(number)[1]
        assert column == [VALUES.index(value) if value else -1]
    numbers = [number for number, _ in seen]
    assert DAMAGED not in numbers and set(numbers) == set(range(COUNT)) - {DAMAGED} and len(seen) == COUNT


def labels_by_red(config, mode="cpu", ranks=1) -> list[tuple[int, list[int]]]:
    """(red of an image, what came with it) of COUNT images from place COUNT on."""
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
                seen += zip(red, finished.metadata.tolist(), strict=True)
    return seen


def as_folder(folder):
    """Files alone, of redder images: nothing is known of them."""
    (folder / "files").mkdir()
    for number in range(COUNT):
        Image.new("RGB", (24, 24), (number + REDDER, 100, 100)).save(folder / f"files/{number}.png")
    return folder / "files"


def as_bare_parquet(folder):
    rows = []
    for path in sorted(as_folder(folder).iterdir()):
        rows.append({"image": {"bytes": path.read_bytes(), "path": None}})
    return write_parquet(folder / "bare.parquet", rows, 12)


@pytest.mark.parametrize(("make", "other"), [(as_parquet, as_folder), (as_tar, as_bare_parquet)])
def test_a_mix_of_which_one_part_says_nothing(tmp_path, make, other):
    mix = [{"shards": str(make(tmp_path))}, {"shards": str(other(tmp_path))}]
    config = config_of(tmp_path, mix, f"data.epoch_samples={COUNT}", "optim.epochs=1", "log.every_steps=1")
    seen = labels_by_red(config)
    assert 0.3 < np.mean([number >= REDDER for number, _ in seen]) < 0.7
    for number, column in seen:
        value = content(number)[1] if number < REDDER else None
        assert column == [VALUES.index(value) if value else -1]
    pretrain(config)
    records = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert 0.2 < np.mean([record["metadata_camera_known"] for record in records]) < 0.6
    assert np.isfinite([record["loss"] for record in records]).all()


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


STEP_BY_STEP = ["log.every_steps=1", "optim.epochs=1", "backbone.drop_path_rate=0", "optim.lr=0.03", "optim.warmup_epochs=0"]


def trained(folder, shards, run: str, *given: str) -> list[dict]:
    """Metrics of six steps of 16."""
    config = config_of(folder, shards, *STEP_BY_STEP, f"run_dir={folder}/{run}", *given)
    pretrain(config)
    return read_jsonl(folder / run / "metrics.jsonl")


def assert_alike(some: list[dict], others: list[dict]) -> None:
    """Within what another order of sums makes of six steps at a high lr (1.4e-3 on a Xeon with AMX); the loss moves, so that a wrong gradient would show."""
    names = [name for name in some[0] if name.startswith("metadata")] + ["loss"]
    assert len(names) >= 3 and np.ptp([record["loss"] for record in some]) > 0.05
    for one, other in zip(some, others, strict=True):
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=3e-3, abs=1e-5)


def test_packed_crops_are_the_same_step(tmp_path):
    shards = as_tar(tmp_path)
    apart, packed = (trained(tmp_path, shards, word, f"backbone.pack_crops={word}") for word in ("false", "true"))
    assert_alike(apart, packed)


def test_micro_batches_are_the_same_step_or_refused(tmp_path):
    """What compares images with each other is of a micro-batch, as with KoLeo and Sinkhorn; the head's loss is a mean over all."""
    shards, head = as_tar(tmp_path), ("objective.1.linear=0", "objective.1.neighbours=0")
    whole, parts = (trained(tmp_path, shards, f"by{n}", *head, f"optim.accumulate_steps={n}") for n in (1, 2))
    for record in (*whole, *parts):
        record.pop("metadata_camera_accuracy")  # of the images that are known: a mean of means
    assert_alike(whole, parts)
    with pytest.raises(ConfigError, match=r"metadata compares the images of a micro-batch, of which there are 8"):
        trained(tmp_path, shards, "refused", "optim.accumulate_steps=2")


def test_stages_of_crops_batches_and_kept_patches(tmp_path):
    """Each image says what it does in any of them; resumed in the middle of the first, the run has the same losses."""
    stages = "crops.stages=[{until: 0.5, batch_size: 24, keep_patches: [0.25, 0.75]}, {until: 1.0, global_size: 48}]"
    given = (stages, "backbone.patch_size=4", "checkpoint={every_steps: 1, keep_last: 9}")
    shards = as_tar(tmp_path)
    records = trained(tmp_path, shards, "whole", *given)
    seen = np.diff([0, *(record["samples_seen"] for record in records)])
    assert list(seen) == [24, 24, 16, 16, 16] and records[0]["student_patches"] < 0.5
    # every image once: one in five says nothing, and of the one that stands in for the damaged one nobody knows
    known = sum(seen * [record["metadata_camera_known"] for record in records])
    assert round(known) in (COUNT - 20 - 1, COUNT - 20)
    config = config_of(tmp_path, shards, *STEP_BY_STEP, f"run_dir={tmp_path}/again", *given)
    pretrain(config, resume=f"{tmp_path}/whole/checkpoints/step_00000001")
    assert losses(config.run_dir) == {record["step"]: record["loss"] for record in records[1:]}


def test_mistakes_cost_no_run(tmp_path):
    shards = as_tar(tmp_path)
    with pytest.raises(ConfigError, match=r"data.metadata.camera: .*\[?'D', 'E': they hold "):
        check(config_of(tmp_path, shards, "data.metadata.camera.values=[D, E]"))
    with pytest.raises(ConfigError, match=r"names 'scanner', which data.metadata does not describe; it has: camera"):
        check(config_of(tmp_path, shards, "objective.1.nuisance=[scanner]"))
