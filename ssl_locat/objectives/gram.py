"""Gram anchoring (DINOv3, arXiv:2508.10104, section 4): patch-to-patch similarities stay what they were in an earlier teacher.

Long training lets the class token's loss wear the patches' locality away; the anchor, a frozen copy from a time when they were good,
holds the similarities in place while the features themselves may move.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.errors import UserError
from ssl_locat.objectives import Needs, Progress, Views, required

NEGATIVES = ("keep", "zero", "zero_teacher")


class PatchTokens(nn.Module):
    """No head: the patch tokens of the global crops themselves.

    Args:
        refined: those after PRR instead of those after the final norm alone.
    """

    def __init__(self, refined: bool):
        super().__init__()
        self.refined = refined

    def forward(self, views: Views) -> Tensor:
        """-> [T, B, N, D]."""
        return required(views.refined_patches if self.refined else views.patches)


class Gram(nn.Module):
    """Mean squared difference of the student's and the anchor's similarities of patches.

    Args:
        anchor: MODEL of the frozen network (a run's folder or checkpoint, ...); `start`: that of backbone.init, as it was before LocAt; or
            `teacher`: a copy of this run's own teacher.
        anchor_every_steps: with `teacher`, copy it anew after so many steps (10000 in DINOv3's refinement stage); None: never.
        anchor_scale: the anchor sees the crops so large that it has this many patches, per side, for each of the student's, and its
            tokens are brought back to the student's grid: smoother, finer similarities (2 in DINOv3). Above 1 they are cut again from
            the image, at crops.anchor_size.
        level: similarities within each `image`, or among the patches of the whole micro-batch on a rank (`batch`).
        negatives: `keep` them, `zero` those of both, or `zero_teacher` only the anchor's. (DINOv3's remove_only_teacher_neg means to zero
            the student's too where both are negative, but tests the anchor after zeroing it; we do what it does.)
        normalize: similarities are cosines.
        refined: compare tokens after PRR instead of after the final norm alone.
    """

    def __init__(
        self,
        anchor: str = "teacher",
        anchor_every_steps: int | None = None,
        anchor_scale: float = 1.0,
        level: Literal["image", "batch"] = "image",
        negatives: Literal["keep", "zero", "zero_teacher"] = "keep",
        normalize: bool = True,
        refined: bool = False,
    ):
        super().__init__()
        if level not in ("image", "batch"):
            raise UserError(f"gram: level is {level!r}; expected image or batch")
        if negatives not in NEGATIVES:
            raise UserError(f"gram: negatives is {negatives!r}; expected one of {', '.join(NEGATIVES)}")
        self.anchor, self.anchor_every_steps, self.anchor_scale = anchor, anchor_every_steps, anchor_scale
        self.level, self.negatives, self.normalize, self.refined = level, negatives, normalize, refined
        self.needs = Needs(patches=not refined, refined_patches=refined)

    def make_head(self, embed_dim: int, anchor_dim: int) -> PatchTokens:
        return PatchTokens(self.refined)

    def forward(self, student: Tensor, anchor: Views, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """student [T, B, N, D], the anchor's views of the same global crops -> loss [], metrics."""
        target = required(anchor.refined_patches if self.refined else anchor.patches)
        return self.compare(student.flatten(0, 1), target.flatten(0, 1)), {}  # views and images alike: [T*B, N, D]

    def compare(self, student: Tensor, target: Tensor) -> Tensor:
        """[B, N, D] and [B, N, D'] (the widths may differ) -> loss []."""
        similarities = []
        for tokens in (student.float(), target.float()):
            tokens = F.normalize(tokens, dim=-1) if self.normalize else tokens
            tokens = tokens.flatten(0, 1) if self.level == "batch" else tokens
            similarities.append(tokens @ tokens.mT)  # Gram matrices: [B, N, N], or [B*N, B*N] over the batch
        student, target = similarities
        if self.negatives == "zero":
            student = student.clamp(min=0)
        if self.negatives != "keep":
            target = target.clamp(min=0)
        return F.mse_loss(student, target)

    def finish_step(self) -> dict[str, Tensor]:
        return {}

    def frozen(self, head: nn.Module, progress: Progress) -> list[nn.Parameter]:
        return []
