"""How much of a label a linear reader gets out of class tokens, in closed form, as something to make small.

    sum_k p_k (m_k - m)^T T^-1 (m_k - m)

with p_k the share of value k, m_k the mean of its tokens, m and T mean and covariance of all (Pillai's trace): of each value's variance the share that least
squares explains, summed over values. 0 where no linear reader is better than guessing, which is where all means are one (arXiv:2306.03819); at most K - 1. No
opponent has to be trained, whom a backbone could outrun. Means and covariance are running ones, of which the newest part has a gradient; each micro-batch
is centred by itself first, or a backbone could make the covariance large by moving all images together, and explain less by it.
"""

import torch
from torch import Tensor, nn

from ssl_locat.objectives.koleo import GatherWithGradient
from ssl_locat.runs.distributed import all_gather_cat

NEWEST = 0.1  # share of the newest micro-batch in the moments: of few images a reader of many numbers would explain all by chance
RIDGE = 1e-5  # of the mean variance, added to each, so that there is a solution; 1e-3 made no clear difference (docs/results.md)


class LinearReader(nn.Module):
    """Running moments of class tokens [D] for each of K values; buffers, so that a run that resumes goes on with them."""

    def __init__(self, embed_dim: int, values: int):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))  # micro-batches
        self.register_buffer("share", torch.zeros(values))  # [K]
        self.register_buffer("away", torch.zeros(values, embed_dim))  # [K, D]: share * (its mean - the mean of all)
        self.register_buffer("covariance", torch.zeros(embed_dim, embed_dim))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens [V, B, D], labels int64 [B], -1 where unknown -> [], 0 to K - 1; the moments move. The same on every rank, of all their images."""
        values = len(self.share)
        flat = GatherWithGradient.apply(tokens.float().flatten(0, 1))  # [W*V*B, D]
        wanted = all_gather_cat(labels.expand(tokens.shape[:2]).flatten())
        one_hot = (wanted[:, None] == torch.arange(values, device=wanted.device)).float()  # [n, K]; a row of zeros where unknown
        known = one_hot.sum().clamp(min=1)
        centred = (flat - (one_hot.sum(1) @ flat) / known) * one_hot.sum(1, keepdim=True)
        newest = torch.clamp(1 / (self.seen + 1), min=NEWEST) * (one_hot.sum() > 0)  # at first the mean over what there is
        share = torch.lerp(self.share, one_hot.sum(0) / known, newest)
        away = torch.lerp(self.away, one_hot.T @ centred / known, newest)
        covariance = torch.lerp(self.covariance, centred.T @ centred / known, newest)
        with torch.no_grad():
            self.seen += 1
            for kept, moved in ((self.share, share), (self.away, away), (self.covariance, covariance)):
                kept.copy_(moved)
        ridge = RIDGE * covariance.diagonal().mean().detach() + 1e-8
        solved = torch.linalg.solve(covariance + ridge * torch.eye(len(covariance), device=flat.device), away.T)  # [D, K]
        explained = (solved * away.T).sum(0) / share.clamp(min=1e-6)  # [K]
        # of the newest part alone there is a gradient: as large as if all were new
        return explained.sum() + (explained.sum() - explained.sum().detach()) * (1 / newest.clamp(min=1e-6) - 1)
