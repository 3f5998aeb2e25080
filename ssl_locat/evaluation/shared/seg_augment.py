"""The published augmentation of segmentation probes (mmseg's ADE20K pipeline): scale, crop, flip, photometric distortion. numpy in, numpy out."""

import cv2
import numpy as np

from ssl_locat.evaluation.shared.dense import keep_aspect, resize_mask
from ssl_locat.evaluation.shared.metrics import VOID

CATEGORY_SHARE = 0.75  # a crop that one class fills beyond this is drawn again, up to CROP_TRIES times
CROP_TRIES = 10


def augment(
    image: np.ndarray, mask: np.ndarray, seed: int, *, crop: int, scale: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A training view: [crop, crop, C], of the image's type, and int64 [crop, crop]; what the image does not cover is the image's mean colour, void.

    scale: (long, short) side limits in pixels, times U(0.5, 2), that the image is resized into before the crop.
    """
    # one generator for image and mask: what moves the one moves the other
    rng = np.random.default_rng(seed)
    factor = rng.uniform(0.5, 2.0)
    image = keep_aspect(image, factor * scale[0], factor * scale[1])
    mask = resize_mask(mask, *image.shape[:2])
    image, mask = _crop(image, mask, crop, rng)
    if rng.random() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    return distort(image, rng), np.ascontiguousarray(mask)


def pad(image: np.ndarray, mask: np.ndarray, size: int, colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At least size x size, filled at the right and the bottom with `colour` and void."""
    height, width = max(0, size - image.shape[0]), max(0, size - image.shape[1])
    if not height and not width:
        return image, mask
    padded = np.empty((image.shape[0] + height, image.shape[1] + width, image.shape[2]), image.dtype)
    padded[:] = colour
    padded[: image.shape[0], : image.shape[1]] = image
    return padded, np.pad(mask, ((0, height), (0, width)), constant_values=VOID)


def _crop(image: np.ndarray, mask: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    height, width = image.shape[:2]
    for _ in range(CROP_TRIES):
        top, left = rng.integers(0, max(height - size, 0) + 1), rng.integers(0, max(width - size, 0) + 1)
        inside = mask[top : top + size, left : left + size]
        counts = np.bincount(inside[inside != VOID])
        # after the last try the crop stays as it is
        if (counts > 0).sum() > 1 and counts.max() / counts.sum() < CATEGORY_SHARE:
            break
    return image[top : top + size, left : left + size], inside


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness +-32, contrast and saturation 0.5..1.5, hue +-18 of 180, each with probability 0.5; contrast before or after the colours.

    Of other than 8-bit colours brightness and contrast alone, neither rounded nor clipped."""
    colours = image.shape[2] == 3 and image.dtype == np.uint8

    def shift(pixels: np.ndarray, gain: float = 1, offset: float = 0) -> np.ndarray:
        changed = pixels.astype(np.float32) * gain + offset
        return np.clip(changed, 0, 255).astype(np.uint8) if pixels.dtype == np.uint8 else changed

    coin = lambda: rng.random() < 0.5  # noqa: E731
    if coin():
        image = shift(image, offset=rng.uniform(-32, 32))
    # before or after the colours, as PhotoMetricDistortion draws it
    contrast_first = coin()
    if contrast_first and coin():
        image = shift(image, gain=rng.uniform(0.5, 1.5))
    if colours and coin():
        hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
        hsv[..., 1] = shift(hsv[..., 1], gain=rng.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if colours and coin():
        hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
        # cv2 keeps hue in 0..179 for uint8, two degrees a step; it wraps
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first and coin():
        image = shift(image, gain=rng.uniform(0.5, 1.5))
    return np.ascontiguousarray(image)
