"""Which model a bare state dict is: name and options, read off the names and shapes of its tensors.

For checkpoints that come without a config, as those of the official LocAtViT release, of DINO and of many trainings with timm.
"""

import re

from torch import Tensor

from ssl_locat.errors import CheckpointError
from ssl_locat.models.registry import SIZES, SWIN
from ssl_locat.models.weights import trained_grid

HALF = (0.5, 0.5, 0.5)  # the release's ViT, RegViT and Jumbo classifiers were trained with this mean and std


def recognise(state: dict[str, Tensor], source: str) -> tuple[str, dict]:
    """-> (name of a model in our registry, options that make its state dict look like this one).

    PRR has no weights, so it is taken to be there wherever GAug is. Raises CheckpointError for a layout that is not one of ours.
    """
    try:
        return _recognise(state, source)
    except (LookupError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{source}: not weights of a timm, DINO or LocAt model, though their names are alike ({error})"
        ) from None


def _recognise(state: dict[str, Tensor], source: str) -> tuple[str, dict]:
    patch = state.get("patch_embed.proj.weight")
    if patch is None or patch.ndim != 4:
        raise CheckpointError(f"{source}: no patch_embed.proj.weight, so these are not weights of a timm, DINO or LocAt model")
    gaug = any(".gaug." in name for name in state)
    options = {"num_classes": 0, "in_chans": patch.shape[1], "patch_size": patch.shape[2]}
    for head in ("head.weight", "head.fc.weight"):
        if head in state:
            options["num_classes"] = state[head].shape[0]
    if "layers.0.blocks.0.norm1.weight" in state:
        return _swin(state, options, patch.shape[0], gaug, source)
    dim = patch.shape[0]
    blocks = [int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))]
    if not blocks:
        raise CheckpointError(f"{source}: no blocks.0, blocks.1, ..., so these are not weights of a timm, DINO or LocAt ViT")
    depth = 1 + max(blocks)
    options |= {"embed_dim": dim, "depth": depth, "num_heads": _heads(state, dim)}
    size = next((n for n, s in SIZES.items() if s["embed_dim"] == dim), "small")
    family = _family(state, options)
    grid = trained_grid(state, options.get("reg_tokens", 0) + 1)
    if grid:
        options["img_size"] = grid[0] * options["patch_size"]
    if family == "jumbo_{}":
        options["num_class_tokens"] = state["cls_token"].shape[1]
        size = size if size in ("tiny", "base") else "base"
    return ("locat" if gaug else "") + family.format(size), options


def _family(state: dict[str, Tensor], options: dict) -> str:
    """Name pattern in the registry; adds the options that the family has."""
    if "jumbo_mlp.fc1.weight" in state:
        return "jumbo_{}"
    if "blocks.0.ls1.gamma" in state:
        options["init_values"] = 1e-5  # any value makes the tensors, whose values are loaded
    if "rope.freqs" in state:
        return "vit_{}_rope_mixed"
    if "pos_embed" not in state:
        return "vit_{}_nopos"
    registers = state.get("reg_token", state.get("register_tokens"))
    if "register_tokens" in state:
        options["no_embed_class"] = True  # as timm converts DINOv2's
    if registers is not None:
        options["reg_tokens"] = registers.shape[1]
        return "regvit_{}"
    return "vit_{}"


def _heads(state: dict[str, Tensor], dim: int) -> int:
    if "blocks.0.attn.gaug.log_alpha.weight" in state:
        return dim // state["blocks.0.attn.gaug.log_alpha.weight"].shape[1]
    if "rope.freqs" in state:
        return state["rope.freqs"].shape[2]
    return max(dim // 64, 1)  # every ViT of the paper, DINO and DINOv2 has heads of 64


def _swin(state: dict[str, Tensor], options: dict, dim: int, gaug: bool, source: str) -> tuple[str, dict]:
    if not gaug:
        raise CheckpointError(f"{source}: a Swin without GAug; name the timm model instead and give this file as backbone.init")
    blocks = [re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name) for name in state]
    depths = {int(m[1]): 0 for m in blocks if m}
    for match in filter(None, blocks):
        depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    tables = [state[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in sorted(depths)]
    options |= {
        "embed_dim": dim,
        "depths": tuple(depths[s] for s in sorted(depths)),
        "num_heads": tuple(t.shape[1] for t in tables),
    }
    options["window_size"] = (round(tables[0].shape[0] ** 0.5) + 1) // 2
    size = next((n for n, s in SWIN.items() if s["embed_dim"] == dim), "tiny")
    return f"locatswin_{size}", options
