"""Patches with outlying norms (arXiv:2309.16588): large ViTs keep global information in a few patches, whose norms are about ten times
the others' and which are lost to dense tasks. Registers are the cure; this is the symptom's size."""

import torch
from torch import Tensor

TIMES_MEDIAN = 3.0  # about the square root of 10: halfway, on a log scale, between ordinary patches and the paper's outliers


@torch.no_grad()
def norm_outlier_share(patches: Tensor) -> Tensor:
    """patches [B, N, D], of the last block, before its norm -> []: share of patches whose norm exceeds three times the median norm."""
    norms = patches.float().norm(dim=-1)
    return (norms > TIMES_MEDIAN * norms.median()).float().mean()
