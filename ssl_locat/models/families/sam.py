"""SAM's ViT: windows in most blocks, the whole map in a few; a bias of relative positions from the queries, or rotary embedding."""

from typing import Any

from timm.layers import PatchDropout, apply_rot_embed_cat
from timm.models.vision_transformer_sam import Attention, VisionTransformerSAM, get_decomposed_rel_pos_bias
from torch import Tensor

from ssl_locat.errors import UserError
from ssl_locat.models.families.front import Family, GaugFront, LocAtMap, project


class GaugSamAttention(GaugFront):
    project = project

    def forward(self, x: Tensor) -> Tensor:
        """x [B, rows, cols, D], of a window or of the whole map -> the same shape."""
        tokens, grid = x.flatten(1, 2), (x.shape[1], x.shape[2])
        q, k, v = self.project(tokens)
        bias = None
        if self.use_rel_pos:
            # [B * heads, N, N] -> [B, heads, N, N]
            bias = get_decomposed_rel_pos_bias(q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, grid, grid).unflatten(
                0, q.shape[:2]
            )
        coefficients = self.gaug(q, grid, k=k, x=tokens)
        if not self.use_rel_pos and self.rope is not None:
            rope = self.rope.get_embed()
            q, k = (apply_rot_embed_cat(each, rope).type_as(v) for each in (q, k))
        out = self.gaug.attend(q, k, v, coefficients, grid, 0, dropout_p=self.dropout_p(), extra_bias=bias)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2))).unflatten(1, grid)


def windowed_and_whole(model: Any) -> dict[str, Any]:
    kinds = {"blocks with windows": True, "blocks without windows": False}
    stages = {name: [b for b in model.blocks if (b.window_size > 0) == windowed] for name, windowed in kinds.items()}
    return {name: blocks for name, blocks in stages.items() if blocks}


def grids(model: Any, stages: list[list[Any]]) -> list[tuple[int, int]]:
    if isinstance(model.patch_drop, PatchDropout):
        raise UserError("GAug cannot serve SAM's ViT with patch dropout: its windows need whole maps; leave patch_drop_rate at 0")
    sizes = [blocks[0].window_size for blocks in windowed_and_whole(model).values()]
    return [(size, size) if size else tuple(model.patch_embed.grid_size) for size in sizes]


SAM = Family(
    VisionTransformerSAM,
    ("vision_transformer_sam",),
    LocAtMap,
    {Attention: GaugSamAttention},
    windowed_and_whole,
    grids,
    where="within each window, in a few blocks on the whole map; added to the bias of relative positions",
    sizes="yes",
)
