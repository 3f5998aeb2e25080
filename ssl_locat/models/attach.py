"""`attach_locat` turns a timm model into its LocAt twin, in place: GAug in every attention, PRR before the head.

The model keeps its timm class as base, its parameter names and its protocol; only `gaug.log_var` and `gaug.log_alpha` appear under each
attention. Where the patches lie reaches the attentions as an argument of the very forward that they belong to (timm hands `attn_mask` down
to them; grid.py has what a LocAt model passes there), so that several resolutions may alternate within a step, under torch.compile,
activation checkpointing, deepcopy and FSDP alike.

TorchScript reads the bodies of these methods, hence its own branches (`torch.jit.is_scripting()`, always as if/else: what follows a return is
compiled, too), explicit loops, and `timm_...` names instead of super(). FX sees one node for each attention. Both take plain attention.
"""

import inspect
from collections.abc import Sequence
from functools import cache, update_wrapper
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    Attention,
    AttentionRope,
    PatchDropout,
    PatchDropoutWithIndices,
    apply_keep_indices_nlc,
    apply_rot_embed_cat,
)
from timm.models._features import feature_take_indices
from timm.models.eva import Eva, EvaAttention
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_locat.errors import UserError, did_you_mean
from ssl_locat.models.attention import dense_bias_attention
from ssl_locat.models.gaug import GAug
from ssl_locat.models.grid import Grid, grid_mask, kept_mask, read_mask
from ssl_locat.models.positions import POS_RESIZE, resize_table
from ssl_locat.models.prr import PRR, ClassAttention
from ssl_locat.models.tokens import recomputed

POOLINGS = ("prr", "class_attention")
Front: Any = object  # base of what stands in front of a timm class, whose attributes it reads
GAUG_OPTIONS = tuple(p.name for p in inspect.signature(GAug).parameters.values() if p.kind is p.KEYWORD_ONLY)


def attach_locat(model: nn.Module, gaug: bool | dict = True, prr: bool | dict = True, pos_resize: str = "timm") -> nn.Module:
    """Attach GAug and PRR (each alone, or both) to a timm VisionTransformer, Eva or SwinTransformer; returns the same object.

    Args:
        gaug: False, True, or options of `GAug` (`isotropic`, `alpha`, `kernel`, `small_start`, ...) and `initial_grid`: (rows, cols) that
            the weights are trained at, by default the model's own. Of a Swin it is the window, which is smaller in stages whose map is;
            there a list of one grid per stage is understood, too.
        prr: False, True, or {"num_heads": h}; by default as many heads as the last block's attention. "pre_norm" and "post_norm" add the
            release's LayerNorms around it. {"kind": "class_attention"} puts class-attention pooling, which has parameters, in its place.
        pos_resize: how learned positional embeddings follow the input size: "timm" (bicubic, antialias, exact size), "dino"
            (bicubic, no antialias, scale factor with 0.1 added, as facebookresearch/dino does) or "transformers" (bicubic, no antialias).

    Raises UserError that names the part which LocAt cannot serve, and why.
    """
    if pos_resize not in POS_RESIZE:
        raise UserError(f"pos_resize is {pos_resize!r}; known: {', '.join(POS_RESIZE)}.{did_you_mean(pos_resize, POS_RESIZE)}")
    check_model(model, gaug, prr, pos_resize)
    if gaug is not False:
        attach_gaug(model, {} if gaug is True else dict(gaug))
    kind: Any = type(model)
    model.__class__ = locat_class(kind)
    for name, value in {"has_gaug": False, "prr": None, "drop_patches": None, "pos_resize": "timm"}.items():
        if name not in model.__dict__ and name not in model._modules:  # TorchScript reads no attribute of a class
            setattr(model, name, value)
    if prr is not False:
        attach_prr(model, {} if prr is True else dict(prr))
    if pos_resize != "timm":
        model.pos_resize = pos_resize
    return model


def check_model(model: nn.Module, gaug: bool | dict, prr: bool | dict, pos_resize: str) -> None:
    name = type(model).__name__
    if not isinstance(model, VisionTransformer | Eva | SwinTransformer):
        raise UserError(
            f"LocAt cannot be attached to {name}: it serves timm's VisionTransformer (ViT, DeiT, registers), Eva (RoPE) and SwinTransformer "
            "and their subclasses; create such a model, e.g. timm.create_model('vit_small_patch16_224', dynamic_img_size=True)"
        )
    if gaug is not False and not isinstance(
        getattr(model, "patch_drop", None), nn.Identity | PatchDropout | PatchDropoutWithIndices | None
    ):
        raise UserError(
            f"GAug cannot serve {name} with {type(model.patch_drop).__name__}, which does not say which patches it keeps; "
            "timm's patch dropout does: create the model with patch_drop_rate"
        )
    if prr is not False and model.global_pool in ("prr", "map"):
        raise UserError(
            f"PRR cannot be attached to a model with global_pool={model.global_pool!r}, which pools by an attention of its own; "
            "create it with global_pool='token' or 'avg'"
        )
    if pos_resize != "timm" and (
        not isinstance(model, VisionTransformer) or hasattr(model, "dist_token") or model.pos_embed is None
    ):
        raise UserError(
            f"pos_resize={pos_resize!r} needs a VisionTransformer with learned positions and without a distillation token, not {name}"
        )


def attach_gaug(model: nn.Module, options: dict) -> None:
    """Give each attention a GAug of its own, and the class that uses it."""
    unknown = set(options) - {*GAUG_OPTIONS, "initial_grid"}
    if unknown:
        known = (*GAUG_OPTIONS, "initial_grid")
        name = sorted(unknown)[0]
        raise UserError(f"gaug has no option {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}")
    stages = find_attentions(model)
    grids = initial_grids(options.pop("initial_grid", None) or default_grids(model, stages), len(stages))
    seen: dict[int, Grid] = {}  # see LocAtViT.remember
    for stage, grid in zip(stages, grids, strict=True):
        for attention in stage:
            weight = attention.proj.weight
            # EVA may have three projections instead of one; it then knows its head_dim
            head_dim = attention.qkv.out_features // 3 // attention.num_heads if attention.qkv is not None else attention.head_dim
            attention.gaug = GAug(head_dim, weight.shape[0], attention.num_heads, grid, **options).to(weight.device, weight.dtype)
            # parameters, hooks and names stay where they are: only the methods change
            attention.__class__ = gaug_class(attention.__class__)
            if not isinstance(attention, WindowAttention):
                attention.num_prefix_tokens, attention.seen_grids = model.num_prefix_tokens, seen
    model.has_gaug, model.seen_grids = True, seen
    model.gaug_options = {**options, "initial_grid": one_or_all(grids)}
    if isinstance(getattr(model, "patch_drop", None), PatchDropout | PatchDropoutWithIndices):
        # drops patches in place of timm's own, which drops where they lay
        drop = model.patch_drop
        model.drop_patches = PatchDropoutWithIndices(drop.prob, drop.num_prefix_tokens, drop.ordered)
        model.patch_drop = None if isinstance(model, Eva) else nn.Identity()


def default_grids(model: nn.Module, stages: list[list[Any]]) -> list[tuple[int, int]]:
    """Windows are what a Swin's attentions see, a ViT's see the image."""
    if isinstance(model, SwinTransformer):
        return [stage[0].window_size for stage in stages]
    return [model.patch_embed.grid_size]


def initial_grids(given: Any, num_stages: int) -> list[tuple[int, int]]:
    """One (rows, cols) per stage of what a user or a config gives: one for all, or a list of them. Raises UserError."""
    # [14, 14] is one grid, [[7, 7], [4, 4]] several
    grids = given if isinstance(given, tuple | list) and given and isinstance(given[0], tuple | list) else [given]
    for grid in grids:
        if not (isinstance(grid, tuple | list) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)):
            raise UserError(f"gaug.initial_grid is {given!r}; expected (rows, cols) in patches, such as [14, 14]")
    if len(grids) not in (1, num_stages):
        raise UserError(
            f"gaug.initial_grid is {given!r}; expected one (rows, cols) for all, or one for each of {num_stages} stages"
        )
    return [(grid[0], grid[1]) for grid in (grids * num_stages if len(grids) == 1 else grids)]


def one_or_all(grids: list[tuple[int, int]]) -> tuple:
    """As `gaug_options` and configs have it: one grid where all stages have the same."""
    return grids[0] if len(set(grids)) == 1 else tuple(grids)


def set_initial_grid(model: nn.Module, grid: Sequence) -> None:
    """Tell every GAug which grid its weights were trained at, and remember it for exports; of a Swin also one grid per stage."""
    if not getattr(model, "has_gaug", False):
        return
    # one for each block: blocks of a stage share the grid, not its module
    stages = [[m for m in stage.modules() if isinstance(m, GAug)] for stage in stages_of(model).values()]
    grids = initial_grids(grid, len(stages))
    for stage, own in zip(stages, grids, strict=True):
        for gaug in stage:
            gaug.set_initial_grid(own)
    model.gaug_options["initial_grid"] = one_or_all(grids)


def attach_prr(model: nn.Module, options: dict) -> None:
    if model.prr is not None:
        raise UserError("PRR is attached to this model already")
    known = ("num_heads", "kind", "pre_norm", "post_norm")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f"prr has no option {unknown[0]!r}; known: {', '.join(known)}.{did_you_mean(unknown[0], known)}")
    kind = options.get("kind", "prr")
    if kind not in POOLINGS:
        raise UserError(f"prr.kind is {kind!r}; known: {', '.join(POOLINGS)}.{did_you_mean(kind, POOLINGS)}")
    norms = {name: True for name in ("pre_norm", "post_norm") if options.get(name)}
    if norms and kind != "prr":
        raise UserError(f"prr.{next(iter(norms))} belongs to prr.kind=prr, not to {kind!r}; leave one of the two out")
    if kind == "class_attention" and (model.global_pool != "token" or hasattr(model, "jumbo_mlp")):
        raise UserError(
            f"prr.kind=class_attention pools into one class token of the patches' width, which this {type(model).__name__} "
            "does not pool by; choose a ViT with global_pool='token'"
        )
    # the last attention of the network: PRR has as many heads as it
    last = [m for m in model.modules() if hasattr(m, "num_heads") and hasattr(m, "proj")][-1]
    num_heads: Any = options.get("num_heads", last.num_heads)
    weight, dim = last.proj.weight, last.proj.out_features
    if dim % num_heads:
        raise UserError(f"prr.num_heads is {num_heads}, which does not divide the tokens' width {dim}")
    pooling = PRR(num_heads, dim, **norms) if kind == "prr" else ClassAttention(dim, num_heads)
    model.prr = pooling.to(weight.device, weight.dtype)


def stages_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> blocks that share a grid."""
    if isinstance(model, SwinTransformer):
        return {f"layers.{i}.blocks": stage.blocks for i, stage in enumerate(model.layers)}
    return {"blocks": model.blocks}


def find_attentions(model: nn.Module) -> list[list[Any]]:
    """Every attention of timm that GAug goes into, by stage; raises UserError for a block whose attention it cannot serve."""
    found: list[list[Any]] = []
    for name, blocks in stages_of(model).items():
        found.append([])
        for index, block in enumerate(blocks):
            # ATTENTIONS by isinstance: subclasses of timm's attentions count, if they compute the same (gaug_class)
            inside: list[Any] = [m for m in block.modules() if isinstance(m, tuple(ATTENTIONS))]
            if any(hasattr(m, "gaug") for m in inside):
                raise UserError(f"GAug is attached to {name}.{index} already")
            if not inside or any(gaug_class(m.__class__) is None for m in inside):
                kind = type(getattr(block, "attn", block)).__name__
                raise UserError(
                    f"GAug cannot serve {name}.{index} of this {type(model).__name__}: its attention is {kind}; "
                    f"it knows {', '.join(c.__name__ for c in ATTENTIONS)}"
                )
            found[-1] += inside
    return found


def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, heads, R + N, head_dim] of a timm attention: normalised where the model normalises, not scaled, not rotated."""
    if self.qkv is None:
        q = self.q_proj(x).unflatten(-1, [self.num_heads, -1]).transpose(1, 2)
        kv_heads = self.num_kv_heads if hasattr(self, "num_kv_heads") else self.num_heads
        k = self.k_proj(x).unflatten(-1, [kv_heads, -1]).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, [kv_heads, -1]).transpose(1, 2)
    else:
        if hasattr(self, "q_bias"):  # EVA has no bias for keys
            bias = torch.cat([self.q_bias, self.k_bias, self.v_bias]) if self.q_bias is not None else None
            qkv = F.linear(x, self.qkv.weight, bias)
        else:
            qkv = self.qkv(x)
        # [B, T, 3 * heads * d] -> [B, T, 3, heads, d] -> 3 x [B, heads, T, d], T = R + N
        q, k, v = qkv.unflatten(-1, [3, self.num_heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    if k.shape[1] != q.shape[1]:  # grouped queries: each key head serves several query heads
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return q, k, v


def rotate(self, x: Tensor, rope: Tensor | None) -> Tensor:
    """Rotary embedding of the patches of x [B, heads, R + N, d]; its dtype stays."""
    if rope is None:
        return x
    prefix = self.num_prefix_tokens
    half = self.rotate_half if hasattr(self, "rotate_half") else False
    # prefix tokens lie nowhere in the image, hence no rotation of them
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
    return torch.cat([x[:, :, :prefix], rotated.to(x.dtype)], dim=2)


class GaugAttention(Front):
    """In front of a timm attention class: the same projections, gate, norms and dropouts around attention with GAug's bias."""

    project, rotate = project, rotate

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


class GaugWindowAttention(Front):
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

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.project(x)
        # each window is a grid of its own: no prefix tokens, distances within it
        coefficients = self.gaug(q, self.window_size, k=k, x=x)
        # Swin's own bias [1, heads, N, N] stays, and GAug's is added to it
        extra = self._get_rel_pos_bias()
        if mask is not None:
            extra = (extra + mask[:, None]).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)  # windows of one image are neighbours
        dropout_p = self.attn_drop.p if self.training else 0.0
        if torch.jit.is_scripting():
            out = dense_bias_attention(q, k, v, self.gaug.bias(coefficients, self.window_size) + extra, 0, dropout_p=dropout_p)
        else:
            out = self.gaug.attend(q, k, v, coefficients, self.window_size, 0, dropout_p=dropout_p, extra_bias=extra)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


# timm's attentions that GAug can enter -> what goes in front of them
ATTENTIONS: dict[Any, type] = {
    Attention: GaugAttention,
    AttentionRope: GaugAttention,  # the bias is predicted from the query before rotation
    EvaAttention: GaugAttention,
    WindowAttention: GaugWindowAttention,
}


@cache
def gaug_class(kind: Any) -> Any:
    """The class with GAug of a timm attention, or of a subclass that computes the same (gated, say); None if GAug cannot enter."""
    for base, front in ATTENTIONS.items():
        # a subclass with another forward computes something that ours would not
        if issubclass(kind, base) and kind.forward is base.forward:
            return type(
                f"LocAt{kind.__name__}", (front, kind), {"__module__": __name__, "__doc__": f"{kind.__name__} with GAug."}
            )
    return None


class LocAtModel(Front):
    """In front of a timm model class: PRR before the head, and what an export needs to build the same model again."""

    has_gaug = False
    __jit_unused_properties__ = ("_model_args",)

    def forward_head(self, x: Tensor, pre_logits: bool = False):  # a distilled model gives two tensors in training
        # before timm pools: the head sees the refined class token
        if self.prr is not None:
            x = self.prr(x)
        return self.timm_forward_head(x, pre_logits)

    @property
    def _model_args(self) -> dict:
        """timm writes these into config.json. GAug's grid belongs to the weights, so it is always among them."""
        # kept in __dict__: the name itself is this property
        return {**self.__dict__.get("_timm_args", {}), **locat_args(self)}

    @_model_args.setter
    def _model_args(self, args: dict) -> None:
        self.__dict__["_timm_args"] = dict(args)


class LocAtViT(LocAtModel):
    """LocAtModel for models whose blocks see all patches: tells them where those lie."""

    pos_resize = "timm"

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


class LocAtEva(LocAtViT):
    """LocAtViT for blocks that rotate queries and keys."""

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
torch.fx.wrap("resize_table")


@cache
def locat_class(base: Any) -> Any:
    """The LocAt subclass of a timm model class (of `VisionTransformer`, `VisionTransformerDistilled`, ...); one per base."""
    if issubclass(base, LocAtModel):
        return base
    mixin = LocAtModel if issubclass(base, SwinTransformer) else LocAtEva if issubclass(base, Eva) else LocAtViT
    own: dict[str, Any] = {"__module__": __name__, "__doc__": f"timm's {base.__name__} with LocAt attached."}
    for name, new_name in {"forward_head": "timm_forward_head", "_pos_embed": "timm_pos_embed"}.items():
        if hasattr(base, name):  # what super() would call, which TorchScript does not know
            own[new_name] = renamed(getattr(base, name), new_name)
    return type(f"LocAt{base.__name__}", (mixin, base), own)


def renamed(function: Any, name: str) -> Any:
    """The same function under another name, by which TorchScript tells a class's methods apart."""
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    return update_wrapper(copy, function, assigned=("__module__", "__doc__", "__annotations__"))


def locat_args(model: nn.Module) -> dict:
    """Options that rebuild what was attached to `model`: gaug, prr, pos_resize; {} for a model without LocAt."""
    if not isinstance(model, LocAtModel):
        return {}
    args: dict[str, Any] = {"gaug": dict(model.gaug_options) if model.has_gaug else False, "prr": False}
    if model.prr is not None:
        args["prr"] = {"num_heads": model.prr.num_heads}
        if isinstance(model.prr, ClassAttention):
            args["prr"]["kind"] = "class_attention"
        else:
            norms = {name: getattr(model.prr, name) for name in ("pre_norm", "post_norm")}
            args["prr"] |= {name: True for name, norm in norms.items() if isinstance(norm, nn.LayerNorm)}
    if getattr(model, "pos_resize", "timm") != "timm":
        args["pos_resize"] = model.pos_resize
    return args
