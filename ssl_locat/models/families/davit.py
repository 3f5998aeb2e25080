"""DaViT: each block attends within windows, then over channels. GAug enters the first; channels do not lie anywhere."""

from timm.models.davit import ChannelAttention, ChannelAttentionV2, DaVit, WindowAttention
from torch import Tensor

from ssl_locat.models.families.front import Family, GaugFront, LocAtMap, project, stages_of, windows


class GaugSpatialAttention(GaugFront):
    project = project

    def forward(self, x: Tensor) -> Tensor:
        """x [B * windows, N, D] -> the same shape."""
        q, k, v = self.project(x)
        return self.proj(self.attend_on_grid(q, k, v, x, self.window_size))


CHANNELS = "it attends over channels, which lie nowhere in the image"
DAVIT = Family(
    DaVit,
    ("davit",),
    LocAtMap,
    {WindowAttention: GaugSpatialAttention},
    stages_of,
    windows,
    where="within each window",
    sizes="yes",
    kept={ChannelAttention: CHANNELS, ChannelAttentionV2: CHANNELS},
)
