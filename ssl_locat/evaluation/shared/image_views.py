"""Views of one image for protocols: a centre crop, and the random resized crop that classifiers train on. Functions of image and seed."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ssl_locat.data.images.bands import Bands, reading

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


def normalisation(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) that the backbone was trained with."""
    return tuple(backbone.pretrained_cfg["mean"]), tuple(backbone.pretrained_cfg["std"])


def channels_of(backbone: nn.Module) -> Bands | int:
    """What `decode_image` makes of a file for it: 8-bit channels, or the bands that it was trained on, on their scale."""
    return reading(backbone.pretrained_cfg.get("channels"), backbone.pretrained_cfg["mean"])


def to_tensor(image: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[H, W, C], uint8 or float32 on the scale of 0..255 -> float32 [C, H, W], normalised."""
    # a copy: Pillow's memory is read-only, which torch warns of, and a flip has negative strides, which it refuses
    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)
    return (
        pixels.div_(255).sub_(_per_channel(mean)).div_(_per_channel(std))
    )  # in place: the copies took a fifth of a small image's time


@lru_cache
def _per_channel(values: tuple[float, ...]) -> Tensor:
    """[C, 1, 1]"""
    return torch.tensor(values)[:, None, None]


def as_picture(image: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """[H, W, C], uint8 or float32, changed by Pillow: 8-bit colours together, all else channel by channel."""
    if image.shape[2] == 3 and image.dtype == np.uint8:
        return np.asarray(change(Image.fromarray(image)))
    return np.stack(
        [np.asarray(change(Image.fromarray(np.ascontiguousarray(band)))) for band in np.moveaxis(image, 2, 0)], axis=2
    )


def centre_view(
    image: np.ndarray, seed: int, *, size: int, resize: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """float32 [C, size, size]: shorter side to `resize` (bicubic, antialiased), then the centre, normalised."""
    height, width = image.shape[:2]
    factor = resize / min(height, width)

    def shown(picture: Image.Image) -> Image.Image:
        if factor != 1:
            # at least `size`: rounding must not leave a side one pixel short
            picture = picture.resize((max(size, round(width * factor)), max(size, round(height * factor))), BICUBIC)
        left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
        return picture.crop((left, top, left + size, top + size))

    return to_tensor(as_picture(image, shown), mean, std)


def training_view(
    image: np.ndarray,
    seed: int,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    scale: tuple[float, float] = (0.08, 1.0),
) -> Tensor:
    """float32 [C, size, size]: a random resized crop (bilinear, antialiased), flipped half the time, normalised."""
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    box = random_box(height, width, scale, rng)
    pixels = as_picture(image, lambda picture: picture.resize((size, size), BILINEAR, box=box))
    return to_tensor(pixels[:, ::-1] if rng.random() < 0.5 else pixels, mean, std)


def random_box(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): `scale` of the area at an aspect of 3/4..4/3, ten tries, else the largest central box of such an aspect.

    torchvision's RandomResizedCrop; an area above 1 (Hummingbird's 0.5..2) never fits and ends in the central box, as there.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        # in logarithms: 3/4 and 4/3 are equally likely
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
