"""Two more kinds of timm's ViT blocks: attention beside the MLP in one projection (ViT-22B), and differential attention, of two softmaxes."""

import torch
from timm.layers import DiffAttention
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from torch import Tensor

from ssl_locat.models.attention import dense_bias_attention
from ssl_locat.models.families.plain import GaugAttention
from ssl_locat.models.grid import read_mask


class GaugDiffAttention(GaugAttention):
    """Both softmaxes have queries of their own, hence bumps of their own: 2 * heads of them."""

    def gaug_shape(self) -> tuple[int, int, int]:
        return self.head_dim, self.qkv.in_features, 2 * self.num_heads

    def attend(self, x: Tensor, rope: Tensor | None, attn_mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        out = self.difference(q, k, v, x, attn_mask)
        return self.proj_drop(self.proj(self.norm(out)))

    def difference(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, attn_mask: Tensor) -> Tensor:
        """The first softmax's values minus lambda times the second's: q, k, v [B, R + N, D] -> the same shape."""
        q, k = (
            norm(t.unflatten(-1, (2 * self.num_heads, -1)).transpose(1, 2)) for t, norm in ((q, self.q_norm), (k, self.k_norm))
        )
        v = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).repeat_interleave(2, 1)  # both halves of a head have its values
        prefix = self.num_prefix_tokens
        rows, cols, kept = read_mask(attn_mask)
        coefficients = self.gaug(q[:, :, prefix:], (rows, cols), k=k[:, :, prefix:], x=x[:, prefix:], kept=kept)
        bias = self.gaug.bias(coefficients, (rows, cols))
        out = dense_bias_attention(q, k, v, bias, prefix, self.attn_drop_p if self.training else 0.0)
        first, second = out.unflatten(1, (self.num_heads, 2)).unbind(2)
        out = self.sub_norm(first - self._compute_lambda().type_as(q) * second) * (1 - self.lambda_init)
        return out.transpose(1, 2).flatten(2)


class GaugParallelBlock(GaugAttention):
    """A whole block: its attention is no module of its own."""

    def gaug_shape(self) -> tuple[int, int, int]:
        return self.head_dim, self.in_proj.in_features, self.num_heads

    def attend(self, x: Tensor, rope: Tensor | None, attn_mask: Tensor) -> Tensor:
        normed = self.in_norm(x)
        hidden, q, k, v = self.in_proj(normed).split(self.in_split, dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        hidden = self.mlp_drop(self.mlp_act(hidden))
        attended = self.look_around(q, k, v, normed, attn_mask)
        if self.out_proj is not None:
            out = self.out_proj(torch.cat([attended, hidden], dim=-1))
        else:
            out = self.attn_out_proj(attended) + self.mlp_out_proj(hidden)
        return x + self.drop_path(self.ls(out))

    def look_around(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, attn_mask: Tensor) -> Tensor:
        prefix = self.num_prefix_tokens
        rows, cols, kept = read_mask(attn_mask)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        coefficients = self.gaug(q[:, :, prefix:], (rows, cols), k=k[:, :, prefix:], x=x[:, prefix:], kept=kept)
        out = self.gaug.attend(q, k, v, coefficients, (rows, cols), prefix, dropout_p=self.dropout_p())
        return out.transpose(1, 2).flatten(2)


class GaugDiffParallelBlock(GaugParallelBlock):
    look_around = GaugDiffAttention.difference

    def gaug_shape(self) -> tuple[int, int, int]:
        return self.head_dim, self.in_proj.in_features, 2 * self.num_heads


DIFFERENTIAL = {
    DiffAttention: GaugDiffAttention,
    ParallelScalingBlock: GaugParallelBlock,
    DiffParallelScalingBlock: GaugDiffParallelBlock,
}
