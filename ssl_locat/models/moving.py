"""What moves of a backbone that starts from given weights: all of it, its last blocks, or low-rank adapters beside its linear layers.

    choose_moving(backbone, "last", last_blocks=4)            # in place: requires_grad says what moves
    choose_moving(backbone, "lora", rank=16, new=missing)     # in place: adapters by Hugging Face's peft, everything else frozen
    state = merged(state, alpha / rank)                       # a state dict with adapters -> the plain model's, without peft

What the start's weights did not bring (`new`: GAug attached to a vanilla ViT, say) moves always: frozen it would stay as it was drawn.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ssl_locat.errors import UserError, did_you_mean
from ssl_locat.models.gaug import GAug
from ssl_locat.models.tokens import forward_tokens

# kinds of linear layers in timm's blocks -> their names; other names are taken as they are
TARGETS = {
    "qkv": ("qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj"),
    "proj": ("proj",),
    "fc1": ("fc1", "fc1_g", "fc1_x"),  # SwiGLU: gate and value side by side in fc1 (DINOv2's w12), or apart (DINOv3's w1, w2)
    "fc2": ("fc2",),
}
# `also_trainable`: whether a parameter of this name, of a module of this class, belongs to the part
PARTS: dict[str, Callable[[str, str], bool]] = {
    "norms": lambda name, kind: "norm" in kind.lower(),
    "gaug": lambda name, kind: ".gaug." in name,
    "layer_scale": lambda name, kind: name.endswith((".gamma", ".gamma_1", ".gamma_2")),
    "positions": lambda name, kind: (
        name.startswith("pos_embed") or "rope." in name or name.endswith("relative_position_bias_table")
    ),
    "class_token": lambda name, kind: name in ("cls_token", "reg_token", "dist_token"),
    "patch_embed": lambda name, kind: name.startswith("patch_embed."),
}
A, B = ".lora_A.default.weight", ".lora_B.default.weight"  # as peft names the factors [rank, in] and [out, rank]


def backbone_blocks(backbone: nn.Module) -> list[nn.Module]:
    """Transformer blocks of a ViT, or of all stages of a Swin."""
    return (
        list(backbone.blocks) if hasattr(backbone, "blocks") else [block for stage in backbone.layers for block in stage.blocks]
    )


def choose_moving(
    backbone: nn.Module,
    trainable: str,
    *,
    last_blocks: int = 4,
    rank: int = 16,
    alpha: float = 16,
    targets: Iterable[str] = ("qkv", "proj", "fc1", "fc2"),
    also: Collection[str] = (),
    new: Collection[str] = (),
) -> None:
    """Freeze what does not move (requires_grad), and put in adapters where `trainable` is "lora"; in place.

    Args:
        trainable: "full" leaves the backbone as it is; "last", the last blocks and all that lies behind the first of these; "lora".
        also: parts of PARTS that move besides, in all blocks; "mask_token" is no part of a backbone and passed over.
        new: names of parameters that the start's weights did not bring.

    Raises:
        UserError: more blocks than there are, a part or a layer that this backbone has not, peft is missing, or a layer whose weights are
            read past its adapter.
    """
    if trainable == "full":
        return
    # by identity: adapters change the names
    moving = {id(parameter) for name, parameter in backbone.named_parameters() if name in new}
    moving |= {id(parameter) for part in also if part != "mask_token" for parameter in _part(backbone, part)}
    if trainable == "last":
        moving |= {id(parameter) for parameter in _from_block(backbone, last_blocks)}
    else:
        layers = _target_layers(backbone, targets)
        _put_in_adapters(backbone, layers, rank, alpha)
        moving |= {id(parameter) for name, parameter in backbone.named_parameters() if ".lora_" in name}
    for parameter in backbone.parameters():
        parameter.requires_grad_(id(parameter) in moving)
    if trainable == "lora":
        _require_acting(backbone)


def merged(state: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """A state dict with adapters -> that of the plain model: weight + scaling * B A, added up in float64. One without stays as it is."""
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, factor in state.items():
        if name.endswith(A):
            stem = name.removesuffix(A)
            weight = plain[f"{stem}.weight"]
            change = state[stem + B].double() @ factor.double()  # [out, rank] [rank, in]
            plain[f"{stem}.weight"] = (weight.double() + scaling * change).to(weight.dtype)
    return plain


def first_moving_block(backbone: nn.Module) -> int:
    """Number of the first block whose inside the backward pass reaches; the number of blocks where none is."""
    blocks = backbone_blocks(backbone)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    names = [(name, parameter) for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    # what lies before the blocks: gradients go through all of them to reach it
    behind = ("norm.", "fc_norm.", "prr.", "attn_pool.", "head")
    if any(id(parameter) not in inside and not name.startswith(behind) for name, parameter in names):
        return 0
    return next((i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())), len(blocks))


def _part(backbone: nn.Module, part: str) -> Iterator[nn.Parameter]:
    kinds = {id(p): type(module).__name__ for module in backbone.modules() for p in module.parameters(recurse=False)}
    found = [p for name, p in backbone.named_parameters() if PARTS[part](name, kinds[id(p)])]
    if not found:
        raise UserError(f"backbone.also_trainable lists {part}, of which this {type(backbone).__name__} has none; leave it out.")
    yield from found


def _from_block(backbone: nn.Module, count: int) -> Iterator[nn.Parameter]:
    """Of the last `count` blocks and of everything that is made after the first of them: norms, PRR, pooling."""
    blocks = backbone_blocks(backbone)
    if count > len(blocks):
        raise UserError(
            f"backbone.last_blocks is {count}, but {type(backbone).__name__} has {len(blocks)} blocks. Give fewer, or trainable: full."
        )
    first, reached = blocks[-count], False
    for module in backbone.modules():  # in the order in which timm makes them: patches, blocks, what lies behind
        reached = reached or module is first
        if reached:
            yield from module.parameters(recurse=False)


def _target_layers(backbone: nn.Module, targets: Iterable[str]) -> list[str]:
    """Full names of the linear layers in the blocks that `targets` mean; GAug's own are none of them."""
    blocks = {id(block) for block in backbone_blocks(backbone)}
    inside = [
        f"{name}.{layer}"
        for name, block in backbone.named_modules()
        if id(block) in blocks
        for layer, module in block.named_modules()
        if isinstance(module, nn.Linear) and not any(isinstance(block.get_submodule(p), GAug) for p in _parents(layer))
    ]
    known = {name.rpartition(".")[2] for name in inside}
    chosen: list[str] = []
    for target in targets:
        names = set(TARGETS.get(target, (target,)))
        if not names & known:
            raise UserError(
                f"backbone.lora.targets lists {target!r}, of which the blocks of this {type(backbone).__name__} have none; linear layers there: "
                f"{', '.join(sorted(known))}.{did_you_mean(target, known)}"
            )
        chosen += [name for name in inside if name.rpartition(".")[2] in names and name not in chosen]
    return chosen


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _put_in_adapters(backbone: nn.Module, layers: list[str], rank: int, alpha: float) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            "backbone.trainable is lora, which needs Hugging Face's peft: pip install 'ssl_locat[lora]'; `last` and `full` need nothing."
        ) from None
    # a pattern over whole names: peft matches a list by endings, so that "proj" would also put one beside the patch embedding
    pattern = "|".join(re.escape(name) for name in layers)
    # Any: peft's annotation says int, any number serves
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": pattern}
    inject_adapter_in_model(LoraConfig(**options), backbone)
    for module in backbone.modules():
        if hasattr(module, "qkv_bias_separate") and hasattr(module.qkv, "lora_A"):
            # timm's Eva and BEiT multiply qkv.weight themselves and pass the adapter by, unless told to add their biases apart
            module.qkv_bias_separate = True


def adapters(backbone: nn.Module) -> dict[str, Any]:
    """Adapted layers by name."""
    return {
        name: module for name, module in backbone.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


@torch.no_grad()
def _require_acting(backbone: nn.Module) -> None:
    """UserError for adapters that no forward pass calls: a model that reads `layer.weight` itself would leave them without effect."""
    waiting = adapters(backbone)
    names = {module: name for name, module in waiting.items()}

    def called(module: nn.Module, *_: Any) -> None:  # what a hook returns would take the output's place
        waiting.pop(names[module], None)

    hooks = [module.register_forward_hook(called) for module in names]
    patch = backbone.patch_embed.patch_size
    patch = patch if isinstance(patch, tuple) else (patch, patch)
    any_size = getattr(backbone, "dynamic_img_size", False)
    size = [2 * side for side in patch] if any_size else backbone.patch_embed.img_size or [14 * side for side in patch]
    like, training = next(backbone.parameters()), backbone.training
    # without stochastic depth, which would draw numbers
    backbone.eval()
    forward_tokens(backbone, like.new_zeros(1, backbone.patch_embed.proj.in_channels, *size))
    backbone.train(training)
    for hook in hooks:
        hook.remove()
    if waiting:
        raise UserError(
            f"adapters on {', '.join(list(waiting)[:3])} would have no effect: this {type(backbone).__name__} reads the weights of those layers "
            "itself. Leave them out of backbone.lora.targets, or take trainable: last."
        )
