"""What LocAt puts in front of timm's classes, and what every family of models (`Family`, one file each) says about its own.

An attention keeps its parameters and its names; a class put in front of its own adds `gaug` and another forward. A model likewise gets PRR
before its head. The files beside this one hold what differs from family to family: where the patches of an attention lie.
"""

from collections.abc import Callable
from functools import cache, update_wrapper
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.models.prr import ClassAttention

Front: Any = object  # base of what stands in front of a timm class, whose attributes it reads


class GaugFront(Front):
    """Base of what stands in front of an attention that has a GAug."""

    def gaug_shape(self) -> tuple[int, int, int]:
        """Width of a head's queries, width of the input, number of heads."""
        return self.qkv.out_features // 3 // self.num_heads, self.qkv.in_features, self.num_heads

    def attend_on_grid(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int], prefix: int = 0, extra_bias: Tensor | None = None
    ) -> Tensor:
        """softmax(q k^T / sqrt(d) + GAug's bias + extra_bias) v for patches row-major over `grid` behind `prefix` tokens.

        q, k, v [B, heads, R + N, d], x [B, R + N, D] what they were projected from -> [B, R + N, heads * d]."""
        coefficients = self.gaug(q[:, :, prefix:], grid, k=k[:, :, prefix:], x=x[:, prefix:])
        out = self.gaug.attend(q, k, v, coefficients, grid, prefix, dropout_p=self.dropout_p(), extra_bias=extra_bias)
        return out.transpose(1, 2).flatten(2)

    def dropout_p(self) -> float:
        """Of the attention weights; some of timm's attentions have none."""
        return self.attn_drop.p if self.training and hasattr(self, "attn_drop") else 0.0


class LocAtModel(Front):
    """In front of a timm model class: PRR before the head, and what an export needs to build the same model again."""

    has_gaug = False
    __jit_unused_properties__ = ("_model_args",)

    def place_gaugs(self, stages: list[list[Any]]) -> None:
        """Called once, when the attentions of each stage have their GAug: give them what they need to know where patches lie."""

    def refined_width(self) -> int:
        """Width of the tokens that PRR refines."""
        return self.num_features

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


class LocAtFixed(LocAtModel):
    """LocAtModel for models of one image size, whose attentions see all patches and are not told where those lie."""

    def place_gaugs(self, stages: list[list[Any]]) -> None:
        for attention in (each for stage in stages for each in stage):
            # in a tuple, as a module would be registered again; `set_input_size` changes its grid_size
            attention.patches, attention.num_prefix_tokens = (self.patch_embed,), self.num_prefix_tokens


class LocAtMap(LocAtModel):
    """LocAtModel for models whose features are maps [B, D, rows, cols]."""

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        if self.prr is not None:
            x = self.prr(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.timm_forward_head(x, pre_logits)


class Family(NamedTuple):
    """One kind of timm's models, and how LocAt enters it."""

    base: Any  # timm's class of the model; its subclasses count
    modules: tuple[str, ...]  # of timm, whose names get a `locat_` twin
    front: type  # what goes in front of the model's class
    attentions: dict[Any, type]  # timm's attentions that GAug enters -> what goes in front of them
    stages: Callable[[Any], dict[str, Any]]  # of a model: name -> blocks whose attentions see grids of one size
    grids: Callable[[Any, list[list[Any]]], list[tuple[int, int]]]  # of a model and its attentions: (rows, cols) of each stage
    any_size: dict[str, Any] = {}  # noqa: RUF012  what makes its models take images of any size, where timm can
    others: dict[Any, type] = {}  # noqa: RUF012  other modules of timm that must tell where patches lie -> what goes in front of them
    where: str = "among the patches of the image"  # the bump of a query lies, in words
    sizes: str = "no"  # whether its models take images of any size, where `any_size` is nothing
    kept: dict[Any, str] = {}  # noqa: RUF012  attentions that stay as they are, and why


def blocks_of(model: Any) -> dict[str, Any]:
    """Stages of a model whose blocks all see one grid."""
    return {"blocks": model.blocks}


def stages_of(model: Any) -> dict[str, Any]:
    """Of a model with stages, whose blocks see windows of one size."""
    return {f"stages.{i}.blocks": stage.blocks for i, stage in enumerate(model.stages)}


def patch_grid(model: Any, stages: list[list[Any]]) -> list[tuple[int, int]]:
    return [tuple(model.patch_embed.grid_size)] * len(stages)


def windows(model: Any, stages: list[list[Any]]) -> list[tuple[int, int]]:
    """Of attentions within windows, each of which is a grid of its own."""
    return [tuple(stage[0].window_size) for stage in stages]


@cache
def put_in_front(front: type, kind: Any) -> Any:
    """The class of timm's `kind` with `front` before it; one for each pair."""
    return type(f"LocAt{kind.__name__}", (front, kind), {"__module__": __name__, "__doc__": f"{kind.__name__} with GAug."})


def gaug_class(attentions: dict[Any, type], kind: Any) -> Any:
    """The class with GAug of a timm attention, or of a subclass that computes the same (gated, say); None if GAug cannot enter."""
    for base, front in attentions.items():
        # a subclass with another forward computes something that ours would not
        if issubclass(kind, base) and kind.forward is base.forward:
            return put_in_front(front, kind)
    return None


def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, heads, R + N, head_dim] of a timm attention: normalised where the model normalises, not scaled, not rotated."""
    if self.qkv is None:
        q = self.q_proj(x).unflatten(-1, [self.num_heads, -1]).transpose(1, 2)
        kv_heads = self.num_kv_heads if hasattr(self, "num_kv_heads") else self.num_heads
        k = self.k_proj(x).unflatten(-1, [kv_heads, -1]).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, [kv_heads, -1]).transpose(1, 2)
    else:
        if hasattr(self, "q_bias"):  # EVA has no bias for keys
            if self.q_bias is None:
                qkv = self.qkv(x)
            elif self.qkv_bias_separate:  # through the layer itself, which may have an adapter (moving.py)
                qkv = self.qkv(x) + torch.cat([self.q_bias, self.k_bias, self.v_bias])
            else:
                qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
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


@cache
def locat_class(front: type, base: Any) -> Any:
    """The LocAt subclass of a timm model class (of `VisionTransformer`, `VisionTransformerDistilled`, ...); one per base."""
    if issubclass(base, LocAtModel):
        return base
    own: dict[str, Any] = {"__module__": __name__, "__doc__": f"timm's {base.__name__} with LocAt attached."}
    for name, new_name in {"forward_head": "timm_forward_head", "_pos_embed": "timm_pos_embed"}.items():
        if hasattr(base, name):  # what super() would call, which TorchScript does not know
            own[new_name] = renamed(getattr(base, name), new_name)
    return type(f"LocAt{base.__name__}", (front, base), own)


def renamed(function: Any, name: str) -> Any:
    """The same function under another name, by which TorchScript tells a class's methods apart."""
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    return update_wrapper(copy, function, assigned=("__module__", "__doc__", "__annotations__"))
