"""Augmentations beyond DINO's, for images that are no photographs: quarter turns, vertical flips, gain and offset of each band, dropped bands,
percentile stretch, noise, stains of histology. All are off unless a config asks for them.

They have draws of their own, so that crops of a config without them stay bit for bit what they were. Values are float [N, C, H, W] on the
scale of 0..255, neither rounded nor clipped but where said; one code serves the loader's CPU and the device, batched, so that all modes agree.
"""

import math
import random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl_locat.data.images.draws import FIELDS
from ssl_locat.seeds import mix64

_STREAM = 0x62616E6473  # of seeds: tells these draws from those of the crops
_FIXED = ("flipped", "turns", "stretch_low", "stretch_high", "noise", "noise_seed", *(f"hed_{i}" for i in range(6)))
PLACE = {name: len(FIELDS) + index for index, name in enumerate(_FIXED)}  # columns of the table of draws, behind those of `Draw`
_BANDS = len(FIELDS) + len(_FIXED)  # gains [C], offsets [C], kept [C]
_SEEDS = 1 << 24  # a float32 holds whole numbers up to there
_HUGE = 1 << 32
# optical densities of haematoxylin, eosin and DAB in RGB (Ruifrok and Johnston 2001)
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


class Extras(NamedTuple):
    """The options of a config's `crops` of the same names."""

    vertical_flip_prob: float = 0.0
    turn_prob: float = 0.0
    band_jitter: tuple[float, float] = (0.2, 0.05)
    band_jitter_prob: float = 0.0
    band_drop_prob: float = 0.0
    stretch: float = 0.02
    stretch_prob: float = 0.0
    noise_sigma: tuple[float, float] = (0.0, 0.05)
    noise_prob: float = 0.0
    hed_jitter: float = 0.05
    hed_prob: float = 0.0

    @property
    def turns(self) -> bool:
        return bool(self.vertical_flip_prob or self.turn_prob)

    @property
    def values(self) -> bool:
        return bool(self.band_jitter_prob or self.band_drop_prob or self.stretch_prob or self.noise_prob or self.hed_prob)

    def draw(self, seed: int, views: int, channels: int) -> np.ndarray:
        """float32 [views, columns behind those of Draw]: what is off is drawn as well, so that one option's draws do not move another's."""
        rng = random.Random(mix64(_STREAM, seed))
        return np.array([self._draw_view(rng, channels) for _ in range(views)], np.float32)

    def _draw_view(self, rng: random.Random, channels: int) -> list[float]:
        uniform = rng.random
        flipped, turns = uniform() < self.vertical_flip_prob, 1 + int(3 * uniform())
        turns = turns if uniform() < self.turn_prob else 0
        cut = [uniform() * self.stretch for _ in range(2)]
        cut = cut if uniform() < self.stretch_prob else [-1.0, -1.0]
        low, high = self.noise_sigma
        noise, noise_seed = low + uniform() * (high - low), int(uniform() * _SEEDS)
        noise = noise if uniform() < self.noise_prob else 0.0
        hed = [(2 * uniform() - 1) * self.hed_jitter for _ in range(6)]
        hed = hed if uniform() < self.hed_prob else [0.0] * 6
        gains, offsets = ([(2 * uniform() - 1) * size for _ in range(channels)] for size in self.band_jitter)
        jittered = uniform() < self.band_jitter_prob
        gains, offsets = (values if jittered else [0.0] * channels for values in (gains, offsets))
        kept, one = [uniform() >= self.band_drop_prob for _ in range(channels)], int(uniform() * channels)
        kept[one] |= not any(kept)
        return [flipped, turns, *cut, noise, noise_seed, *hed, *(1 + gain for gain in gains), *offsets, *kept]


def turned(crop: np.ndarray, row: np.ndarray) -> np.ndarray:
    """[h, w, C], flipped and turned as one row of draws says."""
    crop = crop[::-1] if row[PLACE["flipped"]] else crop
    return np.ascontiguousarray(np.rot90(crop, int(row[PLACE["turns"]])))


def turn_all(crops: Tensor, draws: Tensor) -> Tensor:
    """`turned`, for square crops [N, C, h, h] on a device and their draws [N, columns] on the CPU."""
    for flip, turns in ((True, 0), (False, 1), (False, 2), (False, 3)):
        chosen = draws[:, PLACE["flipped"]] > 0 if flip else draws[:, PLACE["turns"]] == turns
        rows = chosen.nonzero()[:, 0].to(crops.device)
        if len(rows):
            picked = crops[rows]
            crops = crops.index_copy(0, rows, picked.flip(2) if flip else torch.rot90(picked, turns, (2, 3)))
    return crops


def before_blur(crops: Tensor, draws: Tensor) -> Tensor:
    """Stains, gain and offset of the bands, percentile stretch. `draws` [N, columns] on the CPU."""
    crops = _jitter_stains(crops, draws)
    channels = crops.shape[1]
    gains, offsets = (draws[:, _BANDS + place * channels : _BANDS + (place + 1) * channels, None, None] for place in (0, 1))
    if (gains != 1).any() or (offsets != 0).any():
        crops = crops * gains.to(crops.device) + 255 * offsets.to(crops.device)
    return _stretch(crops, draws)


def after_blur(crops: Tensor, draws: Tensor, mean: tuple[float, ...]) -> Tensor:
    """Noise, and dropped bands, which become their `mean` (of channels in 0..1): 0 after the normalisation."""
    crops = _add_noise(crops, draws)
    channels = crops.shape[1]
    kept = draws[:, _BANDS + 2 * channels : _BANDS + 3 * channels, None, None]
    if (kept == 0).any():
        crops = torch.where(kept.to(crops.device) > 0, crops, 255 * torch.tensor(mean, device=crops.device)[:, None, None])
    return crops


def _stretch(crops: Tensor, draws: Tensor) -> Tensor:
    """Each band of the crop so that the drawn percentiles become 0 and 255, clipped there. A band of one value stays."""
    low, high = draws[:, PLACE["stretch_low"]], draws[:, PLACE["stretch_high"]]
    rows = (low >= 0).nonzero()[:, 0]
    if not len(rows):
        return crops
    ordered = crops[rows.to(crops.device)].flatten(2).sort(-1).values  # [n, C, P]
    last = ordered.shape[-1] - 1
    ends = torch.stack([(low[rows] * last).round().long(), last - (high[rows] * last).round().long()]).to(crops.device)
    bottom, top = (
        ordered.gather(2, end[:, None, None].expand(-1, ordered.shape[1], 1))[..., None] for end in ends
    )  # [n, C, 1, 1] each
    wide = top > bottom
    part = crops[rows.to(crops.device)]
    stretched = ((part - bottom) * (255 / torch.where(wide, top - bottom, 1.0))).clamp(0, 255)
    return crops.index_copy(0, rows.to(crops.device), torch.where(wide, stretched, part))


def _add_noise(crops: Tensor, draws: Tensor) -> Tensor:
    """Normal numbers that are a function of seed and place: a CPU and a GPU add the same ones, which their own generators would not."""
    sigma = draws[:, PLACE["noise"]]
    rows = (sigma > 0).nonzero()[:, 0]
    if not len(rows):
        return crops
    device, (_, channels, height, width) = crops.device, crops.shape
    seeds = draws[rows, PLACE["noise_seed"]].long().to(device)[:, None]
    places = torch.arange(channels * height * width, device=device)[None]
    first = _mixed(places * 0x9E3779B1 + seeds * 0x85EBCA77)
    second = _mixed(first + 0xC2B2AE35)
    one, two = ((number.float() + 0.5) / _HUGE for number in (first, second))
    normal = torch.sqrt(-2 * torch.log(one)) * torch.cos(2 * math.pi * two)  # Box and Muller
    added = normal.view(-1, channels, height, width) * (255 * sigma[rows].to(device))[:, None, None, None]
    return crops.index_add(0, rows.to(device), added)


def _mixed(numbers: Tensor) -> Tensor:
    """32-bit hash of int64, a function of their lowest 32 bits (Wellons' lowbias32)."""
    mask = _HUGE - 1
    numbers = numbers & mask
    numbers = (numbers ^ numbers >> 16) * 0x7FEB352D & mask
    numbers = (numbers ^ numbers >> 15) * 0x846CA68B & mask
    return numbers ^ numbers >> 16


def _jitter_stains(crops: Tensor, draws: Tensor) -> Tensor:
    """RGB -> densities of three stains, each times 1 + a and plus b -> RGB (Tellez et al. 2019, "HED-light"); clipped to 0..255."""
    factors = draws[:, PLACE["hed_0"] : PLACE["hed_5"] + 1]
    rows = (factors != 0).any(1).nonzero()[:, 0]
    if not len(rows):
        return crops
    device = crops.device
    stains, apart = (torch.tensor(matrix, dtype=torch.float32, device=device) for matrix in (_STAINS, np.linalg.inv(_STAINS)))
    gains, offsets = factors[rows].to(device)[..., None].split(3, dim=1)  # [n, 3, 1]
    pixels = crops[rows.to(device)]
    densities = -torch.log(pixels.flatten(2).clamp(min=1) / 255)  # [n, RGB, P]; 1 of 255: black is not infinitely dense
    amounts = apart.T @ densities
    changed = 255 * torch.exp(-(stains.T @ (amounts * (1 + gains) + offsets)))
    return crops.index_copy(0, rows.to(device), changed.clamp(0, 255).view_as(pixels))
