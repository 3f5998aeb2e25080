"""A planted bias: images as three cameras would have taken them, two of which see the training set, each mostly its own classes.

    python -m ssl_locat.benchmarks.cameras 'TRAIN-*.tar' 'TEST-*.tar' FOLDER [KIND [BIAS]]   # write the sets

KIND is what a camera leaves in its images: `colours` (the default), which classes hang on as well (eval/tables/cameras.yaml measures with them), or `stripes`, a signal
of their own, apart from what tells classes (eval/tables/cameras_stripes.yaml).

What features of an unseen camera's images are worth, and whether they tell the camera, can then be measured with truth known:

    FOLDER/train.tar      training images; camera A or B, with probability `bias` the one that its class has most; json: {"camera": ...}
    FOLDER/unseen.tar     test images by camera C
    FOLDER/read.tar       training images by A or B, drawn evenly: the bank that a camera is read from
    FOLDER/asked.tar      test images likewise: the queries
    FOLDER/validation/    the same four of the training images alone, of which one in four takes the test images' part: to choose settings by
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np

from ssl_locat.data.images.decode import decode_image, find_image, find_label
from ssl_locat.data.shards.index import open_mix
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import RawSample
from ssl_locat.data.shards.write import write_shard
from ssl_locat.errors import ConfigError, did_you_mean
from ssl_locat.runs.log import say
from ssl_locat.seeds import mix64

# `colours`: gains of red, green and blue: a colour temperature that each camera has of its own; C's is beyond what training has seen
GAINS = {"A": (1.1, 1.0, 0.9), "B": (0.9, 1.0, 1.1), "C": (1.25, 1.0, 0.75)}
# `stripes`: grey levels by which the lines of one sweep are brighter and those of the next darker: the banding of scanners that read a few lines at a time
BANDING = {"A": 0, "B": 16, "C": 48}
SWEEP = 4  # lines: still seen at half the size, and finer than what tells the classes of EuroSAT
SEEN = ("A", "B")
VALIDATION = 4  # of so many training images one is a query of the validation part
Choose = Callable[[int, random.Random], str]  # an image's class and its own source of chance -> its camera


def plant(train: str, test: str, folder: str | Path, kind: str = "colours", bias: float = 0.6, seed: int = 0) -> dict[str, int]:
    """Write both times four sets; set -> how many images. Two seeds draw other cameras for the same images. ConfigError for a kind that is not in KINDS."""
    if kind not in KINDS:
        raise ConfigError(f"kind of planted bias is {kind!r}; known: {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")

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
        name: write_shard(Path(folder) / f"{name}.tar", _seen(dataset, places, choose, mix64(seed, number), kind))
        for number, (name, (dataset, places, choose)) in enumerate(sets.items())
    }


def _seen(
    dataset: Dataset, places: Iterable[int], choose: Choose, seed: int, kind: str
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in places:
        raw = dataset.read(number, number + 1)[0]
        assert isinstance(raw, RawSample), raw
        draw, label = random.Random(mix64(seed, number)), find_label(raw.members)
        name = choose(label, draw)
        pixels = KINDS[kind](decode_image(find_image(raw.members)), name, draw)
        _, png = cv2.imencode(".png", pixels[..., ::-1])
        yield raw.key, {"png": png.tobytes(), "cls": b"%d" % label, "json": json.dumps({"camera": name}).encode()}


def coloured(image: np.ndarray, camera: str, draw: random.Random) -> np.ndarray:
    """uint8 [H, W, 3] -> the same, as this camera would show it; so, too, `striped`."""
    return _rounded(image * np.array(GAINS[camera], np.float32))


def striped(image: np.ndarray, camera: str, draw: random.Random) -> np.ndarray:
    lines = np.arange(len(image))[:, None, None] + draw.randrange(2 * SWEEP)  # an image begins anywhere in a sweep
    return _rounded(image + np.where(lines // SWEEP % 2, 1, -1) * BANDING[camera])


def _rounded(pixels: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


KINDS: dict[str, Callable[[np.ndarray, str, random.Random], np.ndarray]] = {"colours": coloured, "stripes": striped}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "test", "folder"):
        parser.add_argument(name)
    parser.add_argument("kind", nargs="?", default="colours", choices=KINDS)
    parser.add_argument("bias", nargs="?", default=0.6, type=float)
    say(json.dumps(plant(**vars(parser.parse_args()))))
