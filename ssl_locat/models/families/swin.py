"""Swin, v1 and both v2: attention within windows, shifted in every second block. Each window is a grid of its own; the relative position
bias stays, and GAug's is added to it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr, WindowMultiHeadAttention
from torch import Tensor

from ssl_locat.models.attention import dense_bias_attention
from ssl_locat.models.families.front import Family, GaugFront, LocAtMap, LocAtModel, project, stages_of, windows


class GaugWindowAttention(GaugFront):
    """In front of timm's Swin attention: each window is a grid, padding positions take part."""

    project = project

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [windows * B, N, D], mask [windows, N, N] or None -> [windows * B, N, D]."""
        if torch.jit.is_scripting():
            return self.attend(x, mask)
        elif isinstance(x, torch.fx.Proxy):
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {"mask": mask})
        else:
            return self.attend(x, mask)

    def relative_bias(self) -> Tensor:
        return self._get_rel_pos_bias()

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.project(x)
        # each window is a grid of its own: no prefix tokens, distances within it
        coefficients = self.gaug(q, self.window_size, k=k, x=x)
        # Swin's own bias [1, heads, N, N] stays, and GAug's is added to it
        extra = self.relative_bias()
        if mask is not None:
            extra = (extra + mask[:, None]).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)  # windows of one image are neighbours
        dropout_p = self.attn_drop.p if self.training else 0.0
        if torch.jit.is_scripting():
            out = dense_bias_attention(q, k, v, self.gaug.bias(coefficients, self.window_size) + extra, 0, dropout_p=dropout_p)
        else:
            out = self.gaug.attend(q, k, v, coefficients, self.window_size, 0, dropout_p=dropout_p, extra_bias=extra)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


def cosines(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of an attention by cosines: q k^T / sqrt(d) are its logits, and queries have the length sqrt(d) on which they are compared."""
    q, k, v = project(self, x)
    # never more than 100, as timm's
    scale = self.logit_scale.reshape(-1, 1, 1).clamp(max=math.log(100.0)).exp()
    return F.normalize(q, dim=-1) * q.shape[-1] ** 0.5, F.normalize(k, dim=-1) * scale, v


class GaugWindowAttentionV2(GaugWindowAttention):
    project = cosines

    def relative_bias(self) -> Tensor:
        """The continuous bias of Swin v2 (arXiv:2111.09883, section 3.3), [1, heads, N, N]."""
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        bias = table[self.relative_position_index.flatten()].unflatten(0, self.relative_position_index.shape)
        return 16 * torch.sigmoid(bias.permute(2, 0, 1)[None])


class GaugWindowAttentionCr(GaugWindowAttention):
    project = cosines

    def relative_bias(self) -> Tensor:
        return self._relative_positional_encodings()


def layers_of(model: Any) -> dict[str, Any]:
    return {f"layers.{i}.blocks": stage.blocks for i, stage in enumerate(model.layers)}


SWIN = Family(
    SwinTransformer,
    ("swin_transformer",),
    LocAtModel,
    {WindowAttention: GaugWindowAttention},
    layers_of,
    windows,
    any_size={"strict_img_size": False},
    where="within each window, shifted or not, added to the relative position bias",
)
SWIN_V2 = Family(
    SwinTransformerV2,
    ("swin_transformer_v2",),
    LocAtModel,
    {WindowAttentionV2: GaugWindowAttentionV2},
    layers_of,
    windows,
    any_size={"strict_img_size": False},
    where="within each window, shifted or not, added to the relative position bias",
)
SWIN_V2_CR = Family(
    SwinTransformerV2Cr,
    ("swin_transformer_v2_cr",),
    LocAtMap,
    {WindowMultiHeadAttention: GaugWindowAttentionCr},
    stages_of,
    windows,
    any_size={"strict_img_size": False},
    where="within each window, shifted or not, added to the relative position bias",
)
