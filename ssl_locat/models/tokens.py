"""Named tokens of any backbone: what heads, objectives and protocols read.

    tokens = forward_tokens(backbone, images)     # last block, raw: dense probes read these
    tokens = refine(backbone, tokens)             # final norm, then PRR
    vector = class_token(backbone, tokens)        # what a head sees;  features(backbone, images) does all three

The grid of patches is derived from the images in every call, so that one model serves any mix of resolutions.
"""

from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, NamedTuple

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices, apply_keep_indices_nlc
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ssl_locat.errors import UserError
from ssl_locat.models.grid import Grid, kept_mask

SHORT_IN_16_BITS = 128  # tokens; at 197 unfused attention still wins by a little on a Xeon with AMX, at 257 it loses


class Tokens(NamedTuple):
    prefix: Tensor  # [B, R, D] class token(s) first, then registers; R = 0 where there are none
    patches: Tensor  # [B, N, D] row-major over the grid; of kept patches [B, n, D], in the order of their numbers
    grid: Grid


def forward_tokens(
    backbone: nn.Module,
    images: Tensor,
    *,
    masks: Tensor | None = None,
    mask_token: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tokens:
    """Tokens of the last block, raw: no norm, no PRR.

    images [B, 3, H, W]; masks [B, N] bool, True = the patch's embedding is replaced by mask_token [D] before positions are added; kept [B, n] int64,
    numbers of patches: the blocks see these alone, each with its position, and `patches` are [B, n, D] in that order.
    """
    return last_blocks(backbone, images, 1, masks=masks, mask_token=mask_token, kept=kept)[0]


def last_blocks(
    backbone: nn.Module,
    images: Tensor,
    n: int,
    *,
    masks: Tensor | None = None,
    mask_token: Tensor | None = None,
    kept: Tensor | None = None,
) -> list[Tokens]:
    """Raw tokens of the last n blocks (stages, for Swin), the last one at the end."""
    if isinstance(backbone, VisionTransformer | Eva):
        outputs, grid = run_blocks(backbone, images, n, masks=masks, mask_token=mask_token, kept=kept)
        prefix = backbone.num_prefix_tokens
        return [Tokens(x[:, :prefix], x[:, prefix:], grid) for x in outputs]
    if kept is not None:
        raise UserError(
            f"{type(backbone).__name__} cannot leave patches out (crops.keep_patches); that needs a ViT (VisionTransformer or Eva of timm)"
        )
    if masks is not None:
        raise UserError(
            f"{type(backbone).__name__} cannot mask patches; masked objectives need a ViT (VisionTransformer or Eva of timm)"
        )
    if not hasattr(backbone, "forward_intermediates"):
        raise UserError(
            f"{type(backbone).__name__} has no forward_intermediates, by which timm's models give tokens; choose a timm ViT or Swin"
        )
    give: dict[str, Any] = {"indices": n, "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
    if (
        getattr(backbone, "num_prefix_tokens", 0)
        and "return_prefix_tokens" in signature(backbone.forward_intermediates).parameters
    ):
        pairs = backbone.forward_intermediates(images, return_prefix_tokens=True, **give)
    else:
        # one [B, D, rows, cols] per stage
        pairs = [(m, m.new_empty(m.shape[0], 0, m.shape[1])) for m in backbone.forward_intermediates(images, **give)]
    return [Tokens(prefix, m.flatten(2).transpose(1, 2), Grid(*m.shape[2:])) for m, prefix in pairs]


def run_blocks(
    model: VisionTransformer | Eva,
    images: Tensor,
    n: int = 1,
    *,
    masks: Tensor | None = None,
    mask_token: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[list[Tensor], Grid]:
    """Outputs of the last n blocks [B, R + N, D], and the grid; honours timm's `set_grad_checkpointing`."""
    x, grid = embed_patches(model, images, masks=masks, mask_token=mask_token)
    last = range(len(model.blocks) - n, len(model.blocks))
    if hasattr(model, "place_patches"):  # a LocAt model, which tells its blocks where patches lie
        placed = model.place_patches(x)
        x, rope, mask = placed if kept is None else only_kept(model, placed, kept, grid)
        with unfused_if_short(model, x):
            _, outputs = model.run_blocks(x, rope, mask, list(last))
        return outputs, grid
    x, rope = model._pos_embed(x) if isinstance(model, Eva) else (model.patch_drop(model._pos_embed(x)), None)
    if kept is not None:
        x, rope, _ = only_kept(model, (x, rope, None), kept, grid)
    x = model.norm_pre(x)
    outputs = []
    with unfused_if_short(model, x):
        for index, block in enumerate(model.blocks):
            context = {} if rope is None else {"rope": rope[index] if model.rope_mixed else rope}
            x = recomputed(block, x, **context) if model.grad_checkpointing else block(x, **context)
            if index in last:
                outputs.append(x)
    return outputs, grid


def unfused_if_short(model: VisionTransformer | Eva, x: Tensor) -> AbstractContextManager[None]:
    """For blocks on tokens [B, T, D]: where a CPU trains in 16 bits on few tokens, PyTorch's unfused attention, which computes in float32. The backward
    pass of its fused kernel in bf16 takes 3 to 9 times as long there (docs/performance.md, "Intel Xeon")."""
    short = x.device.type == "cpu" and x.shape[1] <= SHORT_IN_16_BITS
    if not (short and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return nullcontext()
    if not torch.backends.cuda.math_sdp_enabled():  # the caller chose other kernels; that flag is CPUs', too
        return nullcontext()
    # what is computed again in the backward pass is so outside of this context, and must be the same there
    if model.grad_checkpointing or any(getattr(block.forward, "func", None) is checkpoint for block in model.blocks):
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def only_kept(
    model: VisionTransformer | Eva, placed: tuple[Tensor, Tensor | None, Tensor | None], kept: Tensor, grid: Grid
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(tokens [B, R + N, D] with positions, rotary embedding, the blocks' mask) of all patches -> of kept [B, n].

    Positions travel with the tokens: the rotary embedding is taken along, and the mask tells GAug where the kept ones lie.
    """
    x, rope, mask = placed
    drops = isinstance(getattr(model, "patch_drop", None), PatchDropout | PatchDropoutWithIndices)
    if drops or getattr(model, "drop_patches", None) is not None:
        raise UserError("crops.keep_patches and the backbone's patch_drop_rate both leave patches out; set one of the two")
    prefix = model.num_prefix_tokens
    x = torch.cat([x[:, :prefix], at_places(x[:, prefix:], kept)], dim=1)
    if rope is not None:  # [N, d] -> [B, 1, n, d]; mixed: [depth, heads, N, d] -> [depth, B, heads, n, d]
        rope = apply_keep_indices_nlc(x, rope, kept)
        rope = rope.transpose(0, 1) if model.rope_mixed else rope.unsqueeze(1)
    return x, rope, None if mask is None else kept_mask(kept, *grid)


def at_places(patches: Tensor, kept: Tensor) -> Tensor:
    """[B, N, D] at kept [B, n] -> [B, n, D]."""
    return patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))


def embed_patches(
    model: VisionTransformer | Eva, images: Tensor, *, masks: Tensor | None = None, mask_token: Tensor | None = None
) -> tuple[Tensor, Grid]:
    """Embeddings of the patches as `patch_embed` gives them, hidden ones replaced, without positions; and the grid."""
    x = model.patch_embed(images)
    grid = Grid(*x.shape[1:3]) if x.ndim == 4 else Grid(*model.patch_embed.grid_size)
    if masks is not None:
        # before positions: a hidden patch keeps its place, as in BEiT and iBOT
        assert mask_token is not None  # comes with masks
        x = torch.where(masks.view(*x.shape[:-1], 1), mask_token.to(x.dtype), x)
    return x, grid


def recomputed(block: nn.Module, x: Tensor, **context: Any) -> Tensor:
    """block(x), whose inside the backward pass recomputes."""
    return checkpoint(block, x, use_reentrant=False, **context) if torch.is_grad_enabled() else block(x, **context)


def input_grid(model: nn.Module, images: Tensor) -> Grid:
    """The patch grid that `model` will cut these images into."""
    if getattr(model, "dynamic_img_size", False):
        return Grid(*model.patch_embed.dynamic_feat_size(images.shape[-2:]))
    return Grid(*model.patch_embed.grid_size)


def refine(backbone: nn.Module, tokens: Tokens) -> Tokens:
    """Final norm, then PRR if it is attached; with average pooling timm's final norm comes after the pooling instead."""
    tokens = normalise(backbone, tokens)
    if getattr(backbone, "prr", None) is None:
        return tokens
    x, prefix = backbone.prr(torch.cat([tokens.prefix, tokens.patches], dim=1)), tokens.prefix.shape[1]
    return Tokens(x[:, :prefix], x[:, prefix:], tokens.grid)


def normalise(backbone: nn.Module, tokens: Tokens) -> Tokens:
    """Final norm alone: what patch losses of models without PRR read."""
    norm = getattr(backbone, "norm", None)
    if norm is None:  # GCViT's, among others, lies in its last stage
        return tokens
    x, prefix = norm(torch.cat([tokens.prefix, tokens.patches], dim=1)), tokens.prefix.shape[1]
    return Tokens(x[:, :prefix], x[:, prefix:], tokens.grid)


def class_token(backbone: nn.Module, tokens: Tokens) -> Tensor:
    """What a head sees of refined tokens, [B, D]: the class token, all of Jumbo's side by side, or the mean of the patches.

    The mean is taken where the model has no class token or pools by average (`global_pool="avg"`), and normalised if timm does so; a model
    with `global_pool="map"` pools by its attention.
    """
    if getattr(backbone, "attn_pool", None) is not None:
        whole = getattr(backbone, "pool_include_prefix", True)
        return backbone.fc_norm(
            backbone.attn_pool(torch.cat([tokens.prefix, tokens.patches], dim=1) if whole else tokens.patches)
        )
    if tokens.prefix.shape[1] == 0 or backbone.global_pool == "avg":
        mean = tokens.patches.mean(dim=1)
        return backbone.fc_norm(mean) if hasattr(backbone, "fc_norm") else mean
    return tokens.prefix.flatten(1) if hasattr(backbone, "jumbo_mlp") else tokens.prefix[:, 0]


def patch_width(backbone: nn.Module) -> int:
    """Width of a patch token of the last block; the class token's, `num_features`, may be a multiple of it (Jumbo)."""
    return backbone.embed_dim if hasattr(backbone, "jumbo_mlp") else backbone.num_features


def features(backbone: nn.Module, images: Tensor) -> Tensor:
    """What a head sees of images [B, 3, H, W], [B, D]: norm and PRR included, which timm's `forward_features` has no PRR for."""
    if not isinstance(backbone, VisionTransformer | Eva | SwinTransformer) and hasattr(backbone, "forward_head"):
        # others make their class token behind the blocks (CaiT, VOLO), or normalise what is pooled (Hiera)
        return backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    return class_token(backbone, refine(backbone, forward_tokens(backbone, images)))
