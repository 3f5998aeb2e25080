"""DINO's step as its publication describes it, written plainly: what `bench step` compares ours with.

One pair of views at a time, one parameter at a time, and a look at the numbers that makes a device wait; no fused optimiser.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pairwise_loss(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float) -> Tensor:
    """student [S, B, K], teacher [T, B, K] -> []: the mean over pairs of different views, pair by pair (arXiv:2104.14294, alg. 1)."""
    targets = [F.softmax((view - center) / teacher_temp, dim=-1).detach() for view in teacher]
    total, pairs = student.new_zeros(()), 0
    for t, target in enumerate(targets):
        for s, view in enumerate(student):
            if s != t:
                # [B, K] -> [B] -> []
                total = total + torch.sum(-target * F.log_softmax(view / student_temp, dim=-1), dim=-1).mean()
                pairs += 1
    return total / pairs


@torch.no_grad()
def clip_each(parameters: list[nn.Parameter], largest: float) -> None:
    """Each gradient to a norm of `largest`, asking the device for every norm."""
    for parameter in parameters:
        if parameter.grad is not None:
            # .item() waits for the device, once for each tensor
            factor = largest / (parameter.grad.norm(2).item() + 1e-6)
            if factor < 1:
                parameter.grad.mul_(factor)


@torch.no_grad()
def update_each(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.mul_(momentum).add_((1 - momentum) * theirs)
