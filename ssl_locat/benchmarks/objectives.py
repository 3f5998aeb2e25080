"""Time and memory of a training step under each objective, and what the masked patch loss costs beside a head on as many loose tokens."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssl_locat.benchmarks.timing import device, make_rows, peak_bytes, side_by_side, time_rows
from ssl_locat.models import attach_locat
from ssl_locat.objectives import Progress, Views
from ssl_locat.objectives.dino import DINO
from ssl_locat.objectives.distill import Distill
from ssl_locat.objectives.gram import Gram
from ssl_locat.objectives.ibot import IBOT, masked_loss
from ssl_locat.objectives.koleo import KoLeo
from ssl_locat.optim.optim import build_optimizer, clip_gradients, set_hyperparameters
from ssl_locat.pretraining.student_teacher import StudentTeacher

SIZE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
}  # 2.7 M parameters, 64 patches
PROTOTYPES = 4096
PROGRESS = Progress(step=0, epoch=2.0, total_epochs=10)
MEANS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

# one step each; dino alone is what the others are compared with
COMBINATIONS: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "dino": lambda: {"dino": DINO(num_prototypes=PROTOTYPES)},
    "dino, sinkhorn": lambda: {"dino": DINO(num_prototypes=PROTOTYPES, targets="sinkhorn", min_images=1)},
    "dino + ibot": lambda: {"dino": DINO(num_prototypes=PROTOTYPES), "ibot": IBOT(num_prototypes=PROTOTYPES)},
    "dino + ibot, shared head": lambda: {
        "dino": DINO(num_prototypes=PROTOTYPES),
        "ibot": IBOT(num_prototypes=PROTOTYPES, shared_head=True),
    },
    "dino + ibot, refined patches": lambda: {
        "dino": DINO(num_prototypes=PROTOTYPES),
        "ibot": IBOT(num_prototypes=PROTOTYPES, refined=True),
    },
    "dino + koleo": lambda: {"dino": DINO(num_prototypes=PROTOTYPES), "koleo": KoLeo(min_images=1)},
    "dino + gram": lambda: {"dino": DINO(num_prototypes=PROTOTYPES), "gram": Gram()},
    "distill, teacher of the same size": lambda: {"distill": Distill("bench")},
}


def make_backbone() -> nn.Module:
    backbone = attach_locat(VisionTransformer(**SIZE, num_classes=0, dynamic_img_size=True))
    backbone.pretrained_cfg = dict(MEANS)
    return backbone


class Step:
    """A whole training step of a small LocAtViT under some objectives, always on the same crops and masks."""

    def __init__(
        self,
        objectives: dict[str, nn.Module],
        batch: int,
        backbone: nn.Module | None = None,
        sizes: tuple[int, int] = (32, 16),
        share_frozen: bool = False,
    ):
        torch.manual_seed(0)
        self.losses = nn.ModuleDict(objectives)
        # an anchor of the same size: its forward pass is what distilling costs
        anchors = {name: make_backbone() for name in objectives if name == "distill"}
        backbone = backbone or make_backbone()
        self.model = StudentTeacher(backbone, self.losses, anchors, share_frozen=share_frozen).to(device())
        self.losses.to(device())
        self.crops, self.local = (torch.randn(n * batch, 3, s, s, device=device()) for n, s in zip((2, 4), sizes, strict=True))
        # seeds of the images, as the loop gives them: each step hides the same patches
        self.masks = self.model.make_masks(self.losses, list(range(batch)), self.crops)
        self.optimizer = build_optimizer(self.model.student, (0.9, 0.999))

    def loss(self) -> torch.Tensor:
        targets, _ = self.model.targets(self.crops, 2, self.masks)
        views = self.model.student(self.crops, self.local, 2, self.masks)
        return torch.stack([objective(views[name], targets[name], PROGRESS)[0] for name, objective in self.losses.items()]).sum()

    def __call__(self) -> None:
        set_hyperparameters(self.optimizer, 1e-4, 0.04)
        self.loss().backward()
        clip_gradients(self.model.student.parameters(), 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for objective in self.losses.values():
            objective.finish_step()
        self.model.update_teacher(0.996)


def rows(repeats: int) -> list[dict]:
    batch = 256 if device().type == "cuda" else 16
    steps = {name: Step(make(), batch) for name, make in COMBINATIONS.items()}
    case = f"objectives, LocAtViT 2.7 M, 2x32 + 4x16 px, batch {batch}, fp32"
    result = time_rows("step", case, side_by_side(steps, repeats, warmup=1), "dino")
    memory = {name: peak_bytes(step) / 2**20 for name, step in steps.items()}
    return result + make_rows("step", case, "peak memory", "MiB", memory, "dino") + patch_rows(repeats, batch)


def patch_rows(repeats: int, batch: int) -> list[dict]:
    """The patch loss, as the loop runs it, beside the same heads on as many tokens that were no one's patches."""
    objective = IBOT(num_prototypes=PROTOTYPES).to(device())
    # [2, B, 64, D] patches of two global crops, and as many loose tokens as are hidden among them
    student: Any = objective.make_head(SIZE["embed_dim"]).to(device())
    teacher = copy.deepcopy(student).requires_grad_(False)
    # [2 * B, 64], True = hidden
    hidden = objective.make_masks(list(range(batch)), 2, (8, 8)).to(device())
    index = hidden.flatten().nonzero().squeeze(1)
    patches = torch.randn(2, batch, 64, SIZE["embed_dim"], device=device())
    tokens = torch.randn(len(index), SIZE["embed_dim"], device=device())
    weights = torch.full((len(tokens),), 1 / len(tokens), device=device())

    def masked() -> None:
        views = Views(tokens, patches=patches, masks=hidden.unflatten(0, (2, batch)), masked=index)
        objective(student(views), teacher(views), PROGRESS)[0].backward()
        objective.finish_step()

    def loose() -> None:
        targets = (teacher.head(tokens) / 0.04).softmax(-1)
        masked_loss(student.head(tokens) / 0.1, targets, weights).backward()

    variants = {"as many tokens": loose, "hidden patches": masked}
    case = f"patch loss, {len(tokens)} hidden of {hidden.numel()} patches, {PROTOTYPES} prototypes"
    result = time_rows("step", case, side_by_side(variants, repeats), "as many tokens")
    memory = {name: peak_bytes(call) / 2**20 for name, call in variants.items()}
    return result + make_rows("step", case, "peak memory", "MiB", memory, "as many tokens")
