"""DINO's loss on class tokens (arXiv:2104.14294, eqs. 1-4): cross-entropy between centred, sharpened teacher and student, over
all pairs of a global view (teacher) and another view (student)."""

from typing import Any

import torch
from torch import Tensor, nn

from ssl_locat.objectives import Needs, Progress, Views
from ssl_locat.objectives.blocks import BlockScores, centered_by_blocks, pair_loss_by_blocks, sinkhorn_by_blocks
from ssl_locat.objectives.heads import DINOHead
from ssl_locat.objectives.prototypes import PrototypeObjective
from ssl_locat.objectives.targets import centered, pair_loss, sinkhorn
from ssl_locat.runs.diagnosis import center_drift
from ssl_locat.runs.distributed import all_reduce_mean_


class ClassHead(DINOHead):
    """DINOHead on the class token of every view."""

    # views instead of tokens; a head that held a DINOHead would rename the parameters of every checkpoint
    def forward(self, views: Views) -> Tensor | BlockScores:  # type: ignore[override]
        """-> scores [V, B, K]."""
        return super().forward(views.cls)


class DINO(PrototypeObjective):
    """Self-distillation with centring.

    Args:
        batch_norm: in the head, before each GELU (heads.DINOHead).
        prototypes: the options of PrototypeObjective.
    """

    needs = Needs()

    def __init__(
        self,
        batch_norm: bool = False,
        teacher_temp: tuple[float, ...] = (0.04, 0.04),
        teacher_temp_warmup_epochs: int = 0,
        **prototypes: Any,
    ):
        super().__init__("dino", teacher_temp=teacher_temp, teacher_temp_warmup_epochs=teacher_temp_warmup_epochs, **prototypes)
        self.head_options["batch_norm"] = batch_norm
        # a buffer, so that it is saved with the run; "center" is its name in every checkpoint since 0.1
        self.register_buffer("center", torch.zeros(1, self.num_prototypes))
        self.seen: list[Tensor] = []  # mean teacher scores [1, K] of this step's micro-batches

    def make_head(self, embed_dim: int) -> ClassHead:
        return ClassHead(embed_dim, **self.head_options)

    def forward(
        self, student: Tensor | BlockScores, teacher: Tensor | BlockScores, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """student [S, B, K], teacher [T, B, K] (no grad) scores; the first T student views are the teacher's -> loss [], metrics."""
        temperature = self.temperature(progress)
        if isinstance(student, BlockScores) and isinstance(teacher, BlockScores):
            return self._by_blocks(student, teacher, temperature, self.active(progress))
        assert isinstance(student, Tensor) and isinstance(teacher, Tensor)  # the networks' heads are of one kind
        teacher = teacher.float()  # under bf16 the head gives 8 bits; the softmax at temperature 0.04 multiplies by 25
        if self.targets == "sinkhorn":
            log_targets = sinkhorn(teacher.flatten(0, 1), temperature).view_as(teacher)  # both global views together: [T*B, K]
        else:
            log_targets = centered(teacher, self.center, temperature)  # [T, B, K]
            self.seen.append(teacher.mean((0, 1)).unsqueeze(0))  # [1, K]; the centre itself moves once per step, in finish_step
        targets = log_targets.exp()
        loss = pair_loss(student, targets, self.student_temp)
        with torch.no_grad():
            entropy = -(targets * log_targets).sum(-1).mean()  # []: ln K is uniform, 0 is one prototype; both mean collapse
        return loss, {"teacher_entropy": entropy, "kl": loss.detach() - entropy}

    def _by_blocks(
        self, student: BlockScores, teacher: BlockScores, temperature: float, active: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same over the first `active` prototypes, of which a block exists at a time."""
        teacher_rows = teacher.first(active).rows()
        if self.targets == "sinkhorn":
            targets = sinkhorn_by_blocks(teacher_rows, temperature)
        else:
            targets, sums = centered_by_blocks(teacher_rows, self.center[:, :active], temperature)
            self.seen.append(sums[None] / len(teacher_rows.tokens))
        loss, entropy = pair_loss_by_blocks(student.first(active), targets, self.student_temp)
        return loss, {"teacher_entropy": entropy, "kl": loss.detach() - entropy, **self.shown(active, loss)}

    @torch.no_grad()
    def finish_step(self) -> dict[str, Tensor]:
        """Move the centre, if targets are centred, by the mean over the whole global batch (eq. 4): every micro-batch, every rank."""
        if self.targets != "centering":
            return {}
        mean = all_reduce_mean_(torch.stack(self.seen).mean(0))
        self.seen.clear()
        center = self.center[:, : mean.shape[1]]  # of the prototypes in use
        drift = center_drift(center, mean, self.teacher_temp[1])
        center.lerp_(mean, 1 - self.center_momentum)
        return {"center_norm": self.center.norm(), "center_drift": drift}

    def frozen(self, head: ClassHead, progress: Progress) -> list[nn.Parameter]:
        """Parameters of the student's head that must not move at this point of the run."""
        return list(head.last_layer.parameters()) if self.freezes_prototypes(progress) else []
