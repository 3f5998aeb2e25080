"""`attach_locat` turns a timm model into its LocAt twin, in place: GAug in every attention, PRR before the head.

The model keeps its timm class as base, its parameter names and its protocol; only `gaug.log_var` and `gaug.log_alpha` appear under each
attention. What differs between kinds of models is in families/, one file each; begin with families/vit.py.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from timm.layers import AttentionPoolLatent, PatchDropout, PatchDropoutWithIndices
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssl_locat.errors import UserError, did_you_mean
from ssl_locat.models.families import family_of
from ssl_locat.models.families.front import Family, gaug_class, locat_class, put_in_front
from ssl_locat.models.families.front import locat_args as locat_args
from ssl_locat.models.gaug import GAug
from ssl_locat.models.positions import POS_RESIZE
from ssl_locat.models.prr import PRR, ClassAttention

ROW_MAJOR = (VisionTransformer, Eva, SwinTransformer)
POOLINGS = ("prr", "class_attention")
GAUG_OPTIONS = tuple(p.name for p in inspect.signature(GAug).parameters.values() if p.kind is p.KEYWORD_ONLY)


def attach_locat(model: nn.Module, gaug: bool | dict = True, prr: bool | dict = True, pos_resize: str = "timm") -> nn.Module:
    """Attach GAug and PRR (each alone, or both) to a timm model of one of the families (families/); returns the same object.

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
    family = family_of(model)
    check_model(model, gaug, prr, pos_resize)
    kind: Any = type(model)
    model.__class__ = locat_class(family.front, kind)
    for name, value in {"has_gaug": False, "prr": None, "drop_patches": None, "pos_resize": "timm"}.items():
        if name not in model.__dict__ and name not in model._modules:  # TorchScript reads no attribute of a class
            setattr(model, name, value)
    if gaug is not False:
        attach_gaug(model, family, {} if gaug is True else dict(gaug))
    if prr is not False:
        attach_prr(model, {} if prr is True else dict(prr))
    if pos_resize != "timm":
        model.pos_resize = pos_resize
    return model


def check_model(model: nn.Module, gaug: bool | dict, prr: bool | dict, pos_resize: str) -> None:
    name = type(model).__name__
    if gaug is not False and not isinstance(
        getattr(model, "patch_drop", None), nn.Identity | PatchDropout | PatchDropoutWithIndices | None
    ):
        raise UserError(
            f"GAug cannot serve {name} with {type(model.patch_drop).__name__}, which does not say which patches it keeps; "
            "timm's patch dropout does: create the model with patch_drop_rate"
        )
    if prr is not False and getattr(model, "global_pool", None) == "prr":
        raise UserError(
            f"PRR cannot be attached to {name} with global_pool='prr', which is timm's own; create it with global_pool='token', 'avg' or 'map'"
        )
    if pos_resize != "timm" and (
        not isinstance(model, VisionTransformer) or hasattr(model, "dist_token") or model.pos_embed is None
    ):
        raise UserError(
            f"pos_resize={pos_resize!r} needs a VisionTransformer with learned positions and without a distillation token, not {name}"
        )


def attach_gaug(model: Any, family: Family, options: dict) -> None:
    """Give each attention a GAug of its own, and the class that uses it."""
    unknown = set(options) - {*GAUG_OPTIONS, "initial_grid"}
    if unknown:
        known = (*GAUG_OPTIONS, "initial_grid")
        name = sorted(unknown)[0]
        raise UserError(f"gaug has no option {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}")
    if options.get("fast", "off") != "off" and family.base not in ROW_MAJOR:
        raise UserError(
            f"gaug.fast={options['fast']!r} pools patches that lie row by row over the whole image, as in {', '.join(c.__name__ for c in ROW_MAJOR)}; "
            f"leave it off for {family.base.__name__}"
        )
    stages = find_attentions(model, family)
    grids = initial_grids(options.pop("initial_grid", None) or family.grids(model, stages), len(stages))
    for stage, grid in zip(stages, grids, strict=True):
        for attention in stage:
            # parameters, hooks and names stay where they are: only the methods change
            attention.__class__ = gaug_class(family.attentions, attention.__class__)
            weight = next(p for p in attention.parameters() if p.ndim > 1)  # scalars may be of another dtype
            head_dim, dim, num_heads = attention.gaug_shape()
            attention.gaug = GAug(head_dim, dim, num_heads, grid, **options).to(weight.device, weight.dtype)
    for module in model.modules():
        kind: Any = type(module)
        if kind in family.others:
            module.__class__ = put_in_front(family.others[kind], kind)
    model.has_gaug = True
    model.gaug_options = {**options, "initial_grid": one_or_all(grids)}
    model.place_gaugs(stages)


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
    blocks = family_of(model).stages(model).values()
    stages = [[m for block in stage for m in block.modules() if isinstance(m, GAug)] for stage in blocks]
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
    if kind == "class_attention" and (getattr(model, "global_pool", None) != "token" or hasattr(model, "jumbo_mlp")):
        raise UserError(
            f"prr.kind=class_attention pools into one class token of the patches' width, which this {type(model).__name__} "
            "does not pool by; choose a ViT with global_pool='token'"
        )
    # as many heads as the last attention of the blocks has; as wide ones, if what PRR refines is of another width (behind SAM's neck)
    last: Any = [m for m in model.modules() if hasattr(m, "num_heads") or hasattr(m, "heads")]
    last = [m for m in last if not isinstance(m, GAug | AttentionPoolLatent)][-1]
    weight, dim = next(p for p in last.parameters() if p.ndim > 1), model.refined_width()
    heads = getattr(last, "num_heads", None) or last.heads
    num_heads: Any = options.get("num_heads", heads if dim % heads == 0 else max(dim // last.head_dim, 1))
    if dim % num_heads:
        raise UserError(f"prr.num_heads is {num_heads}, which does not divide the tokens' width {dim}")
    pooling = PRR(num_heads, dim, **norms) if kind == "prr" else ClassAttention(dim, num_heads)
    model.prr = pooling.to(weight.device, weight.dtype)


def find_attentions(model: nn.Module, family: Family) -> list[list[Any]]:
    """Every attention of timm that GAug goes into, by stage; raises UserError for a block whose attention it cannot serve."""
    found: list[list[Any]] = []
    for name, blocks in family.stages(model).items():
        found.append([])
        for index, block in enumerate(blocks):
            # by isinstance: subclasses of timm's attentions count, if they compute the same (gaug_class)
            inside: list[Any] = [m for m in block.modules() if isinstance(m, tuple(family.attentions))]
            if any(hasattr(m, "gaug") for m in inside):
                raise UserError(f"GAug is attached to {name}.{index} already")
            if not inside or any(gaug_class(family.attentions, m.__class__) is None for m in inside):
                kind = type(getattr(block, "attn", block)).__name__
                raise UserError(
                    f"GAug cannot serve {name}.{index} of this {family.base.__name__}: its attention is {kind}; "
                    f"it knows {', '.join(c.__name__ for c in family.attentions)}"
                )
            found[-1] += inside
    return found
