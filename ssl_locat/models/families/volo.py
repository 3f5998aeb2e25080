"""VOLO: outlookers, then attention over the whole map, then a class token that only asks."""

from typing import Any

from timm.models.volo import VOLO as Volo
from timm.models.volo import Attention, OutlookAttention
from timm.models.volo import ClassAttention as VoloClassAttention  # prr.py has one of ours
from torch import Tensor, nn

from ssl_locat.models.families.front import Family, GaugFront, LocAtModel, project


class GaugMapAttention(GaugFront):
    project = project

    def forward(self, x: Tensor) -> Tensor:
        """x [B, rows, cols, D] -> the same shape."""
        tokens, grid = x.flatten(1, 2), (x.shape[1], x.shape[2])
        q, k, v = self.project(tokens)
        out = self.attend_on_grid(q, k, v, tokens, grid)
        return self.proj_drop(self.proj(out)).unflatten(1, grid)


def stages_with_attention(model: Any) -> dict[str, Any]:
    stages = {f"network.{i}": stage for i, stage in enumerate(model.network) if isinstance(stage, nn.Sequential)}
    return {name: stage for name, stage in stages.items() if isinstance(stage[0].attn, Attention)}


VOLO = Family(
    Volo,
    ("volo",),
    LocAtModel,
    {Attention: GaugMapAttention},
    stages_with_attention,
    lambda model, stages: [tuple(model.pos_embed.shape[1:3])] * len(stages),  # [1, rows, cols, D]
    where="on the map behind the outlookers",
    kept={
        OutlookAttention: "it has no queries and keys: each place predicts weights for its 3 x 3 neighbours, which is local already",
        VoloClassAttention: "the class token alone asks, and it lies nowhere in the image",
    },
)
