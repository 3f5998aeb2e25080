"""Attention weights of a ViT, for figures: recomputed from what each attention was given, since the fused kernels never form them."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from ssl_locat.errors import UserError
from ssl_locat.models.families.front import project
from ssl_locat.models.families.plain import rotate
from ssl_locat.models.grid import read_mask
from ssl_locat.models.tokens import run_blocks


@torch.no_grad()
def attention_maps(backbone: nn.Module, images: Tensor, layers: list[int]) -> list[Tensor]:
    """Weights [B, heads, R + N, R + N] of the blocks `layers` (negative: from the end), GAug's bias included; rows are queries."""
    blocks = getattr(backbone, "blocks", ())
    known = [isinstance(getattr(block, "attn", None), Attention | AttentionRope | EvaAttention) for block in blocks]
    if not known or not all(known):
        raise UserError(
            f"attention over the whole image needs a ViT of timm's VisionTransformer or Eva, not {type(backbone).__name__}"
        )
    outside = [layer for layer in layers if not -len(blocks) <= layer < len(blocks)]
    if outside:
        raise UserError(f"layer {outside[0]} is asked for, but the backbone has {len(blocks)} blocks")
    found: dict[int, Tensor] = {}
    handles = []
    for layer in layers:
        attention, number = blocks[layer].attn, layer % len(blocks)

        def keep(module: nn.Module, inputs: tuple, options: dict[str, Any], number: int = number) -> None:
            found[number] = weights(module, inputs[0], backbone.num_prefix_tokens, **options)

        # on what goes in: fused attention keeps no weights that a hook could see come out
        handles.append(attention.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        whole: Any = backbone  # it has blocks with a known attention, hence is a ViT or an Eva
        run_blocks(whole, images)
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer % len(blocks)] for layer in layers]


def weights(
    attention: nn.Module,
    x: Tensor,
    prefix: int,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """softmax of one attention's logits for its input x [B, R + N, D]."""
    q, k, _ = project(attention, x)
    bias: Tensor | float = 0.0
    if hasattr(attention, "gaug"):
        assert attn_mask is not None  # the model says where patches lie
        rows, cols, kept = read_mask(attn_mask)
        coefficients = attention.gaug(q[:, :, prefix:], (rows, cols), k=k[:, :, prefix:], x=x[:, prefix:], kept=kept)
        # [B, heads, N, N] -> [B, heads, R + N, R + N]: prefix tokens have no bias
        bias = F.pad(attention.gaug.bias(coefficients, (rows, cols)), (prefix, 0, prefix, 0))
    q, k = rotate(attention, q, rope), rotate(attention, k, rope)
    # [B, heads, R + N, R + N]
    return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
