"""BEiT: attention over all patches of one image size, with a bias of relative positions for each layer or one shared by all; GAug's is added."""

from timm.models.beit import Attention, Beit
from torch import Tensor

from ssl_locat.models.families.front import Family, GaugFront, LocAtFixed, blocks_of, patch_grid, project


class GaugBeitAttention(GaugFront):
    project = project

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """x [B, 1 + N, D] -> the same shape; shared_rel_pos_bias [heads, 1 + N, 1 + N]."""
        q, k, v = self.project(x)
        bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        if shared_rel_pos_bias is not None:
            bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
        grid = self.patches[0].grid_size
        return self.proj_drop(self.proj(self.attend_on_grid(q, k, v, x, grid, self.num_prefix_tokens, extra_bias=bias)))


BEIT = Family(
    Beit,
    ("beit",),
    LocAtFixed,
    {Attention: GaugBeitAttention},
    blocks_of,
    patch_grid,
    where="among the patches of the image, added to the relative position bias",
)
