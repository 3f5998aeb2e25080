"""PiT: a ViT in stages, between which a convolution halves the map; class tokens stay beside it."""

from typing import Any

import torch
from timm.layers import Attention
from timm.models.pit import PoolingVisionTransformer, Transformer
from torch import Tensor

from ssl_locat.models.families.front import Family, Front, LocAtModel
from ssl_locat.models.families.plain import GaugAttention
from ssl_locat.models.grid import grid_mask


class PlacedStage(Front):
    """In front of a stage: tells its blocks where patches lie."""

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(map [B, D, H, W], class tokens [B, R, D]) -> the same, of the next stage."""
        patches, class_tokens = x if self.pool is None else self.pool(*x)
        grid = (patches.shape[2], patches.shape[3])
        tokens = self.norm(torch.cat([class_tokens, patches.flatten(2).mT], dim=1))
        mask = grid_mask(tokens, *grid)
        for block in self.blocks:
            tokens = block(tokens, attn_mask=mask)
        prefix = class_tokens.shape[1]
        return tokens[:, prefix:].mT.unflatten(2, grid), tokens[:, :prefix]


class LocAtPit(LocAtModel):
    """Its features are the class tokens alone, so that PRR comes before the patches are left."""

    def place_gaugs(self, stages: list[list[Any]]) -> None:
        for attention in (each for stage in stages for each in stage):
            attention.num_prefix_tokens, attention.seen_grids = self.num_tokens, {}

    def forward_features(self, x: Tensor) -> Tensor:
        if self.prr is None:
            return super().forward_features(x)
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
        patches, class_tokens = self.transformers((x, self.cls_token.expand(x.shape[0], -1, -1)))
        tokens = self.norm(torch.cat([class_tokens, patches.flatten(2).mT], dim=1))
        return self.prr(tokens)[:, : self.num_tokens]

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        return self.timm_forward_head(x, pre_logits)


def stages(model: Any) -> dict[str, Any]:
    return {f"transformers.{i}.blocks": stage.blocks for i, stage in enumerate(model.transformers)}


def grids(model: Any, found: list[list[Any]]) -> list[tuple[int, int]]:
    rows, cols = model.patch_embed.grid_size
    sizes = [(rows, cols)]
    for _ in found[1:]:
        rows, cols = (rows - 1) // 2 + 1, (cols - 1) // 2 + 1  # kernel 3, padding 1, stride 2
        sizes.append((rows, cols))
    return sizes


PIT = Family(
    PoolingVisionTransformer,
    ("pit",),
    LocAtPit,
    {Attention: GaugAttention},
    stages,
    grids,
    where="on each stage's map",
    others={Transformer: PlacedStage},
)
