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
    """What the student does not see of the global crops; view-major. Of the N patches of a crop it gets n, all of them where `kept` is None."""

    hidden: Tensor | None  # [T*B, n] bool, True = a mask token in its place; None where no objective hides any
    # [M] int64: where `hidden` is True, counted through its rows; made on the CPU, so that no kernel is waited for.
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    cells: int  # N
    kept: Tensor | None = None  # [T*B, n] int64, ascending: the numbers of the patches that it gets

    @classmethod
    def of(
        cls, hidden: Tensor | None, device: torch.device | str = "cpu", kept: Tensor | None = None, cells: int | None = None
    ) -> "Masks":
        """From `hidden` [T*B, N] and `kept` on the CPU. What is hidden and not kept is not there at all: of a kept patch it is as likely to be
        hidden as of any."""
        index = None
        if hidden is not None:
            cells = hidden.shape[1]
            hidden = hidden if kept is None else hidden.gather(1, kept)
            index = hidden.flatten().nonzero().squeeze(1)
        assert cells is not None  # where nothing is hidden
        parts = [part if part is None else part.to(device, non_blocking=True) for part in (hidden, index, kept)]
        return cls(parts[0], parts[1], cells, parts[2])

    def on_grid(self, kept_out: bool = False) -> Tensor | None:
        """`hidden` of all N patches [T*B, N]; kept_out: what is not kept counts as hidden, too."""
        if self.kept is None:
            return self.hidden
        if self.hidden is None and not kept_out:
            return None
        inside = torch.zeros_like(self.kept, dtype=torch.bool) if self.hidden is None else self.hidden
        return inside.new_full((len(self.kept), self.cells), kept_out).scatter(1, self.kept, inside)


class Keep(NamedTuple):
    """Which patches of the global crops the student gets: a share of them, single ones at `random`, or one `block` of neighbours."""

    share: float
    shape: str = "random"

    def count(self, patches: int) -> int:
        return max(1, round(self.share * patches))

    def draw(self, seeds: Sequence[int], views: int, grid: tuple[int, int]) -> Tensor | None:
        """One seed per image -> int64 [views * B, n] on the CPU, ascending; None where all are kept."""
        cells = grid[0] * grid[1]
        if (count := self.count(cells)) == cells:
            return None
        kept = np.empty((views, len(seeds), count), np.int64)
        for image, seed in enumerate(seeds):
            rng = random.Random(seed)
            for view in range(views):
                chosen = one_block(rng, grid, count) if self.shape == "block" else rng.sample(range(cells), count)
                kept[view, image] = sorted(chosen)
        return torch.from_numpy(kept).flatten(0, 1)


def one_block(rng: random.Random, grid: tuple[int, int], count: int) -> list[int]:
    """`count` neighbouring cells of the grid, row-major: a rectangle of a random shape, but for the end of its last row."""
    rows, cols = grid
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))  # height over width, as of torchvision's random crops
    height = min(rows, max(1, round(math.sqrt(count * aspect))))
    width = min(cols, -(-count // height))
    height = -(-count // width)  # where the width met its limit
    if height > rows:
        height, width = rows, -(-count // rows)
    top, left = rng.randint(0, rows - height), rng.randint(0, cols - width)
    return [(top + cell // width) * cols + left + cell % width for cell in range(count)]


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
