"""KoLeo: class tokens spread over the sphere, each away from its nearest neighbour (arXiv:1806.03198; as in DINOv2, arXiv:2304.07193)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.errors import UserError
from ssl_locat.objectives import Needs, Progress, Views
from ssl_locat.runs.distributed import all_gather_cat, all_reduce_sum_, rank, world_size

EPS = 1e-8  # DINOv2's, in the distance and in the logarithm: of two equal images it would be log 0


class ClassTokens(nn.Module):
    """No head: the class tokens themselves."""

    def forward(self, views: Views) -> Tensor:
        """-> [V, B, D]."""
        return views.cls


class KoLeo(nn.Module):
    """-mean log distance to the nearest neighbour(s) within the batch, summed over the global views (published weight: 0.1).

    Neighbours are looked for among the images of all ranks, and both ends of a pair get the gradient: one rank with 2B images and two with
    B give the same step. DINOv2 looks within each GPU's own batch, DINOv3 within groups of them. Micro-batches of accumulated
    gradients stay apart, hence `min_images`.

    Args:
        topk: neighbours of each image that count (DINOv3; published: 1); the mean is over all pairs.
        min_images: refuse to run with fewer images per micro-batch on all ranks: neighbours in a handful of images say nothing.
    """

    needs = Needs()

    def __init__(self, min_images: int = 64, topk: int = 1):
        super().__init__()
        if topk < 1:
            raise UserError(f"koleo.topk is {topk}; expected how many neighbours of each image count, at least 1")
        self.topk = topk
        self.min_images = min_images

    def make_head(self, embed_dim: int) -> ClassTokens:
        return ClassTokens()

    def forward(self, student: Tensor, teacher: Tensor, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """student [S, B, D] class tokens; the teacher [T, B, D] only says that the first T views are global -> loss [], metrics."""
        distances = torch.stack([nearest_distances(view, self.topk) for view in student[: len(teacher)]])
        loss = -(distances + EPS).log().mean((1, 2)).sum()  # [T, B, topk]
        return loss, {"nearest": distances.detach().mean()}

    def finish_step(self) -> dict[str, Tensor]:
        return {}

    def frozen(self, head: nn.Module, progress: Progress) -> list[nn.Parameter]:
        return []


def nearest_distances(x: Tensor, topk: int = 1) -> Tensor:
    """Distances [B, topk] of this rank's x [B, D], scaled to unit length, to the nearest of all ranks' rows, nearest first.

    Nearest by inner product, oneself left out; distance ||a - b + 1e-8|| with the epsilon inside, as the references' PairwiseDistance.
    UserError where there are not `topk` others.
    """
    x = F.normalize(x.float(), dim=-1, eps=EPS)
    everyone = GatherWithGradient.apply(x)
    if topk >= len(everyone):
        raise UserError(
            f"koleo.topk is {topk}, but a micro-batch on all ranks has {len(everyone)} images: each has {len(everyone) - 1} neighbours"
        )
    with torch.no_grad():
        similarity = x @ everyone.T  # [B, W*B]; the nearest by angle is the nearest by distance for unit vectors
        own = torch.arange(len(x), device=x.device)
        similarity[own, own + rank() * len(x)] = -1
        # argmax takes the first of equals, as the references do for one neighbour
        nearest = similarity.argmax(1, keepdim=True) if topk == 1 else similarity.topk(topk, dim=1).indices
    return (x[:, None] - everyone[nearest] + EPS).norm(dim=-1)


class GatherWithGradient(torch.autograd.Function):
    """[B, D] on each rank -> [W*B, D]; what other ranks' losses say about a row comes back to the rank that owns it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = slice(rank() * len(x), (rank() + 1) * len(x))
        return all_gather_cat(x).clone() if world_size() == 1 else all_gather_cat(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # autograd may hand the same buffer to others: never reduce it in place
        return all_reduce_sum_(gradient.clone())[ctx.rows]
