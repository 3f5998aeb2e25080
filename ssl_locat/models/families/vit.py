"""ViTs whose attentions see all patches: VisionTransformer, DeiT, registers, hybrids; and what Eva (eva.py) shares with them: the model tells
its blocks where patches lie (plain.py says why so)."""

from typing import Any

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_locat.models.families.differential import DIFFERENTIAL
from ssl_locat.models.families.front import Family, LocAtModel, blocks_of, patch_grid
from ssl_locat.models.families.plain import PLAIN
from ssl_locat.models.grid import Grid, grid_mask, kept_mask
from ssl_locat.models.positions import resize_table
from ssl_locat.models.tokens import recomputed


class LocAtViT(LocAtModel):
    """LocAtModel for models whose blocks see all patches: tells them where those lie."""

    pos_resize = "timm"

    def place_gaugs(self, stages: list[list[Any]]) -> None:
        model: Any = self
        seen: dict[int, Any] = {}  # see `remember`
        for attention in (each for stage in stages for each in stage):
            attention.num_prefix_tokens, attention.seen_grids = self.num_prefix_tokens, seen
        model.seen_grids = seen
        drop = model.patch_drop
        if isinstance(drop, PatchDropout | PatchDropoutWithIndices):
            # drops patches in place of timm's own, which drops where they lay
            model.drop_patches = PatchDropoutWithIndices(drop.prob, drop.num_prefix_tokens, drop.ordered)
            model.patch_drop = self.no_patch_drop()

    def refined_width(self) -> int:
        return self.embed_dim  # of Jumbo the features are wider than its tokens

    def no_patch_drop(self) -> nn.Module | None:
        return nn.Identity()

    def place_patches(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Patches as `patch_embed` gives them -> what the first block reads [B, R + N, D], rotary embedding (None here), the blocks' mask.

        Patch dropout, in training, leaves n patches instead of N, and the mask says which."""
        rows, cols = (x.shape[1], x.shape[2]) if self.dynamic_img_size else self.patch_embed.grid_size
        mask: Tensor | None = grid_mask(x, rows, cols, attn_mask, is_causal)
        x = self.patch_drop(self._pos_embed(x))
        if self.drop_patches is not None:
            x, kept = self.drop_patches(x)
            if kept is not None:
                mask = kept_mask(kept, rows, cols)
        if not self.has_gaug:
            mask = None
        return self.norm_pre(x), None, mask

    def run_blocks(
        self, x: Tensor, rope: Tensor | None, mask: Tensor | None, take: list[int], stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The last block's output, and those of the blocks `take` (stop_early: the last one of these is the last to run)."""
        outputs: list[Tensor] = []
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice blocks
            blocks = self.blocks
        else:
            blocks = self.blocks[: max(take) + 1]
        for index, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = recomputed(block, x, attn_mask=mask)
            else:
                x = block(x, attn_mask=mask)
            if index in take:
                outputs.append(x)
        return x, outputs

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x, rope, mask = self.place_patches(self.patch_embed(x), attn_mask, is_causal)
        # -1: no block has this number, so that no output is kept
        x, _ = self.run_blocks(x, rope, mask, [-1])
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:  # or other things that TorchScript need not know
        """As timm's, whose own recomputes nothing where there is a mask, and loses where patches lie if it drops some."""
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        take, _ = feature_take_indices(len(self.blocks), indices)
        rows, cols = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x, rope, mask = self.place_patches(self.patch_embed(x), attn_mask, is_causal)
        x, outputs = self.run_blocks(x, rope, mask, take, stop_early)
        prefix = self.num_prefix_tokens
        if norm:
            outputs = [self.norm(y) for y in outputs]
        prefixes = [y[:, :prefix] for y in outputs]
        maps = [y[:, prefix:] for y in outputs]
        if output_fmt == "NCHW":
            # [B, N, D] -> [B, D, rows, cols]
            maps = [y.reshape(y.shape[0], rows, cols, -1).permute(0, 3, 1, 2).contiguous() for y in maps]
        if torch.jit.is_scripting():
            if intermediates_only:
                return maps
            return self.norm(x), maps
        else:
            if output_dict:
                found: Any = {"image_intermediates": maps}
                if prefix and return_prefix_tokens:
                    found["image_intermediates_prefix"] = prefixes
                if not intermediates_only:
                    found["image_features"] = self.norm(x)
                return found
            if prefix and return_prefix_tokens:
                pairs: Any = list(zip(maps, prefixes, strict=True))
                return pairs if intermediates_only else (self.norm(x), pairs)
            return maps if intermediates_only else (self.norm(x), maps)

    def remember(self, x: Tensor) -> None:
        """Note the grid of these patches, for blocks that are called by themselves (`for block in model.blocks`, timm's checkpoint_seq).

        {number of patches: grid}, () where images of two grids had that many: then such a call is refused rather than guessed."""
        if not self.has_gaug or isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        grid = Grid(*x.shape[1:3]) if x.ndim == 4 else Grid(*self.patch_embed.grid_size)
        # 16 patches are 4 x 4 or 2 x 8: two grids of one count cannot be told apart later
        if self.seen_grids.setdefault(grid.rows * grid.cols, grid) != grid:
            self.seen_grids[grid.rows * grid.cols] = ()

    def _pos_embed(self, x: Tensor):
        if torch.jit.is_scripting():
            assert self.pos_resize == "timm" or x.dim() == 3 or x.shape[1:3] == self.patch_embed.grid_size, (
                "TorchScript resizes positional embeddings in timm's way alone: give the model's own image size, or use torch.export"
            )
            return self.timm_pos_embed(x)
        else:
            self.remember(x)
            if self.pos_resize == "timm" or x.ndim == 3:
                return self.timm_pos_embed(x)
            return self.add_resized_positions(x)

    def add_resized_positions(self, x: Tensor) -> Tensor:
        """Patches [B, rows, cols, D] -> all tokens with positions in the way of `pos_resize`."""
        skip = 0 if self.no_embed_class else self.num_prefix_tokens
        positions = resize_table(self.pos_embed, skip, self.patch_embed.grid_size, (x.shape[1], x.shape[2]), self.pos_resize)
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = x.flatten(1, 2)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*prefix, x + positions], dim=1))
        return self.pos_drop(torch.cat([*prefix, x], dim=1) + positions)


torch.fx.wrap("grid_mask")
torch.fx.wrap("resize_table")

VIT = Family(
    VisionTransformer,
    ("vision_transformer", "vision_transformer_hybrid", "deit"),
    LocAtViT,
    PLAIN | DIFFERENTIAL,
    blocks_of,
    patch_grid,
    any_size={"dynamic_img_size": True},
)
