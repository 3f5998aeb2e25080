"""A planted bias: images as three cameras would have taken them, two of which see the training set, each mostly its own classes.

    python -m ssl_locat.benchmarks.cameras 'TRAIN-*.tar' 'TEST-*.tar' FOLDER       # write the sets; eval/tables/cameras.yaml measures with them

What features of an unseen camera's images are worth, and whether they tell the camera, can then be measured with truth known:

    FOLDER/train.tar      training images; camera A or B, with probability `bias` the one that its class has most; json: {"camera": ...}
    FOLDER/unseen.tar     test images by camera C
    FOLDER/read.tar       training images by A or B, drawn evenly: the bank that a camera is read from
    FOLDER/asked.tar      test images likewise: the queries
    FOLDER/validation/    the same four of the training images alone, of which one in four takes the test images' part: to choose settings by
"""

import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np

from ssl_locat.data.images.decode import decode_image, find_image, find_label
from ssl_locat.data.shards.index import open_mix
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import RawSample
from ssl_locat.data.shards.write import write_shard
from ssl_locat.runs.log import say
from ssl_locat.seeds import mix64

# gains of red, green and blue: a colour temperature that each camera has of its own; C's is beyond what training has seen
CAMERAS = {"A": (1.1, 1.0, 0.9), "B": (0.9, 1.0, 1.1), "C": (1.25, 1.0, 0.75)}
SEEN = ("A", "B")
VALIDATION = 4  # of so many training images one is a query of the validation part
Choose = Callable[[int, random.Random], str]  # an image's class and its own source of chance -> its camera


def plant(train: str, test: str, folder: str | Path, bias: float = 0.6, seed: int = 0) -> dict[str, int]:
    """Write both times four sets; set -> how many images. Two seeds draw other cameras for the same images."""

    def biased(label: int, draw: random.Random) -> str:
        return SEEN[label % len(SEEN)] if draw.random() < bias else draw.choice(SEEN)

    def evenly(label: int, draw: random.Random) -> str:
        return draw.choice(SEEN)

    def unseen(label: int, draw: random.Random) -> str:
        return "C"

    (training,), _ = open_mix(train)
    (testing,), _ = open_mix(test)
    everything, held = range(len(training)), range(0, len(training), VALIDATION)
    rest = [place for place in everything if place not in held]
    queries = range(len(testing))
    sets: dict[str, tuple[Dataset, Iterable[int], Choose]] = {
        "train": (training, everything, biased),
        "unseen": (testing, queries, unseen),
        "read": (training, everything, evenly),
        "asked": (testing, queries, evenly),
        "validation/train": (training, rest, biased),
        "validation/unseen": (training, held, unseen),
        "validation/read": (training, rest, evenly),
        "validation/asked": (training, held, evenly),
    }
    (Path(folder) / "validation").mkdir(parents=True, exist_ok=True)
    return {
        name: write_shard(Path(folder) / f"{name}.tar", _seen(dataset, places, choose, mix64(seed, number)))
        for number, (name, (dataset, places, choose)) in enumerate(sets.items())
    }


def _seen(dataset: Dataset, places: Iterable[int], choose: Choose, seed: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in places:
        raw = dataset.read(number, number + 1)[0]
        assert isinstance(raw, RawSample), raw
        draw, label = random.Random(mix64(seed, number)), find_label(raw.members)
        name = choose(label, draw)
        pixels = taken(decode_image(find_image(raw.members)), name)
        _, png = cv2.imencode(".png", pixels[..., ::-1])
        yield raw.key, {"png": png.tobytes(), "cls": b"%d" % label, "json": json.dumps({"camera": name}).encode()}


def taken(image: np.ndarray, camera: str) -> np.ndarray:
    """uint8 [H, W, 3] -> the same, as this camera would show it."""
    return np.rint(np.clip(image * np.array(CAMERAS[camera], np.float32), 0, 255)).astype(np.uint8)


if __name__ == "__main__":
    train, test, folder = sys.argv[1:4]
    say(json.dumps(plant(train, test, folder)))
