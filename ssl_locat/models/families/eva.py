"""Eva: EVA-02, RoPE-ViTs (axial, mixed), DINOv3's ViTs. Queries and keys are rotated; GAug reads queries before."""

import torch
from timm.layers import apply_keep_indices_nlc
from timm.models.eva import Eva
from torch import Tensor, nn

from ssl_locat.models.families.front import Family, blocks_of, patch_grid
from ssl_locat.models.families.plain import PLAIN
from ssl_locat.models.families.vit import LocAtViT
from ssl_locat.models.grid import grid_mask, kept_mask
from ssl_locat.models.tokens import recomputed


class LocAtEva(LocAtViT):
    """LocAtViT for blocks that rotate queries and keys."""

    def no_patch_drop(self) -> nn.Module | None:
        return None

    def place_patches(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows, cols = (x.shape[1], x.shape[2]) if self.dynamic_img_size else self.patch_embed.grid_size
        mask: Tensor | None = grid_mask(x, rows, cols, attn_mask, is_causal)
        x, rope = self._pos_embed(x)
        if self.drop_patches is not None:
            x, kept = self.drop_patches(x)
            if kept is not None:
                mask = kept_mask(kept, rows, cols)
                if rope is not None:  # [N, d] -> [B, 1, n, d]; mixed: [depth, heads, N, d] -> [depth, B, heads, n, d]
                    rope = apply_keep_indices_nlc(x, rope, kept)
                    rope = rope.transpose(0, 1) if self.rope_mixed else rope.unsqueeze(1)
        if not self.has_gaug:
            mask = None
        return self.norm_pre(x), rope, mask

    def run_blocks(
        self, x: Tensor, rope: Tensor | None, mask: Tensor | None, take: list[int], stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        outputs: list[Tensor] = []
        if torch.jit.is_scripting() or not stop_early:
            blocks = self.blocks
        else:
            blocks = self.blocks[: max(take) + 1]
        for index, block in enumerate(blocks):
            turn = rope[index] if self.rope_mixed and rope is not None else rope
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = recomputed(block, x, rope=turn, attn_mask=mask)
            else:
                x = block(x, rope=turn, attn_mask=mask)
            if index in take:
                outputs.append(x)
        return x, outputs


torch.fx.wrap("grid_mask")

EVA = Family(
    Eva,
    ("eva",),
    LocAtEva,
    PLAIN,
    blocks_of,
    patch_grid,
    any_size={"dynamic_img_size": True},
    where="among the patches of the image; predicted before queries are rotated",
)
