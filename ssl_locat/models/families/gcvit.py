"""GCViT (LocAtViT's appendix H has it): windows, whose queries are in every second block those of one small map of the whole image."""

from timm.models.gcvit import GlobalContextVit, WindowAttentionGlobal
from torch import Tensor

from ssl_locat.models.families.front import Family, GaugFront, LocAtMap, project, stages_of, windows


class GaugGlobalAttention(GaugFront):
    """Each window is a grid. A global query has the place in every window that its cell has in the small map, as it has for the relative
    position bias, which stays."""

    def gaug_shape(self) -> tuple[int, int, int]:
        return self.head_dim, self.qkv.in_features, self.num_heads

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """x [B * windows, N, D], q_global [B, rows, cols, D], of as many cells as a window -> as x."""
        if self.use_global and q_global is not None:
            k, v = self.qkv(x).unflatten(-1, [2, self.num_heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
            # windows of one image are neighbours
            q = q_global.flatten(1, 2).repeat_interleave(x.shape[0] // q_global.shape[0], 0)
            q = q.unflatten(-1, [self.num_heads, -1]).transpose(1, 2)
        else:
            q, k, v = project(self, x)
        out = self.attend_on_grid(q, k, v, x, self.window_size, extra_bias=self.rel_pos.get_bias())
        return self.proj_drop(self.proj(out))


GCVIT = Family(
    GlobalContextVit,
    ("gcvit",),
    LocAtMap,
    {WindowAttentionGlobal: GaugGlobalAttention},
    stages_of,
    windows,
    where="within each window, added to the relative position bias; a global query has its cell's place in every window",
)
