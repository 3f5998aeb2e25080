"""What `shards dedup` costs at size: thumbnails that are made up, one of a hundred a changed copy of an earlier one, searched as a set of as many images.

    python -m ssl_locat.benchmarks.dedup 1000000

The thumbnails are noise as photographs have it, whose amplitudes fall with frequency; decoding is left out, which reads any set once at
`shards check`'s rate. Prints a line of JSON: CPU-seconds of each part, and the peak of memory (VmHWM) before and after the search.
"""

import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from ssl_locat.data.images.likeness import SIDE, alignment
from ssl_locat.data.stream import duplicates
from ssl_locat.data.stream.dedup import redundant
from ssl_locat.data.stream.duplicates import Looks, find_pairs, space
from ssl_locat.data.stream.nearest import let_go

_AT_ONCE = 8192
_COPIES = 100  # one of so many
_FALL = 1.3  # amplitude ~ 1 / frequency ** 1.3


def made_up(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(thumbnails uint8 [N, 32, 32], int64 [N]: of which earlier one each is a changed copy, -1 for none)."""
    rng = np.random.default_rng(seed)
    thumbnails, source = space(count), np.full(count, -1)
    rows, columns = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    amplitude = (np.hypot(rows, columns).clip(1) ** -_FALL).astype(np.float32)
    places = (np.arange(SIDE) + 0.5) / SIDE
    cosines = np.cos(np.pi * np.arange(SIDE)[:, None] * places).astype(np.float32)  # [K, 32]
    for start in range(0, count, _AT_ONCE):
        some = min(_AT_ONCE, count - start)
        values = cosines.T @ (rng.standard_normal((some, SIDE, SIDE), np.float32) * amplitude) @ cosines
        values -= values.mean((1, 2), keepdims=True)
        values *= 50 / values.std((1, 2), keepdims=True)
        thumbnails[start : start + some] = (values + 128).clip(0, 255)
        for number in range(max(start, 1), start + some):
            if number % _COPIES == 0:
                source[number] = rng.integers(number)
                thumbnails[number] = changed(thumbnails[source[number]], rng)
        let_go(thumbnails)
    return thumbnails, source


def changed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [32, 32]: mirrored or not, cropped by up to 7 % of each side or not, darker or not, and with noise as of compression."""
    if rng.random() < 0.5:
        image = image[:, ::-1]
    if rng.random() < 0.5:
        large = cv2.resize(np.ascontiguousarray(image), (4 * SIDE, 4 * SIDE), interpolation=cv2.INTER_CUBIC)
        top, left = rng.integers(0, 9, 2)
        image = cv2.resize(
            large[top : top + 4 * SIDE - 8, left : left + 4 * SIDE - 8], (SIDE, SIDE), interpolation=cv2.INTER_AREA
        )
    found: np.ndarray = (image * rng.uniform(0.7, 1.0) + rng.normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8)
    return found


def peak_memory() -> float:
    """MB that this process held at most, mapped files with it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measure(count: int) -> dict[str, float]:
    """Numbers of one search, always by lists (faiss)."""
    duplicates.MOST_PAIRS = 0
    thumbnails, source = made_up(count)
    alignment(thumbnails[:1], thumbnails[:1])
    before, began, wall = peak_memory(), time.process_time(), time.monotonic()
    looks = Looks(thumbnails, np.arange(1, count + 1, dtype=np.uint64))
    pairs = find_pairs(looks)
    searched = time.process_time()
    gone = redundant(pairs, looks)
    copies = np.flatnonzero(source >= 0)
    planted = {(int(source[number]), int(number)) for number in copies}
    found = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    return {
        "images": count,
        "planted": len(copies),
        "planted_found": len(planted & found),
        "pairs": len(pairs),
        "left_out": len(gone),
        "search_cpu_seconds": round(searched - began, 1),
        "choice_cpu_seconds": round(time.process_time() - searched, 1),
        "wall_seconds": round(time.monotonic() - wall, 1),
        "peak_mb_before": round(before),
        "peak_mb": round(peak_memory()),
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
