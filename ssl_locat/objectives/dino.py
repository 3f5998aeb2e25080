"""DINO's loss on class tokens (arXiv:2104.14294, eqs. 1-4): cross-entropy between centred, sharpened teacher and student, over
all pairs of a global view (teacher) and another view (student)."""

from typing import Literal

import torch
from torch import Tensor, nn

from ssl_locat.objectives import Needs, Progress, Views
from ssl_locat.objectives.heads import DINOHead
from ssl_locat.objectives.targets import centered, check_targets, pair_loss, sinkhorn
from ssl_locat.optim.schedules import stepwise
from ssl_locat.runs.diagnosis import center_drift
from ssl_locat.runs.distributed import all_reduce_mean_


class ClassHead(DINOHead):
    """DINOHead on the class token of every view."""

    def forward(self, views: Views) -> Tensor:
        """-> scores [V, B, K]."""
        return super().forward(views.cls)


class DINO(nn.Module):
    """Self-distillation with centring.

    Args:
        num_prototypes: K, outputs of the head.
        hidden_dim, bottleneck_dim, num_layers, batch_norm, norm_last_layer: of the head (heads.DINOHead).
        student_temp: temperature of the student's softmax.
        teacher_temp: [at the start, after the warm-up]; the warm-up is linear from epoch to epoch.
        teacher_temp_warmup_epochs: whole epochs.
        center_momentum: of the running mean of teacher scores that is taken off them.
        frozen_last_layer_epochs: prototypes do not move in these first epochs: ones that move too early collapse the targets.
        targets: `centering` (DINO) or `sinkhorn` (DINOv2): how teacher scores become targets. Sinkhorn balances the prototypes within a
            micro-batch, over all ranks and both views.
        min_images: with `sinkhorn`, refuse to run with fewer images per micro-batch on all ranks.
    """

    needs = Needs()

    def __init__(
        self,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
        student_temp: float = 0.1,
        teacher_temp: tuple[float, float] = (0.04, 0.04),
        teacher_temp_warmup_epochs: int = 0,
        center_momentum: float = 0.9,
        frozen_last_layer_epochs: float = 1,
        targets: Literal["centering", "sinkhorn"] = "centering",
        min_images: int = 64,
    ):
        super().__init__()
        check_targets("dino", targets)
        self.head_options = {
            "num_prototypes": num_prototypes,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "num_layers": num_layers,
            "batch_norm": batch_norm,
            "norm_last_layer": norm_last_layer,
        }
        self.num_prototypes = num_prototypes
        self.student_temp = student_temp
        self.teacher_temp = tuple(teacher_temp)
        self.teacher_temp_warmup_epochs = teacher_temp_warmup_epochs
        self.center_momentum = center_momentum
        self.frozen_last_layer_epochs = frozen_last_layer_epochs
        self.targets = targets
        self.min_images = min_images if targets == "sinkhorn" else 1
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        self.seen: list[Tensor] = []  # mean teacher scores [1, K] of this step's micro-batches

    def make_head(self, embed_dim: int) -> ClassHead:
        return ClassHead(embed_dim, **self.head_options)

    def forward(self, student: Tensor, teacher: Tensor, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """student [S, B, K], teacher [T, B, K] (no grad) scores; the first T student views are the teacher's -> loss [], metrics."""
        temperature = stepwise(int(progress.epoch), *self.teacher_temp, self.teacher_temp_warmup_epochs)
        teacher = teacher.float()
        if self.targets == "sinkhorn":
            log_targets = sinkhorn(teacher.flatten(0, 1), temperature).view_as(teacher)
        else:
            log_targets = centered(teacher, self.center, temperature)
            self.seen.append(teacher.mean((0, 1)).unsqueeze(0))
        targets = log_targets.exp()
        loss = pair_loss(student, targets, self.student_temp)
        with torch.no_grad():
            entropy = -(targets * log_targets).sum(-1).mean()
        return loss, {"teacher_entropy": entropy, "kl": loss.detach() - entropy}

    @torch.no_grad()
    def finish_step(self) -> dict[str, Tensor]:
        """Move the centre, if targets are centred, by the mean over the whole global batch (eq. 4): every micro-batch, every rank."""
        if self.targets != "centering":
            return {}
        mean = all_reduce_mean_(torch.stack(self.seen).mean(0))
        self.seen.clear()
        drift = center_drift(self.center, mean, self.teacher_temp[1])
        self.center.lerp_(mean, 1 - self.center_momentum)
        return {"center_norm": self.center.norm(), "center_drift": drift}

    def frozen(self, head: ClassHead, progress: Progress) -> list[nn.Parameter]:
        """Parameters of the student's head that must not move at this point of the run."""
        return list(head.last_layer.parameters()) if progress.epoch < self.frozen_last_layer_epochs else []
