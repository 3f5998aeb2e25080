"""Small pictures side by side: what a person looks at, of images as a network gets them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor, tensor

TILE, GAP = 96, 4  # pixels


def as_colours(images: Tensor, mean: Sequence[float], std: Sequence[float], show: Sequence[int] | None = None) -> np.ndarray:
    """[n, C, H, W], normalised -> uint8 [n, H, W, 3]: the channels `show`; without them the first three, of fewer the first as grey."""
    images = images.float().cpu() * tensor(std).view(-1, 1, 1) + tensor(mean).view(-1, 1, 1)
    images = images[:, list(show or ((0, 1, 2) if images.shape[1] >= 3 else (0, 0, 0)))]
    return (images.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()


def as_tiles(
    images: Tensor, mean: Sequence[float], std: Sequence[float], show: Sequence[int] | None = None, size: int = TILE
) -> list[np.ndarray]:
    """`as_colours`, uint8 [size, size, 3] each."""
    pixels = as_colours(images, mean, std, show)
    return [np.array(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)) for image in pixels]


def montage(rows: list[list[np.ndarray]], gap: int = GAP) -> Image.Image:
    """uint8 [S, S, 3] tiles in rows, a few pixels apart on a transparent ground."""
    size = rows[0][0].shape[0]
    height, width = len(rows) * (size + gap) - gap, max(map(len, rows)) * (size + gap) - gap
    canvas = np.zeros((height, width, 4), np.uint8)
    for row, line in enumerate(rows):
        for column, tile in enumerate(line):
            top, left = row * (size + gap), column * (size + gap)
            canvas[top : top + size, left : left + size, :3] = tile
            canvas[top : top + size, left : left + size, 3] = 255
    return Image.fromarray(canvas)
