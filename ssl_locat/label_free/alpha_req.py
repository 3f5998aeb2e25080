"""alpha-ReQ (Agrawal et al., NeurIPS 2022): how fast the eigenspectrum of the features decays. Near 1 is good, large means collapse."""

from typing import NamedTuple

import torch
from torch import Tensor


class PowerLaw(NamedTuple):
    alpha: float  # eigenvalue ~ rank ** -alpha
    r2: float  # how well the line fits, every rank counted alike; far below 1: alpha means nothing


@torch.no_grad()
def eigenspectrum(features: Tensor) -> Tensor:
    """features [B, D] -> [min(B, D)] float64, falling: shares of variance along the principal components (centred features)."""
    centred = features.double() - features.double().mean(0)
    variances = torch.linalg.svdvals(centred) ** 2
    return variances / variances.sum()


@torch.no_grad()
def alpha_req(features: Tensor, first: int = 4, last: int = 50) -> PowerLaw:
    """features [B, D] -> the fit over the ranks first..last (from 1), as far as there are so many components.

    Weighted least squares of log eigenvalue on log rank with weights 1 / rank: ranks lie evenly on a log axis then (the authors' code).
    The first ranks are left out: they follow the data set's few strongest factors rather than the power law."""
    spectrum = eigenspectrum(features)
    last = min(last, int((spectrum > 0).sum()))
    if last - first < 2:
        return PowerLaw(float("nan"), float("nan"))
    ranks = torch.arange(first, last + 1, dtype=torch.float64, device=spectrum.device)
    x, y, weight = ranks.log(), spectrum[first - 1 : last].log(), 1 / ranks
    x_mean, y_mean = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    slope = (weight * (x - x_mean) * (y - y_mean)).sum() / (weight * (x - x_mean) ** 2).sum()
    residual = y - (y_mean + slope * (x - x_mean))
    r2 = 1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()
    return PowerLaw(float(-slope), float(r2))
