"""Attention over all patches of an image, as timm's ViTs have it: GAug's bias is predicted from queries before they are rotated.

Where the patches lie reaches the attentions as an argument of the very forward that they belong to (timm hands `attn_mask` down
to them; grid.py has what a LocAt model passes there), so that several resolutions may alternate within a step, under torch.compile,
activation checkpointing, deepcopy and FSDP alike.

TorchScript reads the bodies of these methods, hence its own branches (`torch.jit.is_scripting()`, always as if/else: what follows a return is
compiled, too), explicit loops, and `timm_...` names instead of super(). FX sees one node for each attention. Both take plain attention.
"""

from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor

from ssl_locat.errors import UserError
from ssl_locat.models.attention import dense_bias_attention
from ssl_locat.models.families.front import GaugFront, project
from ssl_locat.models.grid import Grid, grid_mask, read_mask


def rotate(self, x: Tensor, rope: Tensor | None) -> Tensor:
    """Rotary embedding of the patches of x [B, heads, R + N, d]; its dtype stays."""
    if rope is None:
        return x
    prefix = self.num_prefix_tokens
    half = self.rotate_half if hasattr(self, "rotate_half") else False
    # prefix tokens lie nowhere in the image, hence no rotation of them
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
    return torch.cat([x[:, :, :prefix], rotated.to(x.dtype)], dim=2)


class GaugAttention(GaugFront):
    """In front of a timm attention class: the same projections, gate, norms and dropouts around attention with GAug's bias."""

    project, rotate = project, rotate

    def gaug_shape(self) -> tuple[int, int, int]:
        # EVA may have three projections instead of one; it then knows its head_dim
        head_dim = self.qkv.out_features // 3 // self.num_heads if self.qkv is not None else self.head_dim
        return head_dim, self.proj.out_features, self.num_heads

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, R + N, D] -> [B, R + N, D]; attn_mask says where these patches lie (grid.py) and is given by the model.

        A block that is called by itself gets none: its patches then lie as those of the last image that gave that many."""
        if torch.jit.is_scripting():
            assert attn_mask is not None, "a scripted attention with GAug needs the patch grid: call the whole model"
            return self.attend(x, rope, attn_mask)
        elif isinstance(x, torch.fx.Proxy):  # one node, whichever tracer this is
            options = {"rope": rope, "attn_mask": attn_mask, "is_causal": is_causal}
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), options)
        else:
            if is_causal:
                raise UserError("an attention with GAug is not causal: GAug adds its own bias between all patches")
            where: Any = attn_mask
            if where is None:
                where = self.remembered_grid(x.shape[1] - self.num_prefix_tokens)
            if isinstance(where, tuple):
                where = grid_mask(x, *where)
            return self.attend(x, rope, where)

    def attend(self, x: Tensor, rope: Tensor | None, attn_mask: Tensor) -> Tensor:
        prefix = self.num_prefix_tokens
        rows, cols, kept = read_mask(attn_mask)
        q, k, v = self.project(x)
        # of queries before rotation: rotated ones would also tell where their patch lies
        coefficients = self.gaug(q[:, :, prefix:], (rows, cols), k=k[:, :, prefix:], x=x[:, prefix:], kept=kept)
        q, k = self.rotate(q, rope), self.rotate(k, rope)
        dropout_p = self.attn_drop.p if self.training else 0.0
        if torch.jit.is_scripting():
            out = dense_bias_attention(q, k, v, self.gaug.bias(coefficients, (rows, cols)), prefix, dropout_p=dropout_p)
        else:
            out = self.gaug.attend(q, k, v, coefficients, (rows, cols), prefix, dropout_p=dropout_p)
        out = self.norm(out.transpose(1, 2).flatten(2))  # [B, heads, T, d] -> [B, T, D]; an Identity in most models
        if hasattr(self, "gate") and self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def remembered_grid(self, num_patches: int) -> Grid:
        """Where the patches of a block called by itself lie; raises UserError if that cannot be known."""
        grid = self.seen_grids.get(num_patches)
        if grid is None and self.gaug.initial_grid[0] * self.gaug.initial_grid[1] == num_patches:
            grid = Grid(*self.gaug.initial_grid)
        if not grid:
            why = "images of two grids had that many" if grid == () else "no image gave that many"
            raise UserError(
                f"an attention with GAug was called by itself with {num_patches} patches, and where they lie cannot be known: {why}. "
                "Call the whole model, or pass attn_mask=Grid(rows, cols) of ssl_locat.models.grid"
            )
        return grid


PLAIN: dict[Any, type] = {Attention: GaugAttention, AttentionRope: GaugAttention, EvaAttention: GaugAttention}
