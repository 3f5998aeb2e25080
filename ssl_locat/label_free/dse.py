"""DSE, the dense representation structure estimator (arXiv:2510.17299): does a checkpoint's patch features serve dense tasks, without labels?

    DSE = inter + lambda * dim - (intra_1 + intra_8) / 2

inter: how far a patch lies from the nearest centroid but its own cluster's (clusters of groups of eight images); intra: radii of the clusters of one image and of a
group; dim: effective dimensionality. Distances are in units of the mean distance of patches to their mean. Higher is better, within
one run: values of different networks or image sets do not compare. The noise over k-means seeds is 0.01 to 0.04: keep the seed and the images.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_locat.seeds import mix64

IMAGE_CLUSTERS, GROUP_CLUSTERS, GROUP_IMAGES = 3, 24, 8  # published settings
ITERATIONS, SHIFT = 20, 1e-4  # of k-means: at most so many; it has converged when the centroids move less


class Clusters(NamedTuple):
    """k-means of G independent sets of points."""

    labels: Tensor  # [G, P] int64, by the centroids before their last move, as the published code has it
    centroids: Tensor  # [G, K, D]


class DSE(NamedTuple):
    dse: float  # with lambda = 1, as the published code; `balanced_dse` applies the paper's lambda to many checkpoints
    inter: float
    intra_1: float
    intra_8: float
    dim: float


@torch.no_grad()
def dse(features: Tensor, seed: int = 0, normalise: bool = True) -> DSE:
    """features [B, N, D]: patches of the last block. A last group of fewer than eight images counts fully.

    normalise: patches to unit length first, as published."""
    patches = F.normalize(features.float(), dim=-1) if normalise else features.float()
    average = mean_distance(patches)
    local = kmeans(patches, seed_centroids(patches, IMAGE_CLUSTERS, seed))
    intra_1 = torch.stack([nan_mean(radii(*pair, IMAGE_CLUSTERS)) for pair in zip(patches, local.labels, strict=True)]).mean()
    inter, spread = [], []
    for group in patches.split(GROUP_IMAGES):
        points = group.flatten(0, 1).unsqueeze(0)  # [1, 8 * N, D]
        found = kmeans(points, seed_centroids(points, GROUP_CLUSTERS, seed))
        inter.append(nearest_other(points[0], found.labels[0], found.centroids[0]))
        spread.append(radii(points[0], found.labels[0], GROUP_CLUSTERS))
    intra_8, inter_mean = nan_mean(torch.cat(spread)), torch.stack(inter).mean()
    dim = effective_dimension(shuffle_patches(patches, seed)).mean()
    parts = [float(value) for value in (inter_mean / average, intra_1 / average, intra_8 / average, dim)]
    return DSE(combine(*parts), *parts)


def combine(inter: float, intra_1: float, intra_8: float, dim: float, weight: float = 1.0) -> float:
    """The sum of the parts; `weight` is lambda."""
    return inter + weight * dim - (intra_1 + intra_8) / 2


def balanced_dse(parts: Sequence[DSE]) -> list[float]:
    """DSE of the checkpoints of one run with the paper's lambda, which brings both terms to one scale by their standard deviations.

    lambda = std(inter - (intra_1 + intra_8) / 2) / std(dim) over the checkpoints: our reading; the authors publish no code for it. 1 where
    the dimensionality does not vary."""
    separation = torch.tensor([combine(p.inter, p.intra_1, p.intra_8, 0.0) for p in parts], dtype=torch.float64)
    dims = torch.tensor([p.dim for p in parts], dtype=torch.float64)
    weight = float(separation.std() / dims.std()) if len(parts) > 1 and dims.std() > 0 else 1.0
    return (separation + weight * dims).tolist()


def local_maxima(scores: Sequence[float], window: int = 2, top: int = 3) -> list[int]:
    """Places of the best `top` scores among those that no neighbour within `window` exceeds, best first: the paper's choice of checkpoints.

    Every point of a plateau counts; ties go to the earlier one."""
    found = [place for place, score in enumerate(scores) if score == max(scores[max(0, place - window) : place + window + 1])]
    return sorted(found, key=lambda place: (-scores[place], place))[:top]


def mean_distance(patches: Tensor) -> Tensor:
    """patches [B, N, D] -> []: mean distance of a patch to the mean of all, the unit of the other distances."""
    flat = patches.flatten(0, 1)
    return (flat - flat.mean(0)).norm(dim=1).mean()


def seed_centroids(points: Tensor, count: int, seed: int) -> Tensor:
    """points [G, P, D] -> [G, K, D]: k-means++ with chances in proportion to the *distance*, as the published code has it, not its square."""
    generator = torch.Generator().manual_seed(mix64(seed, count) >> 1)
    groups = torch.arange(len(points), device=points.device)
    first = torch.randint(points.shape[1], (len(points),), generator=generator).to(points.device)
    chosen = [points[groups, first]]
    distance = (points - chosen[0].unsqueeze(1)).norm(dim=-1)  # [G, P] to the nearest centroid so far
    for _ in range(count - 1):
        # all points alike: any of them serves
        chances = torch.where(distance.sum(1, keepdim=True) > 0, distance, 1.0).cpu()
        following = torch.multinomial(chances, 1, generator=generator)[:, 0].to(points.device)
        chosen.append(points[groups, following])
        distance = torch.minimum(distance, (points - chosen[-1].unsqueeze(1)).norm(dim=-1))
    return torch.stack(chosen, 1)


def kmeans(points: Tensor, centroids: Tensor) -> Clusters:
    """points [G, P, D], centroids [G, K, D] to begin from. Each set stops by itself; an empty cluster keeps its centroid."""
    labels = torch.zeros(points.shape[:2], dtype=torch.int64, device=points.device)
    active = torch.ones(len(points), dtype=torch.bool, device=points.device)
    centroids = centroids.clone()
    for _ in range(ITERATIONS):
        some, old = points[active], centroids[active]
        nearest = torch.cdist(some, old, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)  # [g, P]
        counts = torch.zeros(old.shape[:2], device=points.device).scatter_add_(1, nearest, torch.ones_like(some[..., 0]))
        sums = torch.zeros_like(old).scatter_add_(1, nearest.unsqueeze(-1).expand_as(some), some)
        new = torch.where(counts.unsqueeze(-1) > 0, sums / counts.clamp_min(1).unsqueeze(-1), old)
        labels[active], centroids[active] = nearest, new
        still = (new - old).flatten(1).norm(dim=1) >= SHIFT
        active[active.clone()] = still
        if not active.any():
            break
    return Clusters(labels, centroids)


def radii(points: Tensor, labels: Tensor, count: int) -> Tensor:
    """points [P, D], labels [P] -> [K]: sum of the singular values of each centred cluster of n points / sqrt(max(n - 1, D)); NaN below two points."""
    found = points.new_full((count,), math.nan)
    for label in range(count):
        cluster = points[labels == label]
        if len(cluster) >= 2:
            found[label] = singular_values(cluster - cluster.mean(0)).sum() / math.sqrt(max(len(cluster) - 1, points.shape[1]))
    return found


def nearest_other(points: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """points [P, D], labels [P], centroids [K, D] -> []: mean distance of a point to the nearest centroid that is not its own."""
    distance = torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.scatter(1, labels.unsqueeze(1), math.inf).min(1).values.mean()


def shuffle_patches(patches: Tensor, seed: int) -> Tensor:
    """patches [B, N, D], each image's in an order of its own."""
    generator = torch.Generator().manual_seed(mix64(seed, 0) >> 1)
    order = torch.rand(patches.shape[:2], generator=generator).argsort(1).to(patches.device)
    return patches.gather(1, order.unsqueeze(-1).expand_as(patches))


def effective_dimension(patches: Tensor) -> Tensor:
    """patches [B, N, D] -> [N]: exp of the entropy of the singular values' shares of each patch place's matrix [B, D], not centred, over min(B, D)."""
    values = singular_values(patches.transpose(0, 1))  # [N, min(B, D)]
    shares = values / values.sum(1, keepdim=True) + 1e-12
    return torch.exp(-(shares * shares.log()).sum(1)) / values.shape[1]


def singular_values(matrices: Tensor) -> Tensor:
    """[..., P, D] -> [..., min(P, D)] float64, by the smaller Gram matrix: several times quicker than svdvals on a CPU, and exact enough in float64."""
    wide = matrices.double()
    gram = wide @ wide.mT if wide.shape[-2] <= wide.shape[-1] else wide.mT @ wide
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()


def nan_mean(values: Tensor) -> Tensor:
    return values.nanmean()
