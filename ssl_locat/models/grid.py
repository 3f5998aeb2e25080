"""Distances on the patch grid, as the Gaussian bias and its backends need them."""

import torch
from torch import Tensor


def axis(length: int, device: torch.device | None, pool: int) -> Tensor:
    """Coordinates along one side of the grid, float32."""
    steps = torch.arange(length, device=device, dtype=torch.float32)
    return steps if pool == 1 else torch.div(steps, pool, rounding_mode="floor").mul(pool)


def patch_distances(grid: tuple[int, int], device: torch.device | None = None, pool: int = 1) -> tuple[Tensor, Tensor]:
    """Columns and rows between every two patches of `grid`: dx, dy, both float32 [N, N]."""
    rows, cols = grid
    y, x = torch.meshgrid(axis(rows, device, pool), axis(cols, device, pool), indexing="ij")
    return x.reshape(-1, 1) - x.reshape(1, -1), y.reshape(-1, 1) - y.reshape(1, -1)


def squared_distances(
    grid: tuple[int, int], clamp: float, pool: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Clamped squared differences from each patch to each column [N, cols] and to each row [N, rows], float32."""
    rows, cols = grid
    x, y = axis(cols, device, pool), axis(rows, device, pool)
    dx2, dy2 = ((c[:, None] - c).square().clamp(max=clamp) for c in (x, y))
    return dx2.repeat(rows, 1), dy2.repeat_interleave(cols, 0)


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x), at least 1.6e-38: where results are denormal, CPUs take forty times longer."""
    return torch.exp(x.clamp(min=-87))
