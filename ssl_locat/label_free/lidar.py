"""LiDAR (arXiv:2312.04000): RankMe's entropy, but of the directions that tell images apart and that views of one image do not change."""

import torch
from torch import Tensor


@torch.no_grad()
def lidar(features: Tensor, views: int, delta: float = 1e-4, epsilon: float = 1e-8) -> Tensor:
    """features [n * views, D], the views of an image one after the other -> []: effective rank of the linear discriminant matrix (eq. 1-3).

    Sb = covariance of the n image means, Sw = mean scatter of views about their image's mean + delta * I;
    the result is exp(entropy) of the eigenvalues of Sw^-1/2 Sb Sw^-1/2, as shares (+ epsilon before they are normalised).
    Computed in float64: of collapsed features the float32 value is 20 % off. n should exceed D, or the rank is bounded by n - 1.
    """
    if views < 2 or len(features) < 2 * views:
        raise ValueError(
            f"LiDAR compares views of images: at least 2 views of 2 images, not {len(features)} features of {views} views."
        )
    groups = features.double().unflatten(0, (-1, views))  # [n, q, D]
    images, means = len(groups), groups.mean(1)  # [n, D]
    centred = means - means.mean(0)
    between = centred.T @ centred / (images - 1)  # [D, D]
    spread = (groups - means.unsqueeze(1)).flatten(0, 1)  # [n * q, D]
    within = spread.T @ spread / (images * (views - 1)) + delta * torch.eye(
        between.shape[0], dtype=torch.float64, device=spread.device
    )
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors * values.clamp_min(1e-300).rsqrt() @ vectors.T  # Sw^-1/2; delta keeps every eigenvalue above zero
    eigenvalues = torch.linalg.eigvalsh(whiten @ between @ whiten).clamp_min(0) + epsilon
    shares = eigenvalues / eigenvalues.sum()
    return torch.exp(-(shares * shares.log()).sum()).float()
