"""Small labelled scenes for the protocols' tests: class = colour, mask = where the coloured square lies. Real files, made in a moment."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [190, 190, 30]])


def scene(label: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 [size, size, 3], mask uint8 [size, size]: 0 background, 1 + label inside the square, a void row at the top)."""
    image = rng.integers(90, 130, (size, size, 3), dtype=np.uint8)
    mask = np.zeros((size, size), np.uint8)
    side = size // 2
    top, left = rng.integers(0, size - side, 2)
    image[top : top + side, left : left + side] = np.clip(COLOURS[label] + rng.integers(-20, 20, (side, side, 3)), 0, 255)
    mask[top : top + side, left : left + side] = 1 + label
    mask[0] = 255
    return image, mask


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_shard(path: Path, labels: list[int], seed: int, size: int = 32, void: bool = False) -> str:
    """A WebDataset shard with members png, cls and seg.png (`void`: of nothing but void); its path as text."""
    rng = np.random.default_rng(seed)
    mode = {".gz": "w:gz"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as tar:
        for index, label in enumerate(labels):
            image, mask = scene(label, size, rng)
            if void:
                mask[:] = 255
            for name, content in (("cls", b"%d" % label), ("png", png(image)), ("seg.png", png(mask))):
                info = tarfile.TarInfo(f"{index:04d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_split(folder: Path, num_train: int = 48, num_test: int = 24, size: int = 32) -> dict:
    """{"train": ..., "test": ...} of shards with 4 classes."""
    folder.mkdir(parents=True, exist_ok=True)
    train = write_shard(folder / "train-0.tar", [i % 4 for i in range(num_train)], 0, size)
    test = write_shard(folder / "test-0.tar", [i % 4 for i in range(num_test)], 1, size)
    return {"train": train, "test": test}
