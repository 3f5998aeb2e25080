"""Which model a bare state dict in timm's names is: name and options, read off the names and shapes of its tensors.

For checkpoints that come without a config, as those of the official LocAtViT release, of DINO and of many trainings with timm.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from timm.models.swin_transformer import resolve_stage_window_sizes
from torch import Tensor

from ssl_locat.errors import CheckpointError
from ssl_locat.models.layouts import Known
from ssl_locat.models.positions import TABLE, num_special_tokens, own_grid, own_windows, size_unknown, swin_windows
from ssl_locat.models.registry import SIZES, SWIN

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and std that the release's ViT, RegViT and Jumbo classifiers were trained with


class Architecture(NamedTuple):
    name: str  # in timm's registry, or ours
    options: dict  # that make its state dict look like this one
    assumed: tuple[str, ...]  # what the tensors do not show, in words, and how to say otherwise
    grid: tuple | None = None  # (rows, cols) of patches that the weights were trained at; of a Swin a window for each stage
    prefix: int | None = None  # how many positional embeddings belong to class token and registers


def recognise(state: dict[str, Tensor], source: str, prefix: int | None = None, given: dict | None = None) -> Architecture:
    """The model of a state dict in timm's names.

    PRR has no weights, so it is taken to be there wherever GAug is. prefix: how many positions belong to special tokens, where the layout
    says it. given: options that the user asked for; an image size among them tells the grid of positions that are no square.
    Raises CheckpointError for names that are not those of a ViT or Swin of timm's, and where the grid cannot be known.
    """
    try:
        return _recognise(state, source, prefix, given or {})
    except (LookupError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{source}: not weights of a timm, DINO or LocAt model, though their names are alike ({error})"
        ) from None


def _recognise(state: dict[str, Tensor], source: str, prefix: int | None, given: dict) -> Architecture:
    patch = state.get("patch_embed.proj.weight")
    if patch is None or patch.ndim != 4:
        raise CheckpointError(f"{source}: no patch_embed.proj.weight, so these are not weights of a timm, DINO or LocAt model")
    gaug = any(".gaug." in name for name in state)
    options: dict[str, Any] = {"num_classes": 0, "in_chans": patch.shape[1], "patch_size": patch.shape[2]}
    for head in ("head.weight", "head.fc.weight"):
        if head in state:
            options["num_classes"] = state[head].shape[0]
    if "layers.0.blocks.0.norm1.weight" in state:
        return _swin(state, options, patch.shape[0], gaug, source, given)
    dim = patch.shape[0]
    blocks = [int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))]
    if not blocks:
        raise CheckpointError(f"{source}: no blocks.0, blocks.1, ..., so these are not weights of a timm, DINO or LocAt ViT")
    options |= {"embed_dim": dim, "depth": 1 + max(blocks), **_heads(state, dim)}
    heads = f"{options['num_heads']} heads of {dim // options['num_heads']}, say num_heads=N otherwise"
    assumed = () if shown_heads(state) else (heads,)
    grid = told_grid(given, options["patch_size"])
    if gaug and "pos_embed" not in state and grid is None:
        raise size_unknown(source)
    if "blocks.0.gamma_1" in state and not {"pos_embed", "rope.freqs"} & state.keys():
        return Architecture(_dinov3(state, options, gaug), options, assumed, grid)
    family = _family(state, options)
    name = ("locat" if gaug else "") + family.format(_size(options["embed_dim"], family))
    if _mlp(state, options):  # timm's name for packed SwiGLU, which is a class and could not be written into a config.json
        name = "vit_giant_patch14_reg4_dinov2" if "reg_token" in state else "vit_giant_patch14_dinov2"
        options |= {"gaug": True, "prr": True} if gaug else {}
    if "pos_embed" in state and state["pos_embed"].ndim == 3:
        told = size_grid(given, options["patch_size"])
        prefix, grid = own_grid(state, prefix, told, source, no_embed_class=given.get("no_embed_class"))
        options["img_size"] = grid[0] * options["patch_size"]
        if grid[0] != grid[1]:
            options["img_size"] = [side * options["patch_size"] for side in grid]
        if prefix == 0 and "cls_token" in state and family != "jumbo_{}":
            options["no_embed_class"] = True
    if family == "jumbo_{}":
        options |= _jumbo(state, options)
    return Architecture(name, options, assumed, grid, prefix)


def _jumbo(state: dict[str, Tensor], options: dict) -> dict:
    """Options of Jumbo's own that differ from those of its name."""
    own: dict[str, Any] = {"num_class_tokens": state["cls_token"].shape[1], "norm_patches": "norm_patches.weight" in state}
    hidden, wide = state["jumbo_mlp.fc1.weight"].shape
    if hidden != int(wide * options.get("mlp_ratio", 4.0)):  # of the one wide MLP, not of the patches'
        own["jumbo_mlp_ratio"] = (hidden + 0.5) / wide  # a half, since Jumbo rounds down, too
    if "blocks.0.ls1.gamma" not in state:
        own["init_values"] = None
    return own


def _size(dim: int, family: str) -> str:
    """The size of our registry that has this width; another width is an option of any of them."""
    size = next((name for name, shape in SIZES.items() if shape["embed_dim"] == dim), "small")
    return size if family != "jumbo_{}" or size in ("tiny", "base") else "base"


def as_told(known: Known, given: dict) -> Known:
    """`known` with what the user says of weights that a model takes: the image size that they were trained at, whether the class token has a position."""
    patch, prefix = known.state.get("patch_embed.proj.weight"), known.layout.prefix
    if patch is None or patch.ndim != 4:
        return known
    if prefix is None and "no_embed_class" in given:
        prefix = 0 if given["no_embed_class"] else num_special_tokens(known.state)
    grid: Sequence | None = told_grid(given, patch.shape[2])
    if TABLE.format(0, 0) in known.state:
        stages = {name.split(".")[1] for name in known.state if name.endswith("relative_position_bias_table")}
        grid = _told_windows(given, patch.shape[2], len(stages), known.state[TABLE.format(0, 0)])
    return known._replace(layout=known.layout._replace(prefix=prefix), grid=grid)


def size_grid(given: dict, patch_size: int) -> tuple[int, int] | None:
    """The grid (rows, cols) of an image size that the user gives, a number or [height, width]."""
    size = given.get("img_size")
    if size is None:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    patch_size = given.get("patch_size", patch_size)
    return int(height) // patch_size, int(width) // patch_size


def told_grid(given: dict, patch_size: int) -> tuple[int, int] | None:
    """The grid (rows, cols) that weights were trained at as the user says it: GAug's `initial_grid`, or that of an image size."""
    gaug = given.get("gaug")
    grid = gaug.get("initial_grid") if isinstance(gaug, dict) else None
    return tuple(grid) if grid else size_grid(given, patch_size)


def _family(state: dict[str, Tensor], options: dict) -> str:
    """Name pattern in the registry; adds the options that the family has."""
    if "jumbo_mlp.fc1.weight" in state:
        return "jumbo_{}"
    if "blocks.0.ls1.gamma" in state:
        options["init_values"] = 1e-5  # any value makes the tensors, whose values are loaded
    if "rope.freqs" in state:
        return "vit_{}_rope_mixed"
    if "cls_token" not in state:
        options |= {"class_token": False, "global_pool": "avg"}
    if "attn_pool.latent" in state:  # SigLIP: a learned query pools the patches
        options["global_pool"] = "map"
        return "vit_base_patch16_siglip_224"
    if "norm_pre.weight" in state:  # CLIP: a norm before the blocks, no bias in the patches' kernels, eps 1e-5 in every norm
        return "vit_base_patch16_clip_224"
    if "fc_norm.weight" in state:  # as MAE fine-tunes: mean of the patches, then the norm
        options |= {"global_pool": "avg"}
    elif options.get("global_pool") == "avg" and "norm.weight" in state:
        options |= {"fc_norm": False}
    if "reg_token" in state:
        options["reg_tokens"] = state["reg_token"].shape[1]
    if "pos_embed" not in state:
        return "vit_{}_nopos"
    return "regvit_{}" if "reg_token" in state else "vit_{}"


def _mlp(state: dict[str, Tensor], options: dict) -> bool:
    """Adds the MLP's width where it is not four times as wide; returns whether it is a packed SwiGLU, whose gate halves the inner width."""
    first, second = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.fc2.weight")
    if first is None or second is None:
        return False
    rows, columns = first.shape[0], second.shape[1]
    if rows != 4 * options["embed_dim"]:
        options["mlp_ratio"] = (rows + 0.5) / options["embed_dim"]  # a half, since timm rounds down
    return rows == 2 * columns


def _dinov3(state: dict[str, Tensor], options: dict, gaug: bool) -> str:
    """timm's Eva with DINOv3's periodic RoPE; pooled by the class token, as its makers do (timm's default is the mean)."""
    gated = "blocks.0.mlp.fc1_g.weight"
    hidden = state[gated if gated in state else "blocks.0.mlp.fc1.weight"]
    options |= {"mlp_ratio": (hidden.shape[0] + 0.5) / options["embed_dim"], "global_pool": "token"}
    options["num_reg_tokens"] = state["reg_token"].shape[1] if "reg_token" in state else 0
    if gaug:
        options |= {"gaug": True, "prr": True}
    if "blocks.0.mlp.fc1_g.weight" in state:
        options["swiglu_align_to"] = 1
        return "vit_small_plus_patch16_dinov3" + ("_qkvb" if "blocks.0.attn.q_bias" in state else "")
    size = next((n for n, s in SIZES.items() if s["embed_dim"] == options["embed_dim"] and n != "tiny"), "small")
    return f"vit_{size}_patch16_dinov3" + ("_qkvb" if "blocks.0.attn.q_bias" in state else "")


def shown_heads(state: dict[str, Tensor]) -> int | None:
    """The number of heads, where tensors show it."""
    if "blocks.0.attn.gaug.log_alpha.weight" in state:
        return state["patch_embed.proj.weight"].shape[0] // state["blocks.0.attn.gaug.log_alpha.weight"].shape[1]
    return state["rope.freqs"].shape[2] if "rope.freqs" in state else None


def _heads(state: dict[str, Tensor], dim: int) -> dict:
    """Every ViT of the paper, DINO, DINOv2 and DINOv3 (but for the 7B) has heads of 64; the 7B's are of 128."""
    return {"num_heads": shown_heads(state) or max(dim // (128 if dim >= 4096 else 64), 1)}


def _swin(state: dict[str, Tensor], options: dict, dim: int, gaug: bool, source: str, given: dict) -> Architecture:
    if not gaug and "name" not in given:
        raise CheckpointError(f"{source}: a Swin without GAug; name the timm model, as in FILE?name=swin_tiny_patch4_window7_224")
    blocks = [re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name) for name in state]
    depths = {int(m[1]): 0 for m in blocks if m}
    for match in filter(None, blocks):
        depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    stages = sorted(depths)
    windows = own_windows(state, _told_windows(given, options["patch_size"], len(stages), state[TABLE.format(0, 0)]), source)
    options |= {
        "embed_dim": dim,
        "depths": tuple(depths[stage] for stage in stages),
        "num_heads": tuple(state[TABLE.format(stage, 0)].shape[1] for stage in stages),
        # each stage's own, so that another image size changes none that fits into it
        "window_size": windows[0][0] if {*windows} == {windows[0]} and len({*windows[0]}) == 1 else tuple(windows),
    }
    # the smallest image with these windows: 224 px for 7 x 7 in each of four stages; where stages shift their windows follows the size, too
    sides = [options["patch_size"] * max(window[axis] << stage for stage, window in enumerate(windows)) for axis in (0, 1)]
    options["img_size"] = sides[0] if sides[0] == sides[1] else sides
    size = next((n for n, s in SWIN.items() if s["embed_dim"] == dim), "tiny")
    assumed = () if "img_size" in given else (f"images of {sides[0]}x{sides[1]} px, say img_size=PIXELS otherwise",)
    return Architecture(f"locatswin_{size}", options, assumed, tuple(windows))


def _told_windows(given: dict, patch_size: int, stages: int, first: Tensor) -> list[tuple[int, int]] | None:
    """Windows of the stages on images of the size that the user says; first: the table of the first stage, whose window is square unless said."""
    grid = size_grid(given, patch_size)
    if grid is None:
        return None
    window = given.get("window_size", (round(first.shape[0] ** 0.5) + 1) // 2)
    return swin_windows(grid, resolve_stage_window_sizes(window, stages))
