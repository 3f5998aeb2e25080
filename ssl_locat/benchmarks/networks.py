"""What `bench step` runs: models by pairs, a network small enough for a laptop, and our training step on it."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

import ssl_locat.models  # noqa: F401  (registers the LocAt models with timm)
from ssl_locat.benchmarks.timing import device
from ssl_locat.objectives import Progress
from ssl_locat.objectives.dino import DINO
from ssl_locat.optim.optim import build_optimizer, clip_gradients, set_hyperparameters
from ssl_locat.pretraining.student_teacher import StudentTeacher

PAIRS = {
    "ViT-S": ("vit_small_patch16_224", "locatvit_small"),
    "ViT-B": ("vit_base_patch16_224", "locatvit_base"),
    "ViT-L": ("vit_large_patch16_224", "locatvit_large"),
}
PROGRESS = Progress(step=0, epoch=2.0, total_epochs=10)


def make_model(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    # vanilla timm models take one size, which they are built for; ours any
    options: dict[str, Any] = {"img_size": size} if name.startswith("vit") else {"img_size": size, "dynamic_img_size": True}
    return timm.create_model(name, num_classes=0, **options).to(device())


def forward_backward(model: nn.Module, images: torch.Tensor, dtype: torch.dtype, keep_gradients: bool = False) -> None:
    torch.compiler.cudagraph_mark_step_begin()
    with autocast(dtype):
        # any scalar will do: what is timed is the network
        loss = model(images).float().square().mean()
    loss.backward()
    # None, not zeros: as the loop leaves them
    if not keep_gradients:
        model.zero_grad(set_to_none=True)


def tiny_pair(prototypes: int) -> tuple[StudentTeacher, DINO]:
    """2.7 M parameters at 32 px: a DINO step that a laptop does in a second or two."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3}
    backbone = timm.models.VisionTransformer(**size, num_classes=0, dynamic_img_size=True)
    objective = DINO(num_prototypes=prototypes).to(device())
    return StudentTeacher(backbone, nn.ModuleDict({"dino": objective})).to(device()), objective


def autocast(dtype: torch.dtype) -> torch.autocast:
    """What networks run under; float32: nothing."""
    return torch.autocast(device().type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def our_stepper(
    model: StudentTeacher, objective: DINO, dtype: torch.dtype = torch.float32
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """step(globals_ [2 * B, 3, H, W], locals_ [n * B, 3, h, w] or None) -> loss []."""
    optimizer = build_optimizer(model.student, (0.9, 0.999))

    def step(globals_: torch.Tensor, locals_: torch.Tensor | None) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # as the loop does it: at every step
        set_hyperparameters(optimizer, 1e-4, 0.04)
        with torch.no_grad(), autocast(dtype):
            targets = model.teacher(globals_, None, 2)
        with autocast(dtype):
            views = model.student(globals_, locals_, 2)
        loss, _ = objective(views["dino"], targets["dino"], PROGRESS)
        loss.backward()
        clip_gradients(model.student.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.finish_step()
        model.update_teacher(0.996)
        return loss.detach()

    return step
