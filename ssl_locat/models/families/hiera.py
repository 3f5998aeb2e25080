"""Hiera: attention within mask units, later over the whole map; where a stage begins, queries are pooled and keys are not.

Its tokens do not lie row by row. They are unrolled: [cells of the first pooling, ..., of the last one, mask units], the mask units fastest,
so that pooling is a maximum over the first dimension. A pooled query lies at the centre of its cell, distances count the keys' patches.
"""

import math
from itertools import groupby
from typing import Any

import torch
from timm.models.hiera import Hiera, MaskUnitAttention
from torch import Tensor

from ssl_locat.errors import UserError
from ssl_locat.models.attention import dense_bias_attention
from ssl_locat.models.families.front import Family, GaugFront, LocAtModel
from ssl_locat.models.grid import coordinates, distances

Place = tuple[Tensor, Tensor]


class GaugMaskUnits(GaugFront):
    """`units` and `poolings` are given by the model: rows and columns of mask units that see each other, and the (rows, cols) of cells in them
    that are not pooled so far."""

    def gaug_shape(self) -> tuple[int, int, int]:
        return self.head_dim, self.dim, self.heads

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] unrolled -> [B, N / q_stride, D']."""
        # [B, N, D] -> [B, n, groups, D]: of a mask unit's own tokens, or of all
        groups = x.shape[1] // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        x = x.unflatten(1, (-1, groups))
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
        )  # [B * groups, heads, n, d]
        inputs = x.transpose(1, 2).flatten(0, 1)
        keys = places(self.units, self.poolings, x.device)
        if len(keys[0]) != k.shape[2]:
            raise UserError(
                f"GAug cannot tell where {k.shape[2]} of {len(keys[0])} patches lie: Hiera's mask (or its patch_drop_rate) leaves out mask "
                "units, and this attention goes over the whole map"
            )
        queries = keys
        if self.q_stride > 1:
            q, inputs = (t.unflatten(-2, (self.q_stride, -1)).amax(-3) for t in (q, inputs))
            queries = (keys[0].unflatten(0, (self.q_stride, -1)).mean(0), keys[1].unflatten(0, (self.q_stride, -1)).mean(0))
        coefficients = self.gaug(q, grid_of(self.units, self.poolings), k=k, x=inputs)
        out = dense_bias_attention(q, k, v, self.gaug.bias_between(coefficients, *distances(queries, keys)), 0)
        return self.proj(out.unflatten(0, (-1, groups)).permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2))


def places(units: tuple[int, int], poolings: tuple[tuple[int, int], ...], device: torch.device) -> Place:
    """Column and row of every token in unrolled order, each [N]: the first pooling's cells are next to each other."""
    x, y = coordinates(*units, device=device)
    for rows, cols in reversed(poolings):
        inner_x, inner_y = coordinates(rows, cols, device=device)
        x, y = (inner_x[:, None] + cols * x).flatten(), (inner_y[:, None] + rows * y).flatten()
    return x, y


def grid_of(units: tuple[int, int], poolings: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    return units[0] * math.prod(rows for rows, _ in poolings), units[1] * math.prod(cols for _, cols in poolings)


class LocAtHiera(LocAtModel):
    def place_gaugs(self, stages: list[list[Any]]) -> None:
        for attention, left in zip((block.attn for block in self.blocks), poolings_left(self), strict=True):
            # a mask unit is as many poolings as have its number of tokens
            inside = [
                n
                for n in range(len(left) + 1)
                if math.prod(map(math.prod, left[:n])) == attention.q_stride * attention.window_size
            ]
            attention.poolings = left[: inside[0]] if attention.use_mask_unit_attn else left
            rows, cols = grid_of((1, 1), left)
            whole = token_grid(self, left)
            attention.units = (1, 1) if attention.use_mask_unit_attn else (whole[0] // rows, whole[1] // cols)


def poolings_left(model: Any) -> list[tuple[tuple[int, int], ...]]:
    """Of each block: the cells (rows, cols) of poolings that its input has not passed yet."""
    left = len(model.unroll.schedule)
    found = []
    for block in model.blocks:
        found.append((tuple(model.q_stride),) * left)
        left -= block.attn.q_stride > 1
    return found


def token_grid(model: Any, poolings: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The grid of a block's input."""
    passed = len(model.unroll.schedule) - len(poolings)
    rows, cols = model.tokens_spatial_shape
    return rows // model.q_stride[0] ** passed, cols // model.q_stride[1] ** passed


def key_grid(model: Any, block: Any, poolings: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """What the keys of a block's attention lie on: a mask unit, or the whole map."""
    if not block.attn.use_mask_unit_attn:
        return token_grid(model, poolings)
    side = model.mask_unit_size
    passed = len(model.unroll.schedule) - len(poolings)
    return side[0] // model.q_stride[0] ** passed, side[1] // model.q_stride[1] ** passed


def by_grid(model: Any) -> dict[str, Any]:
    """Neighbouring blocks whose keys lie on grids of one size."""
    if len(model.tokens_spatial_shape) != 2:
        raise UserError("GAug serves Hiera for images; this one is for videos, whose patches lie in time, too")
    pairs = list(zip(model.blocks, poolings_left(model), strict=True))
    runs = [[block for block, _ in run] for _, run in groupby(pairs, lambda pair: key_grid(model, *pair))]
    return {f"blocks of run {number}": run for number, run in enumerate(runs)}


def grids(model: Any, stages: list[list[Any]]) -> list[tuple[int, int]]:
    pairs = zip(model.blocks, poolings_left(model), strict=True)
    return [grid for grid, _ in groupby(key_grid(model, *pair) for pair in pairs)]


HIERA = Family(
    Hiera,
    ("hiera",),
    LocAtHiera,
    {MaskUnitAttention: GaugMaskUnits},
    by_grid,
    grids,
    where="within each mask unit, later on the whole map; a pooled query lies between its four patches",
)
