"""Projection heads: from a token to scores over prototypes."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.objectives.blocks import BlockScores
from ssl_locat.runs.distributed import SyncBatchNorm


class Prototypes(nn.Module):
    """Weight-normalised linear layer without bias: row k scores prototype k by `g_k * cos(x, v_k)` for a unit-length x.

    Parameter names are those of the reference's old-style weight_norm (weight_g, weight_v), so that its heads load.

    Args:
        norm: keep every g at 1, untrained (DINO's norm_last_layer): prototypes of different lengths destabilise long runs.
    """

    def __init__(self, dim: int, num_prototypes: int, norm: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=not norm)  # g [K, 1]
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, dim))
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)  # nn.Linear's own

    def weight(self) -> Tensor:
        """[K, dim]."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor, block: int = 0) -> Tensor | BlockScores:
        """[n, dim] -> scores [n, K]; with `block`, what they are made of, so many prototypes at a time."""
        weight = self.weight()
        if not block:
            return F.linear(x, weight)
        # as the layer itself would; shapes alone ("meta") have no autocast
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        return BlockScores(x, weight, block)


class DINOHead(nn.Module):
    """MLP to a bottleneck, L2 normalisation, prototypes (DINO, arXiv:2104.14294, section 3.1 and appendix C).

    Args:
        num_layers: of the MLP; 1 is a single linear layer to the bottleneck.
        batch_norm: BatchNorm before each GELU, over all ranks.
        norm_last_layer: see Prototypes.
        prototype_block: make BlockScores instead of scores, this many prototypes at a time.
    """

    def __init__(
        self,
        embed_dim: int,
        num_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
        prototype_block: int = 0,
    ):
        super().__init__()
        self.prototype_block = prototype_block
        widths = [embed_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]  # D -> hidden ... -> bottleneck
        layers: list[nn.Module] = []
        for depth, (before, after) in enumerate(pairwise(widths)):
            if depth:
                layers += [SyncBatchNorm(before)] * batch_norm + [nn.GELU()]
            layers.append(nn.Linear(before, after))
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)  # DINO's, as for timm's linear layers
                nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(*layers) if num_layers > 1 else layers[0]
        self.last_layer = Prototypes(bottleneck_dim, num_prototypes, norm_last_layer)

    def forward(self, x: Tensor) -> Tensor | BlockScores:
        """[..., D] -> [..., K]."""
        # [B', bottleneck] of unit length -> [B', K] cosines
        scores = self.last_layer(F.normalize(self.mlp(x.flatten(0, -2)), dim=-1), self.prototype_block)
        if isinstance(scores, BlockScores):
            return scores._replace(tokens=scores.tokens.unflatten(0, x.shape[:-1]))
        return scores.unflatten(0, x.shape[:-1])
