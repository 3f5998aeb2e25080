"""Crops of several sizes through a ViT in one pass: their tokens laid end to end, as DINOv2 does (arXiv:2304.07193, section 5, "sequence packing").

    if reason := cannot_pack(backbone): ...
    allow_packing(backbone)                                                  # in place; other passes stay what they are
    globals_, locals_ = packed_tokens(backbone, [global_crops, local_crops])       # Tokens of each, as `forward_tokens` gives them

What is done to each token alone (norms, projections, MLPs, layer scale) runs once over all of them; attention stays within each sequence, with
LocAt's Gaussian on each sequence's own grid. Positions are each size's own. Stochastic depth draws the numbers that separate passes
would draw, in their order: a packed step differs from an unpacked one by rounding alone.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from timm.layers import Attention, DropPath, PatchDropout, PatchDropoutWithIndices
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ssl_locat.models.attention import unsupported_reason
from ssl_locat.models.attention_packed import Run, as_autocast, packed_attention, sequence_of_token
from ssl_locat.models.families.front import Front, project
from ssl_locat.models.families.plain import GaugAttention
from ssl_locat.models.grid import Grid
from ssl_locat.models.tokens import Tokens, embed_patches, only_kept, recomputed


class Packing(NamedTuple):
    """How tokens are packed; handed to each block in the place of an attention mask."""

    runs: tuple[Run, ...]
    grids: tuple[Grid, ...]  # of each run
    num_prefix_tokens: int
    sequence: Tensor  # [S] int64, the number of each token's sequence
    kept: tuple[Tensor | None, Tensor | None] = (
        None,
        None,
    )  # this block's factors of stochastic depth [sequences], of both branches
    patches: tuple[Tensor | None, ...] = ()  # of each run the numbers [B, n] of the patches that are there; None: all of the grid


def cannot_pack(model: nn.Module) -> str | None:
    """Why the model cannot pack crops, in words that follow its name; None if it can."""
    if not isinstance(model, VisionTransformer):
        return "is no VisionTransformer of timm"
    for index, block in enumerate(model.blocks):
        kind = type(block)
        if not isinstance(block, Block) or not (kind.forward is Block.forward or isinstance(block, PackedBlock)):
            return f"has a {kind.__name__} as blocks.{index}, whose inside is not known here"
        attention = block.attn
        plain = isinstance(attention, Attention) and type(attention).forward in (Attention.forward, GaugAttention.forward)
        if not plain:
            return f"has a {type(attention).__name__} in blocks.{index}, whose inside is not known here"
    drops = [part for part in model.modules() if isinstance(part, nn.Dropout) and part.p > 0]
    if (
        drops
        or isinstance(model.patch_drop, PatchDropout | PatchDropoutWithIndices)
        or getattr(model, "drop_patches", None) is not None
    ):
        return "drops values or patches at random, which would be other ones in a packed pass"
    return None


def allow_packing(model: Any) -> Any:
    """Let the blocks of `model` take a `Packing`; parameters, names, hooks and every other call stay what they are."""
    assert not cannot_pack(model), cannot_pack(model)
    for block in model.blocks:
        kind: Any = type(block)
        block.__class__ = packed_class(kind)
    return model


def packed_tokens(
    model: Any,
    crops: Sequence[Tensor],
    *,
    masks: Tensor | None = None,
    mask_token: Tensor | None = None,
    kept: Tensor | None = None,
) -> list[Tokens]:
    """Raw tokens of the last block for each of `crops` [B_i, 3, H_i, W_i], in one pass; masks [B_0, N] and kept [B_0, n] are of the first."""
    embedded = [
        embed_patches(model, images, masks=masks if number == 0 else None, mask_token=mask_token)
        for number, images in enumerate(crops)
    ]
    grids = tuple(grid for _, grid in embedded)
    chosen = tuple(kept if number == 0 else None for number in range(len(crops)))
    tokens = [  # [B_i, T_i, D]
        _with_positions(model, patches, grid, places) for (patches, grid), places in zip(embedded, chosen, strict=True)
    ]
    runs = tuple(Run(*x.shape[:2]) for x in tokens)
    x = torch.cat([x.flatten(0, 1) for x in tokens])[None]  # [1, S, D]
    packing = Packing(runs, grids, model.num_prefix_tokens, sequence_of_token(runs, x.device), patches=chosen)
    for block, factors in zip(model.blocks, _stochastic_depth(model.blocks, runs, x), strict=True):
        where = packing._replace(kept=factors)
        x = recomputed(block, x, attn_mask=where) if model.grad_checkpointing else block(x, attn_mask=where)
    prefix = model.num_prefix_tokens
    parts = [part.unflatten(0, run) for part, run in zip(x[0].split([r.batch * r.tokens for r in runs]), runs, strict=True)]
    return [Tokens(part[:, :prefix], part[:, prefix:], grid) for part, grid in zip(parts, grids, strict=True)]


def _with_positions(model: Any, patches: Tensor, grid: Grid, kept: Tensor | None) -> Tensor:
    if hasattr(model, "place_patches"):  # a LocAt model
        x = model.place_patches(patches)[0]
    else:
        x = model.norm_pre(model.patch_drop(model._pos_embed(patches)))
    return x if kept is None else only_kept(model, (x, None, None), kept, grid)[0]


def _stochastic_depth(blocks: Any, runs: Sequence[Run], like: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
    """For each block the factors [sequences] of its two branches, 0 or 1 / keep_prob; None where nothing is left out.

    Drawn run by run, block by block: what a pass for each size would draw."""
    drops = [drop for block in blocks for drop in (block.drop_path1, block.drop_path2)]
    drawn: list[list[Tensor]] = [[] for _ in drops]
    for run in runs:
        for drop, found in zip(drops, drawn, strict=True):
            if isinstance(drop, DropPath) and drop.drop_prob and drop.training:
                keep = 1 - drop.drop_prob
                factor = like.new_empty(run.batch, 1, 1).bernoulli_(keep).flatten()
                found.append(factor.div_(keep) if keep > 0 and drop.scale_by_keep else factor)
    whole = [torch.cat(found) if found else None for found in drawn]
    return list(zip(whole[::2], whole[1::2], strict=True))


class PackedBlock(Front):
    """In front of timm's Block: the same, for tokens of several sequences side by side."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        """x [1, S, D] where `attn_mask` is a Packing; else as timm has it."""
        if not isinstance(attn_mask, Packing):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        first, second = attn_mask.kept
        x = x + _scaled(self.ls1(attend(self.attn, self.norm1(x), attn_mask)), first, attn_mask.sequence)
        return x + _scaled(self.ls2(self.mlp(self.norm2(x))), second, attn_mask.sequence)


@cache
def packed_class(kind: Any) -> Any:
    """The class of a block that packs; one for each class."""
    if issubclass(kind, PackedBlock):
        return kind
    return type(kind.__name__, (PackedBlock, kind), {"__module__": __name__, "__doc__": f"{kind.__name__}, packing."})


def _scaled(x: Tensor, factor: Tensor | None, sequence: Tensor) -> Tensor:
    return x if factor is None else x * factor[sequence][None, :, None]


def attend(attention: Any, x: Tensor, packing: Packing) -> Tensor:
    """A timm Attention, or its LocAt twin, on packed tokens [1, S, D]."""
    q, k, v = (t[0].transpose(0, 1) for t in project(attention, x))  # [S, heads, d]
    if hasattr(attention, "gaug"):
        out = _gaussian(attention, q, k, v, x[0], packing)
    else:
        out = packed_attention(q, k, v, packing.runs)
    out = attention.norm(out.flatten(1)[None])
    if attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out))


def _gaussian(attention: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor, packing: Packing) -> Tensor:
    """[S, heads, d], the Gaussian on each run's own grid: one launch on CUDA; elsewhere the blocks of the block-diagonal mask, one by one."""
    prefix, gaug = packing.num_prefix_tokens, attention.gaug
    sizes = [run.batch * run.tokens for run in packing.runs]
    runs: list[Any] = [  # q, k, v [B, heads, T, d], x [B, T, D] of each
        (*(t.unflatten(0, run).transpose(1, 2) for t in qkv), given.unflatten(0, run))
        for *qkv, given, run in zip(*(t.split(sizes) for t in (q, k, v, x)), packing.runs, strict=True)
    ]
    coefficients = [
        gaug(q_run[:, :, prefix:], grid, k=k_run[:, :, prefix:], x=given[:, prefix:], kept=kept)
        for (q_run, k_run, _, given), grid, kept in zip(runs, packing.grids, packing.patches, strict=True)
    ]
    # the packed kernel reads places off the grid: with kept patches each run is a call of its own, which knows them
    if gaug.kernel == "gaussian" and all(kept is None for kept in packing.patches):
        q, k, v = as_autocast(q, k, v)
        if not unsupported_reason("triton", q, plain=True):
            from ssl_locat.models.attention_triton_packed import (
                packed_triton_attention,  # imports triton, which not every machine has
            )

            return packed_triton_attention(q, k, v, coefficients, packing.runs, packing.grids, prefix)
    outs = [
        gaug.attend(q_run, k_run, v_run, coeff, grid, prefix).transpose(1, 2).flatten(0, 1)
        for (q_run, k_run, v_run, _), coeff, grid in zip(runs, coefficients, packing.grids, strict=True)
    ]
    return torch.cat(outs)
