"""NaFlexViT: a ViT for images of any size and aspect ratio, whole ones or, in one batch, patches with their coordinates and padding behind."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from ssl_locat.errors import UserError
from ssl_locat.models.attention import dense_bias_attention
from ssl_locat.models.families.front import Family, LocAtModel, blocks_of
from ssl_locat.models.families.plain import GaugAttention
from ssl_locat.models.grid import distances, grid_mask, kept_mask


class Placed(NamedTuple):
    """What stands in the mask's place for patches with coordinates: each image has a grid of its own."""

    place: tuple[Tensor, Tensor]  # column and row of each patch, float32 [B, 1, N], the 1 standing for heads
    grid: tuple[Tensor, Tensor]  # rows and columns of each image, float32 [B, 1, 1, 1]
    padding: Tensor | None  # timm's mask of what is padding, [B, 1, R + N, R + N] or [B, 1, 1, R + N]


class GaugPlacedAttention(GaugAttention):
    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        if not isinstance(attn_mask, Placed):
            return super().forward(x, rope, attn_mask, is_causal)
        prefix, where = self.num_prefix_tokens, attn_mask
        q, k, v = self.project(x)
        grid: Any = where.grid
        coefficients = self.gaug(q[:, :, prefix:], grid, k=k[:, :, prefix:], x=x[:, prefix:])
        bias = self.gaug.bias_between(coefficients, *distances(where.place, where.place))
        q, k = self.rotate(q, rope), self.rotate(k, rope)
        out = dense_bias_attention(q, k, v, bias, prefix, self.dropout_p(), where.padding)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if getattr(self, "gate", None) is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class LocAtNaFlex(LocAtModel):
    def place_gaugs(self, stages: list[list[Any]]) -> None:
        for attention in stages[0]:
            attention.num_prefix_tokens, attention.seen_grids = self.num_prefix_tokens, {}

    def _forward_embeds(
        self, x: Tensor, patch_coord: Tensor | None, patch_valid: Tensor | None, attn_mask: Tensor | None
    ) -> dict:
        if self.has_gaug and patch_coord is None and (x.ndim != 4 or attn_mask is not None):
            raise UserError(
                "GAug needs to know where patches lie: give NaFlexViT images, or patches with patch_coord, and no mask"
            )
        embeds = super()._forward_embeds(x, patch_coord, patch_valid, attn_mask)
        if not self.has_gaug:
            return embeds
        kept = embeds["keep_indices"]
        if patch_coord is None:
            rows, cols = self.embeds.dynamic_feat_size(x.shape[-2:])
            tokens = embeds["patches"]
            return {**embeds, "attn_mask": grid_mask(tokens, rows, cols) if kept is None else kept_mask(kept, rows, cols)}
        valid = torch.ones_like(patch_coord[..., 0]) if patch_valid is None else patch_valid
        # the last patch that is there says how large the grid is; [B, N, 2] are row and column
        rows, cols = ((patch_coord * valid[..., None]).amax(1) + 1).float()[:, :, None, None, None].unbind(1)
        if kept is not None:
            patch_coord = patch_coord.gather(1, kept[..., None].expand(-1, -1, 2))
        y, x = patch_coord.float()[:, None].unbind(-1)
        return {**embeds, "attn_mask": Placed((x, y), (rows, cols), embeds["attn_mask"])}

    def forward_head(self, patches: Tensor, pre_logits: bool = False, patch_valid: Tensor | None = None) -> Tensor:
        if self.prr is not None:
            there = None if patch_valid is None else F.pad(patch_valid.bool(), (self.num_prefix_tokens, 0), value=True)
            patches = self.prr(patches, there)
        return self.timm_forward_head(patches, pre_logits, patch_valid)


def trained_grid(model: Any, stages: list[list[Any]]) -> list[tuple[int, int]]:
    """Of the positions; without them nothing shows it, and 16 x 16 is what timm's have."""
    return [tuple(getattr(model.embeds, "pos_embed_grid_size", None) or (16, 16))]


NAFLEX = Family(
    NaFlexVit,
    ("naflexvit",),
    LocAtNaFlex,
    {Attention: GaugPlacedAttention, AttentionRope: GaugPlacedAttention, EvaAttention: GaugPlacedAttention},
    blocks_of,
    trained_grid,
    where="among the patches of each image, on its own grid; padding is left out",
    sizes="yes, mixed in a batch, too",
)
