"""`attach_locat` turns a timm model into its LocAt twin, in place: GAug in every attention, PRR before the head.

The model keeps its timm class as base, its parameter names and its protocol; only `gaug.log_var` and `gaug.log_alpha` appear under each
attention. The patch grid reaches the attentions as an argument of the very forward that they belong to (timm hands `attn_mask` down to
them, and a LocAt model passes its grid there), so nothing is remembered between calls: several resolutions may alternate within a step,
under torch.compile, activation checkpointing, deepcopy and FSDP alike.
"""

import inspect
from functools import cache

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_locat.errors import UserError, did_you_mean
from ssl_locat.models.gaug import GAug
from ssl_locat.models.positions import POS_RESIZE, resize_table
from ssl_locat.models.prr import PRR, ClassAttention
from ssl_locat.models.tokens import Grid, input_grid, run_blocks

POOLINGS = ("prr", "class_attention")
GAUG_OPTIONS = tuple(p.name for p in inspect.signature(GAug).parameters.values() if p.kind is p.KEYWORD_ONLY)


def attach_locat(model: nn.Module, gaug: bool | dict = True, prr: bool | dict = True, pos_resize: str = "timm") -> nn.Module:
    """Attach GAug and PRR (each alone, or both) to a timm VisionTransformer, Eva or SwinTransformer; returns the same object.

    Args:
        gaug: False, True, or options of `GAug` (`isotropic`, `alpha`, `kernel`, `small_start`, ...) and `initial_grid`: (rows, cols) that
            the weights are trained at, by default the model's own (Swin: its window).
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
    model.__class__ = locat_class(type(model))
    if not hasattr(model, "prr"):
        model.prr = None
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
    if gaug is not False and not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
        raise UserError(f"GAug cannot serve {name} with patch dropout: it needs every patch of the grid; set patch_drop_rate=0")
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
    attentions = find_attentions(model)
    initial_grid = options.pop("initial_grid", None) or default_grid(model, attentions)
    if not isinstance(initial_grid, tuple | list) or len(initial_grid) != 2 or min(initial_grid) < 1:
        raise UserError(f"gaug.initial_grid is {initial_grid!r}; expected (rows, cols) in patches, such as [14, 14]")
    for attention in attentions:
        weight = attention.proj.weight
        head_dim = attention.qkv.out_features // 3 // attention.num_heads if attention.qkv is not None else attention.head_dim
        attention.gaug = GAug(head_dim, weight.shape[0], attention.num_heads, initial_grid, **options).to(
            weight.device, weight.dtype
        )
        attention.__class__ = gaug_class(type(attention))
        if not isinstance(attention, WindowAttention):
            attention.num_prefix_tokens = model.num_prefix_tokens
    model.has_gaug = True
    model.gaug_options = {**options, "initial_grid": attentions[0].gaug.initial_grid}


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
    last = [m for m in model.modules() if hasattr(m, "num_heads") and hasattr(m, "proj")][-1]
    num_heads = options.get("num_heads", last.num_heads)
    weight, dim = last.proj.weight, last.proj.out_features
    if dim % num_heads:
        raise UserError(f"prr.num_heads is {num_heads}, which does not divide the tokens' width {dim}")
    pooling = PRR(num_heads, dim, **norms) if kind == "prr" else ClassAttention(dim, num_heads)
    model.prr = pooling.to(weight.device, weight.dtype)


def find_attentions(model: nn.Module) -> list[nn.Module]:
    """Every attention that GAug goes into; raises UserError for a block whose attention it cannot serve."""
    groups = (
        [(f"layers.{i}.blocks", s.blocks) for i, s in enumerate(model.layers)]
        if isinstance(model, SwinTransformer)
        else [("blocks", model.blocks)]
    )
    found = []
    for group, blocks in groups:
        for index, block in enumerate(blocks):
            inside = [m for m in block.modules() if isinstance(m, tuple(ATTENTIONS))]
            if any(hasattr(m, "gaug") for m in inside):
                raise UserError(f"GAug is attached to {group}.{index} already")
            if not inside or any(gaug_class(type(m)) is None for m in inside):
                kind = type(getattr(block, "attn", block)).__name__
                raise UserError(
                    f"GAug cannot serve {group}.{index} of this {type(model).__name__}: its attention is {kind}; "
                    f"it knows {', '.join(c.__name__ for c in ATTENTIONS)}"
                )
            found += inside
    return found


def default_grid(model: nn.Module, attentions: list[nn.Module]) -> tuple[int, int]:
    """Swin's windows are what its attentions see; a ViT's grid is the image's."""
    return attentions[0].window_size if isinstance(model, SwinTransformer) else model.patch_embed.grid_size


def project(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, heads, R + N, head_dim] of a timm attention: normalised where the model normalises, not scaled, not rotated."""
    heads = attention.num_heads
    if attention.qkv is None:
        q, k, v = (layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        kv_heads = getattr(attention, "num_kv_heads", heads)
        q, k, v = (t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    else:
        if getattr(attention, "q_bias", None) is None:
            qkv = attention.qkv(x)
        else:  # EVA has no bias for keys
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
            qkv = F.linear(x, attention.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if k.shape[1] != heads:  # grouped queries: each key head serves several query heads
        k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    return q, k, v


def rotate(attention: nn.Module, x: Tensor, rope: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rotary embedding of the patches of x [B, heads, R + N, d]."""
    if rope is None:
        return x
    prefix = attention.num_prefix_tokens
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=getattr(attention, "rotate_half", False))
    return torch.cat([x[:, :, :prefix], rotated], dim=2).to(dtype)


class GaugAttention:
    """In front of a timm attention class: the same projections, gate, norms and dropouts around attention with GAug's bias."""

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Grid | None = None, is_causal: bool = False) -> Tensor:
        """x [B, R + N, D] -> [B, R + N, D]; attn_mask is the grid of these patches, given by the model."""
        if not isinstance(attn_mask, Grid) or is_causal:
            raise UserError(
                "an attention with GAug was called without the patch grid; call the whole model, or pass attn_mask=Grid(rows, cols)"
            )
        prefix = self.num_prefix_tokens
        q, k, v = project(self, x)
        coefficients = self.gaug(q[:, :, prefix:], attn_mask, k=k[:, :, prefix:], x=x[:, prefix:])
        q, k = rotate(self, q, rope, v.dtype), rotate(self, k, rope, v.dtype)
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = self.gaug.attend(q, k, v, coefficients, attn_mask, prefix, dropout_p=dropout_p)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if getattr(self, "gate", None) is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class GaugWindowAttention:
    """In front of timm's Swin attention: each window is a grid, padding positions take part."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [windows * B, N, D], mask [windows, N, N] or None -> [windows * B, N, D]."""
        q, k, v = project(self, x)
        coefficients = self.gaug(q, self.window_size, k=k, x=x)
        extra = self._get_rel_pos_bias()
        if mask is not None:
            extra = (extra + mask[:, None]).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)  # windows of one image are neighbours
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = self.gaug.attend(q, k, v, coefficients, self.window_size, 0, dropout_p=dropout_p, extra_bias=extra)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


# timm's attentions that GAug can enter -> what goes in front of them
ATTENTIONS = {
    Attention: GaugAttention,
    AttentionRope: GaugAttention,  # the bias is predicted from the query before rotation
    EvaAttention: GaugAttention,
    WindowAttention: GaugWindowAttention,
}


@cache
def gaug_class(kind: type) -> type | None:
    """The class with GAug of a timm attention, or of a subclass that computes the same (gated, say); None if GAug cannot enter."""
    for base, front in ATTENTIONS.items():
        if issubclass(kind, base) and kind.forward is base.forward:
            return type(
                f"LocAt{kind.__name__}", (front, kind), {"__module__": __name__, "__doc__": f"{kind.__name__} with GAug."}
            )
    return None


class LocAtModel:
    """In front of a timm model class: PRR before the head, and what an export needs to build the same model again."""

    has_gaug = False

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x if self.prr is None else self.prr(x), pre_logits=pre_logits)

    @property
    def _model_args(self) -> dict:
        """timm writes these into config.json. GAug's grid belongs to the weights, so it is always among them."""
        return {**self.__dict__.get("_timm_args", {}), **locat_args(self)}

    @_model_args.setter
    def _model_args(self, args: dict) -> None:
        self.__dict__["_timm_args"] = dict(args)


class LocAtViT(LocAtModel):
    """LocAtModel for models whose blocks see all patches: hands the grid to them."""

    pos_resize = "timm"

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        self.reject_mask(attn_mask, is_causal)
        outputs, _ = run_blocks(self, x)
        return self.norm(outputs[-1])

    def forward_intermediates(self, x: Tensor, *args, attn_mask: Tensor | None = None, is_causal: bool = False, **kwargs):
        self.reject_mask(attn_mask, is_causal)
        return super().forward_intermediates(x, *args, attn_mask=input_grid(self, x) if self.has_gaug else None, **kwargs)

    def reject_mask(self, attn_mask: Tensor | None, is_causal: bool) -> None:
        if attn_mask is not None or is_causal:
            raise UserError("a LocAt model takes no attention mask and is not causal: GAug adds its own bias between all patches")

    def _pos_embed(self, x: Tensor):
        if self.pos_resize == "timm" or x.ndim == 3:
            return super()._pos_embed(x)
        skip = 0 if self.no_embed_class else self.num_prefix_tokens
        positions = resize_table(self.pos_embed, skip, self.patch_embed.grid_size, x.shape[1:3], self.pos_resize)
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = x.flatten(1, 2)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*prefix, x + positions], dim=1))
        return self.pos_drop(torch.cat([*prefix, x], dim=1) + positions)


@cache
def locat_class(base: type) -> type:
    """The LocAt subclass of a timm model class (of `VisionTransformer`, `VisionTransformerDistilled`, ...); one per base."""
    if issubclass(base, LocAtModel):
        return base
    mixin = LocAtModel if issubclass(base, SwinTransformer) else LocAtViT
    return type(
        f"LocAt{base.__name__}",
        (mixin, base),
        {"__module__": __name__, "__doc__": f"timm's {base.__name__} with LocAt attached."},
    )


def locat_args(model: nn.Module) -> dict:
    """Options that rebuild what was attached to `model`: gaug, prr, pos_resize; {} for a model without LocAt."""
    if not isinstance(model, LocAtModel):
        return {}
    args = {"gaug": dict(model.gaug_options) if model.has_gaug else False, "prr": False}
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
