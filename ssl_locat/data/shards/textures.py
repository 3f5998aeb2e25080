"""The quickstart's images: objects of ten textures on blurred backgrounds, made from a seed, written as WebDataset shards.

    make_textures("data/textures") -> {"train": glob, "test": glob, "num_classes": 10}

What tells the classes apart is how a pattern repeats, in every part of the object and at every size: what self-distillation can find by itself.
What fills pixel space is drawn anew for each image and changes within it: position, scale, turn and bend of the pattern, colours, light,
outline, background. So nearest neighbours on raw pixels or random features find less than half, while a small network with labels
finds nearly everything; tests/data/shards/test_textures.py measures all three, and docs/results.md says how the generator was chosen.
Members of a sample: jpg, cls (0..9), seg.png (0 background, class + 1 on the object).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from ssl_locat.data.shards.write import write_shard
from ssl_locat.errors import DataError
from ssl_locat.runs.log import progress as progress_bar

VERSION = 2  # of the pictures: any change below that changes them is a new version
_PER_SHARD = 500
_INFO = "textures.json"


def make_textures(
    out_dir: str | Path,
    *,
    num_train: int = 4000,
    num_test: int = 1000,
    image_size: int = 48,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Write the shards under `out_dir`, unless they are there already (same arguments); an interrupted run leaves nothing behind.

    Returns {"train": glob of shards, "test": glob of shards, "num_classes"}.
    Raises DataError if `out_dir` holds something else.
    """
    out_dir = Path(out_dir)
    settings = {"version": VERSION, "num_train": num_train, "num_test": num_test, "image_size": image_size, "seed": seed}
    result = {
        "train": str(out_dir / "textures-train-*.tar"),
        "test": str(out_dir / "textures-test-*.tar"),
        "num_classes": len(CLASSES),
    }
    info_path = out_dir / _INFO
    if info_path.exists() and json.loads(info_path.read_text())["settings"] == settings:
        return result
    found = sorted(path.name for path in out_dir.iterdir()) if out_dir.exists() else []
    foreign = [name for name in found if name != _INFO and not name.startswith("textures-")]
    if foreign or (found and not info_path.exists()):
        raise DataError(
            f"{out_dir} holds what this generator did not make ({', '.join((foreign or found)[:5])}); name another folder or remove it"
        )
    temporary = out_dir.with_name(f".{out_dir.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        bar_total = num_train + num_test
        with progress_bar("making textures", total=bar_total if progress else None, unit="images") as bar:
            for number, (split, count) in enumerate({"train": num_train, "test": num_test}.items()):
                for shard, start in enumerate(range(0, count, _PER_SHARD)):
                    size = min(_PER_SHARD, count - start)
                    # a generator for each shard: none depends on how many were made before it
                    rng = np.random.default_rng([VERSION, seed, number, shard])
                    # equally many of each class, in an order drawn anew in every shard
                    labels = (np.arange(start, start + size) % len(CLASSES))[np.argsort(rng.random(size))]
                    write_shard(temporary / f"textures-{split}-{shard:06d}.tar", _samples(labels, start, image_size, rng))
                    bar.update(size)
        info = {"settings": settings, "classes": list(CLASSES), "mask": "0 background, class + 1 on the object"}
        (temporary / _INFO).write_text(json.dumps(info, indent=2) + "\n")
        if out_dir.exists():  # empty, or ours with other settings
            shutil.rmtree(out_dir)
        temporary.rename(out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return result


def _samples(labels: np.ndarray, start: int, image_size: int, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields (key, members) for `write_shard`."""
    images, masks = draw_scenes(labels, image_size, rng)
    for index, (image, mask, label) in enumerate(zip(images, masks, labels, strict=True)):
        jpeg = simplejpeg.encode_jpeg(image, quality=95, colorsubsampling="444")
        png = cv2.imencode(".png", mask)[1].tobytes()
        yield f"{start + index:06d}", {"jpg": jpeg, "cls": b"%d" % label, "seg.png": png}


def draw_scenes(labels: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Class ids [n] -> images uint8 [n, size, size, 3] and masks uint8 [n, size, size]."""
    count = len(labels)

    def uniform(low: float, high: float) -> np.ndarray:
        return low + (high - low) * rng.random((count, 1, 1))

    y, x = np.mgrid[:size, :size].astype(np.float64)
    u, v = _pattern_plane(x, y, size, uniform, rng)
    pattern = np.empty_like(u)
    for index, name in enumerate(CLASSES):
        chosen = labels == index
        pattern[chosen] = CLASSES[name](u[chosen], v[chosen])

    # two smooth coloured fields, kept apart in lightness; the pattern picks between them
    light = _smooth(rng, count, size, cells=3, channels=1)[..., 0] * 25 + 115
    apart = uniform(58, 72)
    tint = _smooth(rng, count, size, cells=3, channels=6) - 0.5
    first = (light + apart * pattern)[..., None] + 25 * np.where(pattern[..., None] > 0, tint[..., :3], tint[..., 3:])
    background = 107 + 40 * _smooth(rng, count, size, cells=4, channels=3)

    inside = _outline(x, y, size, uniform, rng)
    image = np.where(inside[..., None], first, background)
    # light that changes over the image, and noise of up to 8 of 255
    image = image * (0.92 + 0.15 * _smooth(rng, count, size, cells=2, channels=1)) + rng.random(image.shape) * 16 - 8
    masks = np.where(inside, labels[:, None, None] + 1, 0).astype(np.uint8)
    return np.clip(image, 0, 255).astype(np.uint8), masks


def _pattern_plane(
    x: np.ndarray, y: np.ndarray, size: int, uniform: Callable[[float, float], np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates [n, size, size] in periods of the pattern: scaled, turned, shifted and bent for each image."""
    bend = (_smooth(rng, len(uniform(0, 1)), size, cells=3, channels=2) - 0.5) * 14
    period, angle = uniform(7, 10.5), uniform(-np.pi / 6, np.pi / 6)
    px, py = (x + bend[..., 0]) / period, (y + bend[..., 1]) / period
    cosine, sine = np.cos(angle), np.sin(angle)
    return cosine * px - sine * py + uniform(0, 8), sine * px + cosine * py + uniform(0, 8)


def _outline(
    x: np.ndarray, y: np.ndarray, size: int, uniform: Callable[[float, float], np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """bool [n, size, size]: a rounded star or blob covering about 60 % of the image."""
    dx = x - size * uniform(0.42, 0.58)
    dy = y - size * uniform(0.42, 0.58)
    lobes = np.floor(uniform(2, 6))
    radius = size * uniform(0.40, 0.52) * (1 + uniform(0.0, 0.16) * np.cos(lobes * np.arctan2(dy, dx) + uniform(0, 2 * np.pi)))
    inside: np.ndarray = np.hypot(dx, dy) < radius
    return inside


def _smooth(rng: np.random.Generator, count: int, size: int, cells: int, channels: int) -> np.ndarray:
    """[n, size, size, channels] in 0..1: random values on a coarse grid, enlarged bicubically, clipped."""
    coarse = rng.random((count, cells, cells, channels)).astype(np.float32)
    fields = [cv2.resize(field, (size, size), interpolation=cv2.INTER_CUBIC).reshape(size, size, channels) for field in coarse]
    smooth: np.ndarray = np.clip(np.stack(fields), 0, 1)
    return smooth


# --- the textures: coordinates in periods -> about -1 (dark) .. 1 (bright) ------------------------------------------------


def _edge(distance: np.ndarray) -> np.ndarray:
    """Signed distance in periods -> -1 .. 1 with a soft edge of about a pixel."""
    edge: np.ndarray = np.clip(distance * 8, -1, 1)
    return edge


def _cell(value: np.ndarray) -> np.ndarray:
    """Distance from the middle of the cell, -0.5 .. 0.5."""
    distance: np.ndarray = value - np.floor(value) - 0.5
    return distance


def _stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _edge(0.25 - np.abs(_cell(u)))


def _checks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _edge(_cell(u) * _cell(v) * 4)


def _dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _edge(0.3 - np.hypot(_cell(u), _cell(v)))


def _rings(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _edge(0.11 - np.abs(np.hypot(_cell(u), _cell(v)) - 0.33))


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    row = np.floor(v * 1.3)
    return _edge(np.minimum(0.5 - np.abs(_cell(v * 1.3)), 1.2 * (0.5 - np.abs(_cell(u * 0.65 + row / 2)))) - 0.12)


def _zigzag(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _edge(0.25 - np.abs(_cell(v * 1.2 + 0.9 * np.abs(_cell(u * 0.8)))))


def _crosses(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    a, b = np.abs(_cell(u)), np.abs(_cell(v))
    return _edge(np.maximum(np.minimum(0.12 - a, 0.4 - b), np.minimum(0.12 - b, 0.4 - a)))


def _triangles(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    row = v * 0.9
    return _edge(0.45 * (_cell(row) + 0.5) - np.abs(_cell(u * 0.8 + np.floor(row) / 2)))


def _grid(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _edge(0.12 - np.minimum(np.abs(_cell(u)), np.abs(_cell(v))))


def _scales(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    row = np.floor(v * 1.4)
    return _edge(np.hypot(_cell(u * 0.8 + row / 2), (_cell(v * 1.4) + 0.5) * 0.55) - 0.42)


CLASSES = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "bricks": _bricks,
    "zigzag": _zigzag,
    "crosses": _crosses,
    "triangles": _triangles,
    "grid": _grid,
    "scales": _scales,
}
