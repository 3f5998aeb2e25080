"""SimDINO and SimDINOv2 (arXiv:2502.10385): self-distillation without prototypes, temperatures and centring. Views of an image agree by their
cosine, and a coding-rate term spreads the images of a batch, which is all that keeps their features from being the same.

    R(Z) = 1/2 logdet(I + p / (n eps) Z^T Z) * (p + n) / (p n)        Z [n, p]: n images, of all ranks, p dimensions

`coding_rate` is for class tokens; `patch_cosine` for hidden patches beside it (SimDINOv2), through the same head. What they save: the head is its MLP
alone, and no scores [views, images, prototypes] are made.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.errors import ConfigError, UserError
from ssl_locat.objectives import Needs, Progress, Views
from ssl_locat.objectives.ibot import PatchScores
from ssl_locat.objectives.masking import Masking
from ssl_locat.runs.distributed import sum_over_ranks, world_size


class Projection(nn.Module):
    """MLP to `bottleneck_dim` and unit length: DINO's head without its prototypes."""

    def __init__(self, embed_dim: int, hidden_dim: int, bottleneck_dim: int, num_layers: int):
        super().__init__()
        widths = [embed_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)  # DINO's
            nn.init.zeros_(linear.bias)
            layers += [*([nn.GELU()] if layers else []), linear]
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., p] float32: from here on 8 bits of mantissa would be too few, for a determinant above all."""
        return F.normalize(self.mlp(x).float(), dim=-1)


class ClassProjection(Projection):
    """The same on the class token of every view: [V, B, D] -> [V, B, p]."""

    def forward(self, views: Views) -> Tensor:  # type: ignore[override]  # as dino.ClassHead
        return super().forward(views.cls)


class CodingRate(nn.Module):
    """-coeff * mean cosine over pairs of a teacher's view and another view of the student - mean coding rate of the global views.

    The reference's default sums Z^T Z on each GPU alone and yet divides by their number, so that eps, and with it the result, depends on how many
    there are; we take its other setting (reduce_cov 1): the rate of the whole global micro-batch, on 1 and on n ranks alike.

    Args:
        eps: distortion up to which features count as coded (published 0.05): smaller spreads more.
        coeff: weight of the cosine against the rate.
        expand: whose features are spread: the `mean` of student and teacher (published), or the `student`'s.
        hidden_dim, bottleneck_dim, num_layers: of the head.
        min_images: fewer in a micro-batch of all ranks are refused: n images span n dimensions at most.
    """

    needs = Needs()

    def __init__(
        self,
        eps: float = 0.05,
        coeff: float = 1.0,
        expand: Literal["mean", "student"] = "mean",
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        min_images: int = 64,
    ):
        super().__init__()
        if eps <= 0 or expand not in ("mean", "student"):
            raise UserError(f"coding_rate: eps is {eps}, expand {expand!r}; expected eps above 0, and expand mean or student")
        self.eps, self.coeff, self.expand, self.min_images = eps, coeff, expand, min_images
        self.head_options = {"hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim, "num_layers": num_layers}

    def make_head(self, embed_dim: int) -> ClassProjection:
        return ClassProjection(embed_dim, **self.head_options)

    def forward(self, student: Tensor, teacher: Tensor, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """student [S, B, p], teacher [T, B, p] (no grad); the first T student views are the teacher's -> loss [], metrics."""
        similarity = pair_cosine(student, teacher)
        own = student[: len(teacher)]
        spread = (own + teacher) / 2 if self.expand == "mean" else own
        rate = torch.stack([coding_rate(view, self.eps) for view in spread]).mean()
        return -self.coeff * similarity - rate, {"cosine": similarity.detach(), "coding_rate": rate.detach()}

    def finish_step(self) -> dict[str, Tensor]:
        return {}

    def frozen(self, head: nn.Module, progress: Progress) -> list[nn.Parameter]:
        return []


def pair_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cosine over images and pairs of a teacher's view and another one of the student; [S, B, p], [T, B, p] -> []."""
    student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    cosines = torch.einsum("sbp,tbp->st", student, teacher) / student.shape[1]  # [S, T], means over images
    own = cosines.diagonal().sum()  # a view with itself is no pair
    return (cosines.sum() - own) / (cosines.numel() - len(teacher))


def coding_rate(features: Tensor, eps: float) -> Tensor:
    """R of features [B, p] of this rank, over the images of all ranks; [] float32. Of unit vectors it is bounded, the larger the more even they lie."""
    count, dims = len(features) * world_size(), features.shape[1]
    # of p x p numbers, not of B x B: what ranks sum is small, however many images they have
    covariance = sum_over_ranks(features.float().T @ features.float())
    identity = torch.eye(dims, device=features.device)
    # positive definite: logdet is twice the sum of the logs on Cholesky's diagonal, and R half of that
    factor = torch.linalg.cholesky(identity + covariance * (dims / (count * eps)))
    return factor.diagonal().log().sum() * ((dims + count) / (dims * count))


class PatchCosine(nn.Module):
    """-cosine of the student's hidden patches and the teacher's seen ones (SimDINOv2).

    Sum it with `coding_rate` (published weights: 1 and 1), whose head it uses unless `shared_head` is false: nothing in it alone keeps patches
    apart.

    Args:
        shared_head, hidden_dim, bottleneck_dim, num_layers: as in `ibot` and `coding_rate`.
        refined, mask_shape, mask_probability, mask_ratio: as in `ibot`.
    """

    def __init__(
        self,
        shared_head: bool = True,
        refined: bool = False,
        mask_shape: Literal["block", "random"] = "block",
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        hidden_dim: int | None = None,
        bottleneck_dim: int | None = None,
        num_layers: int | None = None,
    ):
        super().__init__()
        self.head_options = {
            "hidden_dim": hidden_dim or 2048,
            "bottleneck_dim": bottleneck_dim or 256,
            "num_layers": num_layers or 3,
        }
        if shared_head and (hidden_dim or bottleneck_dim or num_layers):
            raise ConfigError(
                "patch_cosine: hidden_dim, bottleneck_dim and num_layers are those of coding_rate's head, which it uses; leave them out, or set "
                "shared_head: false."
            )
        self.shares_head_of = "coding_rate" if shared_head else None
        self.refined = refined
        self.needs = Needs(patches=not refined, refined_patches=refined, masks=True)
        self.masking = Masking.of("patch_cosine", mask_shape, mask_probability, mask_ratio)

    def follow(self, owner: CodingRate) -> None:
        """Nothing to take over: the head itself is shared."""

    def make_head(self, embed_dim: int, patch_dim: int | None = None) -> PatchScores:
        return PatchScores(None if self.shares_head_of else Projection(patch_dim or embed_dim, **self.head_options), self.refined)

    @property
    def hidden_share(self) -> float:
        """Of the global crops' patches, on average."""
        return self.masking.hidden_share

    def make_masks(self, seeds: list[int], views: int, grid: tuple[int, int]) -> Tensor:
        """One seed per image -> bool [views * B, N], on the CPU."""
        return self.masking.draw(seeds, views, grid)

    def forward(
        self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Features [M, p] and weights [M] of the hidden patches, by both networks -> loss [], metrics.

        Each crop's mean over its hidden patches, averaged over all crops, also those of which nothing is hidden (as `ibot`)."""
        (features, weights), (targets, _) = student, teacher
        cosines = F.cosine_similarity(features.float(), targets.float(), dim=-1)  # [M]
        return -(cosines * weights).sum(), {"patch_cosine": cosines.detach().sum() / max(1, len(cosines))}

    def finish_step(self) -> dict[str, Tensor]:
        return {}

    def frozen(self, head: nn.Module, progress: Progress) -> list[nn.Parameter]:
        return []
