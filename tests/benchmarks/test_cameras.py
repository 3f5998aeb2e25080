"""The planted bias: cameras go along with classes in training alone, and each leaves its mark."""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from ssl_locat.benchmarks.cameras import BANDING, GAINS, KINDS, SEEN, SWEEP, plant
from ssl_locat.data.images.decode import decode_image, find_label
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.write import write_shard
from ssl_locat.errors import ConfigError


def write(path, count: int, first: int = 0) -> str:
    def samples():
        for number in range(first, first + count):
            out = io.BytesIO()
            Image.new("RGB", (8, 16), (100, 110, 120)).save(out, "PNG")
            yield f"{number:03d}", {"png": out.getvalue(), "cls": b"%d" % (number % 6)}

    write_shard(path, samples())
    return str(path)


@pytest.mark.parametrize(("kind", "bias"), [("colours", 0.6), ("stripes", 0.3)])
def test_cameras_go_along_with_classes_in_training_alone(tmp_path, monkeypatch, kind, bias):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    counts = plant(write(tmp_path / "a.tar", 300), write(tmp_path / "b.tar", 60), tmp_path / "out", kind, bias)
    sizes = {"train": 300, "unseen": 60, "read": 300, "asked": 60}
    held = {"train": 225, "unseen": 75, "read": 225, "asked": 75}
    assert counts == {**sizes, **{f"validation/{name}": count for name, count in held.items()}}
    shares = {}
    for name, count in counts.items():
        found = open_dataset(str(tmp_path / f"out/{name}.tar")).read(0, count)
        cameras = [json.loads(raw.members["json"])["camera"] for raw in found]
        own = [camera == SEEN[find_label(raw.members) % 2] for raw, camera in zip(found, cameras, strict=True)]
        shares[name] = np.mean(own)
        assert set(cameras) == ({"C"} if name.endswith("unseen") else set(SEEN))
        for raw, camera in zip(found, cameras, strict=True):
            away = decode_image(raw.members["png"]) - np.array([100.0, 110.0, 120.0])  # [16, 8, 3]
            gains, steps = (GAINS[camera], 0) if kind == "colours" else ((1, 1, 1), BANDING[camera])
            np.testing.assert_allclose(away.mean((0, 1)), (np.array(gains) - 1) * (100, 110, 120), atol=0.5)
            np.testing.assert_allclose(abs(away - away.mean((0, 1))), steps, atol=0.5)
    expected = bias + (1 - bias) / 2
    for part in ("", "validation/"):
        assert (
            abs(shares[f"{part}train"] - expected) < 0.08
            and abs(shares[f"{part}read"] - 0.5) < 0.08
            and shares[f"{part}unseen"] == 0
        )


def test_settings_are_chosen_on_training_images_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plant(write(tmp_path / "a.tar", 40), write(tmp_path / "b.tar", 10, 1000), tmp_path / "out")

    def keys(name: str) -> set[str]:
        dataset = open_dataset(str(tmp_path / f"out/{name}.tar"))
        return {raw.key for raw in dataset.read(0, len(dataset))}

    train, queries = keys("validation/train"), keys("validation/asked")
    assert len(train) == 30 and len(queries) == 10 and train | queries == keys("train") and not train & queries
    assert keys("validation/unseen") == queries and not keys("train") & keys("asked")


@pytest.mark.parametrize("kind", KINDS)
def test_a_camera_clips_and_does_not_wrap(kind):
    bright = KINDS[kind](np.full((2 * SWEEP, 1, 3), 250, np.uint8), "C", random.Random(0))
    assert bright.max() == 255 and bright.min() < 250


def test_stripes_begin_anywhere_and_keep_the_mean_of_each_sweep_and_the_next():
    draw = random.Random(0)
    image = np.full((4 * SWEEP, 3, 3), 100, np.uint8)
    columns = [KINDS["stripes"](image, "B", draw)[:, 0, 0].astype(int) - 100 for _ in range(50)]
    assert len({tuple(column) for column in columns}) == 2 * SWEEP
    for column in columns:
        assert set(column) == {-BANDING["B"], BANDING["B"]}
        assert (column[: 2 * SWEEP] == column[2 * SWEEP :]).all() and (column[SWEEP:] == -column[:-SWEEP]).all()


def test_an_unknown_kind_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"'stripe'.*known: colours, stripes.*'stripes'"):
        plant("a.tar", "b.tar", tmp_path, "stripe")
