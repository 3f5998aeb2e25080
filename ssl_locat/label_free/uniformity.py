"""Alignment and uniformity on the unit sphere (Wang and Isola, arXiv:2005.10242): views of an image near, images spread out. Lower is better."""

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> Tensor:
    """x, y [B, D]: two views of each image, unit vectors -> []: mean distance to the power alpha; 0 at best."""
    return (x - y).norm(dim=1).pow(alpha).mean()


def uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    """x [B, D]: unit vectors -> []: log of the mean Gaussian potential over all pairs; 0 when all are one point, about -2 t at best."""
    return torch.pdist(x).pow(2).mul(-t).exp().mean().log()


def unit(features: Tensor) -> Tensor:
    """[B, D] -> rows of length 1."""
    return F.normalize(features.float(), dim=-1)
