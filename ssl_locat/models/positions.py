"""Learned positional embeddings: where a table's patches begin, which grid they are of, and how each source resizes them.

The sources differ, so that the same weights give other features at another size: patches move by up to 0.65 at 42 px with the golden networks.
A model therefore remembers whose way its weights were trained with (`pos_resize` of `attach_locat`).
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ssl_locat.errors import CheckpointError

POS_RESIZE = ("timm", "dino", "transformers")


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], how: str) -> Tensor:
    """Positional embeddings of patches [1, rows * cols, D] of grid `old` for grid `new`; the table itself where the grids are equal.

    how: "timm" (bicubic to the exact size, antialias; DINOv2 with registers does the same), "dino" (facebookresearch/dino, iBOT and DINOv2
    without registers: bicubic by a scale factor with 0.1 added, no antialias), "transformers" (its Dinov2Model: exact size, no antialias).
    """
    if tuple(old) == tuple(new):
        return positions
    if how == "timm":
        return resample_abs_pos_embed(positions, new_size=list(new), old_size=list(old), num_prefix_tokens=0)
    table = positions.unflatten(1, tuple(old)).permute(0, 3, 1, 2).float()  # [1, D, rows, cols]
    if how == "dino":
        scale = tuple((length + 0.1) / side for length, side in zip(new, old, strict=True))
        table = F.interpolate(table, scale_factor=scale, mode="bicubic")
    else:
        table = F.interpolate(table, size=tuple(new), mode="bicubic")
    return table.to(positions.dtype).permute(0, 2, 3, 1).flatten(1, 2)


def resize_table(table: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int], how: str) -> Tensor:
    """The same for a whole table [1, prefix + N, D]: the positions of class token and registers stay."""
    return torch.cat([table[:, :prefix], resize_positions(table[:, prefix:], old, new, how)], dim=1)


def is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def square(n: int) -> tuple[int, int]:
    return math.isqrt(n), math.isqrt(n)


def own_grid(
    state: dict[str, Tensor], prefix: int | None, grid: tuple[int, int] | None, source: str
) -> tuple[int, tuple[int, int]]:
    """(how many rows of the table belong to class token and registers, the grid (rows, cols) of the others) of a state dict in timm's names.

    prefix: where it is known by the layout or by the model that takes the weights. grid: of the model that takes them, or asked for by the
    user. CheckpointError where the table fits no square and not that grid, or more than one reading: a wrong grid moves every position.
    """
    tokens = state["pos_embed"].shape[1]
    special = num_special_tokens(state)
    readings = [prefix] if prefix is not None else sorted({0, special})
    if grid is not None and (native := [k for k in readings if tokens - k == grid[0] * grid[1]]):
        return native[0], tuple(grid)
    squares = [k for k in readings if is_square(tokens - k)]
    # GAug's constants follow the grid; its weights were trained with positions for the class token, too, so that a square of all rows
    # (16 = 15 patches + 1, say) proves nothing
    certain = not (squares == [0] and special and prefix is None and any(".gaug." in name for name in state))
    if "jumbo_mlp.fc1.weight" in state:  # positions for patches alone
        squares, certain = [0] if is_square(tokens) else [], True
    if len(squares) == 1 and certain:
        return squares[0], square(tokens - squares[0])
    found = " or ".join(f"{tokens - k} patches{f' and {k} for class token and registers' if k else ''}" for k in readings)
    raise CheckpointError(
        f"{source}: its {tokens} positional embeddings are those of {found}, and the grid that they were trained on does not show. Give the "
        "image size that the weights were trained at, img_size=PIXELS or img_size=[HEIGHT, WIDTH], and no_embed_class=true if the class token "
        "has no position (in a MODEL: FILE?img_size=[96, 160])."
    )


def num_special_tokens(state: dict[str, Tensor]) -> int:
    """Class tokens and registers in a state dict in timm's names."""
    return sum(state[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in state)


def embed_special_tokens(state: dict[str, Tensor], prefix: int, wanted: int) -> dict[str, Tensor]:
    """The same network with `wanted` rows for class token and registers in front of the patches' instead of `prefix`.

    A token's position is a constant added to it, so it can be moved into the token and back: exact.
    """
    state = dict(state)
    if prefix == wanted:
        return state
    table = state["pos_embed"]
    own, patches = table[:, :prefix], table[:, prefix:]
    if wanted == 0:
        for name in ("cls_token", "dist_token", "reg_token"):
            if name in state and own.shape[1]:
                length = state[name].shape[1]
                state[name] = state[name] + own[:, :length]
                own = own[:, length:]
        state["pos_embed"] = patches
    else:  # registers (or all special tokens) without a position get zeros
        zeros = table.new_zeros(1, wanted - prefix, table.shape[2])
        state["pos_embed"] = torch.cat([own, zeros, patches], dim=1)
    return state
