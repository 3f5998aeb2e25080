"""Learned positional embeddings: where a table's patches begin, which grid they are of, and how each source resizes them.

The sources differ, so that the same weights give other features at another size: patches move by up to 0.65 at 42 px with the golden networks.
A model therefore remembers whose way its weights were trained with (`pos_resize` of `attach_locat`).
"""

import math
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from ssl_locat.errors import CheckpointError

POS_RESIZE = ("timm", "dino", "transformers")
TABLE = "layers.{}.blocks.{}.attn.relative_position_bias_table"  # of a stage and block of a Swin


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], how: str) -> Tensor:
    """Positional embeddings of patches [1, rows * cols, D] of grid `old` for grid `new`; the table itself where the grids are equal.

    how: "timm" (bicubic to the exact size, antialias; DINOv2 with registers does the same), "dino" (facebookresearch/dino, iBOT and DINOv2
    without registers: bicubic by a scale factor with 0.1 added, no antialias), "transformers" (its Dinov2Model: exact size, no antialias).
    """
    if how == "timm":
        if tuple(old) == tuple(new):
            return positions
        return resample_abs_pos_embed(positions, new_size=list(new), old_size=list(old), num_prefix_tokens=0)
    if torch.compiler.is_exporting():  # a graph for every size: neither comparing sizes nor a scale factor stays open in it
        return resize_by_matrices(positions, old, new, how)
    if tuple(old) == tuple(new):
        return positions
    table = positions.unflatten(1, tuple(old)).permute(0, 3, 1, 2).float()  # [1, D, rows, cols]
    if how == "dino":
        scale = tuple((length + 0.1) / side for length, side in zip(new, old, strict=True))
        table = F.interpolate(table, scale_factor=scale, mode="bicubic")
    else:
        table = F.interpolate(table, size=tuple(new), mode="bicubic")
    return table.to(positions.dtype).permute(0, 2, 3, 1).flatten(1, 2)


def resize_by_matrices(positions: Tensor, old: tuple[int, int], new: tuple[int, int], how: str) -> Tensor:
    """`resize_positions` of "dino" and "transformers" as a product with a matrix for each axis; the identity where the grids are equal."""
    sides = [torch.scalar_tensor(length, device=positions.device) for length in new]
    equal = (sides[0] == old[0]) & (sides[1] == old[1])
    more = torch.where(equal, 0.0, 0.1 if how == "dino" else 0.0)
    table = positions.unflatten(1, tuple(old)).float()  # [1, rows, cols, D]
    for axis in (0, 1):
        matrix = bicubic_matrix(old[axis], new[axis], (sides[axis] + more) / old[axis])
        table = (matrix @ table.movedim(axis + 1, -2)).movedim(-2, axis + 1)
    return table.to(positions.dtype).flatten(1, 2)


def bicubic_matrix(old: int, new: int, scale: Tensor) -> Tensor:
    """[new, old]: what F.interpolate(mode="bicubic") does along an axis, for a scale factor [] of its own. Keys beyond an edge count as the edge."""
    source = (torch.arange(new, device=scale.device) + 0.5) / scale - 0.5
    taps = source.floor()[:, None] + torch.arange(-1, 3, device=scale.device)  # [new, 4]
    d, a = (source[:, None] - taps).abs(), -0.75
    weight = torch.where(d <= 1, ((a + 2) * d - (a + 3)) * d * d + 1, ((d - 5) * d + 8) * d * a - 4 * a)
    column = taps.clamp(0, old - 1)
    return (weight[..., None] * (column[..., None] == torch.arange(old, device=scale.device))).sum(1)


def resize_table(table: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int], how: str) -> Tensor:
    """The same for a whole table [1, prefix + N, D]: the positions of class token and registers stay."""
    return torch.cat([table[:, :prefix], resize_positions(table[:, prefix:], old, new, how)], dim=1)


def at_own_grid(timms_filter: Callable, state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What a LocAt model reads of a folder or hub repository: `timms_filter` of its class, told the grid that the config beside the weights
    names, and resized in the model's own way. timm takes windows of a square number of relative positions to be squares."""
    kernel, kept, new = state.get("patch_embed.proj.weight"), {}, model.patch_embed.grid_size
    if kernel is None or kernel.ndim != 4:  # not in timm's names: its filter may know them
        return timms_filter(state, model)
    size = getattr(model, "pretrained_model_args", {}).get("img_size") or model.pretrained_cfg["input_size"][1:]
    sides = size if isinstance(size, list | tuple) else (size, size)
    old = tuple(side // patch for side, patch in zip(sides, kernel.shape[-2:], strict=True))
    table, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if table is not None and own is not None and old != tuple(new):
        prefix = own.shape[1] - new[0] * new[1]
        if table.shape[1] - prefix == old[0] * old[1]:
            kept["pos_embed"] = resize_table(table, prefix, old, new, getattr(model, "pos_resize", "timm"))
    windows = swin_windows(old, model._ref_window_sizes) if hasattr(model, "_ref_window_sizes") else []
    for name in [name for name in state if name.endswith("relative_position_bias_table")]:
        (rows, cols), attention = windows[int(name.split(".")[1])], model.get_submodule(name.rpartition(".")[0])
        if state[name].shape[0] == (2 * rows - 1) * (2 * cols - 1):
            shape = attention.relative_position_bias_table.shape
            kept[name] = resize_rel_pos_bias_table(state[name], attention.window_size, shape, (rows, cols))
    return {**timms_filter({name: tensor for name, tensor in state.items() if name not in kept}, model), **kept}


def is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def square(n: int) -> tuple[int, int]:
    return math.isqrt(n), math.isqrt(n)


def own_grid(
    state: dict[str, Tensor],
    prefix: int | None,
    told: tuple[int, int] | None,
    source: str,
    hint: tuple[int, int] | None = None,
    no_embed_class: bool | None = None,
) -> tuple[int, tuple[int, int]]:
    """(how many rows of the table belong to class token and registers, the grid (rows, cols) of the others) of a state dict in timm's names.

    prefix: where it is known by the layout or by the model that the weights come from. told: the grid of the size that the user says, or that
    the weights came with; it goes before everything where it fits. hint: of the model that takes them, which may be another. no_embed_class:
    what the user says, or that model's convention, where both are possible. CheckpointError where the table fits no square and not those grids, or more than one reading: a wrong grid moves every
    position, and GAug's constants follow it.
    """
    tokens = state["pos_embed"].shape[1]
    special = num_special_tokens(state)
    if "jumbo_mlp.fc1.weight" in state:
        prefix = 0  # positions for patches alone
    readings = [prefix] if prefix is not None else sorted({0, special})
    if told is not None and (native := [k for k in readings if tokens - k == told[0] * told[1]]):
        return native[0], (told[0], told[1])
    found = {(k, square(tokens - k)) for k in readings if is_square(tokens - k)}
    if hint is not None:
        found |= {(k, (hint[0], hint[1])) for k in readings if tokens - k == hint[0] * hint[1]}
    # GAug's weights have positions for the class token, too: a square of all rows (16 = 15 patches + 1, say) proves nothing
    certain = {k for k, _ in found} != {0} or not special or prefix is not None or not any(".gaug." in name for name in state)
    if prefix is None and no_embed_class is not None and (len(found) > 1 or not certain):
        found = {reading for reading in found if reading[0] == (0 if no_embed_class else special)}
        certain = True
    if len(found) == 1 and certain:
        return found.pop()
    words = " or ".join(f"{tokens - k} patches{f' and {k} for class token and registers' if k else ''}" for k in readings)
    raise CheckpointError(
        f"{source}: its {tokens} positional embeddings are those of {words}, and the grid that they were trained on does not show. Give the "
        "image size that the weights were trained at, img_size=PIXELS or img_size=[HEIGHT, WIDTH], and no_embed_class=true if the class token "
        "has no position (in a MODEL: FILE?img_size=[96, 160])."
    )


def size_unknown(source: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: without positional embeddings, these weights do not show the image size that they were trained at, which GAug's "
        "constants follow. Give it as in FILE?img_size=224."
    )


def own_windows(
    state: dict[str, Tensor],
    told: Sequence[tuple[int, int]] | None,
    source: str,
    hint: Sequence[tuple[int, int]] | None = None,
) -> list[tuple[int, int]]:
    """Window (rows, cols) of each stage of a Swin, which its tables of relative positions [(2 rows - 1) * (2 cols - 1), heads] show.

    A stage whose map is smaller than the window has a smaller one. told, hint: as in `own_grid`, one for each stage.
    """
    names = [(int(m[1]), name) for name in state if (m := re.fullmatch(TABLE.format(r"(\d+)", 0), name))]
    windows = []
    for stage, (_, name) in enumerate(sorted(names)):
        length = state[name].shape[0]

        def fitting(grids: Sequence[tuple[int, int]] | None, stage: int = stage, length: int = length) -> set[tuple[int, int]]:
            rows, cols = grids[stage] if grids is not None and stage < len(grids) else (0, 0)
            return {(rows, cols)} if (2 * rows - 1) * (2 * cols - 1) == length and rows else set()

        found = {square((math.isqrt(length) + 1) ** 2 // 4)} if is_square(length) else set()
        found = fitting(told) or found | fitting(hint)
        if len(found) != 1:
            raise CheckpointError(
                f"{source}: the {length} relative positions of stage {stage} are of no square window, or of more than one that fits, so the "
                "windows that GAug's constants follow do not show. Give the image size that the weights were trained at, and the window: "
                "FILE?img_size=[HEIGHT, WIDTH]&window_size=[ROWS, COLS]."
            )
        windows.append(found.pop())
    return windows


def swin_windows(grid: tuple[int, int], windows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Windows (rows, cols) of a Swin's stages on images of `grid` patches: as large as the stage's map at most, which halves, rounded up."""
    return [(min(-(-grid[0] >> stage), rows), min(-(-grid[1] >> stage), cols)) for stage, (rows, cols) in enumerate(windows)]


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
