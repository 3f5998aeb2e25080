"""ViTs with relative positions instead of absolute ones (tables or an MLP of log-distances, shared or not); GAug's bias is added to theirs."""

from timm.models.vision_transformer_relpos import RelPosAttention, VisionTransformerRelPos
from torch import Tensor

from ssl_locat.models.families.front import Family, GaugFront, LocAtFixed, blocks_of, patch_grid, project


class GaugRelPosAttention(GaugFront):
    project = project

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """x [B, R + N, D] -> the same shape; shared_rel_pos [1, heads, R + N, R + N]."""
        q, k, v = self.project(x)
        # as timm: an attention's own bias goes before the shared one
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        grid = self.patches[0].grid_size
        return self.proj_drop(self.proj(self.attend_on_grid(q, k, v, x, grid, self.num_prefix_tokens, extra_bias=bias)))


RELPOS = Family(
    VisionTransformerRelPos,
    ("vision_transformer_relpos",),
    LocAtFixed,
    {RelPosAttention: GaugRelPosAttention},
    blocks_of,
    patch_grid,
    where="among the patches of the image, added to the relative position bias",
)
