"""Which patches of the student's global crops are hidden: blocks (BEiT, arXiv:2106.08254; iBOT, arXiv:2111.07832) or single patches at random.

A mask is a pure function of its seed, which the loop derives from the sample's position in the stream: a resumed run, and one with
another number of ranks, hides the same patches of the same images.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl_locat.errors import UserError

MIN_BLOCK = 4  # patches, and the range of aspect ratios: BEiT's, kept by iBOT and DINOv2
MIN_ASPECT = 0.3  # heights from 0.3 to 3.3 widths, even in the logarithm
ATTEMPTS = 10  # rectangles tried before single cells fill the rest; BEiT's


class Masks(NamedTuple):
    hidden: Tensor  # [T*B, N] bool, True = hidden from the student; view-major
    # [M] int64: where `hidden` is True, counted through its rows; made on the CPU, so that no kernel is waited for.
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls

    @classmethod
    def of(cls, hidden: Tensor, device: torch.device | str = "cpu") -> "Masks":
        """From `hidden` on the CPU."""
        index = hidden.flatten().nonzero().squeeze(1)
        return cls(hidden.to(device, non_blocking=True), index.to(device, non_blocking=True))


class Masking(NamedTuple):
    """Which patches an objective hides: its options `mask_shape`, `mask_probability` and `mask_ratio`."""

    shape: str  # "block" or "random"
    probability: float  # of a global crop to be masked at all
    ratio: tuple[float, float]  # smallest and largest share of a masked crop's patches, drawn evenly

    @classmethod
    def of(cls, objective: str, shape: str, probability: float, ratio: tuple[float, float]) -> "Masking":
        """Checked; `objective` is named in the UserError."""
        if shape not in ("block", "random"):
            raise UserError(f"{objective}: mask_shape is {shape!r}; expected block or random")
        if not (0 <= ratio[0] <= ratio[1] <= 1 and 0 < probability <= 1):
            raise UserError(
                f"{objective}: mask_ratio is {list(ratio)}, mask_probability {probability}; expected shares "
                "0 <= smallest <= largest <= 1, and a probability above 0"
            )
        return cls(shape, probability, (ratio[0], ratio[1]))

    @property
    def hidden_share(self) -> float:
        """Of the global crops' patches, on average."""
        return self.probability * sum(self.ratio) / 2

    def draw(self, seeds: Sequence[int], views: int, grid: tuple[int, int]) -> Tensor:
        """One seed per image -> bool [views * B, N], on the CPU."""
        return draw_masks(seeds, views, grid, *self)


def draw_masks(
    seeds: Sequence[int], views: int, grid: tuple[int, int], shape: str, probability: float, ratio: tuple[float, float]
) -> Tensor:
    """bool [views * B, N] for images with these seeds: each crop is masked with `probability`, by a share of its patches drawn from `ratio`.

    DINOv2 masks exactly half of a batch's crops, with shares spread evenly over the range; drawn crop by crop, as here and in iBOT, the
    distribution of a crop is the same and does not depend on what else is in its batch.
    """
    cells = grid[0] * grid[1]
    hidden = np.zeros((views, len(seeds), cells), bool)
    for image, seed in enumerate(seeds):
        rng = random.Random(seed)
        for view in range(views):
            if rng.random() < probability:
                count = int(cells * rng.uniform(*ratio))  # patches of this crop
                places = block_places(rng, grid, count) if shape == "block" else rng.sample(range(cells), count)
                hidden[view, image, places] = True
    return torch.from_numpy(hidden).flatten(0, 1)


def block_places(rng: random.Random, grid: tuple[int, int], count: int) -> list[int]:
    """`count` cells of the grid, row-major: rectangles until no more fits, then single cells (the references stop short there)."""
    rows, cols = grid
    chosen = 0  # bit c: cell c. Numbers join and count in one operation what sets of cells take a loop for
    while chosen.bit_count() < count:
        added = _one_block(rng, rows, cols, chosen, count - chosen.bit_count())
        if not added:
            break
        chosen |= added
    bits = f"{chosen:0{rows * cols}b}"[::-1]
    places = [cell for cell, bit in enumerate(bits) if bit == "1"]
    if len(places) < count:
        places += rng.sample([cell for cell, bit in enumerate(bits) if bit == "0"], count - len(places))
    return places


def _one_block(rng: random.Random, rows: int, cols: int, chosen: int, room: int) -> int:
    """New cells of a rectangle, as bits, with at least one and at most `room` of them; 0 if no attempt gave one."""
    for _ in range(ATTEMPTS):
        area = rng.uniform(min(MIN_BLOCK, room), room)
        aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < cols):
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, cols - width)
        line = ((1 << width) - 1) << left
        block = sum(line << row * cols for row in range(top, top + height)) & ~chosen
        if 0 < block.bit_count() <= room:
            return block
    return 0
