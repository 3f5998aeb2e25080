"""The random choices behind one crop, as numbers: what the CPU's and the device's augmentation have in common."""

import math
from collections.abc import Callable
from itertools import permutations
from typing import NamedTuple

JITTER_ORDERS = tuple(permutations(range(4)))  # of brightness, contrast, saturation, hue
FIRST_OF_COLOUR = 2  # from there on, operations need RGB
_RATIO = (3 / 4, 4 / 3)  # aspect ratios of RandomResizedCrop


class Draw(NamedTuple):
    """All random choices behind one crop. Box in pixels of the image; factors as torchvision's ColorJitter defines them."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter_order: int  # index into JITTER_ORDERS; -1: no jitter
    brightness: float
    contrast: float
    saturation: float
    hue: float  # fraction of the colour circle
    gray: bool
    sigma: float  # of the blur, in pixels of the crop; 0: no blur
    solarize: bool


FIELDS = {name: index for index, name in enumerate(Draw._fields)}  # columns of draws as a table


def draw_box(uniform: Callable[[], float], height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) with the distribution of torchvision's RandomResizedCrop; always inside, at least 1 x 1."""
    area, (low, high) = height * width, (math.log(_RATIO[0]), math.log(_RATIO[1]))
    for _ in range(10):
        target = area * (scale[0] + uniform() * (scale[1] - scale[0]))
        ratio = math.exp(low + uniform() * (high - low))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(uniform() * (height - h + 1)), int(uniform() * (width - w + 1)), h, w
    # no box fits (very long images): the largest central one of an allowed ratio
    w, h = width, height
    if width / height < _RATIO[0]:
        h = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        w = round(height * _RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w
