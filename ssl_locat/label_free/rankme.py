"""RankMe (arXiv:2210.02885): how many directions an embedding really uses. High is no proof of quality: for dense features it misleads."""

import torch
from torch import Tensor


@torch.no_grad()
def rankme(features: Tensor, epsilon: float = 1e-7) -> Tensor:
    """features [B, D] -> []: effective rank, from 1 to min(B, D) (eq. 1): exp of the entropy of the singular values' shares.

    Features are not centred. epsilon is the paper's; it is added to each share and not normalised away, so that D shares of a larger one
    lift the result. The decomposition is small but not free (and CUDA waits for it): once per log interval, not once per step."""
    values = torch.linalg.svdvals(features.float())
    shares = values / values.sum().clamp_min(1e-12) + epsilon
    return torch.exp(-(shares * shares.log()).sum())
