"""AdamW as DINO uses it, or Muon for the matrices: lr and weight decay set from outside each step, gradients clipped tensor by tensor; layer-wise rates as in DINOv2."""

from collections.abc import Iterable

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ssl_locat.errors import UserError


def parameter_groups(
    model: nn.Module, layer_decay: float = 1.0, patch_embed_lr: float = 1.0, matrices: bool = False
) -> list[dict]:
    """Decayed parameters and, not decayed, biases and everything one-dimensional (DINO's get_params_groups).

    So cls_token, pos_embed and GAug's weights are decayed, GAug's biases are not. Parameters without requires_grad are left out.
    With factors on the learning rate (see `lr_scales`) there are two such groups for each factor; without, group 0 is decayed, group 1 not.
    matrices: those of `is_matrix` are a group "matrices" of their own, decayed as well.
    """
    scales = lr_scales(model, layer_decay, patch_embed_lr)
    kinds = ("matrices", "decayed", "plain")
    groups: dict[tuple[float, str], list[nn.Parameter]] = {
        (scale, kind): [] for scale in sorted(set(scales.values()), reverse=True) or [1.0] for kind in kinds
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = not (name.endswith(".bias") or parameter.ndim == 1)  # biases and norms: shrinking them only undoes scale
            kind = "matrices" if matrices and is_matrix(name, parameter) else "decayed" if decayed else "plain"
            groups[scales.get(name, 1.0), kind].append(parameter)
    return [
        {"params": parameters, "name": kind, "lr_scale": scale, "weight_decay": 0.0}
        for (scale, kind), parameters in groups.items()
        if parameters
    ]


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon moves it: the linear layers of blocks and heads, which take activations to activations.

    Not the embeddings, tokens and prototypes, whose rows are looked up or compared one by one, nor GAug's few outputs a head: of those
    an orthogonal update means nothing.
    """
    inside = "blocks." in name or ".mlp." in name
    return parameter.ndim == 2 and name.endswith(".weight") and inside and ".gaug." not in name


def lr_scales(model: nn.Module, layer_decay: float, patch_embed_lr: float) -> dict[str, float]:
    """Factor on the learning rate, by the name of each parameter of a student (`backbone`, `heads`, mask token); {} if all are 1.

    Block i of L gets layer_decay^(L - i), counted from 0; what lies before the blocks (patches, positions, class token, registers, the mask token)
    layer_decay^(L + 1), what lies behind them 1; the patch embedding patch_embed_lr besides (as in DINOv2, whose registers alone differ: they get
    1 there). Layers are those that timm's `group_matcher` tells. Raises UserError for a backbone without one.
    """
    if layer_decay == 1 and patch_embed_lr == 1:
        return {}
    if not hasattr(model.backbone, "group_matcher"):
        raise UserError(
            f"{type(model.backbone).__name__} has no group_matcher, by which timm's models tell their layers; "
            "leave optim.layer_decay and optim.patch_embed_lr at 1, or choose a timm model"
        )
    layers = group_parameters(model.backbone, model.backbone.group_matcher(), reverse=True)
    behind = 1 + max(layer for name, layer in layers.items() if "blocks." in name)
    scales = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    for name, layer in layers.items():
        # timm counts the final norm to the last block; what all blocks share (Jumbo's MLP, learned rotary frequencies) keeps the full lr
        if "blocks." in name or layer < behind - 1:
            scales[f"backbone.{name}"] = layer_decay ** (behind - layer) * (
                patch_embed_lr if name.startswith("patch_embed.") else 1
            )
    if "mask_token" in scales:
        scales["mask_token"] = layer_decay**behind
    return scales


def build_optimizer(
    model: nn.Module, betas: tuple[float, float], layer_decay: float = 1.0, patch_embed_lr: float = 1.0, name: str = "adamw"
) -> torch.optim.Optimizer:
    """Fused AdamW, or `muon` (Jordan et al. 2024) for matrices with AdamW for the rest; `set_hyperparameters` gives lr and weight decay before each step.

    Muon's updates are scaled to the size of AdamW's (0.2 * sqrt(larger side), arXiv:2502.16982), so that one lr serves both.
    """
    groups = parameter_groups(model, layer_decay, patch_embed_lr, matrices=name == "muon")
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    from timm.optim import Muon

    for group in groups:
        # told for each group: by their shape alone, prototypes and position tables would count as matrices
        group["use_muon"] = group["name"] == "matrices"
    return Muon(groups, lr=0.0, betas=betas, adjust_lr_fn="match_rms_adamw")


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = 0.0 if group["name"] == "plain" else weight_decay


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, how: str = "per_parameter") -> Tensor:
    """Clip in place; returns the total gradient norm [] before clipping, on the device: nothing here waits for it.

    Args:
        largest: no clipping at 0.
        how: `per_parameter`, each tensor to a norm of `largest` (DINO), or `global`, all together.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)  # one kernel for all tensors, not one each
    total = torch.linalg.vector_norm(torch.stack(norms))  # norm of norms = norm of everything
    if largest > 0:
        if how == "global":
            torch._foreach_mul_(gradients, (largest / (total + 1e-6)).clamp(max=1.0))
        else:
            factors = (largest / (torch.stack(norms) + 1e-6)).clamp(max=1.0)  # 1e-6: as torch's and DINO's clipping
            torch._foreach_mul_(gradients, list(factors.unbind()))
    return total.full_tensor() if isinstance(total, DTensor) else total  # FSDP: the norm of all shards
