"""AdamW as DINO uses it: two parameter groups, lr and weight decay set from outside each step, gradients clipped tensor by tensor."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def parameter_groups(model: nn.Module) -> list[dict]:
    """Group 0: decayed. Group 1: biases and everything one-dimensional, not decayed (DINO's get_params_groups).

    So cls_token, pos_embed and GAug's weights are decayed, GAug's biases are not. Parameters without requires_grad are left out.
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed, "name": "decayed"}, {"params": plain, "name": "plain", "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW; `set_hyperparameters` gives it lr and weight decay before each step."""
    return torch.optim.AdamW(parameter_groups(model), lr=0.0, betas=betas, fused=True)


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, how: str = "per_parameter") -> Tensor:
    """Clip in place; returns the total gradient norm [] before clipping, on the device: nothing here waits for it.

    Args:
        largest: no clipping at 0.
        how: `per_parameter`, each tensor to a norm of `largest` (DINO), or `global`, all together.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    total = torch.linalg.vector_norm(torch.stack(norms))
    if largest > 0:
        if how == "global":
            torch._foreach_mul_(gradients, (largest / (total + 1e-6)).clamp(max=1.0))
        else:
            factors = (largest / (torch.stack(norms) + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, list(factors.unbind()))
    return total.full_tensor() if isinstance(total, DTensor) else total
