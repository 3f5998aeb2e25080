"""Is this the same picture? A perceptual hash before its signs are taken, and the alignment of two small pictures.

Everything is computed from a grey thumbnail of 32 x 32 pixels: colours, size and compression are gone from the start. Its low frequencies
(a cosine transform, as pHash takes them) are weighted by their frequency, since photographs hold less the finer it gets, and made a unit
vector: brightness and contrast are gone, too, and the inner product of two says how alike they are. The mirrored image has the same numbers with
every odd column's sign turned. A crop is met by windows: each image is also described as if it had been cropped. Numbers instead of pHash's bits,
because bits turn over where a crop shifts a coefficient through zero (docs/duplicates.md has what was measured).
"""

from functools import cache

import cv2
import numpy as np

SIDE = 32  # pixels of a thumbnail
COARSE, FINE = 8, 12  # frequencies in each direction, of a search and of an alignment
_FLAT = 32.0  # below it a thumbnail varies by less than one of 256 grey levels: nothing to tell images by
_SAMPLES = 128  # of a window, along each side

Window = tuple[float, float]  # (size, offset) along one side, as shares of it

# the whole image, and crops to 93 % of each side: in the four corners and the middle. A crop of a tenth lies near one of them
WINDOWS: list[tuple[Window, Window]] = [
    ((1.0, 0.0), (1.0, 0.0)),
    *(((0.93, top), (0.93, left)) for top in (0.0, 0.07) for left in (0.0, 0.07)),
    ((0.93, 0.035), (0.93, 0.035)),
]
# along one side, for an alignment: all places, 2.5 % apart, of a window of 100, 97.5, 95, 92.5 and 90 %
_PLACES: list[Window] = [(1 - 0.025 * less, 0.025 * at) for less in range(5) for at in range(less + 1)]


def thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [32, 32], grey, whatever its aspect; of other channels than three the mean."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.shape[2] == 3 else image.mean(2).astype(np.uint8)
    return cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


@cache
def _basis(frequencies: int, window: Window) -> np.ndarray:
    """float32 [K, 32]: cosines over a window of one side of a thumbnail."""
    size, offset = window
    place = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
    # between the centres of pixels linearly; beyond the outermost ones as they are
    pixel = (offset + size * place) * SIDE - 0.5
    below = np.clip(np.floor(pixel).astype(int), 0, SIDE - 2)
    share = np.clip(pixel - below, 0, 1)
    sampled = np.zeros((_SAMPLES, SIDE))
    sampled[np.arange(_SAMPLES), below] += 1 - share
    sampled[np.arange(_SAMPLES), below + 1] += share
    cosines = np.cos(np.pi * np.arange(frequencies)[:, None] * place) * np.sqrt(2 * SIDE) / _SAMPLES
    basis: np.ndarray = (cosines @ sampled).astype(np.float32)
    return basis


@cache
def _weights(frequencies: int) -> np.ndarray:
    """float32 [K, K]: the distance from the mean, which itself weighs nothing."""
    return np.hypot(np.arange(frequencies)[:, None], np.arange(frequencies)).astype(np.float32)


@cache
def mirror(frequencies: int = COARSE) -> np.ndarray:
    """float32 [K * K]: what turns a description into that of the mirrored image."""
    return np.tile((-1.0) ** np.arange(frequencies), frequencies).astype(np.float32)


def describe(thumbnails: np.ndarray, windows: int = len(WINDOWS)) -> np.ndarray:
    """uint8 [n, 32, 32] -> float32 [n, W, 64], unit vectors: the image and (the first of) its WINDOWS. Of a flat image all are 0, like nothing."""
    values = thumbnails.astype(np.float32)
    found = [_basis(COARSE, rows) @ values @ _basis(COARSE, columns).T * _weights(COARSE) for rows, columns in WINDOWS[:windows]]
    return _unit(np.stack(found, axis=1).reshape(len(values), windows, -1))


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(length > _FLAT, vectors / np.maximum(length, 1e-9), 0).astype(np.float32)


def alignment(first: np.ndarray, second: np.ndarray, at_once: int = 32) -> np.ndarray:
    """float32 [n], at most 1: how alike image i of each is, at the best of 225 windows of either and mirrored or not. uint8 [n, 32, 32] each."""
    found = np.zeros(len(first), np.float32)
    for start in range(0, len(first), at_once):
        here = slice(start, start + at_once)
        one, other = _everywhere(first[here]), _everywhere(second[here])  # [b, A * A, K * K]
        for windows, whole in ((one, other[:, 0]), (other, one[:, 0])):
            for sign in (1, mirror(FINE)):
                turned = whole * sign
                best = np.einsum("nwk,nk->nw", windows, turned).argmax(1)
                found[here] = np.maximum(found[here], _agreement(windows[np.arange(len(best)), best], turned))
    return found


def _agreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[n]: cosine of unit vectors [n, K * K], as they are and with strong frequencies tamed, the smaller of both."""
    # a white frame or a horizon is strong in few frequencies, and would make any two images alike that have one: 0.95 became 0.88
    tamed = [np.sign(part) * np.abs(part) ** 0.7 for part in (one, other)]
    product = (tamed[0] * tamed[1]).sum(1) / np.maximum(np.linalg.norm(tamed[0], axis=1) * np.linalg.norm(tamed[1], axis=1), 1e-9)
    smaller: np.ndarray = np.minimum((one * other).sum(1), product)
    return smaller


def _everywhere(thumbnails: np.ndarray) -> np.ndarray:
    """[n, A * A, K * K]: unit descriptions of all windows, the whole image first."""
    basis = np.concatenate([_basis(FINE, place) for place in _PLACES])  # [A * K, 32]
    found = (basis @ thumbnails.astype(np.float32) @ basis.T).reshape(len(thumbnails), len(_PLACES), FINE, len(_PLACES), FINE)
    weighted = found.transpose(0, 1, 3, 2, 4) * _weights(FINE)
    return _unit(weighted.reshape(len(thumbnails), len(_PLACES) ** 2, -1))
