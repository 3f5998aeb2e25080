"""RUN/pictures/crops.png: some crops of the first batch, as the networks saw them. Written once in a run, whatever its size."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ssl_locat.data.images.tiles import TILE, as_tiles, montage
from ssl_locat.runs.distributed import is_main

IMAGES, LOCALS = 4, 6  # rows; local crops of each, at most


class FirstCrops:
    """Waits for the first batch of a run that has no picture yet; on other ranks, and later, it does nothing."""

    def __init__(self, run: Path, mean: Sequence[float], std: Sequence[float], show: Sequence[int] | None = None):
        self.path, self.mean, self.std, self.show_bands = run / "pictures" / "crops.png", mean, std, show
        self.wanted = is_main() and not self.path.exists()

    def show(self, global_crops: Tensor, local_crops: Tensor | None, hidden: Tensor | None) -> None:
        """global_crops [2*B, C, H, W], local_crops [L*B, C, h, w], view-major; hidden [2*B, N]: patches that the student does not see."""
        if not self.wanted:
            return
        self.wanted = False
        images = len(global_crops) // 2
        views = [self._tiles(global_crops, images, view, hidden) for view in range(2)]
        if local_crops is not None:
            views += [self._tiles(local_crops, images, view) for view in range(min(LOCALS, len(local_crops) // images))]
        out = io.BytesIO()
        montage([list(row) for row in zip(*views, strict=True)]).save(out, "PNG", optimize=True)
        self.path.parent.mkdir(exist_ok=True)
        beside = self.path.with_name(f".crops.{os.getpid()}")
        beside.write_bytes(out.getvalue())
        os.replace(beside, self.path)

    def _tiles(self, crops: Tensor, images: int, view: int, hidden: Tensor | None = None) -> list[np.ndarray]:
        rows = slice(view * images, view * images + min(IMAGES, images))
        tiles = as_tiles(crops[rows].detach(), self.mean, self.std, self.show_bands)
        if hidden is not None:
            tiles = [_greyed(tile, mask) for tile, mask in zip(tiles, hidden[rows].cpu(), strict=True)]
        return tiles


def _greyed(tile: np.ndarray, hidden: Tensor) -> np.ndarray:
    """The tile with its hidden patches (bool [N], row by row of a square grid) in grey."""
    side = math.isqrt(len(hidden))
    places = np.arange(TILE) * side // TILE  # which patch a pixel lies in
    mask = hidden.numpy().reshape(side, side)[places][:, places]
    return np.where(mask[..., None], np.uint8(128), tile)
