"""Image towers of CLIP and SigLIP as transformers and open_clip write them -> timm's names; text towers and projections are left out."""

import re
from collections.abc import Callable

from torch import Tensor

State = dict[str, Tensor]
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean and std of CLIP's images
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # of SigLIP's

_TRANSFORMERS: list[tuple[str, str | Callable]] = [
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),  # as its authors spell it
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
]
_OPEN_CLIP: list[tuple[str, str | Callable]] = [
    (r"^class_embedding$", "cls_token"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.", r".ls\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def from_transformers(inside: State) -> State:
    """Of `CLIPVisionModel` and `SiglipVisionModel`, without the names in front. q, k and v of blocks stay apart: layouts.join_qkv joins them."""
    state = _as_tables(_renamed({name: value for name, value in inside.items() if "position_ids" not in name}, _TRANSFORMERS))
    for kind in ("weight", "bias"):  # of the pooling: q is one layer, k and v another
        if f"attn_pool.qkv.{kind}" in state:
            q, kv = state.pop(f"attn_pool.qkv.{kind}").tensor_split([state["attn_pool.latent"].shape[2]])
            state |= {f"attn_pool.q.{kind}": q, f"attn_pool.kv.{kind}": kv}
    return state


def from_open_clip(inside: State) -> State:
    """Of open_clip's own `VisionTransformer`, and of OpenAI's files with its names."""
    known = ("class_embedding", "conv1.", "positional_embedding", "ln_pre.", "ln_post.", "transformer.resblocks.")
    return _as_tables(_renamed({name: value for name, value in inside.items() if name.startswith(known)}, _OPEN_CLIP))


def _renamed(state: State, rules: list[tuple[str, str | Callable]]) -> State:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _as_tables(state: State) -> State:
    """[D] and [N, D] as timm has them: [1, 1, D] and [1, N, D]."""
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    if state["pos_embed"].ndim == 2:
        state["pos_embed"] = state["pos_embed"][None]
    return state
