"""Which patches of the student's global crops are hidden: blocks (BEiT, arXiv:2106.08254; iBOT, arXiv:2111.07832) or single patches at random.

A mask is a pure function of its seed, which the loop derives from the sample's position in the stream: a resumed run, and one with
another number of ranks, hides the same patches of the same images.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MIN_BLOCK = 4  # patches, and the range of aspect ratios: BEiT's, kept by iBOT and DINOv2
MIN_ASPECT = 0.3
ATTEMPTS = 10


class Masks(NamedTuple):
    hidden: Tensor  # [T*B, N] bool, True = hidden from the student; view-major
    index: Tensor  # [M] int64: where `hidden` is True, counted through its rows; made on the CPU, so that no kernel is waited for

    @classmethod
    def of(cls, hidden: Tensor, device: torch.device | str = "cpu") -> "Masks":
        """From `hidden` on the CPU."""
        index = hidden.flatten().nonzero().squeeze(1)
        return cls(hidden.to(device, non_blocking=True), index.to(device, non_blocking=True))


def draw_masks(
    seeds: Sequence[int], views: int, grid: tuple[int, int], shape: str, probability: float, ratio: tuple[float, float]
) -> Tensor:
    """bool [views * B, N] for images with these seeds: each crop is masked with `probability`, by a share of its patches drawn from `ratio`.

    DINOv2 masks exactly half of a batch's crops, with shares spread evenly over the range; drawn crop by crop, as here and in iBOT, the
    distribution of a crop is the same and does not depend on what else is in its batch.
    """
    cells = grid[0] * grid[1]
    hidden = torch.zeros(views, len(seeds), cells, dtype=torch.bool)
    for image, seed in enumerate(seeds):
        rng = random.Random(seed)
        for view in range(views):
            if rng.random() < probability:
                count = int(cells * rng.uniform(*ratio))
                places = block_places(rng, grid, count) if shape == "block" else rng.sample(range(cells), count)
                hidden[view, image, places] = True
    return hidden.flatten(0, 1)


def block_places(rng: random.Random, grid: tuple[int, int], count: int) -> list[int]:
    """`count` cells of the grid, row-major: rectangles until no more fits, then single cells (the references stop short there)."""
    rows, cols = grid
    chosen: set[int] = set()
    while len(chosen) < count:
        added = _one_block(rng, rows, cols, chosen, count - len(chosen))
        if not added:
            break
        chosen |= added
    free = [cell for cell in range(rows * cols) if cell not in chosen]
    return [*sorted(chosen), *rng.sample(free, count - len(chosen))]


def _one_block(rng: random.Random, rows: int, cols: int, chosen: set[int], room: int) -> set[int]:
    """New cells of a rectangle with at least one and at most `room` of them; empty if no attempt gave one."""
    for _ in range(ATTEMPTS):
        area = rng.uniform(min(MIN_BLOCK, room), room)
        aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < cols):
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, cols - width)
        block = {row * cols + col for row in range(top, top + height) for col in range(left, left + width)} - chosen
        if 0 < len(block) <= room:
            return block
    return set()
