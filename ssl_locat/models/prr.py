"""PRR: refines all tokens by one attention without parameters before they are pooled (LocAtViT, arXiv:2603.04892, eq. 11).

timm has a pooling of the same name (`timm.layers.AttentionPoolPrr`, `global_pool="prr"`). It is not used here because it returns only what
is pooled, while patch tokens after PRR are needed too (patch losses, features); the class token of both is the same, and a test says so.

What the paper compares it with: the class token as it is (no PRR), the mean of the patches (`global_pool="avg"`), and class attention, here below.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.cait import ClassAttn
from torch import Tensor, nn


def prr(x: Tensor, num_heads: int, there: Tensor | None = None) -> Tensor:
    """softmax(x x^T / sqrt(d)) x in each head, over all tokens; x [B, N, D] or a map [B, H, W, D]; the same shape comes back.

    there: [B, N] bool where some tokens are padding, which nobody reads."""
    tokens = x.flatten(1, -2).unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, heads, N, d]
    # keys and values are the tokens themselves: [B, heads, N, d]
    mask = None if there is None else there[:, None, None]
    refined = F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=mask)
    return refined.transpose(1, 2).reshape(x.shape)


class PRR(nn.Module):
    """`prr` as a module, so that a model shows it; without norms nothing to learn, nothing in the state dict.

    Args:
        num_heads: as in the attention of the last block.
        dim: width of the tokens; needed by the norms alone.
        pre_norm, post_norm: a LayerNorm of the tokens before and after (the release has them, but no published model uses them).
    """

    def __init__(self, num_heads: int, dim: int | None = None, *, pre_norm: bool = False, post_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.pre_norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()
        self.post_norm = nn.LayerNorm(dim) if post_norm else nn.Identity()

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """x [B, N, D] or [B, H, W, D] -> the same shape; there [B, N]: False for padding."""
        return self.post_norm(prr(self.pre_norm(x), self.num_heads, there))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class ClassAttention(nn.Module):
    """Class-attention pooling in PRR's place: the class token adds what it gathers from all tokens by one attention of its own, with
    parameters (CaiT, arXiv:2103.17239, section 2.2; here one such layer without the MLP). Registers and patches pass as they are.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attn = ClassAttn(dim, num_heads, qkv_bias=True)
        for layer in (self.attn.q, self.attn.k, self.attn.v, self.attn.proj):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, R + N, D] -> the same shape."""
        return torch.cat([x[:, :1] + self.attn(x), x[:, 1:]], dim=1)  # ClassAttn gives the class token's row alone, [B, 1, D]
