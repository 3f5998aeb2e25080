"""Mean, deviation, percentiles and share of no data of each channel, over any number of images in one pass and in bounded memory."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np

GRID = 48  # each side: so many rows and columns of an image go into the percentiles, evenly over it
_MOST = 1 << 20  # values of a channel kept for them: 1 and 99 % are then good to a thousandth of the values
_DIGITS = 4


class ChannelStatistics(NamedTuple):
    """One number for each channel, in the units of the files."""

    images: int
    mean: list[float]
    std: list[float]
    percentiles: dict[float, list[float]]  # in percent
    no_data: list[float]  # share
    least: list[float]
    greatest: list[float]

    def scale(self, type: str) -> tuple[list[float], list[float]]:
        """(low, high) that a config's data.channels gets: the percentiles 1 and 99; of 8 bits their whole range."""
        if type == "uint8":
            return [0.0] * len(self.mean), [255.0] * len(self.mean)
        pairs = zip(self.percentiles[1], self.percentiles[99], self.least, self.greatest, strict=True)
        # a channel nearly all of which is one value: all of it, and at least something
        ends = [(low, high) if high > low else (least, max(greatest, least + 1)) for low, high, least, greatest in pairs]
        return [_rounded(low) for low, _ in ends], [_rounded(high) for _, high in ends]

    def on(self, low: list[float], high: list[float]) -> tuple[list[float], list[float]]:
        """(mean, std) on the scale where `low` is 0 and `high` is 1: a config's crops.mean and crops.std."""
        each = list(zip(self.mean, self.std, low, high, strict=True))
        return [round((mean - a) / (b - a), 3) for mean, _, a, b in each], [
            max(0.001, round(std / (b - a), 3)) for _, std, a, b in each
        ]


class Counting:
    """`add` images, `join` what others counted, and read the `result`."""

    def __init__(self) -> None:
        self.images = 0
        self.types: Counter[str] = Counter()
        self._pixels = 0
        self._count = self._mean = self._square = np.zeros(0)  # valid values, their mean, the sum of squares about it: each [C]
        self._least = self._greatest = np.zeros(0)
        self._kept: list[np.ndarray] = []  # of each image [n, C], NaN where there is no data

    def add(self, values: np.ndarray, missing: np.ndarray | None) -> None:
        """values [H, W, C] of any number type; missing bool, the same shape."""
        flat = values.reshape(-1, values.shape[2]).astype(np.float64)
        if missing is not None:
            flat = np.where(missing.reshape(flat.shape), np.nan, flat)
        valid = np.isfinite(flat)
        count = valid.sum(0).astype(np.float64)
        kept = np.where(valid, flat, 0.0)
        mean = kept.sum(0) / np.maximum(count, 1)
        square = (np.where(valid, flat - mean, 0.0) ** 2).sum(0)
        part = Counting()
        part.images, part._pixels, part._count, part._mean, part._square = 1, len(flat), count, mean, square
        part._least = np.where(valid, flat, np.inf).min(0)
        part._greatest = np.where(valid, flat, -np.inf).max(0)
        height, width = values.shape[:2]
        rows, columns = (np.unique(np.linspace(0, side - 1, min(GRID, side)).round().astype(int)) for side in (height, width))
        part._kept = [flat.reshape(values.shape)[rows][:, columns].reshape(-1, values.shape[2]).astype(np.float32)]
        self.join(part)

    def join(self, other: "Counting") -> None:
        """By Chan's formula: sums of squares of a large mean would lose their digits."""
        if not other.images:
            return
        if not self.images:
            self._count, self._mean, self._square = other._count, other._mean, other._square
            self._least, self._greatest = other._least, other._greatest
        else:
            total = np.maximum(self._count + other._count, 1)
            apart = other._mean - self._mean
            self._mean = self._mean + apart * other._count / total
            self._square = self._square + other._square + apart**2 * self._count * other._count / total
            self._count = self._count + other._count
            self._least, self._greatest = np.minimum(self._least, other._least), np.maximum(self._greatest, other._greatest)
        self.images += other.images
        self.types += other.types
        self._pixels += other._pixels
        self._kept += other._kept
        while len(self._kept) > 1 and sum(map(len, self._kept)) > _MOST:
            self._kept = self._kept[::2]

    @property
    def channels(self) -> int:
        return len(self._count)

    def result(self, percents: tuple[float, ...] = (1, 50, 99)) -> ChannelStatistics:
        sample = np.concatenate(self._kept)
        valid = [column[np.isfinite(column)] for column in sample.T]
        found = {percent: [float(np.percentile(one, percent)) if len(one) else 0.0 for one in valid] for percent in percents}
        std = np.sqrt(self._square / np.maximum(self._count, 1))
        least, greatest = (np.where(np.isfinite(ends), ends, 0.0).tolist() for ends in (self._least, self._greatest))
        share = 1 - self._count / max(1, self._pixels)
        return ChannelStatistics(self.images, self._mean.tolist(), std.tolist(), found, share.tolist(), least, greatest)


def _rounded(value: float) -> float:
    """To four significant digits: more were not measured."""
    if not value or not math.isfinite(value):
        return 0.0
    return float(f"{value:.{_DIGITS}g}")
