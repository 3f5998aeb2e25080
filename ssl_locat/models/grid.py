"""Where patches lie: the grid of an input, how it reaches the attentions, and distances on it as the Gaussian bias needs them.

A LocAt model hands the places of its patches to every attention as `attn_mask`, which timm passes down to them: GAug is the mask's
recipe. Two tensors say it, both by their shape, so that no kernel ever waits for their values:

    grid_mask(x, rows, cols)             [rows, cols]          all patches, row-major; its values mean nothing
    kept_mask(kept, rows, cols)          [B, n, rows, cols]    n patches of each image, in any order: kept [B, n] are their numbers

Tensors, since TorchScript, FX, activation checkpointing and FSDP pass tensors through timm's blocks, and nothing else.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor

from ssl_locat.errors import UserError


class Grid(NamedTuple):
    """Patches of one input, row-major."""

    rows: int
    cols: int


@register_notrace_function
def grid_mask(x: Tensor, rows: int, cols: int, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """The mask of a whole grid, on x's device; an `attn_mask` or `is_causal` that a LocAt model was called with is refused here.

    One function for both, because FX traces a model with placeholders for its mask: whether there is one shows when the graph runs.
    """
    if attn_mask is not None or is_causal:
        raise UserError("a LocAt model takes no attention mask and is not causal: GAug adds its own bias between all patches")
    # on x's device and of its dtype: checkpointing and FSDP move and cast what they pass on
    return x.new_empty([rows, cols])


def kept_mask(kept: Tensor, rows: int, cols: int) -> Tensor:
    """The mask of some patches: kept [B, n], numbers of patches (row-major over rows x cols) in the order of the tokens."""
    # expanded, not repeated: four dimensions of shape, n numbers of memory
    return kept[:, :, None, None].expand(-1, -1, rows, cols)


def read_mask(mask: Tensor) -> tuple[int, int, Tensor | None]:
    """rows, cols, and the numbers [B, n] of the patches that are there, None for all of them."""
    kept: Tensor | None = None
    if mask.dim() == 4:
        kept = mask[:, :, 0, 0]
    return mask.shape[-2], mask.shape[-1], kept


def axis(length: int, device: torch.device | None, pool: int) -> Tensor:
    """Coordinates along one side of the grid, float32."""
    steps = torch.arange(length, device=device, dtype=torch.float32)
    return steps if pool == 1 else torch.div(steps, pool, rounding_mode="floor").mul(pool)


def coordinates(
    rows: int, cols: int, kept: Tensor | None = None, device: torch.device | None = None, pool: int = 1
) -> tuple[Tensor, Tensor]:
    """Column and row of each patch, both float32 [N]; of kept ones [B, 1, n], the 1 standing for heads."""
    x, y = axis(cols, device, pool), axis(rows, device, pool)
    if kept is None:
        # row-major: columns run fastest
        return x.repeat(rows), y.repeat_interleave(cols, 0)
    return x[kept % cols][:, None], y[torch.div(kept, cols, rounding_mode="floor")][:, None]


def patch_distances(
    grid: tuple[int, int], device: torch.device | None = None, pool: int = 1, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Columns and rows between every two patches: dx, dy, both float32 [N, N]; between kept ones [B, 1, n, n]."""
    x, y = coordinates(grid[0], grid[1], kept, device, pool)
    return x[..., :, None] - x[..., None, :], y[..., :, None] - y[..., None, :]


def cell_centres(grid: tuple[int, int], cell: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Column and row of the centre of each whole cell x cell patches, row-major, float32 [M]."""
    x, y = coordinates(grid[0] // cell, grid[1] // cell, device=device)
    return x * cell + (cell - 1) / 2, y * cell + (cell - 1) / 2


def distances(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Columns and rows between every query and every key, from their columns and rows [..., N] and [..., M]: dx, dy [..., N, M]."""
    return queries[0][..., :, None] - keys[0][..., None, :], queries[1][..., :, None] - keys[1][..., None, :]


def squared_distances(
    grid: tuple[int, int], clamp: float, pool: int, device: torch.device | None = None, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Clamped squared differences from each patch to each column [N, cols] and to each row [N, rows], float32; of kept ones [B, 1, n, ...]."""
    rows, cols = grid
    x, y = coordinates(rows, cols, kept, device, pool)
    dx2, dy2 = (  # the Gaussian is a product of both axes: N * (rows + cols) numbers instead of N * N
        (of[..., None] - to).square().clamp(max=clamp)
        for of, to in ((x, axis(cols, device, pool)), (y, axis(rows, device, pool)))
    )
    return dx2, dy2


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x), 0 instead of less than 1e-12: where factors, their products or gradients are denormal, CPUs take up to forty times longer. float32 logits
    do not resolve such a factor, and two of them times a gradient are normal numbers still."""
    return F.threshold(torch.exp(x.clamp(min=-87)), 1e-12, 0.0)  # literals: TorchScript reads no globals
