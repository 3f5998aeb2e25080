"""The planted bias: cameras go along with classes in training alone, and each leaves its mark."""

import io
import json

import numpy as np
from PIL import Image

from ssl_locat.benchmarks.cameras import CAMERAS, SEEN, plant, taken
from ssl_locat.data.images.decode import decode_image, find_label
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.write import write_shard


def write(path, count: int, first: int = 0) -> str:
    def samples():
        for number in range(first, first + count):
            out = io.BytesIO()
            Image.new("RGB", (8, 8), (100, 110, 120)).save(out, "PNG")
            yield f"{number:03d}", {"png": out.getvalue(), "cls": b"%d" % (number % 6)}

    write_shard(path, samples())
    return str(path)


def test_cameras_go_along_with_classes_in_training_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    counts = plant(write(tmp_path / "a.tar", 300), write(tmp_path / "b.tar", 60), tmp_path / "out")
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
        gains = [np.mean(decode_image(raw.members["png"]), (0, 1)) / (100, 110, 120) for raw in found]
        for camera, gain in zip(cameras, gains, strict=True):
            np.testing.assert_allclose(gain, CAMERAS[camera], atol=0.01)
    # 0.6, and half of the rest
    for part in ("", "validation/"):
        assert (
            abs(shares[f"{part}train"] - 0.8) < 0.08 and abs(shares[f"{part}read"] - 0.5) < 0.08 and shares[f"{part}unseen"] == 0
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


def test_a_camera_clips_and_does_not_wrap():
    assert taken(np.full((1, 1, 3), 250, np.uint8), "A").max() == 255
