"""How well neighbours tell a label of class tokens, as something to make small: what a k-NN reads, wherever in the tokens' space it is written.

    -log of the share of an image's neighbours that have another label than itself, each weighed by exp(-d^2 / s^2), s its distance to the tenth nearest

Images of a batch are compared with each other and with those of the steps before (a memory, without gradient), and never with their own other views. What the
neighbours pull together are images that are alike but for the label, so that content may stay; where a label goes along with content, that is the better part.
Of a label that cannot be told it is what guessing gives: log 2 for two values that are equally common.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.objectives.koleo import GatherWithGradient
from ssl_locat.runs.distributed import all_gather_cat, rank, world_size

MEMORY = 1024  # tokens: 8 steps of 64 images in two views; the backbone moves, and what is older was seen by another one
NEAREST = 10  # to which the width reaches: of fewer, one image's chance decides; of more, nothing is local
LEAST = 1e-5  # of a squared width: rounding of squares in float32 is 1e-7


class NeighbourReader(nn.Module):
    """Remembers class tokens [MEMORY, D] of unit length and their labels; buffers, so that a run that resumes goes on with them."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.register_buffer("tokens", torch.zeros(MEMORY, embed_dim))
        self.register_buffer("labels", torch.full((MEMORY,), -1))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens [V, B, D] of this rank, labels int64 [B], -1 where unknown -> [], the mean over this rank's images, of which those that say nothing
        count 0; the memory moves on. All ranks hold as many images; the mean over ranks is that of one process with all of them."""
        views, batch = tokens.shape[:2]
        own = F.normalize(tokens.float(), dim=-1)
        # [V, W*B, D] in the order of one process, whatever the number of ranks: the memory is cut at its end
        new = GatherWithGradient.apply(own.transpose(0, 1).flatten(1)).unflatten(1, (views, -1)).transpose(0, 1).flatten(0, 1)
        told = all_gather_cat(labels).repeat(views)
        image = torch.arange(batch * world_size(), device=own.device).repeat(views)
        others = torch.cat([new, self.tokens])  # [m, D]
        other_labels = torch.cat([told, self.labels])
        other_image = torch.cat([image, torch.full_like(self.labels, -1)])

        rows, mine = own.flatten(0, 1), labels.repeat(views)[:, None]  # [V*B, D], [V*B, 1]
        own_image = torch.arange(batch, device=own.device).repeat(views)[:, None] + batch * rank()
        compared = (mine >= 0) & (other_labels >= 0) & (own_image != other_image)  # [V*B, m]
        different = compared & (mine != other_labels)
        lengths = rows.square().sum(1, keepdim=True) + others.square().sum(1)
        squares = (lengths - 2 * rows @ others.T).clamp(min=0)  # of distances, [V*B, m]
        far = torch.finfo(squares.dtype).max
        width = squares.detach().masked_fill(~compared, far).topk(NEAREST, dim=1, largest=False).values[:, -1:]  # [V*B, 1]
        scores = -squares / width.clamp(min=LEAST)
        told_apart = _log_sum(scores, compared) - _log_sum(scores, different)  # [V*B]
        with torch.no_grad():
            self.tokens.copy_(others[:MEMORY])
            self.labels.copy_(other_labels[:MEMORY])
        # where all that is known has one label there is nobody to be told from
        return torch.where(different.any(1), told_apart, 0).mean()


def _log_sum(scores: Tensor, chosen: Tensor) -> Tensor:
    """log sum exp [n] over the chosen of [n, m]; rows without any give a large negative number, not -inf, whose gradient would be NaN."""
    return scores.masked_fill(~chosen, -1e9).logsumexp(1)
