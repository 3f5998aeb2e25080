"""Whose layout a file of weights has, and how its names become timm's: one table, LAYOUTS, read from the top, the first row that fits.

    known = convert(weights, source)      # which row, the state dict in timm's names, and what the row says besides

A row is recognised by names and shapes alone. Adding a layout is a row here, its functions below, a case in tests/models/test_layouts.py and
a line in docs/weights.md. Block i, in the order of the columns: facebookresearch, transformers on disk, timm.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ssl_locat.errors import CheckpointError
from ssl_locat.models import layouts_clip

State = dict[str, Tensor]
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class Weights(NamedTuple):
    """What a file holds: a state dict without wrappers' prefixes, and the names that lay around it (`student`, `dino_loss`, `args`, ...)."""

    state: State
    around: frozenset[str] = frozenset()


class Layout(NamedTuple):
    name: str  # said when it is recognised
    fits: Callable[[Weights], bool]
    rename: Callable[[State], State]  # to timm's names; tensors that belong to no backbone (mask token, decoder) are left out
    prefix: int | None = (
        None  # how many positional embeddings belong to special tokens after `rename`; None: not known by the layout
    )
    pos_resize: str = "timm"  # how the source resizes positional embeddings, see positions.py
    normalisation: tuple | None = None  # (mean, std) that the source trains with, where it has one for all its weights
    act_layer: str | None = None  # the activation that the source takes unless its config says another; tensors do not show it


class Known(NamedTuple):
    layout: Layout
    state: State  # in timm's names
    grid: Sequence | None = (
        None  # (rows, cols) of patches that it was trained at, of a Swin a window for each stage, where they are known
    )


def convert(weights: Weights, source: str) -> Known:
    """The row of LAYOUTS that fits, and the state dict in timm's names. CheckpointError for names of none."""
    for layout in LAYOUTS:
        if layout.fits(weights):
            try:
                return Known(layout, layout.rename(dict(weights.state)))
            except (LookupError, RuntimeError, ValueError) as error:
                raise CheckpointError(f"{source}: names as of {layout.name}, but its tensors are not ({error})") from None
    some = ", ".join(sorted(weights.state)[:3])
    raise CheckpointError(
        f"{source}: these are weights of no layout that is known here, such as {some}; known: {', '.join(row.name for row in LAYOUTS)}"
    )


def has(*names: str) -> Callable[[Weights], bool]:
    return lambda weights: all(name in weights.state for name in names)


def ends(weights: Weights, *endings: str) -> bool:
    """Whether each ending is one of some name: a task's head puts the model's name in front (`dinov2.embeddings...`)."""
    return all(any(name == ending or name.endswith(f".{ending}") for name in weights.state) for ending in endings)


def substitute(state: State, *rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> State:
    """Every name with each rule (pattern, replacement) applied in turn."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def without(state: State, *patterns: str) -> State:
    return {name: value for name, value in state.items() if not any(re.match(pattern, name) for pattern in patterns)}


# --- facebookresearch ----------------------------------------------------------------------------------------------------------


def from_ibot(state: State) -> State:
    """DINO's names; masked_embed replaces masked patches in training; LayerScale is gamma_1, gamma_2."""
    return substitute(without(state, r"masked_embed$"), (r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"))


def from_timm(state: State) -> State:
    """timm's own names, and bare files of iBOT and DeiT III, whose LayerScale is gamma_1, gamma_2 (timm's Eva, too, which has no qkv.bias)."""
    return from_ibot(state) if {"blocks.0.gamma_1", "blocks.0.attn.qkv.bias", "pos_embed"} <= state.keys() else state


def from_mae(state: State) -> State:
    """The encoder alone: the decoder has its own width, mask token and positions."""
    return without(state, r"decoder_", r"mask_token$")


def from_dinov2(state: State) -> State:
    """Training checkpoints put the blocks into chunks, `blocks.CHUNK.BLOCK.`, where BLOCK counts through all chunks."""
    state = substitute(
        without(state, r"mask_token$"),
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
        (r"\.mlp\.w12\.", ".mlp.fc1."),  # SwiGLU: gate rows, then the others, as timm's packed one
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    )
    if "register_tokens" in state:
        # registers have no position; with the class token's moved into it, the table is of patches alone (timm's no_embed_class)
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


def from_dinov3(state: State) -> State:
    """RoPE's periods are constants; the key's third of the qkv bias is stored, but masked: keys have none."""
    state = substitute(
        without(state, r"mask_token$", r"rope_embed\.", r"local_cls_norm\.", r"projectors\."),
        (r"^storage_tokens$", "reg_token"),
        (r"\.ls([12])\.gamma$", r".gamma_\1"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    )
    for name in [name for name in state if name.endswith(".attn.qkv.bias")]:
        block = name.removesuffix("qkv.bias")
        q, k, v = state.pop(name).chunk(3)
        if state.pop(f"{block}qkv.bias_mask", None) is None and k.any():
            raise ValueError(f"{name} has a key bias that no bias_mask switches off; timm's Eva has none")
        state |= {f"{block}q_bias": q, f"{block}v_bias": v}
    return state


# --- transformers: names on disk, and those of its version 5 in memory ------------------------------------------------------------


def inside_of(state: State, landmark: str) -> State:
    """Without the model's name in front and without what lies beside it (`classifier`)."""
    front = next(name for name in state if name.endswith(landmark)).removesuffix(landmark)
    return {name.removeprefix(front): value for name, value in state.items() if name.startswith(front)}


def join_qkv(state: State) -> State:
    """`attn.q.`, `attn.k.` and `attn.v.` of each block as one: rows of q, k and v in that order; a missing key bias is zero."""
    for name in [name for name in state if name.endswith(".attn.q.weight")]:
        block = name.removesuffix("q.weight")
        state[f"{block}qkv.weight"] = torch.cat([state.pop(f"{block}{part}.weight") for part in "qkv"])
        if f"{block}q.bias" in state:
            q, v = state.pop(f"{block}q.bias"), state.pop(f"{block}v.bias")
            k = state.pop(f"{block}k.bias", torch.zeros_like(q))
            state[f"{block}qkv.bias"] = torch.cat([q, k, v])
    return state


def from_transformers_dinov2(state: State) -> State:
    state = substitute(
        inside_of(state, "embeddings.cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.", ""),
        (r"^encoder\.layer\.", "blocks."),
        (r"\.attention\.attention\.(query|key|value)\.", lambda match: f".attn.{match[1][0]}."),
        (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
        (r"^layernorm\.", "norm."),
    )
    for name in [name for name in state if ".mlp.gate_proj." in name]:
        up = name.replace("gate_proj", "up_proj")
        state[name.replace("gate_proj", "fc1")] = torch.cat([state.pop(name), state.pop(up)])
    return from_dinov2(join_qkv(state))


def from_transformers_dinov3(state: State) -> State:
    gated = any(".mlp.gate_proj." in name for name in state)
    state = substitute(
        inside_of(state, "embeddings.cls_token"),
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"^embeddings\.register_tokens$", "storage_tokens"),
        (r"^embeddings\.", ""),
        (r"^(model\.)?layer\.", "blocks."),
        (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.mlp\.gate_proj\.", ".mlp.w1."),
        (r"\.mlp\.up_proj\.", ".mlp.w2." if gated else ".mlp.fc1."),
        (r"\.mlp\.down_proj\.", ".mlp.w3." if gated else ".mlp.fc2."),
    )
    if not state["storage_tokens"].shape[1]:
        del state["storage_tokens"]
    return from_dinov3(join_qkv(state))


def from_transformers_clip(state: State) -> State:
    return join_qkv(layouts_clip.from_transformers(inside_of(state, "embeddings.patch_embedding.weight")))


# --- open_clip ------------------------------------------------------------------------------------------------------------------


def from_open_clip(state: State) -> State:
    return layouts_clip.from_open_clip(inside_of(state, "class_embedding"))


def from_open_clip_trunk(state: State) -> State:
    """A tower that open_clip took from timm: its names, behind `visual.trunk.`."""
    return inside_of(state, "patch_embed.proj.weight")


# --- the table -------------------------------------------------------------------------------------------------------------------


def same(state: State) -> State:
    return state


LAYOUTS = (
    Layout(
        "transformers DINOv3ViTModel",
        lambda w: ends(
            w, "embeddings.patch_embeddings.weight", "layer.0.attention.k_proj.weight", "layer.0.layer_scale1.lambda1"
        ),
        from_transformers_dinov3,
        normalisation=IMAGENET,
    ),
    Layout(
        "transformers Dinov2WithRegistersModel",
        lambda w: ends(w, "embeddings.register_tokens", "embeddings.position_embeddings", "layer.0.layer_scale1.lambda1"),
        from_transformers_dinov2,
        prefix=0,
        normalisation=IMAGENET,
    ),
    Layout(
        "transformers Dinov2Model",
        lambda w: ends(w, "embeddings.position_embeddings", "layer.0.layer_scale1.lambda1"),
        from_transformers_dinov2,
        prefix=1,
        pos_resize="transformers",
        normalisation=IMAGENET,
    ),
    Layout(
        "transformers CLIPVisionModel",
        lambda w: ends(
            w, "embeddings.class_embedding", "embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"
        ),
        from_transformers_clip,
        prefix=1,
        pos_resize="transformers",
        normalisation=layouts_clip.OPENAI,
        act_layer="quick_gelu",
    ),
    Layout(
        "transformers SiglipVisionModel",
        lambda w: ends(w, "embeddings.patch_embedding.bias", "encoder.layers.0.self_attn.q_proj.weight"),
        from_transformers_clip,
        prefix=0,
        pos_resize="transformers",
        normalisation=layouts_clip.HALF,
        act_layer="gelu_tanh",
    ),
    Layout(
        "open_clip",
        lambda w: ends(w, "class_embedding", "conv1.weight", "transformer.resblocks.0.attn.in_proj_weight"),
        from_open_clip,
        prefix=1,
        normalisation=layouts_clip.OPENAI,
        act_layer="gelu",
    ),
    Layout("open_clip with a tower of timm's", has("visual.trunk.patch_embed.proj.weight"), from_open_clip_trunk),
    Layout(
        "facebookresearch/dinov3",
        lambda w: "storage_tokens" in w.state or "rope_embed.periods" in w.state,
        from_dinov3,
        normalisation=IMAGENET,
    ),
    Layout(
        "bytedance/ibot",
        lambda w: "ibot_loss" in w.around or "masked_embed" in w.state,
        from_ibot,
        prefix=1,
        pos_resize="dino",
        normalisation=IMAGENET,
    ),
    Layout("facebookresearch/mae", has("decoder_embed.weight", "pos_embed"), from_mae, prefix=1, normalisation=IMAGENET),
    Layout(
        "facebookresearch/dinov2 with registers",
        has("register_tokens", "pos_embed"),
        from_dinov2,
        prefix=0,
        normalisation=IMAGENET,
    ),
    Layout(
        "facebookresearch/dinov2",
        lambda w: has("mask_token", "pos_embed")(w) and w.state["mask_token"].ndim == 2,
        from_dinov2,
        prefix=1,
        pos_resize="dino",
        normalisation=IMAGENET,
    ),
    Layout(
        "facebookresearch/dino",
        lambda w: "pos_embed" in w.state and ("dino_loss" in w.around or {"student", "teacher"} <= w.around),
        same,
        prefix=1,
        pos_resize="dino",
        normalisation=IMAGENET,
    ),
    Layout("LocAtViT", lambda w: any(".gaug." in name for name in w.state), same),
    Layout("timm", has("patch_embed.proj.weight"), from_timm),
)
