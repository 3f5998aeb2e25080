"""Twins: attention within windows in turn with attention of all patches to keys that stand for cells of them (SVT), or the latter alone (PCPVT)."""

from typing import Any

import torch.nn.functional as F
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn, Twins
from torch import Tensor

from ssl_locat.models.attention import dense_bias_attention
from ssl_locat.models.families.front import Family, GaugFront, LocAtModel, project
from ssl_locat.models.grid import cell_centres, coordinates, distances

Size = tuple[int, int]


class GaugLocalAttention(GaugFront):
    """Each window is a grid; zeros that fill the last windows take part, as in timm."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """x [B, rows * cols, D] -> the same shape."""
        (rows, cols), side = size, self.ws
        maps = F.pad(x.unflatten(1, size), (0, 0, 0, -cols % side, 0, -rows % side))
        down, across = maps.shape[1] // side, maps.shape[2] // side
        # [B, down * side, across * side, D] -> [B * down * across, side^2, D] and back
        tokens = maps.unflatten(2, (across, side)).unflatten(1, (down, side)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        q, k, v = project(self, tokens)
        out = self.attend_on_grid(q, k, v, tokens, (side, side))
        out = out.unflatten(0, (-1, down, across)).unflatten(3, (side, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return self.proj_drop(self.proj(out[:, :rows, :cols].flatten(1, 2)))


class GaugSubSampled(GaugFront):
    """A key stands for a cell of r x r patches: the bump of a query counts patches, and a key lies at its cell's centre."""

    def gaug_shape(self) -> tuple[int, int, int]:
        return self.q.out_features // self.num_heads, self.q.in_features, self.num_heads

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """x [B, rows * cols, D] -> the same shape."""
        q = self.q(x).unflatten(-1, [self.num_heads, -1]).transpose(1, 2)
        cells = x
        if self.sr is not None:
            cells = self.norm(self.sr(x.mT.unflatten(2, size)).flatten(2).mT)  # [B, M, D], M = rows // r * (cols // r)
        k, v = self.kv(cells).unflatten(-1, [2, self.num_heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
        where = cell_centres(size, self.sr_ratio, x.device)
        coefficients = self.gaug(q, size, k=k, x=x)
        bias = self.gaug.bias_between(coefficients, *distances(coordinates(*size, device=x.device), where))  # [B, heads, N, M]
        out = dense_bias_attention(q, k, v, bias, 0, dropout_p=self.dropout_p())
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


def local_and_global(model: Any) -> dict[str, Any]:
    """Of each stage: blocks with windows, blocks with cells."""
    stages = {}
    for number, blocks in enumerate(model.blocks):
        for kind, name in ((LocallyGroupedAttn, "windows"), (GlobalSubSampleAttn, "cells")):
            chosen = [block for block in blocks if isinstance(block.attn, kind)]
            if chosen:
                stages[f"blocks.{number} ({name})"] = chosen
    return stages


def grids(model: Any, stages: list[list[Any]]) -> list[Size]:
    own = []
    for name, attentions in zip(local_and_global(model), stages, strict=True):
        embed, side = model.patch_embeds[int(name[7])], getattr(attentions[0], "ws", None)
        own.append((side, side) if side else (embed.H, embed.W))
    return own


TWINS = Family(
    Twins,
    ("twins",),
    LocAtModel,
    {LocallyGroupedAttn: GaugLocalAttention, GlobalSubSampleAttn: GaugSubSampled},
    local_and_global,
    grids,
    where="within each window; in the blocks between, from a patch to the centres of the cells that keys stand for",
    sizes="yes",
)
